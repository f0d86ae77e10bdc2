"""Runs with parameter servers, launched: equal to data parallel, through deaths, and back."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence

import numpy as np
import pytest
from runs import BIN, SLOW, Bench, Run
from safetensors.torch import load_file

from bigtrain.checkpoint.manifest import read_manifest

pytestmark = pytest.mark.cluster

SYNC = ("parallel.dp=1", "server.servers=1", "server.mode=sync")
UNTIED = "model.tie_embeddings=false"  # what stages share is summed in another order
TWO = ("parallel.dp=1", "server.servers=2", "server.replicas=2", "server.mode=sync")


def numbers(run: Run) -> list[tuple[float, float]]:
    """Return (loss, norm) of each step."""
    return [(r["loss"], r["grad_norm"]) for r in run.metrics() if "loss" in r]


def tensors(run: Run) -> dict[str, list[float]]:
    """Return all that the last checkpoint has, by name and place."""
    folder = run.folder / "checkpoints" / run.checkpoints()[-1]
    found: dict[str, list[float]] = {}
    for name, tensor in read_manifest(folder).tensors.items():
        whole = {}
        for block in tensor.blocks:
            values = load_file(folder / block.file)[block.key]
            whole[tuple(block.offsets)] = values.flatten().tolist()
        found[name] = [value for offsets in sorted(whole) for value in whole[offsets]]
    return found


@pytest.mark.parametrize(
    ("served", "plain"),
    [
        (("server.workers=2",), ("parallel.dp=2",)),
        (("server.workers=2", "train.precision=bf16"), ("parallel.dp=2", "train.precision=bf16")),
        (("server.workers=2", "train.microbatch=2"), ("parallel.dp=2", "train.microbatch=2")),
        (
            ("server.workers=3", "server.servers=2", "server.replicas=2", "train.global_batch=12"),
            ("parallel.dp=3", "zero.stage=1", "train.global_batch=12"),
        ),
        (("server.workers=2", "parallel.tp=2"), ("parallel.dp=2", "parallel.tp=2")),
        (
            ("server.workers=2", "parallel.pp=2", "train.microbatch=2", UNTIED),
            ("parallel.dp=2", "parallel.pp=2", "train.microbatch=2", UNTIED),
        ),
    ],
)
def test_sync_is_data_parallel(bench: Bench, served: Sequence[str], plain: Sequence[str]) -> None:
    """Bit for bit: losses, norms, parameters and moments."""
    ours = bench.launch(*SYNC, *served, "run.dir=ours")
    peer = bench.launch(*plain, "run.dir=peer")
    assert numbers(ours) == numbers(peer)
    assert ours.validation_losses() == pytest.approx(peer.validation_losses(), rel=1e-12)
    assert tensors(ours) == tensors(peer)
    ours.assert_clean()


def test_a_run_goes_on_without_servers_and_back(bench: Bench) -> None:
    whole = bench.launch(*SYNC, "train.steps=9", "schedule.kind=constant", "run.dir=whole")
    common = ("schedule.kind=constant",)
    bench.launch(*SYNC, *common, "train.steps=3")
    bench.launch("parallel.dp=2", "zero.stage=1", *common, "train.steps=6", resume=True)
    run = bench.launch(*SYNC, *common, "train.steps=9", resume=True)
    assert np.allclose(numbers(run), numbers(whole), rtol=1e-6, atol=0)


@pytest.mark.parametrize("server", [0, 1])
def test_the_end_of_a_server_changes_nothing(bench: Bench, server: int) -> None:
    """Neither that of the one that keeps the board, nor that of the other."""
    options = (*TWO, *SLOW, "train.steps=40", "checkpoint.every=20")
    calm = bench.launch(*options, "run.dir=calm")
    chaos = ("--chaos", f"kill:server={server},step=10")
    run = bench.launch(*options, *chaos, "run.dir=killed")
    assert numbers(run) == numbers(calm)
    assert tensors(run) == tensors(calm)
    assert f"server {server}" in run.err
    run.assert_clean()


@pytest.mark.parametrize("mode", ["sync", "local"])
def test_a_worker_is_killed_and_joins_again(bench: Bench, mode: str) -> None:
    options = (*SYNC[:2], f"server.mode={mode}", "server.local_steps=4", *SLOW, "train.steps=80")
    options = options if mode == "local" else (*SYNC, *SLOW, "train.steps=80")
    run = bench.launch(*options, "--chaos", "kill:worker=1,step=4", "log.sample_ids=true")
    assert len(run.losses()) == 80
    assert "worker 1" in run.err
    assert "started again" in run.err
    assert "has joined" in run.out
    run.assert_clean()


# A user's module by which the first that saves step 10 stands still in it, until others have saved.
STILL = """
import os
from parts import model
import bigtrain.checkpoint.save as saving
from bigtrain.server.chaos import parse, suffer

