"""The executor: it takes microbatches through the stages of this rank as a table says.

One rank with one stage is the plain case: forward, backward, forward, backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from bigtrain.comm.collectives import Pending
from bigtrain.comm.failure import telling_others
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Axis
from bigtrain.comm.p2p import Links
from bigtrain.errors import BigtrainError
from bigtrain.ops.later import Later
from bigtrain.pipeline.messages import Exchange, Spec, tensors_in
from bigtrain.pipeline.schedule import Action, Table, forward_only, with_communication
from bigtrain.pipeline.split_backward import Root, backward, splitting
from bigtrain.pipeline.stage import Call, Stage, StandIn, call_of

LossOf = Callable[[Any, Any], Any]
Prepare = Callable[[int, int, bool], None]


@dataclass
class _Kept:
    """What a forward leaves for its backward."""

    inputs: list[torch.Tensor]  # whose gradients go back to the stage before
    roots: list[Root]  # where its backward starts
    later: Later


@dataclass(frozen=True)
class _Plan:
    """A table, and what this rank must know beside its row."""

    table: Table
    row: tuple[Action, ...]
    finals: Mapping[int, frozenset[nn.Parameter]]  # place in the row -> gradients final after it
    last_forward: int


@dataclass
class Pipeline:
    """Runs the stages of this rank with those of the other ranks of `axis`.

    path: takes the gradients of this rank's parameters. table_for(number of microbatches) gives the
    schedule. num_parameters: of the whole model. `trace`, if it is a list, gets (action, start,
    stop) of all that is computed, in seconds; `peak_in_flight` is how many forwards waited for
    their backward at most.
    """

    path: GradientPath
    stages: Sequence[Stage]
    axis: Axis
    links: Links
    table_for: Callable[[int], Table]
    placement: Sequence[int]
    num_parameters: int
    trace: list[tuple[Action, float, float]] | None = None
    peak_in_flight: int = 0
    _plans: dict[tuple[bool, int], _Plan] = field(default_factory=dict)
    _specs: dict[tuple[int, Hashable], Spec] = field(default_factory=dict)
    _leaving: list[Pending] = field(default_factory=list)

    @property
    def has_last(self) -> bool:
        """Is the last stage on this rank, so that losses are?"""
        return any(stage.is_last for stage in self.stages)

    @property
    def last_rank(self) -> int:
        """Place on the axis of the rank that has the last stage."""
        return self.placement[-1]

    # -- what users call -----------------------------------------------------------------------

    def step(
        self,
        batches: Sequence[Any],
        loss_of: LossOf,
        weights: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of all microbatches; return the loss, the same on all ranks.

        The loss is the weighted sum of the microbatches' (by default their mean); its gradient is
        taken as `GradientPath.backward` does. All ranks of the pipeline pass the same batches.

        loss_of(model, batch) returns the scalar loss of a batch; it may call `model` once.
        Communicates activations and gradients between neighbours, gradient buckets as soon as they
        are final, and one number from the last stage.

        Raises:
            BigtrainError: on all ranks, what a stage raised; stages that break an agreement on
                shapes; no batches.
        """
        weights = weights or [1 / len(batches)] * len(batches)
        total = torch.zeros((), device=self.links.device)

        def weighted(model: Any, item: tuple[int, Any]) -> torch.Tensor:
            index, batch = item
            loss = loss_of(model, batch) * weights[index]
            total.add_(loss.detach())
            return loss

        self.run(list(enumerate(batches)), weighted)
        return self._shared(total)

    def run(
        self,
        batches: Sequence[Any],
        loss_of: LossOf,
        *,
        prepare: Prepare | None = None,
        forwards_done: Callable[[], None] | None = None,
    ) -> None:
        """Run forward and backward of all microbatches; losses are seen by `loss_of` only.

        prepare(stage, microbatch, forward) is called before each forward, and before each backward
        (which may recompute). forwards_done() is called after this rank's last forward.
        """
        if not batches:
            raise BigtrainError("a step without batches", mend="pass at least one microbatch")
        plan = self._plan(len(batches), training=True)
        passage = _Passage(self, plan, batches, loss_of, prepare, training=True)
        passage.go(forwards_done)
        self.peak_in_flight = max(self.peak_in_flight, passage.peak)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], loss_of: LossOf) -> None:
        """Run forward only; what comes out is seen by `loss_of` on the last stage's rank."""
        if batches:
            plan = self._plan(len(batches), training=False)
            _Passage(self, plan, batches, loss_of, None, training=False).go(None)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what the whole model returns for these arguments, a tensor, on all ranks.

        Communicates beside activations the result, from the last stage's rank to the others.
        """
        results: list[torch.Tensor] = []

        def keep(model: Any, call: Call) -> torch.Tensor:
            results.append(model(*call[0], **call[1]))
            return results[0]

        self.evaluate([(args, kwargs)], keep)
        return self.from_last(results[0] if results else None)

    def from_last(self, value: torch.Tensor | None) -> torch.Tensor:
        """Return the tensor that the last stage's rank has, on all ranks of the pipeline."""
        shape: tuple[Any, ...] = () if value is None else (tuple(value.shape), value.dtype)
        if self.axis.degree > 1:
            what = "shape of a result"
            for rank in self._others() if self.has_last else ():
                self._leaving += self.links.send_object(shape, rank, what)
            if not self.has_last:
                shape = self.links.receive_object(self.last_rank, what)
        if value is None:
            value = torch.empty(shape[0], dtype=shape[1], device=self.links.device)
        return self._shared(value)

    def _shared(self, value: torch.Tensor) -> torch.Tensor:
        """Return `value` as it is on the last stage's rank, which does not wait for the others."""
        value = value.detach().contiguous()
        if self.axis.degree == 1:
            return value
        if not self.has_last:
            return self.links.receive(value, self.last_rank, "a result").wait()
        self._leaving += [self.links.send(value, rank, "a result") for rank in self._others()]
        return value

    def _others(self) -> list[int]:
        return [rank for rank in range(self.axis.degree) if rank != self.axis.rank]

    def _all_left(self) -> None:
        """Wait until results of the passage before have left."""
        for pending in self._leaving:
            pending.wait()
        self._leaving.clear()

    # -- inside --------------------------------------------------------------------------------

    def _plan(self, num_microbatches: int, *, training: bool) -> _Plan:
        key = training, num_microbatches
        if key not in self._plans:
            if training:
                table = self.table_for(num_microbatches)
            else:
                table = forward_only(tuple(self.placement), num_microbatches)
            self._plans[key] = _plan_of(with_communication(table), self.axis.rank, self.stages)
        return self._plans[key]


