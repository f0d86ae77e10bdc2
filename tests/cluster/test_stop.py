"""Ctrl-C and SIGTERM in every phase: a word about it, exit code 128 + signal, nothing broken."""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable

import pytest
from runs import GONE, SLOW, Bench, Run, wait_for

pytestmark = pytest.mark.cluster

LONG = "train.steps=2000"
TROUBLE = "model.factory=parts:model"
SLOW_DATA = ("data.factory=parts:data", "data.args={slow_rank: 0}")


def when_ranks_exist(run: Run) -> None:
    run.wait_ranks(2)


def when_torch_is_imported(run: Run) -> None:
    run.wait_library(run.wait_ranks(2)[1], "libtorch_cpu")


def when_saving(run: Run) -> None:
    run.wait_path("run/checkpoints/step-00000001")
    run.wait_path("run/checkpoints/.writing-step-*")


def when_generating(run: Run) -> None:
    wait_for("the end of training", lambda: "validation loss" in run.out or run.ended())
    run.wait_path("run/checkpoints/step-00000008")
    time.sleep(0.3)


# phase: (overrides, how to wait for it, whether the ranks have something to save)
PHASES: dict[str, tuple[tuple[str, ...], Callable[[Run], None], bool]] = {
    "start": ((LONG,), when_ranks_exist, False),
    "import": ((LONG,), when_torch_is_imported, False),
    "data": ((LONG, TROUBLE, *SLOW_DATA), lambda run: run.wait_path("now-data-0"), False),
    "first step": (
        (LONG, TROUBLE, "model.args={slow_first: 1.5}"),
        lambda run: run.wait_path("now-first-1"),
        True,
    ),
    "training": ((LONG, *SLOW), lambda run: run.wait_step(3), True),
    "saving": (
        (LONG, TROUBLE, "model.args={ballast_mb: 48}", "checkpoint.every=1"),
        when_saving,
        True,
    ),
    "evaluation": (
        (LONG, TROUBLE, "model.args={slow_eval: 0.3}", "eval.every=3"),
        lambda run: run.wait_path("now-evaluation-1"),
        True,
    ),
    "generation": (("eval.generate=100000", "eval.every=8"), when_generating, False),
}
CASES = [(phase, signal.SIGINT) for phase in PHASES]
CASES += [(phase, signal.SIGTERM) for phase in ("start", "data", "training", "saving")]


@pytest.mark.parametrize(("phase", "number"), CASES, ids=lambda x: getattr(x, "name", x))
def test_stop_in_every_phase(bench: Bench, phase: str, number: signal.Signals) -> None:
    overrides, in_phase, saves = PHASES[phase]
    run = bench.start(*overrides)
    in_phase(run)
    assert not run.ended(), run.shown
    asked = time.monotonic()
    run.send(number)
    code = run.wait()
    took = time.monotonic() - asked
    run.assert_clean()
    assert code == 128 + number, run.shown
    assert took < (10.0 if saves else GONE), run.shown
    run.assert_told()
    if saves:
        said = re.search(r"error: stopped after step (\d+) of 2000; the checkpoint is in", run.err)
        assert said, run.shown
        assert f"step-{int(said[1]):08d}" in run.checkpoints()
        assert len(run.losses()) == int(said[1])
        assert "go on with: bigtrain launch run/config.yaml --resume" in run.err
    else:
        assert f"error: stopped by {number.name}" in run.err, run.shown
    if number == signal.SIGTERM:
        return  # resuming takes its time, and is the same
    done = len(run.losses())
    trouble = (TROUBLE, "model.args={ballast_mb: 48}") if phase == "saving" else overrides[1:2]
    data = SLOW_DATA if phase == "data" else ()
    more = f"train.steps={max(done + 1, 8)}"
    again = bench.launch(more, *trouble, *data, "parallel.dp=1", resume=True)
    assert len(again.losses()) == max(done + 1, 8)
    again.assert_clean()
    if saves:
        assert f"after step {done}" in again.out


