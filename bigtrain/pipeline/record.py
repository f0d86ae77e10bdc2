"""Any nn.Module as a chain of units: its own forward runs in every stage, over what is absent.

A stage runs the model's real forward. Modules of earlier stages return what was received of them,
or an `Absent` of the right shape where nobody here needs the values; at the first module of a later
stage the forward is left. So nothing is traced into a graph: the model's control flow, its shapes
and its hooks are those of the batch at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.absent import Absent
from bigtrain.pipeline.follow import Followed, Output, leaves_of
from bigtrain.pipeline.messages import Constant, constant
from bigtrain.pipeline.stage import Call


@dataclass(frozen=True)
class Outline(Constant):
    """What units returned, without values: of each its leaves (shape and dtype, or a constant)."""

    leaves: tuple[tuple[Any, ...], ...]


@dataclass
class _Visit:
    """One forward of a stage."""

    start: int
    stop: int
    home: torch.device
    received: dict[Output, torch.Tensor]
    outlines: tuple[tuple[Any, ...], ...]
    made: dict[Output, torch.Tensor] = field(default_factory=dict)
    next: int = 0
    depth: int = 0


class _Done(BaseException):
    """Leaves the model's forward where the next stage begins. No Exception, so that it gets out."""


class RecordedChain:
    """A model whose units were found by following one forward (`follow`)."""

    def __init__(self, model: nn.Module, inside: Collection[str], followed: Followed) -> None:
        self.model, self.inside = model, inside
        self.followed = followed
        self.units: Sequence[str] = [unit.name for unit in followed.units]
        self._visit: _Visit | None = None
        self._watched: set[nn.Module] = set()
        self._absent: dict[Any, Absent] = {}

    def owned(self, start: int, stop: int) -> set[str]:
        """Return the names of modules that these units are, and of parameters used on the way."""
        mine = self.followed.units[start:stop]
        last = [self.followed.end] if stop == len(self.units) else []
        return {u.module for u in mine} | {p for u in (*mine, *last) for p in u.parameters}

    def needed_after(self, stop: int) -> list[Output]:
        """Return the outputs of units before `stop` that units from there on need."""
        later = (*self.followed.units[stop:], self.followed.end)
        return sorted({tag for unit in later for tag in unit.needs if tag[0] < stop})

    def part(self, start: int, stop: int) -> Callable[[Any, Call], Any]:
        """Return the function of a stage; see `Stage.run`."""
        self._watch()
        before, after = self.needed_after(start), self.needed_after(stop)

        def run(carry: Any, call: Call) -> Any:
            tensors, outline = carry if carry is not None else ((), Outline(()))
            home = _home_of(call, tensors)
            received = dict(zip(before, tensors, strict=True))
            visit = _Visit(start, stop, home, received, outline.leaves)
            self._visit = visit
            try:
                result = self.model.forward(*call[0], **call[1])
                if stop == len(self.units):
                    return result
                raise self._disorder(visit, "its forward ends")
            except _Done:
                known = {**visit.received, **visit.made}
                return tuple(known[output] for output in after), Outline(visit.outlines)
            finally:
                self._visit = None

        return run

    # -- hooks of the modules that are units ---------------------------------------------------

    def _watch(self) -> None:
        """Let all modules that are units take part in visits."""
        for name, module in leaves_of(self.model, self.inside).items():
            if module not in self._watched:
                self._watched.add(module)
                module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                module.register_forward_hook(self._leave, always_call=True)
                plain = module.forward
                module.forward = partial(self._run, plain)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        visit = self._visit
        if visit is None:  # activation checkpointing repeats a unit in backward
            return
        visit.depth += 1
        if visit.depth > 1:
            return
        if visit.next == visit.stop and visit.stop < len(self.units):
            raise _Done
        if visit.next >= len(self.units) or self.followed.units[visit.next].module != name:
            raise self._disorder(visit, f"{name} is called")
        if visit.next >= visit.start:
            self._refuse_absent(name, (args, kwargs))

    def _run(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        visit = self._visit
        if visit is None or visit.depth != 1 or visit.next >= visit.start:
            return plain(*args, **kwargs)
        number = visit.next
        leaves = [
            self._stand_in(visit, (number, index), leaf)
            for index, leaf in enumerate(visit.outlines[number])
        ]
        return pytree.tree_map(lambda index: leaves[index], self.followed.nestings[number])

    def _stand_in(self, visit: _Visit, output: Output, leaf: Any) -> Any:
        if not isinstance(leaf, _Outlined):
            return leaf
        if output in visit.received:
            return visit.received[output]
        known = self._absent.get((leaf, visit.home))
        if known is None:
            known = self._absent[leaf, visit.home] = Absent.of(leaf.shape, leaf.dtype, visit.home)
        return known

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        visit = self._visit
        if visit is None:
            return
        visit.depth -= 1
        if visit.depth or visit.next >= visit.stop:
            return
        if visit.next >= visit.start:
            leaves = pytree.tree_leaves(output)
            for index, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor):
                    output = (visit.next, index)
                    # Sent as the unit returned it: what changes it later runs in each stage.
                    visit.made[output] = leaf.clone() if output in self.followed.changed else leaf
            visit.outlines = (*visit.outlines, tuple(_outlined(leaf) for leaf in leaves))
        visit.next += 1

    def _refuse_absent(self, name: str, given: Any) -> None:
        if any(isinstance(leaf, Absent) for leaf in pytree.tree_leaves(given)):
            raise BigtrainError(
                f"{name} needs a tensor of another stage that it did not need when the model was "
                "followed",
                why="what travels between stages is found once, on an example",
                mend="let the example show every path of the data, or cut the model elsewhere",
            )

    def _disorder(self, visit: _Visit, what: str) -> BigtrainError:
        wanted = self.units[visit.next] if visit.next < len(self.units) else "the end"
        return BigtrainError(
            f"{type(self.model).__name__}: {what} where {wanted} came when the model was followed",
            why="stages must call their modules in the same order for every batch",
            mend="put what depends on the data into one module, and let stages begin around it",
        )


def _home_of(call: Call, tensors: Sequence[torch.Tensor]) -> torch.device:
    """Return the device of this stage: that of what it was given."""
    given = [*tensors, *(t for t in pytree.tree_leaves(call) if isinstance(t, torch.Tensor))]
    return given[0].device if given else torch.device("cpu")


@dataclass(frozen=True)
class _Outlined:
    """What is known everywhere of a tensor that a unit returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _outlined(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _Outlined(tuple(leaf.shape), leaf.dtype)
    return constant(leaf)
