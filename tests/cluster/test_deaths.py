"""A rank or the launcher dies: the rest ends within 5 seconds, and the culprit is named."""

import os
import signal
import time

import pytest
from runs import GONE, SLOW, Bench

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("victim", [0, 2])
def test_kill_9_of_one_rank(bench: Bench, victim: int) -> None:
    run = bench.start(*SLOW, "train.steps=2000", "parallel.dp=4")
    run.wait_step(2)
    ranks = run.wait_ranks(4)
    os.kill(ranks[victim], signal.SIGKILL)
    killed = time.monotonic()
    run.wait_gone()
    assert run.wait() == 137, run.shown
    assert time.monotonic() - killed < GONE
    message = run.err[run.err.index("error:") :]
    assert message.startswith(f"error: rank {victim} was ended by SIGKILL"), run.shown
    assert f"run/logs/rank-{victim}.log" in message
    run.assert_told()


def test_kill_9_of_a_rank_with_loader_processes(bench: Bench) -> None:
    """They live a few seconds longer than their rank, and hold what it had open."""
    run = bench.start(*SLOW, "train.steps=2000", "data.factory=parts:data", "data.num_workers=1")
    run.wait_step(2)
    os.kill(run.wait_ranks(2)[1], signal.SIGKILL)
    run.wait_gone()
    assert run.wait() == 137, run.shown
    run.assert_told("rank 1 was ended by SIGKILL")


def test_kill_9_of_one_rank_before_the_world_is_formed(bench: Bench) -> None:
    run = bench.start("parallel.dp=2", "train.steps=2000")
    ranks = run.wait_ranks(2)
    os.kill(ranks[1], signal.SIGKILL)
    run.wait_gone()
    assert run.wait() == 137
    assert "error: rank 1 was ended by SIGKILL" in run.err, run.shown


@pytest.mark.parametrize("early", [False, True])
def test_kill_9_of_the_launcher_leaves_no_rank(bench: Bench, early: bool) -> None:
    run = bench.start(*SLOW, "train.steps=2000", "data.factory=parts:data", "data.num_workers=1")
    if early:
        run.wait_ranks(2)
    else:
        run.wait_step(2)
    run.send(signal.SIGKILL)
    run.wait()
    wait = 8.0  # loader processes of torch look for their rank every 5 seconds
    run.wait_gone(wait)
    if not early:
        trouble = ("model.factory=parts:model", "data.factory=parts:data", "parallel.dp=1")
        assert len(bench.launch(*trouble, resume=True).losses()) == 8


def test_an_exception_on_one_rank_is_what_is_shown(bench: Bench) -> None:
    run = bench.start(
        "model.factory=parts:model", "model.args={fail_at: [1, 3]}", "checkpoint.every=2"
    )
    run.wait_step(2)
    failed = time.monotonic()
    assert run.wait() == 1, run.shown
    run.wait_gone()
    assert time.monotonic() - failed < GONE
    message = run.err[run.err.index("error:") :]
    assert message.startswith("error: rank 1 failed: Traceback"), run.shown
    assert "ValueError: the model of rank 1 has had enough" in message
    assert "parts.py" in message  # the user's own line
    assert "run/logs/rank-1.log" in message
    assert "went away" not in run.err + run.out, run.shown
    assert run.checkpoints() == ["step-00000002"]
    run.verify()


def test_an_exception_on_all_ranks_is_shown_once(bench: Bench) -> None:
    run = bench.launch("model.factory=parts:model", "model.args={hidden_size: 31}", code=1)
    assert run.err.count("Traceback") == 1, run.shown
    assert "Traceback" not in run.out
