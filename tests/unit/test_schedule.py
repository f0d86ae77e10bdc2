"""Learning rates by hand."""

from __future__ import annotations

import itertools
import math

import pytest

from bigtrain.config.schema import ScheduleSection
from bigtrain.optim.schedule import learning_rate

PEAK = 0.8


def rates(steps: int, **settings: object) -> list[float]:
    schedule = ScheduleSection(**settings)
    return [learning_rate(schedule, PEAK, step, steps) for step in range(steps)]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_warmup(kind: str) -> None:
    """Rises linearly and reaches the peak at its last step, whatever comes then."""
    warm = rates(100, kind=kind, warmup_steps=4)[:4]
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_constant() -> None:
    assert rates(5, kind="constant", min_lr_ratio=0.5) == [PEAK] * 5


def test_linear() -> None:
    """Equal steps down to the floor at the last one."""
    assert rates(4, kind="linear", min_lr_ratio=0.0) == pytest.approx([0.6, 0.4, 0.2, 0.0])
    assert rates(4, kind="linear", min_lr_ratio=0.5) == pytest.approx([0.7, 0.6, 0.5, 0.4])


def test_linear_after_warmup() -> None:
    got = rates(6, kind="linear", warmup_steps=2, min_lr_ratio=0.0)
    assert got == pytest.approx([0.4, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_cosine() -> None:
    """Half a cosine, from the peak to the floor."""
    got = rates(4, kind="cosine", min_lr_ratio=0.0)
    by_hand = [PEAK * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)]
    assert got == pytest.approx(by_hand, abs=1e-12)
    assert rates(4, kind="cosine", min_lr_ratio=0.25)[1::2] == pytest.approx([0.5, 0.2])


def test_wsd() -> None:
    """Warm-up, stable, decay over the last steps."""
    got = rates(10, kind="wsd", warmup_steps=2, decay_steps=4, min_lr_ratio=0.0)
    stable = [0.8] * 4
    assert got == pytest.approx([0.4, 0.8, *stable, 0.6, 0.4, 0.2, 0.0])


def test_wsd_decays_over_a_tenth_unless_told() -> None:
    got = rates(30, kind="wsd", min_lr_ratio=0.1)
    assert got[:27] == [PEAK] * 27
    assert got[27:] == pytest.approx([0.56, 0.32, 0.08])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1])
def test_short_runs(kind: str, steps: int, warmup: int) -> None:
    """No division by zero, and never above the peak or below the floor."""
    for rate in rates(steps, kind=kind, warmup_steps=warmup, min_lr_ratio=0.1):
        assert 0.1 * PEAK - 1e-12 <= rate <= PEAK


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
def test_falls_and_ends_at_the_floor(kind: str) -> None:
    got = rates(50, kind=kind, warmup_steps=5, min_lr_ratio=0.1)
    assert all(a >= b for a, b in itertools.pairwise(got[5:]))
    assert got[-1] == pytest.approx(0.1 * PEAK)


def test_past_the_end_stays_at_the_floor() -> None:
    schedule = ScheduleSection(kind="cosine", min_lr_ratio=0.1)
    assert learning_rate(schedule, PEAK, 70, 50) == pytest.approx(0.1 * PEAK)
