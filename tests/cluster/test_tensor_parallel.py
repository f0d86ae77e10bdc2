"""Layers shared out over ranks, as a user launches them: nothing changes but the speed."""

import os
import re
import shutil
import signal
import textwrap
import time

import pytest
from runs import GONE, Bench, Run

pytestmark = pytest.mark.cluster

# Ranks add the same fp32 numbers in another order, relative to about 1e-7 each; see test_layouts.py
# for how Adam magnifies that. Over these steps losses of about 5 were seen to differ by 1e-6.
TOLERANCE = 1e-5
STEPS = 10
SEQUENCE = "parallel.sequence_parallel=true"

# The vocabulary and, for llama, the width inside the MLP divide by none of the degrees.
KINDS = {
    "gpt": ("model.num_heads=8", "model.vocab_size=257", "model.num_layers=2"),
    "llama": (
        "model.kind=llama",
        "model.num_heads=8",
        "model.num_kv_heads=2",
        "model.mlp_size=77",
        "model.vocab_size=257",
        "model.num_layers=2",
    ),
}
WITH_ALL = (f"train.steps={STEPS}", "eval.every=5", "log.sample_ids=true")

# A model of a user's, who knows nothing of tensor parallelism.
MINE = """
    import os
    import torch
    from torch import nn

    class Mine(nn.Module):
        def __init__(self, wrong_at: int) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 32)
            self.norm = nn.LayerNorm(32)
            self.up, self.down = nn.Linear(32, 63), nn.Linear(63, 32)
            self.out, self.loss = nn.Linear(32, 256), nn.CrossEntropyLoss()
            self.wrong_at, self.num_forwards = wrong_at, 0

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.num_forwards += 1
            if self.num_forwards == self.wrong_at and os.environ["RANK"] == "1":
                with torch.no_grad():  # as faulty hardware would
                    self.norm.weight[3] += 1e-6
            x = self.table(tokens)
            x = x + self.down(torch.tanh(self.up(self.norm(x))))
            return self.loss(self.out(x).flatten(0, 1), targets.flatten())

    def build(wrong_at: int = -1) -> nn.Module:
        return Mine(wrong_at)
"""
PLAN = "parallel.tensor_plan={table: vocab, up: column, down: row, out: vocab, loss: vocab}"


def degrees(dp: int, tp: int) -> tuple[str, ...]:
    return (f"parallel.dp={dp}", f"parallel.tp={tp}")


def assert_same_curve(run: Run, alone: Run) -> None:
    assert run.losses() == pytest.approx(alone.losses(), abs=TOLERANCE)
    assert run.validation_losses() == pytest.approx(alone.validation_losses(), abs=TOLERANCE)
    assert run.sample_ids() == alone.sample_ids()  # one rank of those that share layers tells


@pytest.fixture(scope="module")
def alone(shared_bench: Bench) -> dict[str, Run]:
    """A run of each kind of model in one process."""
    runs = {
        kind: shared_bench.launch(*WITH_ALL, *model, *degrees(1, 1), f"run.dir={kind}-alone")
        for kind, model in KINDS.items()
    }
    for run in runs.values():
        assert len(run.losses()) == STEPS
        assert run.losses()[-1] < run.losses()[0] - 0.2  # it learns: to be equal means something
    return runs


@pytest.mark.parametrize(
    ("kind", "dp", "tp", "more"),
    [
        ("gpt", 2, 2, (SEQUENCE, "train.microbatch=2", "parallel.tp_chunks=2")),
        ("llama", 1, 4, ()),
        ("llama", 4, 2, (SEQUENCE,)),
        ("gpt", 2, 4, ()),
        ("llama", 1, 8, (SEQUENCE, "parallel.bucket_mb=0.01")),
    ],
    ids=lambda x: str(x) if isinstance(x, int | str) else "sequence" if SEQUENCE in x else "plain",
)
def test_layouts_give_the_same_curve(
    alone: dict[str, Run], shared_bench: Bench, kind: str, dp: int, tp: int, more: tuple[str, ...]
) -> None:
    run = shared_bench.launch(
        *WITH_ALL, *KINDS[kind], *degrees(dp, tp), *more, f"run.dir={kind}-{dp}-{tp}"
    )
    assert_same_curve(run, alone[kind])
    assert f"dp={dp} x cp=1 x tp={tp}" in run.out, run.shown
    full_size = re.findall(r"([\d,]+) parameters", alone[kind].out)
    assert re.findall(r"([\d,]+) parameters", run.out) == full_size  # not those of one rank
    run.assert_clean()