def test_ctrl_c_while_ranks_wait_for_one_another(bench: Bench) -> None:
    """Rank 0 waits for the others to join, deep in native code, where it hears no signal."""
    run = bench.start(LONG)
    ranks = run.wait_ranks(2)
    os.kill(ranks[1], signal.SIGSTOP)  # it is late
    run.wait_library(ranks[0], "libtorch_cpu")
    time.sleep(4.0)
    asked = time.monotonic()
    run.send(signal.SIGINT)
    os.kill(ranks[1], signal.SIGCONT)
    assert run.wait() == 130
    assert time.monotonic() - asked < GONE, run.shown
    run.assert_told("stopped by SIGINT")
    run.assert_clean()


def test_ranks_that_stop_wait_for_the_last_one(bench: Bench) -> None:
    """Rank 0 removes old checkpoints, for longer than a failed rank would be given."""
    args = "model.args={slow: 0.05, slow_remove: 4.0}"
    keep = ("checkpoint.every=1000", "checkpoint.keep_last=1")
    bench.launch("train.steps=2", "parallel.dp=1", TROUBLE, *keep)
    run = bench.start(LONG, TROUBLE, args, *keep, resume=True)
    run.wait_step(4)
    run.send(signal.SIGTERM)
    assert run.wait() == 143
    assert "error: stopped after step" in run.err, run.shown
    assert len(run.checkpoints()) == 1
    assert not list((run.folder / "checkpoints").glob(".writing-*"))
    run.assert_clean()


def test_the_command_it_shows_goes_on(bench: Bench) -> None:
    run = bench.start("train.steps=30", *SLOW)
    run.wait_step(2)
    run.send(signal.SIGINT)
    assert run.wait() == 130
    (command,) = re.findall(r"go on with: bigtrain launch (\S+) --resume", run.err)
    assert len(bench.launch("parallel.dp=1", config=command, resume=True).losses()) == 30


@pytest.mark.parametrize("library", ["pydantic_core", "_yaml"])
def test_ctrl_c_while_the_launcher_itself_is_starting(bench: Bench, library: str) -> None:
    """Typed right after Enter, before there is any rank."""
    run = bench.start(LONG)
    with contextlib.suppress(AssertionError):  # where yaml has no such library
        run.wait_library(run.process.pid, library, seconds=5.0)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    run.assert_clean()


def test_a_second_ctrl_c_ends_at_once(bench: Bench) -> None:
    run = bench.start(LONG, TROUBLE, "model.args={slow: 25.0}")
    run.wait_ranks(2)
    wait_for("the first step", lambda: "per step" in run.out)
    time.sleep(0.3)
    run.send(signal.SIGINT)
    wait_for("the launcher's word", lambda: "once more" in run.err)
    time.sleep(1.0)
    assert not run.ended()
    again = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait() == 130
    assert time.monotonic() - again < 2.0
    assert "error: ended by SIGINT before" in run.err, run.shown
    run.assert_clean()


def test_stop_seconds_bounds_the_wait(bench: Bench) -> None:
    run = bench.start(LONG, TROUBLE, "model.args={slow: 25.0}", "launch.stop_seconds=1")
    wait_for("the first step", lambda: "per step" in run.out)
    time.sleep(0.3)
    run.send(signal.SIGTERM)
    assert run.wait(5.0) == 143
    assert "error: ended by SIGTERM before" in run.err, run.shown
    run.assert_clean()


def test_ctrl_c_to_the_whole_process_group(bench: Bench) -> None:
    """What a terminal does: every process of the foreground group gets it, the ranks once."""
    run = bench.start(LONG, *SLOW)
    run.wait_step(2)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert "stopped after step" in run.err, run.shown
    run.assert_clean()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_loader_processes_do_not_spoil_the_last_save(bench: Bench, number: signal.Signals) -> None:
    run = bench.start(LONG, *SLOW, "data.factory=parts:data", "data.num_workers=1")
    run.wait_step(3)
    run.send(number)
    assert run.wait() == 128 + number, run.shown
    assert "stopped after step" in run.err, run.shown
    assert run.checkpoints()
    run.assert_clean()
