"""Servers and workers on several machines: by ssh and in Slurm jobs; a machine is lost."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator

import pytest
from real_slurm import Slurm, why_no_slurm
from runs import SLOW, Bench, RunFiles, marked, wait_for
from test_nodes import LIMIT, Hosts, command_of, needs_ssh, screen, start, wait_step
from test_slurm import Cluster
from virtual_nodes import MANAGER, why_no_nodes

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_no_nodes()), reason=why_no_nodes() or "there are nodes"),
]
needs_slurm = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "Slurm is here")
SYNC = ("server.mode=sync", "server.servers=2", "server.replicas=2", "server.lease_seconds=2")
LIMITS = ("launch.processes=1", "launch.silence_seconds=5", "launch.threads_per_rank=1")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"), 4)
    try:
        yield made
    finally:
        made.close()


def interrupt(bench: Bench) -> None:
    """Have the launcher hear a Ctrl-C."""
    launchers = [pid for pid in marked(bench.mark) if "launch" in command_of(pid)[2:3]]
    os.kill(min(launchers), signal.SIGINT)


@needs_ssh
def test_hosts_are_lost_one_by_one(hosts: Hosts, bench: Bench) -> None:
    """A worker that is killed comes back on its host; a host that is lost takes along what is on
    it; after that of the last server, the run goes on from its checkpoint on what is left."""
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n2,n3", hosts.ssh, *SYNC, *SLOW)
    more = ("server.hosts=[n3, n4]", "server.workers=3", "parallel.dp=1", "train.global_batch=12")
    long = ("train.steps=2000", "checkpoint.every=5", "schedule.kind=constant")
    drill = ("--chaos", "kill:worker=1,step=4")
    run = start(hosts, bench, MANAGER, *words, *more, *LIMITS, *long, *drill)
    files = RunFiles(bench.path, bench.path / "run")

    def wait_told(words: str) -> None:
        wait_for(words, lambda: re.search(words, screen(bench, MANAGER)) or run.poll() is not None)

    try:
        wait_told("worker 1 has joined")
        hosts.kill("n3")
        wait_told("server 0 on n3 lost: node n3 is gone: .*; the run goes on with 1 of 2")
        wait_told("worker 2 on n3 lost: node n3 is gone: .*; the run goes on with 2 of 3")
        hosts.kill("n4")
        wait_told(r"resumed from \S+")
        wait_step(files, files.metrics()[-1]["step"] + 2)
        interrupt(bench)
        assert run.wait(LIMIT) == 130, screen(bench, MANAGER)
    finally:
        for name in ("n3", "n4"):
            hosts.boot(name)
            hosts.start_sshd(name)
    told = screen(bench, MANAGER)
    assert "4 hosts: 3 workers of 1 rank on n1, n2, n3; 2 servers on n3, n4; started by" in told
    assert "worker 1 on n2 was ended by SIGKILL; it is started again" in told, told
    assert re.search(r"since the checkpoint of step \d+ is lost: the run goes on from there", told)
    assert "4 hosts: 3 workers of 1 rank on n1, n2; 2 servers on n1, n2; started by ssh" in told
    assert "Traceback" not in told
    assert files.checkpoints()[-1] == f"step-{len(files.losses()):08d}"
    wait_for("nothing left", lambda: not marked(bench.mark), 30)


@needs_ssh
def test_a_worker_on_several_hosts_and_one_of_them_is_lost(hosts: Hosts, bench: Bench) -> None:
    """A worker ends with any of its hosts; servers, on the others, do not."""
    words = ("bigtrain", "launch", "config.yaml", "--hosts", "n1,n2,n3,n4", hosts.ssh, *SYNC, *SLOW)
    islands = ("server.workers=2", "parallel.dp=2", "train.steps=2000")
    run = start(hosts, bench, MANAGER, *words, *islands, *LIMITS)
    files = RunFiles(bench.path, bench.path / "run")
    wait_step(files, 5)
    hosts.cut("n4")
    try:
        on = "worker 1, rank 1 on n4 lost: node n4 is gone: .*; the run goes on with 1 of 2"
        wait_for(on, lambda: re.search(on, screen(bench, MANAGER)) or run.poll() is not None)
        interrupt(bench)
        assert run.wait(LIMIT) == 130, screen(bench, MANAGER)
        wait_for("nothing left, on both sides of the cut", lambda: not marked(bench.mark), 30)
    finally:
        hosts.mend("n4")
    told = screen(bench, MANAGER)
    assert "2 workers of 2 ranks on n1, n2, n3, n4; 2 servers on n1, n3; started by ssh" in told
    assert "Traceback" not in told
    assert files.checkpoints()[-1] == f"step-{len(files.losses()):08d}"


# -- in Slurm --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("slurm"), 4)
    try:
        yield made
    finally:
        made.close()


@needs_slurm
def test_a_job_with_nodes_apart_for_servers(slurm: Slurm, bench: Bench) -> None:
    """It saves before its time is up, queues up again, and goes on; one of its nodes is lost."""
    cluster = Cluster(slurm, bench)
    words = (*SYNC, *SLOW, "server.slurm.nodes=2", "server.workers=2", "parallel.dp=1")
    try:
        number, run = cluster.submit("het", *words, "launch.nodes=2", "train.steps=60", *LIMITS)
        cluster.wait_step(run, 5)
        assert re.search(rf"^{number} +running", cluster.do("bigtrain", "jobs"), re.MULTILINE)
        cluster.do("scancel", "--batch", "--signal=USR1", str(number))
        slurm.start_now(number)
        wait_for("the job to go on", lambda: "resumed from" in cluster.log(number, "het"))
        cluster.wait_step(run, cluster.resumed_after(number, "het") + 5)
        # Of a component of one node, Slurm would end the job, whichever node is lost.
        slurm.nodes.kill(slurm.nodes_of(number + 1)[1])
        assert cluster.ended(number) == "COMPLETED", cluster.log(number, "het")
    finally:
        slurm.cancel_all()
    log = cluster.log(number, "het")
    assert "2 workers of 1 rank on n1, n2; 2 servers on n3, n4; started by srun" in log, log
    assert f"time is nearly up: job {number} queues up again" in log, log
    assert re.search(r"server 1 on n4 lost: node n4 is gone: .*; the run goes on with 1 of 2", log)
    assert len(run.losses()) == 60
    wait_for("nothing left", cluster.is_free, 30)
