"""Every optimizer from the command line: trained, stopped, resumed."""

import pytest
from runs import Bench

pytestmark = pytest.mark.cluster

CHOICES = {
    "lamb": ("optimizer.kind=lamb", "optimizer.lr=0.01"),
    "adagrad": ("optimizer.kind=adagrad",),
    "lion": ("optimizer.kind=lion", "train.precision=bf16"),
    "muon": ("optimizer.kind=muon", "optimizer.lr=0.01"),
}


@pytest.mark.parametrize("kind", CHOICES)
def test_a_run_and_its_continuation(bench: Bench, kind: str) -> None:
    """8 steps at once, and 4 and 4, are the same curve, bit for bit."""
    options = (*CHOICES[kind], "schedule.kind=constant")
    once = bench.launch(*options, "run.dir=once")
    once.assert_clean()
    assert len(once.losses()) == 8
    assert once.losses()[-1] < once.losses()[0]
    bench.launch(*options, "run.dir=twice", "train.steps=4")
    twice = bench.launch(*options, "run.dir=twice", resume=True)
    assert twice.losses() == once.losses()
