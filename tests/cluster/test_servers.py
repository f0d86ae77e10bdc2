"""Runs with parameter servers whose processes end, stop, lag and come back, as a user sees them."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence

import pytest
from runs import GONE, SLOW, Bench, Run, marked, wait_for
from test_server_runs import SYNC, TWO, numbers, tensors

pytestmark = pytest.mark.cluster

TROUBLE = "model.factory=parts:model"
CONSTANT = "schedule.kind=constant"
UNEVEN = ("server.workers=3", "train.global_batch=12", CONSTANT)
HALF = 4 * 32  # items of one of two workers


def processes(run: Run, role: str) -> dict[int, list[int]]:
    """Return the ids of the live processes of each server, or each worker."""
    found: dict[int, list[int]] = {}
    for pid, env in sorted(marked(run.mark).items()):
        if f"BIGTRAIN_{role.upper()}" in env and pid != run.process.pid:
            found.setdefault(int(env[f"BIGTRAIN_{role.upper()}"]), []).append(pid)
    return found


def items(run: Run) -> list[int]:
    """Return how many items each step had: those of all workers that took part."""
    return [record["items"] for record in run.metrics() if "loss" in record]


def kill(run: Run, role: str, index: int) -> None:
    for pid in processes(run, role)[index]:
        os.kill(pid, signal.SIGKILL)


def told(run: Run, words: str) -> int:
    """Return how often the processes of a run have said this."""
    logs = (run.folder / "logs").rglob("*.log")
    return sum(path.read_text(errors="replace").count(words) for path in logs)


def ids_by_step(run: Run) -> dict[int, list[int]]:
    """Return the samples of each step, over all workers, sorted."""
    found: dict[int, list[int]] = {}
    for path in (run.folder / "samples").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            found.setdefault(record["step"], []).extend(record["ids"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}


@pytest.fixture(scope="module")
def calm(shared_bench: Bench) -> Run:
    """Data-parallel training of 60 steps that nobody disturbed: the start of any longer one."""
    options = ("parallel.dp=2", *SLOW[:1], CONSTANT, "log.sample_ids=true", "eval.samples=0")
    return shared_bench.launch(*options, "train.steps=60", "run.dir=calm")


# -- workers of several ranks, and other numbers ---------------------------------------------------


def test_workers_may_be_data_parallel_themselves(bench: Bench) -> None:
    """Sums over four ranks have another order than those over two workers of two."""
    ours = bench.launch(*SYNC, "parallel.dp=2", "run.dir=ours")
    peer = bench.launch("parallel.dp=4", "zero.stage=1", "run.dir=peer")
    assert len(ours.losses()) == 8
    assert ours.losses() == pytest.approx(peer.losses(), abs=2e-6)
    assert ours.validation_losses() == pytest.approx(peer.validation_losses(), abs=2e-6)
    ours.assert_clean()


def test_three_workers_that_accumulate_in_bf16(bench: Bench) -> None:
    common = ("train.precision=bf16", "train.microbatch=2", "train.global_batch=12")
    ours = bench.launch(*TWO, "server.replicas=1", "server.workers=3", *common, "run.dir=ours")
    peer = bench.launch("parallel.dp=3", "zero.stage=1", *common, "run.dir=peer")
    assert numbers(ours) == numbers(peer)
    assert tensors(ours) == tensors(peer)


def test_without_servers_and_back(bench: Bench, calm: Run) -> None:
    """The curve of who goes from one to the other is that of who stays."""
    plain, common = ("parallel.dp=2", "zero.stage=1"), (*SLOW[:1], CONSTANT)
    bench.launch(*plain, *common, "train.steps=3")
    bench.launch(*SYNC, *common, "train.steps=6", resume=True)
    run = bench.launch(*plain, *common, "train.steps=9", resume=True)
    assert numbers(run) == numbers(calm)[:9]


# -- samples ---------------------------------------------------------------------------------------


def test_sample_ids_are_those_of_all_workers(bench: Bench, calm: Run) -> None:
    run = bench.launch(*SYNC, "log.sample_ids=true", "eval.samples=0", "train.steps=4")
    expected = ids_by_step(calm)
    assert ids_by_step(run) == {step: expected[step] for step in range(1, 5)}
    files = sorted(path.name for path in (run.folder / "samples").iterdir())
    assert files == ["worker-0-rank-0.jsonl", "worker-1-rank-0.jsonl"]


@pytest.mark.parametrize(
    "mode",
    [
        ("server.mode=local", "server.local_steps=3"),
        ("server.mode=ssp", "server.staleness=2"),
        ("server.mode=async", "optimizer.kind=sgd"),
    ],
    ids=lambda mode: mode[0],
)
def test_sample_ids_of_other_modes(bench: Bench, calm: Run, mode: Sequence[str]) -> None:
    """Those of a resumed run go on where it does; in `async` a step is one worker's."""
    options = (*SYNC[:2], *mode, CONSTANT, "log.sample_ids=true", "eval.samples=0")
    bench.launch(*options, "train.steps=6")
    run = bench.launch(*options, "train.steps=12", resume=True)
    found, expected = ids_by_step(run), ids_by_step(calm)
    found = {step: ids for step, ids in found.items() if step <= 12}  # `ssp` may take more
    assert list(found) == list(range(1, 13))
    if "async" in mode[0]:
        assert {len(ids) for ids in found.values()} == {4}
    else:
        assert found == {step: expected[step] for step in range(1, 13)}


