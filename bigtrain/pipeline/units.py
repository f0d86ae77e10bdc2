"""Where a model is cut: the units it is made of, what they cost, and where stages begin."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.follow import Followed, follow
from bigtrain.pipeline.record import RecordedChain
from bigtrain.pipeline.split import Bounds, Chain, LayerChain, balanced, bounds_at
from bigtrain.pipeline.stage import Call, inside

log = logging.getLogger(__name__)

_TOGETHER = ("forward", "pipeline_layers")
EVEN_ENOUGH = 1.15  # costliest stage over the mean, where finer units are not looked for any more
MOST_LOOKS = 12  # into how many layers of modules


@dataclass(frozen=True)
class Cuts:
    """How a model is cut: where stages begin, and of a model that was followed what was found."""

    bounds: Bounds
    inside: frozenset[str] = frozenset()
    followed: Followed | None = None


def chain_of(model: nn.Module, cuts: Cuts) -> tuple[Chain, Bounds]:
    """Return the chain that `cuts` are about, of this rank's copy of the model."""
    if cuts.followed is None:
        return LayerChain(model), cuts.bounds
    return RecordedChain(model, cuts.inside, cuts.followed), cuts.bounds


def choose_cuts(
    model: nn.Module,
    num_stages: int,
    split: Sequence[str] | None,
    cost: str,
    example: Any,
    loss_of: Any,
) -> Cuts:
    """Return how to cut the model into `num_stages` stages.

    A model that lists its layers is made of these, but not a subclass with a forward of its own. Of
    any other, one forward is followed: with `split`, the modules beside those that are named are
    the units; without, as fine ones as it takes to make stages even.

    Raises:
        BigtrainError: the model cannot be cut so; or an example is needed, and there is none.
    """
    if _lists_layers(model):
        chain = LayerChain(model)
        if split is not None:
            return Cuts(bounds_at(chain.units, split, num_stages))
        if len(chain.units) < num_stages:
            return Cuts(balanced(chain.units, [1.0] * len(chain.units), num_stages))  # refuses
        return Cuts(balanced(chain.units, _list_costs(chain, cost, example, loss_of), num_stages))
    call = _call(model, example, loss_of)
    if split is not None:
        _refuse_unknown(model, split)
        followed = _followed(model, _around(split), cost, call)
        units = [unit.name for unit in followed.units]
        return Cuts(bounds_at(units, split, num_stages), _around(split), followed)
    return _finely(model, num_stages, cost, call)


def _lists_layers(model: nn.Module) -> bool:
    """Has the model a list of layers that is about its forward, and not about that of a parent?"""
    if not callable(getattr(model, "pipeline_layers", None)) or "forward" in vars(model):
        return False
    lineage = type(model).__mro__
    by = {name: next((c for c in lineage if name in vars(c)), None) for name in _TOGETHER}
    owner, lister = by["forward"], by["pipeline_layers"]
    return owner is None or lister is None or lineage.index(lister) <= lineage.index(owner)


def _finely(model: nn.Module, num_stages: int, cost: str, call: Call) -> Cuts:
    """Look into the costliest modules until stages are even, or nothing is left to look into."""
    inside, closed = {""}, set[str]()
    followed = _followed(model, inside, cost, call)
    for _ in range(MOST_LOOKS):
        wanted = _too_coarse(model, inside | closed, followed, num_stages)
        if not wanted:
            break
        try:
            finer = _followed(model, inside | wanted, cost, call)
        except BigtrainError as error:
            log.info("%s stays in one piece: %s", ", ".join(sorted(wanted)), error)
            closed |= wanted
            continue
        inside, followed = inside | wanted, finer
    units = [unit.name for unit in followed.units]
    return Cuts(balanced(units, followed.costs, num_stages), frozenset(inside), followed)


def _too_coarse(model: nn.Module, known: set[str], followed: Followed, num_stages: int) -> set[str]:
    """Return the modules to look into, so that stages can be more even; none if they are."""
    units, costs = followed.units, followed.costs
    mean = sum(costs) / num_stages
    if len(units) >= num_stages:
        bounds = balanced([unit.name for unit in units], costs, num_stages)
        if max(sum(costs[start:stop]) for start, stop in bounds) <= EVEN_ENOUGH * mean:
            return set()
    open_ = {
        unit.module: cost
        for unit, cost in zip(units, costs, strict=True)
        if unit.module not in known and any(model.get_submodule(unit.module).children())
    }
    if not open_:
        return set()
    # All of the same size at once: they are layers of one kind.
    largest = max(open_.values())
    if largest < 0.05 * mean and len(units) >= num_stages:
        return set()
    return {name for name, cost in open_.items() if cost >= 0.9 * largest}


def _around(split: Sequence[str]) -> frozenset[str]:
    """Return the modules to look into, so that those named are seen."""
    return frozenset({""} | {name[:i] for name in split for i, c in enumerate(name) if c == "."})


def _refuse_unknown(model: nn.Module, split: Sequence[str]) -> None:
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if not set(split) <= known:
        bounds_at(sorted(known - {""}), split, len(split) + 1)  # names what is near


def _followed(model: nn.Module, inside: Any, cost: str, call: Call) -> Followed:
    from bigtrain.pipeline.cost import metered  # late: fake tensors take half a second

    def run(example: Call, read: Callable[[], float]) -> Followed:
        return follow(model, inside, example, read)

    runs = metered(model, cost, call, run)
    runs[0].costs = [min(costs) for costs in zip(*(each.costs for each in runs), strict=True)]
    return runs[0]


def _list_costs(chain: Chain, cost: str, example: Any, loss_of: Any) -> list[float]:
    from bigtrain.pipeline.cost import metered

    def run(call: Call, read: Callable[[], float]) -> list[float]:
        costs, carry = [], None
        for index in range(len(chain.units)):
            before = read()
            carry = chain.part(index, index + 1)(carry, call)
            costs.append(read() - before)
        return costs

    runs = metered(chain.model, cost, _call(chain.model, example, loss_of), run)
    return [min(costs) for costs in zip(*runs, strict=True)]


def _call(model: nn.Module, example: Any, loss_of: Any) -> Call:
    """Return how the loss function calls the model for the example."""
    if example is None:
        raise BigtrainError(
            f"no example of how {type(model).__name__} is called",
            why="what its units are and cost is found by following one forward",
            mend="pass example= (a batch of one microbatch) and the loss_of= that is used",
        )
    call: Call = inside(
        lambda model: loss_of(model, example) if loss_of else model(**example),
        model,
        lambda call: call,
    )
    return call
