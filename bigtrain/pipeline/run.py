"""The executor: it takes microbatches through the stages of all ranks as a table says.

One rank with one stage is the plain case: forward, backward, forward, backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bigtrain.comm.failure import telling_others
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Axis
from bigtrain.comm.p2p import Links
from bigtrain.errors import BigtrainError, CommError
from bigtrain.pipeline.messages import Exchange, Spec, tensors_in
from bigtrain.pipeline.passage import LossOf, Passage, Plan, Prepare, Trace
from bigtrain.pipeline.schedule import Table, forward_only, with_communication
from bigtrain.pipeline.stage import Call, Stage


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
    trace: Trace | None = None
    peak_in_flight: int = 0
    _plans: dict[tuple[bool, int], Plan] = field(default_factory=dict)
    _specs: dict[tuple[int, Hashable], Spec] = field(default_factory=dict)

    @property
    def has_last(self) -> bool:
        """Is the last stage on this rank, so that losses are?"""
        return any(stage.is_last for stage in self.stages)

    # -- what users call -----------------------------------------------------------------------

    def step(
        self,
        batches: Sequence[Any],
        loss_of: Callable[[Any, Any], torch.Tensor],
        weights: Sequence[float] | None = None,
    ) -> torch.Tensor:
        """Run forward and backward of all microbatches; return this replica's loss.

        The loss is the weighted sum of the microbatches' (by default their mean); its gradient is
        taken as `GradientPath.backward` does. All ranks of the pipeline pass the same batches, and
        get the same loss.

        loss_of(model, batch) returns the scalar loss of a batch; it calls `model` once.
        Communicates activations and gradients between neighbours, gradient buckets as soon as they
        are final, and one number from the last stage.

        Raises:
            BigtrainError: on all ranks, what a stage raised; stages that break an agreement on
                shapes; no batches, or not one weight for each.
        """
        chosen = list(weights or [1 / max(1, len(batches))] * len(batches))
        if len(chosen) != len(batches):
            raise BigtrainError(
                f"{len(chosen)} weights for {len(batches)} microbatches",
                mend="give one weight for each microbatch",
            )
        total = torch.zeros((), device=self.links.device)

        def weighted(model: Any, number: int, batch: Any) -> torch.Tensor:
            loss = loss_of(model, batch) * chosen[number]
            total.add_(loss.detach())
            return loss

        self.run(batches, weighted)
        return self.from_last(total)

    def run(
        self,
        batches: Sequence[Any],
        loss_of: LossOf,
        *,
        prepare: Prepare | None = None,
        forwards_done: Callable[[], None] | None = None,
    ) -> None:
        """Run forward and backward of all microbatches; losses are seen by `loss_of` only.

        batches: each is asked for once, when it is needed, and given up after its last forward.
        loss_of(model, number, batch): as in `step`, and it is told the number of the microbatch.
        prepare(stage, number, forward) is called before each forward, and before each backward
        (which may recompute). forwards_done() is called after this rank's last forward.
        """
        if not len(batches):
            raise BigtrainError("a step without batches", mend="pass at least one microbatch")
        passage = self._passage(batches, loss_of, prepare, training=True)
        with telling_others(self.axis):
            try:
                passage.go(forwards_done)
            except Exception:
                with contextlib.suppress(CommError):  # what was on the wire need not arrive
                    self.path.abandon()
                raise
        self.peak_in_flight = max(self.peak_in_flight, passage.peak)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Any], loss_of: LossOf) -> None:
        """Run forward only; what comes out is seen by `loss_of` on the last stage's rank."""
        if len(batches):
            with telling_others(self.axis):
                self._passage(batches, loss_of, None, training=False).go()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the whole model returns for these arguments, on all ranks.

        That is tensors, None and constants in tuples, lists and dicts. Communicates beside
        activations the result, from the last stage's rank to the others.
        """
        results: list[Any] = [None]

        def keep(model: Any, number: int, call: Call) -> None:
            results[0] = model(*call[0], **call[1])

        self.evaluate([(args, kwargs)], keep)
        return self.from_last(results[0])

    def from_last(self, value: Any) -> Any:
        """Return what the last stage's rank has, on all ranks of the pipeline."""
        if self.axis.degree == 1:
            return value
        with telling_others(self.axis):
            if not self.has_last:
                return self._received()
            spec = Spec.of(value)
            leaving = []
            for rank in range(self.axis.degree):
                if rank != self.axis.rank:
                    leaving += self.links.send_object(spec, rank, "outline of a result")
                    for tensor in tensors_in(value):
                        dense = tensor.detach().contiguous()
                        leaving.append(self.links.send(dense, rank, "a result"))
            for pending in leaving:
                pending.wait()
        return value

    # -- inside --------------------------------------------------------------------------------

    def _received(self) -> Any:
        source = self.placement[-1]
        spec: Spec = self.links.receive_object(source, "outline of a result")
        tensors = [
            torch.empty(each.shape, dtype=each.dtype, device=self.links.device)
            for each in spec.tensors
        ]
        pending = [self.links.receive(each, source, "a result") for each in tensors]
        return spec.build([each.wait() for each in pending])

    def _passage(
        self, batches: Sequence[Any], loss_of: LossOf, prepare: Prepare | None, *, training: bool
    ) -> Passage:
        return Passage(
            self.path,
            self.stages,
            self._plan(len(batches), training=training),
            self.axis.rank,
            self.placement,
            partial(Exchange, self.links, self.placement, self._specs),
            batches,
            loss_of,
            prepare,
            self.trace,
            training=training,
        )

    def _plan(self, num_microbatches: int, *, training: bool) -> Plan:
        key = training, num_microbatches
        if key not in self._plans:
            if training:
                table = self.table_for(num_microbatches)
            else:
                table = forward_only(tuple(self.placement), num_microbatches)
            self._plans[key] = Plan.of(with_communication(table), self.axis.rank, self.stages)
        return self._plans[key]