def _plan_of(table: Table, rank: int, stages: Sequence[Stage]) -> _Plan:
    row = table.rows[rank]
    last_forward = max(i for i, action in enumerate(row) if action.kind == "F")
    ends = {a.stage: i for i, a in enumerate(row) if a.kind in ("B", "W")}  # the last one of each
    place: dict[nn.Parameter, int] = {}
    for stage in stages:
        for param in stage.parameters:
            if ends:
                place[param] = max(place.get(param, 0), ends[stage.index])
    finals = {
        end: frozenset(param for param, i in place.items() if i == end) for end in place.values()
    }
    return _Plan(table, row, finals, last_forward)


class _Passage:
    """One passage of microbatches through the stages of this rank."""

    def __init__(
        self,
        pipeline: Pipeline,
        plan: _Plan,
        batches: Sequence[Any],
        loss_of: LossOf,
        prepare: Prepare | None,
        *,
        training: bool,
    ) -> None:
        self.pipeline, self.path, self.plan = pipeline, pipeline.path, plan
        self.stages = {stage.index: stage for stage in pipeline.stages}
        self.placement = pipeline.placement
        self.batches, self.loss_of, self.prepare = batches, loss_of, prepare
        self.training = training
        self.kept: dict[tuple[int, int], _Kept] = {}
        self.peak = 0
        # What stages on this rank pass to each other, by (the stage it is for, microbatch).
        self.activations: dict[tuple[int, int], Any] = {}
        self.gradients: dict[tuple[int, int], list[torch.Tensor]] = {}
        self.to_send: dict[Action, Any] = {}
        shapes = (
            [_shape_of(batch, training) for batch in batches] if len(self.placement) > 1 else ()
        )
        self.exchange = Exchange(pipeline.links, self.placement, pipeline._specs, shapes)
        self.do: dict[str, Callable[[Action, int], None]] = {
            "F": self._forward,
            "B": self._backward,
            "I": self._backward,
            "W": self._weights,
            "RECV_F": lambda action, place: self.exchange.expect(action),
            "RECV_B": lambda action, place: self.exchange.expect(action),
            "SEND_F": lambda action, place: self.exchange.send_activations(
                action, self.to_send.pop(action)
            ),
            "SEND_B": lambda action, place: self.exchange.send_gradients(
                action, self.to_send.pop(action)
            ),
        }

    def go(self, forwards_done: Callable[[], None] | None) -> None:
        """Do the row of this rank. What fails here is told to the other ranks."""
        with telling_others(self.pipeline.axis):
            self.pipeline._all_left()
            for place, action in enumerate(self.plan.row):
                self.do[action.kind](action, place)
                if place == self.plan.last_forward and forwards_done is not None:
                    forwards_done()
            self.exchange.finish()

    # -- forward -------------------------------------------------------------------------------

    def _forward(self, action: Action, place: int) -> None:
        stage, micro = self.stages[action.stage], action.microbatch
        carry = self._carry(stage, micro)
        if self.prepare is not None:
            self.prepare(stage.index, micro, True)
        later = Later(self.path.add)
        with self._computing(action, later):
            result = self._result(stage, carry, micro)
        if not stage.is_last:
            self._pass_on(stage, micro, result)
        if self.training:
            inputs = [t for t in tensors_in(carry) if t.requires_grad] if stage.index else []
            self.kept[stage.index, micro] = _Kept(inputs, _roots(stage, result), later)
            self.peak = max(self.peak, len(self.kept))

    def _carry(self, stage: Stage, micro: int) -> Any:
        """Return what the stage before gave, cut off from where it came from."""
        if stage.index == 0:
            return None
        if self._is_here(stage.index - 1):
            return self.activations.pop((stage.index, micro))
        tensors = self.exchange.take(Action("RECV_F", stage.index, micro))
        spec = self.exchange.spec(stage.index - 1, micro)
        for tensor, wanted in zip(tensors, spec.tensors, strict=True):
            tensor.requires_grad_(wanted.requires_grad)
        return spec.build(tensors)

    def _result(self, stage: Stage, carry: Any, micro: int) -> Any:
        model, batch = self.path.model, self.batches[micro]
        if stage.num_stages == 1:
            loss = self.loss_of(model, batch)
        elif stage.is_last:
            loss = self.loss_of(StandIn(model, lambda call: stage.run(carry, call)), batch)
        else:
            call = call_of(self.loss_of, model, batch) if stage.sees_call else None
            return stage.run(carry, call)
        degree = self.path.sync.axis.degree
        return loss / degree if degree > 1 and self.training else loss

    def _pass_on(self, stage: Stage, micro: int, result: Any) -> None:
        if self._is_here(stage.index + 1):
            self.activations[stage.index + 1, micro] = pytree.tree_map(_cut_off, result)
        else:
            self.to_send[Action("SEND_F", stage.index, micro)] = result

    # -- backward ------------------------------------------------------------------------------

    def _backward(self, action: Action, place: int) -> None:
        stage, micro = self.stages[action.stage], action.microbatch
        kept = self.kept[stage.index, micro]
        grads = self._gradients(stage, micro)
        if self.prepare is not None:
            self.prepare(stage.index, micro, False)
        kept.later.open = action.kind == "I"
        with self._computing(action, kept.later), self._accumulating(place):
            if kept.roots:
                backward(kept.roots, grads)
        kept.roots = []
        if stage.index:
            self._pass_back(stage, micro, kept.inputs)
        kept.inputs = []
        if action.kind == "B":
            del self.kept[stage.index, micro]

    def _gradients(self, stage: Stage, micro: int) -> list[Any]:
        """Return the gradients of what a stage gave; of a loss it is one."""
        if stage.is_last:
            return [None]
        if self._is_here(stage.index + 1):
            return self.gradients.pop((stage.index, micro))
        return self.exchange.take(Action("RECV_B", stage.index, micro))

    def _pass_back(self, stage: Stage, micro: int, inputs: Sequence[torch.Tensor]) -> None:
        grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        if self._is_here(stage.index - 1):
            self.gradients[stage.index - 1, micro] = grads
        else:
            self.to_send[Action("SEND_B", stage.index, micro)] = grads

    def _weights(self, action: Action, place: int) -> None:
        kept = self.kept.pop((action.stage, action.microbatch))
        with self._computing(action, None), self._accumulating(place):
            kept.later.compute()

    # -- around --------------------------------------------------------------------------------

    def _is_here(self, stage: int) -> bool:
        return self.placement[stage] == self.pipeline.axis.rank

    def _accumulating(self, place: int) -> Any:
        return self.path.accumulate(self.plan.finals.get(place, ()))

    @contextmanager
    def _computing(self, action: Action, later: Later | None) -> Iterator[None]:
        with ExitStack() as stack:
            if later is not None and self.training and len(self.placement) > 1:
                stack.enter_context(splitting(later))
            begin = time.perf_counter()
            yield
            if self.pipeline.trace is not None:
                self.pipeline.trace.append((action, begin, time.perf_counter()))


def _cut_off(leaf: Any) -> Any:
    """Return a tensor as the next stage's own input: without its history."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def _roots(stage: Stage, result: Any) -> list[Root]:
    """Return where backward starts. Edges, so that what was sent need not be kept in memory."""
    if stage.is_last:
        return [result]
    return [get_gradient_edge(t) for t in tensors_in(result) if t.requires_grad]


def _shape_of(batch: Any, training: bool) -> Hashable:
    """Return what shapes of activations depend on."""
    leaves = pytree.tree_leaves(batch)
    shapes = (
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else type(leaf)
        for leaf in leaves
    )
    return training, *shapes
