"""Ranks that mpiexec starts: they find each other, end together, and carry bytes by MPI."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import BIN, SLOW, Bench, wait_for

pytest.importorskip("mpi4py")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not shutil.which("mpiexec", path=str(BIN)), reason="there is no mpiexec"),
]
MPI = ("mpiexec", "-n", "2", str(BIN / "bigtrain"), "launch")


def test_a_run(bench: Bench) -> None:
    run = bench.launch("parallel.dp=auto", command=MPI)
    alone = bench.launch("parallel.dp=2", "run.dir=alone")
    assert run.losses() == alone.losses()
    assert "loss curve   run/loss.png" in run.out, "mpiexec let rank 0 end its work"


def test_a_world_of_another_size(bench: Bench) -> None:
    run = bench.launch("parallel.dp=3", command=MPI, code=None)
    assert "the world has 2 ranks" in run.err + run.out
    assert not (run.folder / "config.yaml").exists()


def test_a_rank_that_fails_ends_all(bench: Bench) -> None:
    fails = ("model.factory=parts:model", "model.args={fail_at: [1, 3]}")
    run = bench.launch(*fails, "parallel.dp=2", command=MPI, code=1)
    assert "the model of rank 1 has had enough" in run.err


def test_a_signal_saves(bench: Bench) -> None:
    run = bench.start(*SLOW, "train.steps=400", command=MPI)
    run.wait_step(3)
    run.send(signal.SIGTERM)
    assert run.wait() != 0
    run.wait_gone()
    assert run.checkpoints() == [f"step-{len(run.losses()):08}"]
    steps = len(run.losses()) + 2
    resumed = bench.launch(*SLOW, f"train.steps={steps}", command=MPI, resume=True)
    assert len(resumed.losses()) == steps


def test_mpi_by_the_config(bench: Bench) -> None:
    overrides = ("parallel.dp=2", f"launch.mpi.command=[{BIN / 'mpiexec'}]")
    told = bench.launch(*overrides, "--dry-run")
    assert "MPI: 2 ranks, started by mpiexec" in told.out
    assert " -n 2 " in told.out
    run = bench.launch(*overrides)
    assert len(run.losses()) == 8


def test_no_such_mpiexec(bench: Bench) -> None:
    run = bench.launch("launch.mpi.command=[nowhere/mpiexec]", code=1)
    run.assert_told("could not start nowhere/mpiexec", "launch.mpi.command")


def test_processes_of_another_mpi(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be alone in a world of its own, all training into one folder."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    run = bench.launch("parallel.dp=auto", code=2)
    told = "mpiexec has started 4 processes, but mpi4py knows of 1"
    assert told in run.err


OWN_LOOP = """
import sys
import torch
from bigtrain import init
from bigtrain.comm.transport import MpiTransport
mesh = init()
axis = mesh.world
if "fail" in sys.argv and axis.rank == 1:
    raise ValueError("enough")
def message(source, to, size, number):
    draws = torch.Generator().manual_seed(1000 * number + 10 * source + to)
    return torch.randint(256, (size + 3 * to + source,), dtype=torch.uint8, generator=draws)
transport = MpiTransport(axis, timeout_seconds=20)
for size in (0, 1, 1000, 1 << 20):
    found = []
    for number in range(2):
        outgoing = [message(axis.rank, to, size, number) for to in axis.ranks]
        incoming = [torch.empty(size + 3 * axis.rank + of, dtype=torch.uint8) for of in axis.ranks]
        found.append((incoming, transport.exchange(outgoing, incoming, "bytes")))
    for number, (incoming, pending) in enumerate(found):
        pending.wait()
        for source, got in zip(axis.ranks, incoming):
            assert torch.equal(got, message(source, axis.rank, size, number))
print("equal")
"""


def own_loop(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "loop.py").write_text(OWN_LOOP)
    return subprocess.run(
        [BIN / "mpiexec", "-n", "3", sys.executable, "loop.py", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_bytes_by_mpi_are_those_that_were_sent(tmp_path: Path) -> None:
    done = own_loop(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 3


def test_an_own_loop_that_fails_on_one_rank_ends(tmp_path: Path) -> None:
    done = own_loop(tmp_path, "fail")
    assert done.returncode != 0
    assert "ValueError: enough" in done.stderr


SMALL = ("compression.kind=safe", "compression.least_numel=100", "zero.stage=1")


def test_compressed_messages_by_mpi(bench: Bench) -> None:
    by_mpi = bench.launch("compression.transport=mpi", "parallel.dp=auto", *SMALL, command=MPI)
    assert "compression |" in by_mpi.out
    by_group = bench.launch("parallel.dp=2", *SMALL, "run.dir=group")
    assert by_mpi.losses() == by_group.losses()


def test_messages_by_mpi_without_it(bench: Bench) -> None:
    run = bench.launch("compression.transport=mpi", "parallel.dp=2", *SMALL, code=1)
    run.assert_told("of the run is rank 0 of 1 in MPI", "mpiexec -n N bigtrain launch")


def test_nothing_is_left(bench: Bench) -> None:
    run = bench.start(*SLOW, "train.steps=400", command=MPI)
    run.wait_step(2)
    run.process.kill()
    wait_for("all to end with mpiexec", lambda: not run.ranks(), 20)
