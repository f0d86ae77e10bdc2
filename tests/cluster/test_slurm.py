"""Jobs of a real Slurm on four virtual nodes: they come, go, queue up again, and lose nothing."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_slurm import Slurm, why_no_slurm
from runs import BIN, NOT_PASSED_ON, SLOW, Bench, RunFiles, marked, wait_for
from virtual_nodes import MANAGER

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm() or "Slurm is here"),
]
TWO_BY_TWO = ("launch.nodes=2", "launch.processes=2", "parallel.dp=auto")
LONG = (*SLOW, "train.steps=60", "eval.samples=8")


class Cluster:
    """Slurm, a folder that all nodes see, and a user on the login node."""

    def __init__(self, slurm: Slurm, bench: Bench) -> None:
        self.slurm, self.bench = slurm, bench

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)}
        return {
            **kept,
            **self.slurm.env,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(Path(__file__).parent),
            "BENCH_MARK": self.bench.mark,
        }

    def do(self, *command: str, code: int = 0, cwd: Path | None = None, **options: Any) -> str:
        """Run a command on the login node; return all that it prints."""
        options = {"timeout": 120, "env": self.env, "cwd": cwd or self.bench.path, **options}
        done = self.slurm.nodes.run(MANAGER, *command, **options)
        assert done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, name: str, *overrides: str) -> tuple[int, RunFiles]:
        """Submit a run of two ranks on each of two nodes, into the folder `name`."""
        words = [*TWO_BY_TWO, f"run.dir={name}", *overrides]
        said = self.do("bigtrain", "launch", "config.yaml", "--slurm", *words)
        number = re.match(r"job (\d+)", said)
        assert number, said
        return int(number[1]), self.run(name)

    def run(self, name: str) -> RunFiles:
        return RunFiles(self.bench.path, self.bench.path / name)

    def log(self, number: int | str, name: str) -> str:
        text = ""
        with contextlib.suppress(FileNotFoundError):
            text = (self.bench.path / name / "slurm" / f"{number}.out").read_text(errors="replace")
        return text

    def resumed_after(self, number: int | str, name: str) -> int:
        """Return the step that a job has gone on from."""
        found = re.search(r"resumed from \S+, after step (\d+)", self.log(number, name))
        assert found, self.log(number, name)
        return int(found[1])

    def wait_step(self, run: RunFiles, step: int) -> None:
        wait_for(f"step {step}", lambda: any(r["step"] >= step for r in run.metrics()))

    def ended(self, number: int, *states: str, seconds: float = 120) -> str:
        return self.slurm.wait_state(
            number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", *states, seconds=seconds
        )

    def is_free(self) -> bool:
        return not marked(self.bench.mark)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    made = Slurm(tmp_path_factory.mktemp("slurm"), 4)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def cluster(slurm: Slurm, bench: Bench) -> Iterator[Cluster]:
    made = Cluster(slurm, bench)
    yield made
    slurm.cancel_all()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[float]]:
    """The losses of LONG by four ranks that nobody disturbs."""
    bench = Bench(tmp_path_factory.mktemp("undisturbed"))
    try:
        fast = ("model.factory=parts:model", "model.args={slow: 0.0}")
        yield bench.launch("parallel.dp=4", *LONG, *fast).losses()
    finally:
        bench.close()


def test_submit_and_follow(cluster: Cluster) -> None:
    words = (*TWO_BY_TWO, "run.dir=first")
    said = cluster.do("bigtrain", "launch", "config.yaml", "--slurm", "--follow", *words)
    assert "Slurm: 4 ranks, 2 on each of 2 nodes" in said
    assert re.search(r"Slurm job \d+: 4 ranks, 2 on each of 2 nodes \(n1, n2\)", said), said
    assert "step 8" in said.replace("step  ", "step ")
    assert "completed" in said
    run = cluster.run("first")
    assert len(run.losses()) == 8
    assert sorted(path.name for path in (run.folder / "logs").glob("rank-*")) == [
        f"rank-{rank}.log" for rank in range(4)
    ]
    assert "bigtrain 0." in (run.folder / "slurm" / "code.txt").read_text()
    wait_for("nothing left", cluster.is_free, 30)


def test_a_script_goes_on_where_it_was_by_plain_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    number, run = cluster.submit("again")
    assert cluster.ended(number) == "COMPLETED", cluster.log(number, "again")
    script = str(run.folder / "slurm" / "job.sh")
    other = tmp_path / "elsewhere"
    other.mkdir()
    more = int(cluster.do("sbatch", "--parsable", script, cwd=other))
    assert cluster.ended(more) == "COMPLETED", cluster.log(more, "again")
    assert "step-00000008" in cluster.log(more, "again")


def test_cancel_saves_and_leaves_nothing(cluster: Cluster) -> None:
    number, run = cluster.submit("cancelled", *LONG)
    cluster.wait_step(run, 3)
    listed = cluster.do("bigtrain", "jobs")
    assert re.search(rf"{number} +running .* cancelled$", listed, re.MULTILINE), listed
    refused = cluster.do(
        *("bigtrain", "launch", "config.yaml", "--slurm", *TWO_BY_TWO, "run.dir=cancelled"), code=1
    )
    assert f"job {number} of this run is running already" in refused
    assert "cancelled" in cluster.do("bigtrain", "jobs", "cancel", "cancelled")
    assert cluster.ended(number).startswith("CANCELLED")
    wait_for("nothing left", cluster.is_free, 30)
    steps = len(run.losses())
    assert run.checkpoints()[-1] == f"step-{steps:08}", cluster.log(number, "cancelled")
    assert "no job of bigtrain" in cluster.do("bigtrain", "jobs")


def test_cancelled_while_it_saves_for_the_limit(cluster: Cluster) -> None:
    """It is not to queue up again, though its time was nearly up."""
    slow = ("model.factory=parts:model", "model.args={slow: 1.5}", "train.steps=60")
    number, run = cluster.submit("unwanted", *slow)
    cluster.wait_step(run, 2)
    both = f"scancel --batch --signal=USR1 {number}; scancel {number}"
    cluster.do("sh", "-c", both)
    assert cluster.ended(number).startswith("CANCELLED"), cluster.log(number, "unwanted")
    wait_for("nothing left", cluster.is_free, 30)
    assert cluster.slurm.job(number)["Restarts"] == "0", cluster.log(number, "unwanted")
    assert "queues up again" not in cluster.log(number, "unwanted")


def test_ranks_of_mpi_are_requeued_too(cluster: Cluster, undisturbed: list[float]) -> None:
    mpi = f"launch.mpi.command=[{BIN / 'mpiexec'}]"
    number, run = cluster.submit("mpi", *LONG, mpi, "launch.threads_per_rank=1")
    cluster.wait_step(run, 5)
    cluster.do("scancel", "--batch", "--signal=USR1", str(number))
    cluster.slurm.start_now(number)
    assert cluster.ended(number) == "COMPLETED", cluster.log(number, "mpi")
    log = cluster.log(number, "mpi")
    assert "MPI: 4 ranks, started by mpiexec" in log
    assert f"time is nearly up: job {number} queues up again" in log
    assert cluster.resumed_after(number, "mpi") >= 5, log
    assert run.losses() == undisturbed


def test_time_is_up_and_the_curve_is_the_same(cluster: Cluster, undisturbed: list[float]) -> None:
    """What Slurm sends before the time limit, sent by hand: save, queue up again, go on."""
    number, run = cluster.submit("requeued", *LONG)
    cluster.wait_step(run, 5)
    cluster.do("scancel", "--batch", "--signal=USR1", str(number))
    cluster.slurm.start_now(number)
    assert cluster.ended(number) == "COMPLETED", cluster.log(number, "requeued")
    log = cluster.log(number, "requeued")
    assert f"time is nearly up: job {number} queues up again" in log
    assert run.losses() == undisturbed
    saves = [record["save_seconds"] for record in run.metrics() if "save_seconds" in record]
    assert len(saves) == 2
    assert all(seconds > 0 for seconds in saves)


def test_preempted_by_another_queue(cluster: Cluster, undisturbed: list[float]) -> None:
    number, run = cluster.submit("preempted", *LONG)
    cluster.wait_step(run, 5)
    urgent = ("--wrap", "true", "-N4", "--exclusive", "-p", "urgent", "-o", "/dev/null")
    other = int(cluster.do("sbatch", "--parsable", *urgent))
    assert cluster.ended(other) == "COMPLETED"
    cluster.slurm.start_now(number)
    assert cluster.ended(number) == "COMPLETED", cluster.log(number, "preempted")
    assert run.losses() == undisturbed
    log = cluster.log(number, "preempted")
    assert f"pre-empted: job {number} queues up again" in log
    assert cluster.resumed_after(number, "preempted") >= 5, log
    assert len([record for record in run.metrics() if "save_seconds" in record]) == 2, log


def test_node_killed_in_the_middle(cluster: Cluster, undisturbed: list[float]) -> None:
    number, run = cluster.submit("killed", *LONG, "checkpoint.every=4")
    cluster.wait_step(run, 6)
    victim = cluster.slurm.nodes_of(number)[1]
    cluster.slurm.nodes.kill(victim)
    wait_for("the job to end", lambda: cluster.slurm.state(number) != "RUNNING", 60)
    log = cluster.log(number, "killed")
    assert f"lost {victim}: job {number} queues up again" in log, log
    wait_for("nothing left", cluster.is_free, 30)
    cluster.slurm.nodes.boot(victim)
    cluster.slurm.start_daemon(victim)
    cluster.slurm.start_now(number)
    assert cluster.ended(number) == "COMPLETED", cluster.log(number, "killed")
    assert run.losses() == undisturbed
    assert cluster.resumed_after(number, "killed") >= 4


def test_goes_on_with_the_nodes_that_are_left(cluster: Cluster) -> None:
    overrides = ("launch.nodes=1:2", "launch.silence_seconds=5", "checkpoint.every=4")
    number, run = cluster.submit("elastic", *LONG, *overrides)
    cluster.wait_step(run, 6)
    victim = cluster.slurm.nodes_of(number)[1]
    cluster.slurm.nodes.kill(victim)
    try:
        assert cluster.ended(number) == "COMPLETED", cluster.log(number, "elastic")
    finally:
        cluster.slurm.nodes.boot(victim)
        cluster.slurm.start_daemon(victim)
    assert "going on with 1 of 2 nodes" in cluster.log(number, "elastic")
    assert len(run.losses()) == 60


def test_sweep(cluster: Cluster) -> None:
    sweep = "launch.slurm.sweep={run.seed: [1, 2], optimizer.lr: [0.001]}"
    words = (sweep, "launch.slurm.sweep_at_once=2", "run.dir=sweep")
    number, _ = cluster.submit("sweep", *words, *SLOW, "train.steps=30", "eval.samples=8")
    cluster.wait_step(cluster.run("sweep/1"), 3)
    cluster.do("scancel", "--batch", "--signal=USR1", f"{number}_1")
    cluster.slurm.start_now(f"{number}_1")
    wait_for("an empty queue", lambda: not cluster.slurm.ask("squeue", "-h"), 120)
    curves = [cluster.run(f"sweep/{task}").losses() for task in (0, 1)]
    assert [len(curve) for curve in curves] == [30, 30], number
    assert curves[0] != curves[1]
    assert "queues up again" not in cluster.log(f"{number}_0", "sweep")
    assert cluster.resumed_after(f"{number}_1", "sweep") >= 3
    said = cluster.do("bigtrain", "launch", "config.yaml", "--slurm", *TWO_BY_TWO, *words, code=1)
    assert "sweep holds a run already" in said


def test_bad_sweep_is_refused_before_it_is_submitted(cluster: Cluster) -> None:
    words = (*TWO_BY_TWO, "launch.slurm.sweep={optimizer.lr: [0.1, fast]}")
    said = cluster.do("bigtrain", "launch", "config.yaml", "--slurm", *words, code=2)
    assert "optimizer.lr" in said
    assert not cluster.slurm.ask("squeue", "-h")


def test_chain_goes_on_where_jobs_may_not_be_requeued(cluster: Cluster) -> None:
    overrides = ("launch.slurm.requeue=false", "launch.slurm.chain=2")
    number, run = cluster.submit("chain", *LONG, *overrides)
    cluster.wait_step(run, 3)
    cluster.do("scancel", "--batch", "--signal=USR1", str(number))
    assert cluster.ended(number) == "FAILED"
    assert cluster.slurm.job(number)["ExitCode"] == "75:0"
    assert cluster.ended(number + 1) == "COMPLETED", cluster.log(number + 1, "chain")
    assert len(run.losses()) == 60


def test_wrong_number_of_nodes(cluster: Cluster) -> None:
    number, run = cluster.submit("wrong", "launch.slurm.time=5", "launch.slurm.signal_seconds=60")
    cluster.ended(number)
    script = str(run.folder / "slurm" / "job.sh")
    more = int(cluster.do("sbatch", "--parsable", "--nodes=1", script))
    assert cluster.ended(more) == "FAILED"
    assert cluster.slurm.job(more)["ExitCode"] == "2:0"
    assert f"launch.nodes = 2, but Slurm job {more} has 1: n1" in cluster.log(more, "wrong")


def test_tasks_of_srun_are_ranks(cluster: Cluster) -> None:
    words = ("-N2", "--ntasks-per-node=2", "bigtrain", "launch", "config.yaml", "run.dir=tasks")
    cluster.do("srun", *words, "parallel.dp=4")
    assert len(cluster.run("tasks").losses()) == 8
    said = cluster.do("srun", *words, "--restart", "parallel.dp=3", code=2)
    assert "the world has 4 ranks" in said, said


def test_a_world_on_each_node_is_none(cluster: Cluster) -> None:
    """What torchrun makes without an address to meet at; and fewer ranks than one has meant."""
    alone = ("torchrun", "--standalone", "--nproc-per-node", "1", "-m", "bigtrain.train")
    words = ("config.yaml", "parallel.dp=auto", "run.dir=alone")
    said = cluster.do("srun", "-N2", "--ntasks-per-node=1", *alone, *words, code=1)
    assert "Slurm has given 2 nodes, but the 1 ranks are on 1: the others idle" in said, said
    tasks = ("srun", "-N2", "--ntasks-per-node=1", "bigtrain", "launch", *words)
    said = cluster.do(*tasks, "launch.processes=4", code=2)
    assert "launch.processes = 4, but nodes have 1 rank(s): 2 ranks on 2 node(s)" in said, said
    assert not cluster.run("alone").metrics()


def test_allocation_of_salloc(cluster: Cluster) -> None:
    words = ("launch.processes=1", "parallel.dp=auto", "train.global_batch=6", "run.dir=salloc")
    said = cluster.do("salloc", "-N3", "bigtrain", "launch", "config.yaml", "--dry-run", *words)
    assert "3 ranks, 1 on each of 3 nodes (n1, n2, n3), started by srun" in said
    refused = cluster.do(
        *("salloc", "-N3", "bigtrain", "launch", "config.yaml", *words, "launch.nodes=2"), code=2
    )
    assert "launch.nodes = 2, but Slurm job" in refused
    assert "has 3: n1, n2, n3" in refused


def test_what_sbatch_refuses_is_told(cluster: Cluster) -> None:
    words = ("launch", "config.yaml", "--slurm", *TWO_BY_TWO, "run.dir=refused")
    said = cluster.do("bigtrain", *words, "launch.slurm.partition=nowhere", code=1)
    assert "sbatch refused" in said
    assert "partition" in said
    assert "Traceback" not in said
    said = cluster.do("env", f"PATH={BIN}", "bigtrain", *words, code=1)
    assert "there is no squeue here" in said


def test_time_limit(cluster: Cluster) -> None:
    """Slurm's own signal, at its own time, which may be up to a minute early."""
    slow = ("model.factory=parts:model", "model.args={slow: 0.5}", "train.steps=1000")
    limits = ("launch.slurm.time=1", "launch.slurm.signal_seconds=10")
    number, run = cluster.submit("limit", *slow, *limits)
    cluster.wait_step(run, 2)
    wait_for("requeue", lambda: cluster.slurm.state(number) == "PENDING", 100)
    assert f"time is nearly up: job {number} queues up again" in cluster.log(number, "limit")
    steps = len(run.losses())
    assert run.checkpoints()[-1] == f"step-{steps:08}"
    cluster.slurm.start_now(number)
    cluster.wait_step(run, steps + 1)
    assert cluster.resumed_after(number, "limit") == steps


def test_nothing_to_follow_or_cancel(cluster: Cluster) -> None:
    for verb in ("follow", "cancel"):
        said = cluster.do("bigtrain", "jobs", verb, "nowhere", code=1)
        assert "no job of bigtrain that waits or runs is nowhere" in said
