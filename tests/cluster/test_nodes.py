"""Hosts that are network namespaces: by ssh, and by torchrun's rendezvous; hosts are cut off."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from runs import BIN, NOT_PASSED_ON, SLOW, Bench, Run, RunFiles, marked, wait_for
from virtual_nodes import MANAGER, VirtualNodes, why_no_nodes

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "there are nodes"),
]
needs_ssh = pytest.mark.skipif(
    not (shutil.which("sshd") and shutil.which("ssh")), reason="there is no sshd: make slurm"
)
needs_mpi = pytest.mark.skipif(
    not shutil.which("mpiexec", path=str(BIN)), reason="there is no mpiexec"
)
LIMIT = 150.0  # seconds that a run may take on a busy machine
LONG = (*SLOW, "train.steps=80", "eval.samples=8", "checkpoint.every=4", "parallel.dp=auto")
SSHD = """
Port 22
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin yes
"""
SSH = """
Host *
  User root
  IdentityFile {folder}/user
  UserKnownHostsFile /dev/null
  StrictHostKeyChecking no
  LogLevel ERROR
"""


class Hosts(VirtualNodes):
    """Virtual nodes with an sshd on each, and a bench that all of them see."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, count)
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True
            )
        (folder / "sshd.conf").write_text(SSHD.format(folder=folder))
        (folder / "ssh.conf").write_text(SSH.format(folder=folder))
        Path("/run/sshd").mkdir(exist_ok=True)  # which sshd wants
        for name in self.names:
            self.start_sshd(name)

    def start_sshd(self, name: str) -> None:
        done = self.run(name, shutil.which("sshd") or "", "-f", str(self.folder / "sshd.conf"))
        assert done.returncode == 0, done.stderr

    @property
    def ssh(self) -> str:
        return f"launch.ssh=[ssh, -F, {self.folder / 'ssh.conf'}, -o, BatchMode=yes]"


