"""The examples of tensor parallelism say the same on several ranks as alone."""

from __future__ import annotations

import functools
import importlib.util
import re

import pytest
from runs import run_example

pytestmark = pytest.mark.cluster
LAYERS = "examples/tensor_parallel.py"
TRANSFORMERS = "examples/transformers_tp.py"
KINDS = ("llama", "qwen2", "qwen3")

# Ranks add the same fp32 numbers in another order: losses of 2 to 3 after 30 steps were seen to
# differ by 1e-5, the last digit that is printed.
TOLERANCE = 1e-4

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None,
    reason="transformers is not installed; bigtrain does not need it, its users do",
)


def numbers(ranks: int, script: str, *options: str) -> dict[str, list[float]]:
    """Run an example, alone if `ranks` is 0; return the numbers that it prints, by their names."""
    printed = run_example(ranks, script, *options)
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["10", "20", "30"], printed  # by one rank
    found: dict[str, list[float]] = {}
    for line in lines:
        for name, number in re.findall(r"([a-z ]+) ([\d.]+)", line):
            found.setdefault(name.strip(), []).append(float(number))
    return found


@functools.cache
def alone(script: str, *options: str) -> dict[str, list[float]]:
    """The same example in one process, where it must learn."""
    found = numbers(0, script, *options)
    assert found["loss"][-1] < found["loss"][0] - 0.3
    return found


@pytest.mark.parametrize(("ranks", "options"), [(2, ()), (4, ("--sequence-parallel",))])
def test_own_model_of_parallel_layers(ranks: int, options: tuple[str, ...]) -> None:
    wanted, got = alone(LAYERS), numbers(ranks, LAYERS, *options)
    assert got["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE)
    assert got["gradient norm"] == pytest.approx(wanted["gradient norm"], abs=TOLERANCE)
    assert wanted["gradient norm"][0] > 0.5  # it was clipped, so the norm mattered


def test_sequence_parallel_alone_changes_nothing() -> None:
    assert numbers(0, LAYERS, "--sequence-parallel") == alone(LAYERS)


@needs_transformers
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_split_from_outside(kind: str) -> None:
    wanted = alone(TRANSFORMERS, "--model", kind)
    got = numbers(2, TRANSFORMERS, "--model", kind)
    assert got["loss"] == pytest.approx(wanted["loss"], abs=TOLERANCE)
