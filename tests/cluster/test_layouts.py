"""The number of ranks changes the speed of a run and nothing else, even in the middle of it."""

import pytest
from runs import SLOW, Bench

pytestmark = pytest.mark.cluster

# Ranks and microbatches sum the same fp32 numbers in another order, and the number of threads of a
# rank changes how matrix products are blocked: each relative to about 1e-7. Adam divides by the
# root of the second moment, so an element whose gradient is close to zero turns such a difference
# into one of up to lr in the parameter. Over these 16 steps the loss was seen to differ by 1e-6, a
# twentieth of this (absolute; losses are about 5).
TOLERANCE = 2e-5


def test_1_2_and_4_ranks_give_the_same_curve(bench: Bench) -> None:
    curves, held_out, ids = {}, {}, {}
    for name, overrides in {
        "1": ("parallel.dp=1",),
        "2": ("parallel.dp=2",),
        "4": ("parallel.dp=4",),
        "1 accumulating": ("parallel.dp=1", "train.microbatch=2"),
        "2 accumulating": ("parallel.dp=2", "train.microbatch=1"),
    }.items():
        run = bench.launch(
            *overrides,
            "train.steps=16",
            "eval.every=8",
            "log.sample_ids=true",
            f"run.dir=ranks-{name.replace(' ', '-')}",
        )
        curves[name], held_out[name] = run.losses(), run.validation_losses()
        ids[name] = run.sample_ids()
        assert len(curves[name]) == 16
    for name in curves:
        assert curves[name] == pytest.approx(curves["1"], abs=TOLERANCE), name
        assert held_out[name] == pytest.approx(held_out["1"], abs=TOLERANCE), name
        assert ids[name] == ids["1"], name
    assert curves["1"][-1] < curves["1"][0] - 0.2  # it learned, so the comparison means something


def test_kill_9_of_everything_then_other_numbers_of_ranks(bench: Bench) -> None:
    """4 ranks, killed; 2 ranks, killed while saving; 1 rank to the end."""
    common = ("train.steps=16", "checkpoint.every=4", "log.sample_ids=true", "eval.every=8")
    calm = bench.launch(*common, *SLOW[:1], "run.dir=calm")

    run = bench.start(*common, *SLOW, "parallel.dp=4")
    run.wait_step(6)
    run.kill_all()
    assert run.checkpoints() == ["step-00000004"]
    run.verify()

    run = bench.start(*common, *SLOW, "parallel.dp=2", resume=True)
    run.wait_path("run/checkpoints/.writing-step-00000012-*")
    run.kill_all()
    assert "resumed from run/checkpoints/step-00000004" in run.out, run.shown
    assert run.checkpoints()[-1] in ("step-00000008", "step-00000012")  # the kill may be too late
    run.verify()

    run = bench.launch(*common, *SLOW[:1], "parallel.dp=1", resume=True)
    assert run.sample_ids() == calm.sample_ids()
    everything = [i for step in run.sample_ids().values() for i in step]
    assert len(everything) == len(set(everything)) == 16 * 8  # all within the first epoch
    assert len(run.losses()) == 16
    assert run.losses() == pytest.approx(calm.losses(), abs=TOLERANCE)
    assert run.validation_losses() == pytest.approx(calm.validation_losses(), abs=TOLERANCE)
    assert not list((run.folder / "checkpoints").glob(".writing-*"))
    run.assert_clean()


def test_resume_at_the_same_layout_is_exact(bench: Bench) -> None:
    common = ("train.steps=12", "checkpoint.every=4", *SLOW[:1])
    calm = bench.launch(*common, "run.dir=calm")
    run = bench.start(*common, SLOW[1])
    run.wait_step(6)
    run.kill_all()
    run = bench.launch(*common, resume=True)
    assert run.losses() == calm.losses()
