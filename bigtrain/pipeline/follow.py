"""Finding the units of any model: one forward is followed, and it is noted who needs whose results.

The modules that the model's own code calls, not looking into them, are its units. What this code
does between them (residuals, masks, views) is followed only so far as to know which units' results
and which parameters go into it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from bigtrain.pipeline.absent import changes_first
from bigtrain.pipeline.stage import Call

Output = tuple[int, int]  # number of a unit, number of a tensor in what it returns
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are never called


@dataclass(frozen=True)
class Unit:
    """One call of a module in a forward: its name, what it needs of other units, and parameters
    that are used on the way to it."""

    name: str
    module: str
    needs: frozenset[Output]
    parameters: frozenset[str]


@dataclass
class Followed:
    """What one forward did: its units in order, and what its result needs beside them."""

    units: list[Unit]
    end: Unit
    costs: list[float]
    nestings: list[Any]  # of what each unit returns: it with the number of each leaf in its place
    changed: frozenset[Output]  # what the model's own code changes in place afterwards


def leaves_of(model: nn.Module, inside: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules that are units when called: the first ones that are not looked into.

    `inside` has the names of those that are ("" is the model itself); containers are anyway.
    """
    found: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module) -> None:
        for own, child in module.named_children():
            path = f"{name}.{own}".lstrip(".")
            if path in inside or isinstance(child, CONTAINERS):
                visit(path, child)
            elif child not in found.values():
                found[path] = child

    visit("", model)
    return found


def follow(
    model: nn.Module, inside: Collection[str], call: Call, read: Callable[[], float]
) -> Followed:
    """Run `model` as `call` says and return what it did; `read()` is a meter of cost."""
    follower = _Follower(model, read)
    with follower.watching(leaves_of(model, inside)), follower:
        result = model(*call[0], **call[1])
    return follower.finish(result)


class _Follower(TorchFunctionMode):
    """Tags tensors with the unit outputs and the parameters that they were made of."""

    def __init__(self, model: nn.Module, read: Callable[[], float]) -> None:
        super().__init__()
        named = (*model.named_parameters(), *model.named_buffers())
        self.params = {tensor: name for name, tensor in named}
        self.read = read
        self.tags: dict[int, frozenset[Any]] = {}
        self.alive: list[torch.Tensor] = []  # so that no id is given twice
        self.units: list[Unit] = []
        self.costs: list[float] = []
        self.nestings: list[Any] = []
        self.outputs: dict[int, Output] = {}
        self.changed: set[Output] = set()
        self.calls: dict[str, int] = {}
        self.depth = 0
        self.begin = read()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.depth:
            tags = self.tags_of((args, kwargs))
            if tags:
                changed = [args[0]] if args and changes_first(func) else []
                for tensor in _tensors((out, changed)):
                    self.tag(tensor, tags)
                self.changed |= {self.outputs[id(t)] for t in changed if id(t) in self.outputs}
        return out

    @contextmanager
    def watching(self, leaves: dict[str, nn.Module]) -> Iterator[None]:
        handles = []
        for name, module in leaves.items():
            enter, leave = partial(self.enter, name), partial(self.leave, name)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.calls[name] = self.calls.get(name, 0) + 1
            number = self.calls[name]
            unit = name if number == 1 else f"{name}#{number}"
            self.units.append(self.unit(unit, name, (args, kwargs)))

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if not self.depth:
            leaves, tree = pytree.tree_flatten(output)
            self.nestings.append(pytree.tree_unflatten(range(len(leaves)), tree))
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor):
                    output = (len(self.units) - 1, index)
                    # A unit may return what it was given (an identity), under both names then.
                    self.tag(leaf, frozenset([output]))
                    self.outputs[id(leaf)] = output
            self.meter()

    def unit(self, name: str, module: str, given: Any) -> Unit:
        tags = self.tags_of(given)
        needs = frozenset(tag for tag in tags if isinstance(tag, tuple))
        return Unit(name, module, needs, frozenset(tag for tag in tags if isinstance(tag, str)))

    def meter(self) -> None:
        now = self.read()
        self.costs.append(now - self.begin)
        self.begin = now

    def tag(self, tensor: torch.Tensor, tags: frozenset[Any]) -> None:
        self.tags[id(tensor)] = self.tags.get(id(tensor), frozenset()) | tags
        self.alive.append(tensor)

    def tags_of(self, value: Any) -> frozenset[Any]:
        found: set[Any] = set()
        for tensor in _tensors(value):
            found |= self.tags.get(id(tensor), frozenset())
            if isinstance(tensor, nn.Parameter) and tensor in self.params:
                found.add(self.params[tensor])
        return frozenset(found)

    def finish(self, result: Any) -> Followed:
        end = self.unit("", "", result)
        if self.units:
            self.costs[-1] += self.read() - self.begin
        return Followed(self.units, end, self.costs, self.nestings, frozenset(self.changed))


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor))


def _leaves(value: Any) -> Iterator[Any]:
    """Yield what is in a value, also in objects that pytrees take for leaves (model outputs)."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, dict):
            for item in leaf.values():
                yield from _leaves(item)
        else:
            yield leaf
