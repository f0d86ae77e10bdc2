"""`engine: deepspeed` as real processes: the same curve, kill -9 in the middle, resume natively."""

from __future__ import annotations

import pytest
from runs import SLOW, Bench

pytestmark = pytest.mark.cluster
pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: bigtrain[deepspeed]")

ENGINE = ("engine.kind=deepspeed", "zero.stage=3")


def test_kill_9_and_resume(bench: Bench) -> None:
    """After SIGKILL of everything, the last checkpoint is good, and the native engine goes on."""
    constant = (*SLOW, "schedule.kind=constant", "train.steps=30")
    whole = bench.launch("run.dir=whole", *constant)
    options = (*constant, "checkpoint.every=4")
    run = bench.start(*options, *ENGINE)
    run.wait_step(10)
    run.kill_all()
    resumed = bench.launch(*options, *ENGINE, "train.steps=20", resume=True)
    assert "resumed from" in resumed.err + resumed.out
    resumed.assert_clean()
    native = bench.launch(*options, resume=True)
    assert native.losses() == pytest.approx(whole.losses(), abs=2e-5)
    for screen in (resumed.out, resumed.err):
        assert "DeepSpeed" not in screen
        assert "deprecated" not in screen


def test_one_rank(bench: Bench) -> None:
    """There is no process group then, and DeepSpeed wants one."""
    run = bench.launch("parallel.dp=1", *ENGINE)
    assert len(run.losses()) == 8
    run.assert_clean()


def test_ctrl_c_saves(bench: Bench) -> None:
    run = bench.start(*SLOW, "train.steps=2000", *ENGINE)
    run.wait_step(3)
    run.send(2)
    assert run.wait() == 130, run.shown
    assert run.checkpoints()
    run.assert_clean()