@pytest.mark.parametrize(
    "mode",
    [
        ("server.mode=ssp", "server.staleness=3", "server.quorum=2", "server.grace_seconds=0"),
        ("server.mode=async", "optimizer.kind=sgd"),
    ],
    ids=lambda mode: mode[0],
)
def test_each_round_has_one_that_speaks(bench: Bench, mode: Sequence[str]) -> None:
    """Though workers hear of rounds at different times, and reports wait for others to be in."""
    every = ("train.steps=30", "checkpoint.every=10", "checkpoint.keep_last=5")
    run = bench.launch(*SYNC[:2], *UNEVEN, *mode, *every, "eval.samples=0")
    steps = [record["step"] for record in run.metrics() if "loss" in record]
    assert sorted(steps) == list(range(1, 31))
    assert run.checkpoints() == [f"step-{step:08d}" for step in (10, 20, 30)]
    assert "to continue" in run.shown


def test_samples_of_a_worker_that_was_killed_are_read_by_others(bench: Bench, calm: Run) -> None:
    """None is lost, and none is in two updates."""
    chaos = ("--chaos", "kill:worker=1,step=4")
    run = bench.launch(*SYNC, *SLOW, "train.steps=60", "log.sample_ids=true", *chaos)
    assert len(run.losses()) == 60
    assert all(math.isfinite(loss) for loss in run.losses())
    used = Counter(i for some in ids_by_step(run).values() for i in some)
    assert set(used.values()) == {1}
    assert len(used) == sum(items(run)) // 32
    stream = [i for some in ids_by_step(calm).values() for i in some]
    assert set(used) <= set(stream)
    whole_steps = len(used) // 8 - 2  # a share may be under way at the end
    assert set(stream[: 8 * whole_steps]) <= set(used)
    run.assert_clean()


# -- ends ------------------------------------------------------------------------------------------


def test_both_servers_end_in_turn(bench: Bench) -> None:
    """The second once the first is back: it has all from the one that ends now."""
    run = bench.start(*TWO, *SLOW, "train.steps=2000", CONSTANT, "server.lease_seconds=2")
    run.wait_step(5)
    for victim in (0, 1):
        kill(run, "server", victim)
        word = f"server {victim} has joined"
        wait_for(word, lambda word=word: told(run, word) or run.ended())
        run.wait_step(len(run.losses()) + 5)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    run.assert_clean()
    done = len(run.losses())
    plain = ("parallel.dp=2", *SLOW[:1], CONSTANT, f"train.steps={done}")
    peer = bench.launch(*plain, "run.dir=peer")
    assert numbers(run) == numbers(peer)
    assert tensors(run) == tensors(peer)


def test_what_is_over_within_the_lease_changes_nothing(bench: Bench, calm: Run) -> None:
    events = (
        "delay:worker=0,step=4,seconds=0.5,ms=20",
        "delay:server=0,step=10,seconds=0.5,ms=20",
        "cut:worker=1,step=16,seconds=0.5",
        "cut:server=1,step=22,seconds=0.5",
        "cut:server=0,step=28,seconds=0.5",
        "stop:server=0,step=34,seconds=0.5",
        "stop:worker=1,step=38,seconds=0.5",
    )
    drills = [word for event in events for word in ("--chaos", event)]
    run = bench.launch(*TWO, *SLOW, CONSTANT, "train.steps=42", *drills)
    assert numbers(run) == numbers(calm)[:42]
    for event in events:
        assert told(run, f"drill: {event}"), run.shown
    run.assert_clean()


