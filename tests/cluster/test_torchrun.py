"""Ranks that torchrun has started."""

import signal

import pytest
from runs import SLOW, Bench

pytestmark = pytest.mark.cluster

TORCHRUN = ("torchrun", "--standalone", "--nproc-per-node=2", "-m", "bigtrain.train")


def test_two_ranks_train(bench: Bench) -> None:
    run = bench.launch("eval.generate=4", command=TORCHRUN)
    assert len(run.losses()) == 8
    assert run.checkpoints() == ["step-00000008"]
    assert run.out.count("step 8/8") == 1  # of all ranks, one speaks
    run.assert_clean()

    again = bench.launch(command=TORCHRUN, code=1)
    assert "run holds a run already" in again.err, again.shown
    assert "--resume" in again.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda x: x.name)
def test_a_signal_saves(bench: Bench, number: signal.Signals) -> None:
    run = bench.start(*SLOW, "train.steps=2000", command=TORCHRUN)
    run.wait_step(3)
    run.send(number)
    assert run.wait() != 0
    run.wait_gone()
    assert f"step-{len(run.losses()):08d}" in run.checkpoints(), run.shown
    run.verify()
    assert "stopped after step" in run.err, run.shown
    steps = len(run.losses()) + 2
    again = bench.launch("model.factory=parts:model", f"train.steps={steps}", resume=True)
    assert len(again.losses()) == steps


def test_a_world_of_the_wrong_size_is_refused(bench: Bench) -> None:
    run = bench.launch("parallel.dp=3", "train.global_batch=6", command=TORCHRUN, code=1)
    assert "the world has 2 ranks, but pp=1 x dp=3 x cp=1 x tp=1 = 3" in run.err, run.shown
    assert "start 3 ranks, or set parallel.dp=auto" in run.err
    ours = run.err[: run.err.index("the world has 2 ranks")]
    assert "Traceback" not in ours
    assert not run.folder.exists()


def test_an_error_of_one_rank_is_readable(bench: Bench) -> None:
    run = bench.launch(
        "model.factory=parts:model", "model.args={fail_at: [1, 3]}", command=TORCHRUN, code=1
    )
    assert "ValueError: the model of rank 1 has had enough" in run.err, run.shown
