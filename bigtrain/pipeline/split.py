"""A model as a chain of units, cut into stages."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.absent import Absent
from bigtrain.pipeline.layer import Layer
from bigtrain.pipeline.stage import Call, Stage

Bounds = list[tuple[int, int]]  # of each stage: its first unit, and the one after its last


class Chain(Protocol):
    """A model whose forward is units that come one after the other."""

    model: nn.Module
    units: Sequence[str]

    def owned(self, start: int, stop: int) -> set[str]:
        """Return the names of the modules and parameters that units [start, stop) use."""

    def part(self, start: int, stop: int) -> Callable[[Any, Call], Any]:
        """Return the function of a stage that is units [start, stop); see `Stage.run`."""


class LayerChain:
    """The chain that a model itself declares, by its method `pipeline_layers()`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.units: Sequence[str] = [layer.name for layer in self._layers()]
        self.signature = inspect.signature(model.forward)

    def _layers(self) -> list[Layer]:
        layers: list[Layer] = self.model.pipeline_layers()  # type: ignore[operator]
        return layers

    def owned(self, start: int, stop: int) -> set[str]:
        return {name for layer in self._layers()[start:stop] for name in layer.modules}

    def part(self, start: int, stop: int) -> Callable[[Any, Call], Any]:
        layers = self._layers()[start:stop]

        def run(carry: Any, call: Call) -> Any:
            given = self.signature.bind(*call[0], **call[1])
            given.apply_defaults()
            for layer in layers:
                before = carry if isinstance(carry, tuple) else () if carry is None else (carry,)
                carry = layer.call(*before, *(given.arguments[name] for name in layer.takes))
            return carry

        return run


def bounds_at(units: Sequence[str], begins: Sequence[str], num_stages: int) -> Bounds:
    """Return the stages that begin at the first unit and at each of those that `begins` names.

    The name of a module around several units stands for the first of them.

    Raises:
        BigtrainError: a name is no unit, names are not in order, or there are too few or many.
    """
    places = []
    for name in begins:
        found = [i for i, unit in enumerate(units) if unit == name or unit.startswith(f"{name}.")]
        if not found:
            near = difflib.get_close_matches(name, units, n=1, cutoff=0.3)
            raise BigtrainError(
                f"no stage can begin at {name!r}",
                why=f"the units of the model are {_some(units)}",
                mend=f"name one of them{f'; did you mean {near[0]!r}?' if near else ''}",
            )
        places.append(found[0])
    if len(begins) != num_stages - 1 or sorted(set(places)) != places or 0 in places:
        raise BigtrainError(
            f"split names {len(begins)} places ({', '.join(begins)}) for {num_stages} stages",
            why="it says where each stage but the first begins: one name less than stages, in the "
            "model's order, each once",
            mend=f"give {num_stages - 1} names, out of {_some(units[1:])}",
        )
    edges = [0, *places, len(units)]
    return list(pairwise(edges))


def balanced(units: Sequence[str], costs: Sequence[float], num_stages: int) -> Bounds:
    """Return the cut into `num_stages` stages whose costliest is least; then the most even one.

    Raises:
        BigtrainError: there are fewer units than stages.
    """
    num = len(units)
    if num < num_stages:
        raise BigtrainError(
            f"a model of {num} units cannot be cut into {num_stages} stages",
            why=f"every stage needs one at least; they are {_some(units)}",
            mend=f"use at most {num} stages (parallel.pp times stages per rank), or a deeper model",
        )
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[stop]: (costliest stage, sum of squares, cuts) of the first units as so many stages.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(num_stages):
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for stop in range(stage + 1, num - (num_stages - stage - 1) + 1):
            options = [
                (
                    max(worst, sums[stop] - sums[start]),
                    squares + (sums[stop] - sums[start]) ** 2,
                    [*cuts, stop],
                )
                for start, (worst, squares, cuts) in best.items()
                if start < stop
            ]
            longer[stop] = min(options)
        best = longer
    edges = [0, *best[num][2]]
    return list(pairwise(edges))


def make_stages(
    chain: Chain,
    bounds: Bounds,
    indices: Iterable[int],
    parameters: Sequence[Sequence[nn.Parameter]],
) -> list[Stage]:
    """Return the stages with these indices; `parameters` has those of every stage."""
    stages = []
    for index in indices:
        start, stop = bounds[index]
        stages.append(
            Stage(
                index,
                len(bounds),
                chain.units[start:stop],
                parameters[index],
                chain.part(start, stop),
            )
        )
    return stages


def tensors_of(model: nn.Module, names: Iterable[str]) -> list[torch.Tensor]:
    """Return all parameters and buffers of the modules and parameters that are named."""
    found: dict[torch.Tensor, None] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent)
        direct = holder._parameters.get(own, holder._buffers.get(own))
        if direct is not None:
            found[direct] = None
        else:
            module = model.get_submodule(name)
            found |= dict.fromkeys((*module.parameters(), *module.buffers()))
    return list(found)


def prune(model: nn.Module, keep: Collection[str], dtype: torch.dtype, home: torch.device) -> None:
    """Take the parameters and buffers of modules that are not in `keep` out of `model`.

    In their places stand absent tensors, since the model's own code may ask for their dtype or
    device, which are those that the model will have: `dtype` if it is a float, on `home`. Buffers
    of modules around those that stay (a table that all layers use) stay too.
    """
    around = {""} | {name[:i] for name in keep for i, c in enumerate(name) if c == "."}
    for name, module in list(model.named_modules()):
        if any(name == kept or name.startswith(f"{kept}.") for kept in keep):
            continue
        gone = [own for own in module._parameters if f"{name}.{own}".lstrip(".") not in keep]
        if name not in around:
            gone += module._buffers
            shards = getattr(module, "shards", None)
            if isinstance(shards, dict):
                shards.clear()
        for own in gone:
            tensor = module._parameters.pop(own, None)
            tensor = module._buffers.pop(own, None) if tensor is None else tensor
            kind = dtype if tensor is not None and tensor.is_floating_point() else None
            module.__dict__[own] = (
                None if tensor is None else Absent.of(tensor.shape, kind or tensor.dtype, home)
            )


def _some(units: Sequence[str]) -> str:
    shown = units if len(units) <= 8 else [*units[:4], "...", *units[-3:]]
    return ", ".join(shown)