def test_a_worker_that_is_stopped_for_long_is_one_of_them_again(bench: Bench) -> None:
    run = bench.start(*TWO, *SLOW, "train.steps=3000", "server.lease_seconds=1")
    run.wait_step(5)
    [victim] = processes(run, "worker")[1]
    os.kill(victim, signal.SIGSTOP)
    wait_for("the other to go on alone", lambda: items(run)[-1:] == [HALF] or run.ended())
    run.wait_step(len(run.losses()) + 5)
    os.kill(victim, signal.SIGCONT)
    wait_for("both to go on", lambda: items(run)[-1:] == [2 * HALF] or run.ended())
    run.wait_step(len(run.losses()) + 5)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    assert told(run, "nothing was heard of it for 1 s")
    run.assert_clean()


def test_one_rank_of_an_island_ends(bench: Bench) -> None:
    """The other is ended with it, and both are started again."""
    run = bench.start(*SYNC, "parallel.tp=2", "train.steps=3000", CONSTANT)
    run.wait_step(5)
    victim = processes(run, "worker")[1]
    assert len(victim) == 2
    os.kill(victim[1], signal.SIGKILL)
    wait_for("worker 1 to join", lambda: told(run, "worker 1 has joined") or run.ended())
    assert not set(victim) & set(marked(run.mark))
    run.wait_step(len(run.losses()) + 5)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    run.assert_clean()


def test_the_only_server_ends_without_a_checkpoint(bench: Bench) -> None:
    run = bench.start(*SYNC, *SLOW, "train.steps=2000")
    run.wait_step(3)
    kill(run, "server", 0)
    killed = time.monotonic()
    assert run.wait() not in (0, 130), run.shown
    run.wait_gone()
    assert time.monotonic() - killed < 2 * GONE, run.shown
    run.assert_told("server 0", "SIGKILL")


# A user's module by which ranks take long to end, as those that share a layer may.
LATE = """
import os, time
from parts import model

end = os._exit
os._exit = lambda code: (time.sleep(1.5), end(code))
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_workers_that_take_their_time_to_end(bench: Bench, stopped: bool) -> None:
    """Servers end as soon as workers have left; the run is not over before workers are."""
    (bench.path / "late.py").write_text(LATE)
    late = ("model.factory=late:model", "model.args={slow: 0.05}")
    run = bench.start(*SYNC, *late, f"train.steps={2000 if stopped else 8}")
    if stopped:
        run.wait_step(3)
        run.send(signal.SIGINT)
    assert run.wait() == (130 if stopped else 0), run.shown
    assert ("stopped after step" in run.err) == stopped
    run.assert_clean()


# A user's module by which the first that saves step 8 is killed before it is done.
FATAL = """
import os, signal
from parts import model
import bigtrain.trainer as trainer

save = trainer.save

def fatal(folder, state, *rest, **more):
    if state.step == 8 and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return save(folder, state, *rest, **more)

trainer.save = fatal
"""


@pytest.mark.parametrize(
    "mode",
    [
        ("server.mode=sync",),
        ("server.mode=async", "optimizer.kind=sgd"),
        ("server.mode=local", "server.local_steps=4"),
    ],
    ids=lambda mode: mode[0],
)
def test_a_worker_is_killed_in_the_last_save(bench: Bench, mode: Sequence[str]) -> None:
    """Another saves; it comes back no more, since there is nobody who could be joined."""
    (bench.path / "fatal.py").write_text(FATAL)
    run = bench.start(*SYNC[:2], *UNEVEN, *mode, "model.factory=fatal:model", "train.steps=8")
    assert run.wait() == 0, run.shown
    assert (bench.path / "killed").exists()
    assert run.checkpoints() == ["step-00000008"]
    assert "to continue" in run.shown
    assert [r["step"] for r in run.metrics() if "save_seconds" in r] == [8]
    run.assert_clean()


HANGING = """
import os, time
from parts import model
import bigtrain.trainer as trainer

step = trainer.Trainer.train_step

def hang(self, *args, **kwargs):
    if self.step == 3 and os.environ["BIGTRAIN_WORKER"] == "1":
        time.sleep(1000)
    return step(self, *args, **kwargs)