def test_dropout_evaluation_and_sample_are_those_of_one_process(
    alone: dict[str, Run], bench: Bench
) -> None:
    common = (
        *WITH_ALL,
        *KINDS["gpt"],
        "model.dropout=0.1",
        "eval.generate=40",  # more than the 32 positions of the model
    )
    whole = bench.launch(*common, *degrees(1, 1), "run.dir=whole")
    split = bench.launch(
        *common, *degrees(1, 2), SEQUENCE, "parallel.check_replicas_every=2", "run.dir=split"
    )
    assert_same_curve(split, whole)
    assert abs(whole.losses()[0] - alone["gpt"].losses()[0]) > 100 * TOLERANCE  # it drops
    texts = [
        run.out[run.out.index("a sample of the model:") : run.out.index("\ncheckpoint ")]
        for run in (whole, split)
    ]
    assert len(texts[0]) > 60
    assert texts[0] == texts[1]


# -- checkpoints ----------------------------------------------------------------------------------


def test_kill_9_at_tp_2_then_other_degrees(bench: Bench) -> None:
    """What two ranks wrote goes on at other degrees as if it had never been interrupted."""
    common = (*KINDS["llama"], "schedule.kind=constant", "log.sample_ids=true", "eval.samples=0")
    run = bench.start(*common, *degrees(1, 2), SEQUENCE, "train.steps=100000", "checkpoint.every=4")
    run.wait_step(6)
    run.kill_all()
    run.verify()
    before = int(run.checkpoints()[-1].removeprefix("step-"))
    steps = f"train.steps={before + 6}"
    calm = bench.launch(*common, *degrees(1, 1), steps, "run.dir=calm")
    for dp, tp, more in ((1, 1, ()), (1, 4, (SEQUENCE,)), (2, 2, ())):
        folder = f"run-{dp}-{tp}"
        shutil.copytree(run.folder, bench.path / folder)
        again = bench.launch(
            *common, *degrees(dp, tp), *more, steps, f"run.dir={folder}", resume=True
        )
        assert f"resumed from {folder}/checkpoints/step-{before:08d}" in again.out, again.shown
        assert len(again.losses()) == before + 6
        assert_same_curve(again, calm)
        again.assert_clean()


# -- models of a user's ---------------------------------------------------------------------------


@pytest.fixture
def mine(shared_bench: Bench) -> Bench:
    """A bench whose folder has the user's module in it."""
    (shared_bench.path / "mine.py").write_text(textwrap.dedent(MINE))
    return shared_bench


FACTORY = ("model.factory=mine:build", "train.steps=8", "eval.every=4", "log.sample_ids=true")


def test_a_model_of_a_users_by_a_plan_in_yaml(mine: Bench) -> None:
    alone = mine.launch(*FACTORY, *degrees(1, 1), "run.dir=mine-alone")
    check = "parallel.check_replicas_every=1"
    split = mine.launch(*FACTORY, *degrees(1, 2), PLAN, check, "run.dir=mine-split")
    assert_same_curve(split, alone)
    split.assert_clean()


def test_without_a_plan_the_key_is_named(mine: Bench) -> None:
    run = mine.launch(*FACTORY, *degrees(1, 2), "run.dir=mine-no-plan", code=1)
    run.assert_told("Mine brings no plan", "parallel.tensor_plan", "tensor_plan()")
    run.assert_clean()


def test_sequence_parallel_needs_a_plan_that_splits_the_sequence(mine: Bench) -> None:
    """Else every rank has all of it, and gradients would be counted once for each rank."""
    plan = "parallel.tensor_plan={up: column, down: row}"
    run = mine.launch(
        *FACTORY, *degrees(1, 2), plan, SEQUENCE, "run.dir=mine-no-sequence", code=None
    )
    run.assert_told("sequence_parallel")
    run.assert_clean()


def test_replicas_that_went_apart_are_found(mine: Bench) -> None:
    wrong, check = "model.args={wrong_at: 3}", "parallel.check_replicas_every=2"
    run = mine.launch(*FACTORY, *degrees(1, 2), PLAN, wrong, check, "run.dir=mine-wrong", code=1)
    run.assert_told(
        "after step 4, replicas are not equal", "model.norm.weight on rank 1 and rank 0"
    )
    assert len(run.losses()) in (3, 4)
    run.assert_clean()


# -- deaths ---------------------------------------------------------------------------------------


def test_kill_9_of_one_rank(bench: Bench) -> None:
    run = bench.start(*KINDS["gpt"], *degrees(1, 2), SEQUENCE, "train.steps=100000")
    run.wait_step(2)
    os.kill(run.wait_ranks(2)[1], signal.SIGKILL)
    killed = time.monotonic()
    run.wait_gone()
    assert run.wait() == 137, run.shown
    assert time.monotonic() - killed < GONE
    run.assert_told("rank 1 was ended by SIGKILL", "run/logs/rank-1.log")