def start(
    nodes: VirtualNodes, bench: Bench, name: str, *words: str, **env: str
) -> subprocess.Popen[str]:
    """Start a command on a node, with its output in screen-<node>."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)}
    mine = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parent),
        "BENCH_MARK": bench.mark,
        "OMP_NUM_THREADS": "1",
    }
    with open(bench.path / f"screen-{name}", "ab") as screen:
        return subprocess.Popen(
            [*nodes.inside(name, bench.path), *words],
            env={**kept, **mine, **env},
            stdin=subprocess.DEVNULL,
            stdout=screen,
            stderr=subprocess.STDOUT,
        )


def screen(bench: Bench, name: str) -> str:
    return (bench.path / f"screen-{name}").read_text(errors="replace")


def command_of(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return []


def wait_step(files: RunFiles, step: int) -> None:
    wait_for(f"step {step}", lambda: any(r["step"] >= step for r in files.metrics()))


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[VirtualNodes]:
    made = VirtualNodes(tmp_path / "nodes", 4)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), 4)
    try:
        yield made
    finally:
        made.close()


# -- by ssh ------------------------------------------------------------------------------------


@needs_ssh
def test_hosts_by_ssh(hosts: Hosts, bench: Bench) -> None:
    (bench.path / "hostfile").write_text("# ours\nn1\n\nn2 slots=8\nn3\nn4\n")
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "hostfile", hosts.ssh)
    same = ("launch.threads_per_rank=1", "parallel.dp=auto")
    run = start(hosts, bench, MANAGER, *words, "launch.processes=1", *same)
    assert run.wait(LIMIT) == 0, screen(bench, MANAGER)
    assert "4 hosts: 4 ranks, 1 on each of 4 nodes (n1, n2, n3, n4)" in screen(bench, MANAGER)
    files = RunFiles(bench.path, bench.path / "run")
    alone = bench.launch("parallel.dp=4", "launch.threads_per_rank=1", "run.dir=alone")
    assert files.losses() == alone.losses()
    wait_for("nothing left", lambda: not marked(bench.mark), 30)


@needs_ssh
def test_one_host_is_cut_off(hosts: Hosts, bench: Bench) -> None:
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n2", hosts.ssh)
    run = start(
        *(hosts, bench, MANAGER, *words, *LONG, "launch.processes=1", "launch.silence_seconds=5")
    )
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    hosts.cut("n2")
    try:
        assert run.wait(LIMIT) == 1, screen(bench, MANAGER)
        told = screen(bench, MANAGER)
        assert "rank 1 on n2 lost: node n2 is gone: nothing was heard for" in told, told
        assert "Traceback" not in told
        wait_for("nothing left, on both sides of the cut", lambda: not marked(bench.mark), 30)
    finally:
        hosts.mend("n2")


@needs_ssh
def test_hosts_that_are_left_go_on(hosts: Hosts, bench: Bench) -> None:
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n2,n3,n4", hosts.ssh)
    limits = ("launch.processes=1", "launch.silence_seconds=5", "launch.nodes=2:4")
    run = start(hosts, bench, MANAGER, *words, *LONG, *limits)
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    hosts.kill("n3")
    try:
        assert run.wait(LIMIT) == 0, screen(bench, MANAGER)
    finally:
        hosts.boot("n3")
        hosts.start_sshd("n3")
    told = screen(bench, MANAGER)
    # Three ranks cannot share a batch of eight evenly.
    assert "going on with 2 of 4 nodes" in told, told
    assert len(files.losses()) == 80


@needs_ssh
def test_a_host_that_does_not_answer(hosts: Hosts, bench: Bench) -> None:
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,nowhere", hosts.ssh)
    run = start(hosts, bench, MANAGER, *words, "launch.processes=1", "parallel.dp=auto")
    assert run.wait(LIMIT) == 1
    told = screen(bench, MANAGER)
    assert "1 of 2 nodes joined; nowhere did not" in told or "0 of 2 nodes" in told, told
    assert "nowhere" in told
    assert "Traceback" not in told
    wait_for("nothing left", lambda: not marked(bench.mark), 30)


@needs_ssh
def test_a_host_with_other_versions_is_refused_before_the_first_step(
    hosts: Hosts, bench: Bench, tmp_path: Path
) -> None:
    """Its numpy says that it is another one; that host alone sees it so."""
    [record] = list(Path(numpy.__file__).parents[1].glob("numpy-*.dist-info/METADATA"))
    changed = tmp_path / "METADATA"
    changed.write_text(record.read_text().replace(numpy.__version__, "1.0.7"))
    hosts.run("n2", "mount", "--bind", str(changed), str(record), check=True)
    batch = ("train.global_batch=6", "parallel.dp=auto")
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n2,n3", hosts.ssh)
    try:
        run = start(hosts, bench, MANAGER, *words, "launch.processes=1", *batch)
        assert run.wait(LIMIT) == 1, screen(bench, MANAGER)
        told = screen(bench, MANAGER)
        assert f"numpy is 1.0.7 on n2; {numpy.__version__} on the others" in told, told
        assert not list((bench.path / "run" / "logs").glob("rank-*.log")), "a rank was started"
        may_leave = ("launch.nodes=2:3", "launch.processes=1", *batch)
        more = start(hosts, bench, MANAGER, *words, *may_leave)
        assert more.wait(LIMIT) == 0, screen(bench, MANAGER)
        assert "going on with 2 of 3 nodes" in screen(bench, MANAGER)
    finally:
        hosts.run("n2", "umount", str(record), check=True)


@needs_ssh
def test_a_signal_while_hosts_join(hosts: Hosts, bench: Bench) -> None:
    hosts.cut("n4")
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n4", hosts.ssh)
    try:
        run = start(hosts, bench, MANAGER, *words, "launch.processes=1", "parallel.dp=auto")
        called = lambda: [p for p in marked(bench.mark) if command_of(p)[:1] == ["ssh"]]  # noqa: E731
        wait_for("ssh", called)
        launchers = [pid for pid in marked(bench.mark) if "launch" in command_of(pid)[2:3]]
        os.kill(min(launchers), signal.SIGINT)
        assert run.wait(LIMIT) == 130, screen(bench, MANAGER)
    finally:
        hosts.mend("n4")
    assert "stopped by SIGINT before any rank was started" in screen(bench, MANAGER)
    wait_for("nothing left", lambda: not marked(bench.mark), 30)


# -- by MPI ------------------------------------------------------------------------------------


def mpiexec(hosts: Hosts, *words: str) -> list[str]:
    """Return the command of two ranks on each of two hosts; MPI starts its helpers by ssh."""
    ssh = hosts.folder / "ssh.sh"
    ssh.write_text(f'#!/bin/sh\nexec ssh -F {hosts.folder / "ssh.conf"} "$@"\n')
    ssh.chmod(0o755)
    return [
        *("mpiexec", "-launcher", "ssh", "-launcher-exec", str(ssh)),
        *("-hosts", "n1,n2", "-ppn", "2", "-n", "4", "bigtrain", "launch", "config.yaml"),
        *("launch.threads_per_rank=1", *words),
    ]


def _tasks(bench: Bench) -> list[int]:
    """Return the ranks of MPI that live; an ssh to a host that is cut off is not ours to end."""
    return [pid for pid, env in marked(bench.mark).items() if "PMI_RANK" in env]


@needs_ssh
@needs_mpi
def test_mpiexec_on_two_hosts_of_which_one_is_cut_off(hosts: Hosts, bench: Bench) -> None:
    overrides = (*LONG, "parallel.timeout_seconds=6")
    run = start(hosts, bench, MANAGER, *mpiexec(hosts, *overrides))
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    hosts.cut("n2")
    try:
        assert run.wait(LIMIT) != 0
    finally:
        hosts.kill("n2")
        hosts.boot("n2")
        hosts.start_sshd("n2")
    assert "another rank did not come in time" in screen(bench, MANAGER), screen(bench, MANAGER)
    wait_for("no rank left", lambda: not _tasks(bench), 30)
    again = start(hosts, bench, MANAGER, *mpiexec(hosts, *overrides, "--resume"))
    assert again.wait(LIMIT) == 0, screen(bench, MANAGER)
    alone = bench.launch(*LONG, "launch.processes=4", "launch.threads_per_rank=1", "run.dir=alone")
    assert files.losses() == alone.losses()


# -- by torchrun -------------------------------------------------------------------------------


def torchrun(count: str, *words: str, restarts: int = 0) -> list[str]:
    return [
        *("torchrun", "--nnodes", count, "--nproc-per-node", "1", "--rdzv-id", "x"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29400"),
        *("--rdzv-conf", "join_timeout=30,last_call_timeout=3", "--max-restarts", str(restarts)),
        *("-m", "bigtrain.train", "config.yaml", *words),
    ]


@pytest.mark.parametrize("count", [2, 4])
def test_torchrun_on_several_hosts(nodes: VirtualNodes, bench: Bench, count: int) -> None:
    words = torchrun(str(count), "parallel.dp=auto", "launch.threads_per_rank=1")
    runs = [start(nodes, bench, name, *words) for name in nodes.names[:count]]
    assert [run.wait(LIMIT) for run in runs] == [0] * count, screen(bench, "n1")
    files = RunFiles(bench.path, bench.path / "run")
    alone = bench.launch(f"parallel.dp={count}", "launch.threads_per_rank=1", "run.dir=alone")
    assert files.losses() == alone.losses()


def test_torchrun_with_one_host_cut_off(nodes: VirtualNodes, bench: Bench) -> None:
    """It is noticed within the timeout of a step; what was saved goes on on one host."""
    words = torchrun("2", *LONG, "parallel.timeout_seconds=6")
    runs = [start(nodes, bench, name, *words) for name in nodes.names[:2]]
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    nodes.cut("n2")
    assert runs[0].wait(LIMIT) == 1
    told = screen(bench, "n1")
    assert "rank 0" in told
    assert "another rank did not come in time" in told, told
    runs[1].kill()
    nodes.kill("n2")
    saved = files.checkpoints()
    assert saved
    more = torchrun("1", *LONG, "--resume")
    assert start(nodes, bench, "n1", *more).wait(LIMIT) == 0, screen(bench, "n1")
    assert len(files.losses()) == 80


def test_torchrun_restarts_with_the_hosts_that_are_left(nodes: VirtualNodes, bench: Bench) -> None:
    words = torchrun("1:2", *LONG, "--resume", "parallel.timeout_seconds=10", restarts=3)
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    first = start(nodes, bench, "n1", *words, **env)
    start(nodes, bench, "n2", *words, **env)
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    nodes.kill("n2")
    assert first.wait(LIMIT) == 0, screen(bench, "n1")
    assert len(files.losses()) == 80
    assert "set TORCH_DISABLE_SHARE" not in screen(bench, "n1")


def test_torchrun_that_cannot_restart_is_warned_of(bench: Bench) -> None:
    command = ("torchrun", "--nproc-per-node=2", "--max-restarts=1", "-m", "bigtrain.train")
    run: Run = bench.launch(command=command)
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in run.out + run.err