trainer.Trainer.train_step = hang
"""


def test_a_worker_stands_still_for_ever(bench: Bench) -> None:
    """Its links live. The others wait once, end the run without it, and it is ended, too."""
    (bench.path / "hanging.py").write_text(HANGING)
    run = bench.start(
        *SYNC,
        *UNEVEN,
        "model.factory=hanging:model",
        "train.steps=12",
        "parallel.timeout_seconds=6",
        "launch.stop_seconds=3",
    )
    assert run.wait() == 0, run.shown
    assert "worker 1 does not end, and is ended" in run.shown
    assert run.checkpoints() == ["step-00000012"]
    assert len(run.losses()) == 12
    run.assert_clean()


def test_the_launcher_ends(bench: Bench) -> None:
    """No process outlives it, neither server nor worker."""
    run = bench.start(*TWO, *SLOW, "train.steps=2000")
    run.wait_step(2)
    run.send(signal.SIGKILL)
    run.wait()
    run.wait_gone()


# -- signals ---------------------------------------------------------------------------------------


def test_ctrl_c_and_on(bench: Bench, calm: Run) -> None:
    """All workers stop after the same step; what is resumed is as if nothing had been."""
    options = (*TWO, *SLOW, CONSTANT)
    run = bench.start(*options, "train.steps=2000")
    run.wait_step(6)
    run.send(signal.SIGINT)
    asked = time.monotonic()
    assert run.wait() == 130, run.shown
    assert time.monotonic() - asked < 10.0
    run.wait_gone()
    run.assert_told("stopped after step", "--resume")
    done = len(run.losses())
    assert run.checkpoints()[-1] == f"step-{done:08d}"
    again = bench.launch(*options, f"train.steps={done + 5}", resume=True)
    assert len(again.losses()) == done + 5
    assert numbers(again)[:60] == numbers(calm)[: done + 5]
    again.assert_clean()


def test_ctrl_c_to_the_whole_process_group(bench: Bench) -> None:
    """As a terminal does it: servers get it, too, and are there until workers have saved."""
    run = bench.start(*TWO, *SLOW, "train.steps=2000")
    run.wait_step(3)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130, run.shown
    assert "stopped after step" in run.err, run.shown
    assert run.checkpoints()
    run.assert_clean()


def test_a_second_ctrl_c_ends_at_once(bench: Bench) -> None:
    run = bench.start(*TWO, TROUBLE, "model.args={slow: 25.0}", "train.steps=2000")
    wait_for("the first step", lambda: len(processes(run, "worker")) == 2 and told(run, "per step"))
    time.sleep(0.3)
    run.send(signal.SIGINT)
    wait_for("the launcher's word", lambda: "once more" in run.err)
    assert not run.ended()
    again = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    assert time.monotonic() - again < 3.0
    run.assert_clean()


def test_ctrl_c_before_anything_is_there(bench: Bench) -> None:
    run = bench.start(*TWO, "train.steps=2000")
    wait_for("all processes", lambda: len(processes(run, "worker")) == 2)
    run.send(signal.SIGINT)
    wait_for("workers to end", lambda: not processes(run, "worker"))
    ended = time.monotonic()
    assert run.wait() == 130, run.shown
    assert time.monotonic() - ended < 3.0
    run.assert_clean()


# -- what is asked for -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--chaos", "explode:worker=1,step=3"), ("is no event", "kill, stop, cut, delay")),
        (("--chaos", "kill:worker=1"), ("is no event", "step")),
        (("--chaos", "kill:worker=1,server=0,step=2"), ("is no event", "one worker or one server")),
        (("--chaos", "kill:worker=one,step=2"), ("is no event", "numbers")),
        (("--chaos", "kill:server=1,step=2"), ("there is no server 1", "number 0")),
        (("train.precision=fp16",), ("fp16", "server.servers")),
        (("zero.stage=3",), ("zero.stage = 3", "server.servers")),
        (("optimizer.kind=lamb",), ("lamb", "server.servers")),
        (("server.quorum=3",), ("server.quorum = 3", "server.workers = 2")),
        (("train.global_batch=7",), ("train.global_batch = 7", "2 workers")),
        (("server.servers=0",), ("server.mode",)),
    ],
    ids=lambda x: x[-1] if "=" in x[-1] else "",
)
def test_what_is_refused(bench: Bench, options: Sequence[str], words: Sequence[str]) -> None:
    """In one error, before anything is started."""
    run = bench.launch(*SYNC, *options, code=None)
    run.assert_told(*words)
    assert not run.metrics()


def test_the_token_is_told_to_nobody(bench: Bench) -> None:
    """It is in the environment of the processes of the run, and nowhere else."""
    run = bench.start(*SYNC, *SLOW, "train.steps=2000")
    run.wait_step(1)
    tokens = {env["BIGTRAIN_TOKEN"] for env in marked(run.mark).values() if "RANK" in env}
    assert len(tokens) == 1
    [token] = tokens
    run.send(signal.SIGINT)
    run.wait()
    files = [path for path in bench.path.rglob("*") if path.is_file()]
    assert not [path for path in files if token.encode() in path.read_bytes()]
    run.assert_clean()