save_file = saving.save_file

def still(payload, path):
    if "step-00000010" in str(path) and not os.path.exists("still"):
        open("still", "w").close()
        suffer(parse("stop:worker=0,step=10,seconds=6"))
    return save_file(payload, path)

saving.save_file = still
"""


def test_a_save_that_is_overtaken_ends_nobody(bench: Bench) -> None:
    """Who was stopped in it for longer than the lease gives it up, and goes on with the others."""
    (bench.path / "still.py").write_text(STILL)
    model = ("model.factory=still:model", SLOW[1])
    often = ("train.steps=200", "checkpoint.every=10", "eval.samples=0", "server.lease_seconds=1")
    run = bench.launch(*SYNC, *model, *often)
    assert (bench.path / "still").exists()
    assert "no checkpoint of step 10 was written: another worker has saved" in run.out, run.shown
    assert "started again" not in run.err
    assert run.checkpoints()[-1] == "step-00000200"
    run.assert_clean()


def test_a_drill_is_gone_through_once(bench: Bench) -> None:
    """Though a worker that was ahead of another joins again where that is; a later one, too."""
    mode = ("server.mode=ssp", "server.staleness=3", "server.lease_seconds=30")
    drills = ("stop:worker=1,step=10,seconds=8", "kill:worker=0,step=13", "kill:worker=0,step=40")
    chaos = [word for drill in drills for word in ("--chaos", drill)]
    run = bench.launch(*SYNC[:2], *mode, *SLOW, "eval.samples=0", "train.steps=80", *chaos)
    logs = [path.read_text() for path in (run.folder / "logs").glob("worker-*/*.log")]
    assert [sum(log.count(f"drill: {drill}") for log in logs) for drill in drills] == [1, 1, 1]
    assert run.err.count("it is started again") == 2
    run.assert_clean()


def test_all_servers_gone_the_run_goes_on_from_its_checkpoint(bench: Bench) -> None:
    options = (*SYNC, *SLOW, "train.steps=20", "checkpoint.every=5")
    calm = bench.launch(*options, "run.dir=calm")
    run = bench.launch(*options, "--chaos", "kill:server=0,step=12", "run.dir=killed")
    assert numbers(run) == numbers(calm)
    assert "since the checkpoint of step 10 is lost" in run.err
    run.assert_clean()


def test_all_servers_gone_without_a_checkpoint(bench: Bench) -> None:
    run = bench.launch(*SYNC, *SLOW, "--chaos", "kill:server=0,step=3", code=None)
    run.assert_told("server 0 was ended by SIGKILL", "no checkpoint to go on from")


@pytest.mark.parametrize("killed", [True, False])
def test_a_server_that_was_not_needed_is_not_to_blame(bench: Bench, killed: bool) -> None:
    """Long after its end all workers end: nothing is lost, and nothing begins anew."""
    wrong = (SLOW[0], f"model.args={{slow: 0.05{'' if killed else ', nan_from: 25'}}}")
    options = (*TWO[:3], "server.mode=ssp", "server.restarts=1", *wrong, "checkpoint.every=10")
    drills = ["kill:server=1,step=5"]
    if killed:
        drills += [f"kill:worker={w},step={step}" for step in (15, 40) for w in (0, 1)]
    chaos = [word for drill in drills for word in ("--chaos", drill)]
    run = bench.launch(*options, "train.steps=400", *chaos, code=None)
    run.assert_told("error: worker", "SIGKILL" if killed else "NaN or infinite")
    assert run.process.returncode == (137 if killed else 1)
    assert "the run goes on with 1 of 2" in run.err
    assert "goes on from there" not in run.err, run.shown
    run.wait_gone()


def test_stop_and_resume(bench: Bench) -> None:
    run = bench.start(*SYNC, *SLOW, "train.steps=60", "schedule.kind=constant")
    run.wait_step(10)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    run.assert_told("stopped after step")
    run.wait_gone()
    done = len(run.losses())
    assert run.checkpoints()[-1] == f"step-{done:08d}"
    again = bench.launch(
        *SYNC, *SLOW, f"train.steps={done + 3}", "schedule.kind=constant", resume=True
    )
    assert len(again.losses()) == done + 3


def test_local_goes_on_only_between_rounds(bench: Bench) -> None:
    """Else its steps would be counted from where its round began."""
    common = ("schedule.kind=constant", "eval.samples=0")
    bench.launch("parallel.dp=2", *common, "train.steps=9")
    local = (*SYNC[:2], "server.mode=local", *common, "train.steps=18")
    run = bench.launch(*local, "server.local_steps=6", resume=True, code=1)
    run.assert_told("local_steps = 6", "after step 9", "back to step 6", "server.local_steps=3,")
    assert len(run.losses()) == 9
    run = bench.launch(*local, "server.local_steps=3", resume=True)
    assert len(run.losses()) == 18
    run.assert_clean()


def test_status(bench: Bench) -> None:
    bench.launch(*SYNC)
    done = subprocess.run(
        [BIN / "bigtrain", "status", "run"], cwd=bench.path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "server 0  lives, keeps the board" in done.stdout
    assert "worker" in done.stdout
    missing = subprocess.run(
        [BIN / "bigtrain", "status", "nowhere"], cwd=bench.path, capture_output=True, text=True
    )
    assert missing.returncode == 1
    assert "there is no status" in missing.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--chaos", "nonsense"), "is no event"),
        (("--chaos", "kill:worker=7,step=1"), "there is no worker 7"),
        (("server.mode=async",), "adamw with server.mode = async"),
        (("server.replicas=2",), "server.replicas = 2"),
    ],
)
def test_what_makes_no_sense(bench: Bench, options: Sequence[str], words: str) -> None:
    run = bench.launch(*SYNC, *options, code=None)
    run.assert_told(words)


def test_chaos_is_for_servers(bench: Bench) -> None:
    run = bench.launch("--chaos", "kill:worker=1,step=1", code=None)
    run.assert_told("--chaos is for runs with servers")


FRAGMENTS = ("server.mode=local", "server.local_steps=4", "server.fragments=2", "train.steps=16")
SMALL = ("parallel.bucket_mb=0.02", "server.push=fp32", "server.pull=fp32")


def test_fragments_that_meet_nobody_change_nothing(bench: Bench) -> None:
    """One worker, whose parameters are what servers take up."""
    alone = ("server.workers=1", "server.outer_lr=1", "server.outer_momentum=0")
    common = ("parallel.dp=1", "train.steps=16", "parallel.bucket_mb=0.02")
    ours = bench.launch("server.servers=2", *FRAGMENTS, *SMALL, *alone, *common, "run.dir=ours")
    peer = bench.launch(*common, "run.dir=peer")
    losses = [loss for loss, _ in numbers(ours)]
    assert np.allclose(losses, [loss for loss, _ in numbers(peer)], rtol=1e-4, atol=0)


@pytest.mark.parametrize("coding", [(), SMALL[1:]], ids=["int4", "fp32"])
def test_fragments_survive_the_end_of_a_server(bench: Bench, coding: tuple[str, ...]) -> None:
    options = (*TWO[:3], *FRAGMENTS, SMALL[0], *coding, *SLOW, "checkpoint.every=8")
    calm = bench.launch(*options, "train.steps=80", "run.dir=calm")
    chaos = ("--chaos", "kill:server=0,step=6")
    run = bench.launch(*options, "train.steps=80", *chaos, "run.dir=killed")
    assert numbers(run) == numbers(calm)
    assert tensors(run) == tensors(calm)
    assert sum(run.losses()[-8:]) < sum(run.losses()[:8])


def test_more_fragments_than_buckets(bench: Bench) -> None:
    run = bench.launch("server.servers=1", "parallel.dp=1", *FRAGMENTS, code=1)
    run.assert_told("server.fragments = 2", "parallel.bucket_mb")
