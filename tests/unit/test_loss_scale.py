"""The loss scale of fp16: when it moves, where it ends, what configs give."""

from __future__ import annotations

import pytest

from bigtrain.config.schema import TrainSection
from bigtrain.optim.loss_scale import INITIAL, LossScale, build_loss_scale


def test_halves_with_every_overflow() -> None:
    scale = LossScale(8.0, window=3)
    for _ in range(2):
        scale.found(overflow=True)
    assert (scale.scale, scale.good_steps) == (2.0, 0)


def test_doubles_after_a_window_of_good_steps() -> None:
    scale = LossScale(8.0, window=3)
    seen = []
    for _ in range(7):
        scale.found(overflow=False)
        seen.append((scale.scale, scale.good_steps))
    assert seen == [(8, 1), (8, 2), (16, 0), (16, 1), (16, 2), (32, 0), (32, 1)]


def test_an_overflow_begins_the_window_anew() -> None:
    scale = LossScale(8.0, window=3)
    for overflow in (False, False, True, False, False):
        scale.found(overflow)
    assert (scale.scale, scale.good_steps) == (4.0, 2)


def test_a_window_that_became_shorter_is_over_at_once() -> None:
    scale = LossScale(8.0, window=3, good_steps=900)
    scale.found(overflow=False)
    assert (scale.scale, scale.good_steps) == (16.0, 0)


def test_one_is_the_smallest_scale() -> None:
    scale = LossScale(2.0, window=3)
    scale.found(overflow=True)
    assert scale.scale == 1.0
    assert not scale.exhausted
    scale.found(overflow=True)
    assert scale.exhausted


def test_a_fixed_scale_stays() -> None:
    scale = LossScale(0.5)
    scale.found(overflow=True)
    scale.found(overflow=False)
    assert scale == LossScale(0.5, None, 0)
    assert not scale.dynamic
    assert not scale.exhausted


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({}, LossScale(1.0)),
        ({"precision": "bf16"}, LossScale(1.0)),
        ({"precision": "fp16"}, LossScale(INITIAL, 1000)),
        ({"precision": "fp16", "loss_scale": "dynamic"}, LossScale(INITIAL, 1000)),
        ({"precision": "fp16", "loss_scale_window": 7}, LossScale(INITIAL, 7)),
        ({"precision": "fp16", "loss_scale": 128}, LossScale(128.0)),
    ],
)
def test_what_a_config_gives(section: dict, expected: LossScale) -> None:
    assert build_loss_scale(TrainSection.model_validate(section)) == expected
