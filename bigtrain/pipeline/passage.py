"""One passage of microbatches through the stages of a rank, action by action of a table's row."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.sync import Passage as Kind
from bigtrain.ops.later import Later
from bigtrain.pipeline.messages import Exchange, tensors_in
from bigtrain.pipeline.split_backward import Root, backward, splitting
from bigtrain.pipeline.stage import Call, Stage, StandIn, inside
from bigtrain.pipeline.table import Action, Table

_CONSTANTS = (bool, int, float, str, type(None))
LossOf = Callable[[Any, int, Any], Any]
Prepare = Callable[[int, int, bool], None]
Trace = list[tuple[Action, float, float]]


@dataclass(frozen=True)
class Plan:
    """A table with wires, and what a rank must know beside its row.

    finals: place in the row -> parameters whose gradients are final after it. splits: are there
    backwards in two halves? last_uses: microbatch -> place in the row of its last forward.
    """

    table: Table
    row: tuple[Action, ...]
    finals: Mapping[int, frozenset[nn.Parameter]]
    splits: bool
    last_uses: Mapping[int, int]

    @classmethod
    def of(cls, table: Table, rank: int, stages: Sequence[Stage]) -> Plan:
        """Return the plan of `rank`, which has `stages`."""
        row = table.rows[rank]
        uses = {action.microbatch: i for i, action in enumerate(row) if action.kind == "F"}
        # The last B or W of each stage; a parameter may be in several stages.
        ends = {action.stage: i for i, action in enumerate(row) if action.kind in ("B", "W")}
        place: dict[nn.Parameter, int] = {}
        for stage in stages:
            if stage.index in ends:
                for param in stage.parameters:
                    place[param] = max(place.get(param, 0), ends[stage.index])
        finals = {
            end: frozenset(param for param, i in place.items() if i == end)
            for end in set(place.values())
        }
        return cls(table, row, finals, any(a.kind == "W" for a in row), uses)


class _Arrival:
    """A tensor that a stage was given: the gradient of it goes back to the stage before."""

    def __init__(self, value: torch.Tensor) -> None:
        self.like = torch.empty_like(value, device="meta")
        self.device = value.device
        self.grad: torch.Tensor | None = None

    def gradient(self) -> torch.Tensor:
        """Return the gradient; zeros if the stage made no use of the tensor."""
        if self.grad is None:
            return torch.zeros_like(self.like, device=self.device)
        return self.grad


class _Arrive(torch.autograd.Function):
    """Makes received memory the start of a graph; no leaf, so that it may be changed in place."""

    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, value: torch.Tensor, arrival: _Arrival
    ) -> torch.Tensor:
        ctx.arrival = arrival
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.arrival.grad = grad
        return None, None, None


@dataclass
class _Kept:
    """What a forward leaves for its backward."""

    arrivals: list[_Arrival]
    roots: list[Root]
    later: Later


class Passage:
    """One passage of microbatches through the stages of this rank.

    loss_of(model, number, batch) is called for each microbatch by every stage, by all but the last
    only up to where it calls the model. `peak` is how many forwards waited for
    their backward at most.
    """

    def __init__(
        self,
        path: GradientPath,
        stages: Sequence[Stage],
        plan: Plan,
        rank: int,
        placement: Sequence[int],
        exchange: Callable[[Callable[[int], Hashable]], Exchange],
        batches: Sequence[Any],
        loss_of: LossOf,
        prepare: Prepare | None = None,
        trace: Trace | None = None,
        *,
        training: bool,
    ) -> None:
        self.path, self.plan, self.rank, self.placement = path, plan, rank, placement
        self.stages = {stage.index: stage for stage in stages}
        self.batches, self.loss_of, self.prepare, self.trace = batches, loss_of, prepare, trace
        self.training = training
        self.peak = 0
        self.exchange = exchange(self._shape)
        self._fetched: dict[int, Any] = {}
        self._shapes: dict[int, Hashable] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        # What stages on this rank pass to each other, by (the stage it is for, microbatch).
        self._activations: dict[tuple[int, int], Any] = {}
        self._gradients: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._to_send: dict[Action, Any] = {}
        self._anchor = torch.empty(0, requires_grad=True)

    def go(self, forwards_done: Callable[[], None] | None = None) -> None:
        """Do the row of this rank; call `forwards_done` after its last forward."""
        do: dict[str, Callable[[Action, int], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
            "RECV_F": self._expect,
            "RECV_B": self._expect,
            "SEND_F": self._send,
            "SEND_B": self._send,
        }
        last = max(self.plan.last_uses.values())
        for place, action in enumerate(self.plan.row):
            do[action.kind](action, place)
            if place == last and forwards_done is not None:
                forwards_done()
        self.exchange.finish()

    # -- messages ------------------------------------------------------------------------------

    def _expect(self, action: Action, place: int) -> None:
        self.exchange.expect(action)

    def _send(self, action: Action, place: int) -> None:
        content = self._to_send.pop(action)
        if action.kind == "SEND_F":
            self.exchange.send_activations(action, content)
        else:
            self.exchange.send_gradients(action, content)

    def _batch(self, micro: int) -> Any:
        """Return a microbatch, which is asked for once and held until its last forward here."""
        if micro not in self._fetched:
            batch = self.batches[micro]
            self._fetched[micro] = batch
            self._shapes[micro] = (self.training, shape_of(batch))
        return self._fetched[micro]

    def _shape(self, micro: int) -> Hashable:
        self._batch(micro)
        return self._shapes[micro]

    # -- forward -------------------------------------------------------------------------------

    def _forward(self, action: Action, place: int) -> None:
        stage, micro = self.stages[action.stage], action.microbatch
        self._batch(micro)
        carry, arrivals = self._arrive(self._carry(stage, micro))
        if self.prepare is not None:
            self.prepare(stage.index, micro, True)
        later = Later(self.path.add)
        with self._computing(action, later), self.path.forward(stage.index):
            result = self._result(stage, carry, micro)
        if not stage.is_last:
            self._pass_on(stage, micro, result)
        if self.training:
            self._kept[stage.index, micro] = _Kept(arrivals, _roots(stage, result), later)
            self.peak = max(self.peak, len(self._kept))
        if self.plan.last_uses[micro] == place:
            self._fetched[micro] = None

    def _carry(self, stage: Stage, micro: int) -> Any:
        """Return what the stage before gave."""
        if stage.index == 0:
            return None
        if self._is_here(stage.index - 1):
            return self._activations.pop((stage.index, micro))
        tensors = self.exchange.take(Action("RECV_F", stage.index, micro))
        spec = self.exchange.spec(stage.index - 1, micro)
        wanted = [each.requires_grad for each in spec.tensors]
        return spec.build([_Given(*each) for each in zip(tensors, wanted, strict=True)])

    def _arrive(self, carry: Any) -> tuple[Any, list[_Arrival]]:
        """Return what a stage was given as the start of its own graph, and what notes gradients."""
        arrivals: list[_Arrival] = []

        def enter(leaf: Any) -> Any:
            if not isinstance(leaf, _Given):
                return leaf
            if not (leaf.requires_grad and self.training):
                return leaf.tensor
            arrivals.append(_Arrival(leaf.tensor))
            return _Arrive.apply(self._anchor, leaf.tensor, arrivals[-1])

        return pytree.tree_map(enter, carry), arrivals

    def _result(self, stage: Stage, carry: Any, micro: int) -> Any:
        model, batch = self.path.model, self._batch(micro)

        def loss_of(model: Any) -> Any:
            return self.loss_of(model, micro, batch)

        def answer(call: Call) -> Any:
            return stage.run(carry, call)

        if not stage.is_last:
            return inside(loss_of, model, answer)
        # One stage is the whole model, which may be looked at and called in any way.
        loss = loss_of(model if stage.num_stages == 1 else StandIn(model, answer))
        degree = self.path.sync.axis.degree
        return loss / degree if degree > 1 and self.training else loss

    def _pass_on(self, stage: Stage, micro: int, result: Any) -> None:
        if self._is_here(stage.index + 1):
            # A copy, since the next stage may change it in place, and this one may have kept it.
            self._activations[stage.index + 1, micro] = pytree.tree_map_only(
                torch.Tensor, lambda t: _Given(t.detach().clone(), t.requires_grad), result
            )
        else:
            self._to_send[Action("SEND_F", stage.index, micro)] = result

    # -- backward ------------------------------------------------------------------------------

    def _backward(self, action: Action, place: int) -> None:
        stage, micro = self.stages[action.stage], action.microbatch
        kept = self._kept[stage.index, micro]
        grads = self._gradients_of(stage, micro)
        if self.prepare is not None:
            self.prepare(stage.index, micro, False)
        kept.later.open = action.kind == "I"
        with self._computing(action, kept.later), self._accumulating(action, place):
            if kept.roots:
                backward(kept.roots, grads, kept.later)
        kept.roots = []
        if stage.index:
            self._pass_back(stage, micro, [arrival.gradient() for arrival in kept.arrivals])
        kept.arrivals = []
        if action.kind == "B":
            del self._kept[stage.index, micro]

    def _gradients_of(self, stage: Stage, micro: int) -> list[Any]:
        """Return the gradients of what a stage gave; of a loss it is one."""
        if stage.is_last:
            return [None]
        if self._is_here(stage.index + 1):
            return self._gradients.pop((stage.index, micro))
        return self.exchange.take(Action("RECV_B", stage.index, micro))

    def _pass_back(self, stage: Stage, micro: int, grads: list[torch.Tensor]) -> None:
        if self._is_here(stage.index - 1):
            self._gradients[stage.index - 1, micro] = grads
        else:
            self._to_send[Action("SEND_B", stage.index, micro)] = grads

    def _weights(self, action: Action, place: int) -> None:
        kept = self._kept.pop((action.stage, action.microbatch))
        with self._computing(action, None), self._accumulating(action, place):
            kept.later.compute()

    # -- around --------------------------------------------------------------------------------

    def _is_here(self, stage: int) -> bool:
        return self.placement[stage] == self.rank

    def _accumulating(self, action: Action, place: int) -> Any:
        kinds: dict[str, Kind] = {"B": "backward", "I": "inputs", "W": "weights"}
        final = self.plan.finals.get(place, ())
        return self.path.accumulate(final, action.stage, kinds[action.kind])

    @contextmanager
    def _computing(self, action: Action, later: Later | None) -> Iterator[None]:
        begin = time.perf_counter()
        if later is not None and self.plan.splits:
            with splitting(later):
                yield
        else:
            yield
        if self.trace is not None:
            self.trace.append((action, begin, time.perf_counter()))


@dataclass(frozen=True)
class _Given:
    """A tensor that comes from the stage before, without its history."""

    tensor: torch.Tensor
    requires_grad: bool


def _roots(stage: Stage, result: Any) -> list[Root]:
    """Return where backward starts. Edges, so that what was sent need not be kept in memory."""
    if stage.is_last:
        return [result]
    return [get_gradient_edge(t) for t in tensors_in(result) if t.requires_grad]


def shape_of(batch: Any) -> Hashable:
    """Return what shapes of activations may depend on: structure, shapes, constants of a batch."""
    if isinstance(batch, torch.Tensor):
        return tuple(batch.shape), batch.dtype
    if isinstance(batch, Mapping) or hasattr(batch, "items"):
        return tuple((key, shape_of(value)) for key, value in batch.items())
    if isinstance(batch, list | tuple):
        return tuple(shape_of(value) for value in batch)
    if dataclasses.is_dataclass(batch):
        return tuple(shape_of(getattr(batch, each.name)) for each in dataclasses.fields(batch))
    return cast(Hashable, batch if isinstance(batch, _CONSTANTS) else type(batch))
