"""Bubbles that are known as formulas; what the clock must come to."""

from __future__ import annotations

from fractions import Fraction

from bigtrain.pipeline.schedule import placement_of
from bigtrain.pipeline.simulate import Costs


def bubble_time(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int, costs: Costs
) -> Fraction | None:
    """Return how long every rank idles in a step, or None where no formula is known.

    `costs` are one number for all stages. With p ranks, F, B, I = B - W and W of one stage:

    - gpipe, 1f1b, interleaved: (p - 1) (F + B), of a stage that is smaller where there are more.
    - zb_h1: (p - 1) (F + I - W); where W is larger than F or I, the fill of the last rank,
      (p - 1) F, or the wait of the first, (p - 1) I, is what is left. From p microbatches on.
    - zb_v, dualpipe_v: (p - 1) F if F = I = W: rank r starts r forwards after rank 0. From 2 p
      microbatches on. (Under zb_v a rank that has started never idles until it is through.)
    """
    if costs.transfer:
        return None
    forward, backward, weight = (_exact(c) for c in (costs.forward, costs.backward, costs.weight))
    inner = backward - weight
    p, equal = num_ranks, forward == inner == weight
    if name in ("gpipe", "1f1b", "interleaved"):
        return (p - 1) * (forward + backward)
    if name == "zb_h1" and num_microbatches >= p:
        return (p - 1) * max(forward, inner, forward + inner - weight)
    if name in ("zb_v", "dualpipe_v") and equal and num_microbatches >= 2 * p:
        return (p - 1) * forward
    return None


def bubble_share(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int, costs: Costs
) -> Fraction | None:
    """Return the share of a step that every rank idles, or None where no formula is known."""
    idle = bubble_time(name, num_ranks, num_microbatches, virtual_stages, costs)
    if idle is None:
        return None
    stages = len(placement_of(name, num_ranks, virtual_stages)) // num_ranks
    busy = num_microbatches * stages * (_exact(costs.forward) + _exact(costs.backward))
    return idle / (busy + idle) if busy + idle else Fraction(0)


def _exact(cost: object) -> Fraction:
    assert isinstance(cost, int | float | Fraction), "closed forms are for equal stages"
    return Fraction(cost)
