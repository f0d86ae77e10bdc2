"""The examples of pipelines say the same on several ranks as alone."""

from __future__ import annotations

import functools
import importlib.util
import re

import pytest
from runs import run_example

pytestmark = pytest.mark.cluster
OWN = "examples/pipeline.py"
TRANSFORMERS = "examples/transformers_pp.py"

# What is added up in another order: gradients of tied parameters, the gradient norm, with tp the
# layers. Losses after 30 steps were seen to differ by 1e-5, the last digit that is printed.
TOLERANCE = 1e-4

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed; bigtrain does not need it, its users do",
)


def numbers(printed: str) -> dict[str, list[float]]:
    """Return the numbers of the steps, by their names."""
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["10", "20", "30"], printed  # by one rank
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, number in re.findall(r"([a-z ]+) ([\d.]+)", line):
            found.setdefault(name.strip(), []).append(float(number))
    return found


def stages(printed: str) -> dict[int, str]:
    """Return what is said of each rank's stages: "number: first unit to last unit", in order.

    Ranks print at the same time, so that lines may run into each other.
    """
    found = re.findall(r"rank (\d) has stage (\d: \S+ to \S+?)(?=rank \d has|\s)", printed)
    return {int(rank): stage for rank, stage in sorted(found)}


@functools.cache
def alone(script: str) -> dict[str, list[float]]:
    """The same example in one process, where it must learn."""
    found = numbers(run_example(0, script))
    assert found["loss"][-1] < found["loss"][0] - 0.3
    return found


@pytest.mark.parametrize(("ranks", "schedule"), [(2, "1f1b"), (4, "zb_v")])
def test_own_model_in_own_loop(ranks: int, schedule: str) -> None:
    printed = run_example(ranks, OWN, "--schedule", schedule)
    wanted, got = alone(OWN), numbers(printed)
    assert got["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE)
    assert got["gradient norm"] == pytest.approx(wanted["gradient norm"], abs=TOLERANCE)
    assert wanted["gradient norm"][0] > 0.5  # it was clipped, so the norm mattered
    said = stages(printed)
    assert list(said) == list(range(ranks))
    assert "0: embedding to blocks." in printed
    assert " to head" in printed


@needs_transformers
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 2)])
def test_transformers_cut_from_outside(ranks: int, tp: int) -> None:
    printed = run_example(ranks, TRANSFORMERS, "--tp", str(tp))
    assert numbers(printed)["loss"] == pytest.approx(alone(TRANSFORMERS)["loss"], abs=TOLERANCE)
    said = stages(printed)
    assert list(said) == list(range(ranks))
    assert said[0].startswith("0: model.embed_tokens to model.layers.")
    assert said[ranks - 1].startswith(f"{ranks // tp - 1}: model.layers.")
    assert said[ranks - 1].endswith(" to lm_head")
    assert said[0] == said[tp - 1]  # ranks that share layers have the same stage
