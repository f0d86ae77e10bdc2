"""What the trainer asks of an engine. Natively four objects answer; DeepSpeed's engine is all four.

A step is: `Runner.run`, `Gradients.finish`, `Gradients.grad_norm`, then `Updater.step` and
`Gradients.publish`, or `Gradients.abandon`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.buckets import Bucket
from bigtrain.ops.op import Kernels
from bigtrain.pipeline.passage import LossOf, Prepare


class Runner(Protocol):
    """Runs the model. `num_parameters`: of the whole model."""

    @property
    def num_parameters(self) -> int: ...

    def run(
        self,
        batches: Sequence[Any],
        loss_of: LossOf,
        *,
        prepare: Prepare | None = None,
        forwards_done: Callable[[], None] | None = None,
    ) -> None:
        """Run forward and backward of all microbatches; see `Pipeline.run`."""

    def evaluate(self, batches: Sequence[Any], loss_of: LossOf) -> None:
        """Run forward only; losses are seen by `loss_of`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the whole model returns for these arguments, on all ranks."""


class Gradients(Protocol):
    """The gradient of a step, summed over the data-parallel axis."""

    def rescale(self, scale: float) -> None:
        """Note by what losses are multiplied from the next backward on."""

    def finish(self) -> None:
        """Return when the gradient is final."""

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        """Return the 2-norm of the gradient of all parameters, the same on all ranks."""

    def publish(self, bucket: Bucket | None = None) -> None:
        """Bring updated (or loaded) parameters to every rank: those of one bucket, or all that are
        left, and the first rank's buffers."""

    def settle(self) -> None:
        """Return when nothing is on the wire any more."""

    def abandon(self) -> None:
        """Forget the gradient of a step that must not count, and what it did to buffers."""

    def nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        """Return the names of parameters with a NaN or infinity, of what this rank holds."""


class Updater(Protocol):
    """The optimizer. `lr` is the peak of the learning rate."""

    lr: float
    num_updates: int

    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
    ) -> None:
        """Do one update with rate `lr`; gradients are first divided by `grad_divisor`.

        done(bucket) may be called for what is updated already.
        """


class Holder(Protocol):
    """What a checkpoint holds."""

    def blocks(self) -> Iterator[NamedBlock]:
        """Yield the state of model and optimizer as blocks of this rank's own memory."""

    def consolidate(self) -> None:
        """Before a checkpoint, on all ranks: bring what ranks keep for themselves to owners.

        Raises:
            Overtaken: on all ranks, if it is not there any more.
        """

    def saved(self) -> None:
        """After a checkpoint: what `consolidate` has brought is not needed any more."""

    @property
    def progress(self) -> dict[str, Any] | None:
        """What else compression must know to go on: numbers and words."""

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None: ...

    def errors(self) -> Iterator[NamedBlock]:
        """Yield what compression keeps, where there is any; `consolidate` comes before."""

    def replicas(self) -> Iterator[NamedBlock]:
        """Yield what must be equal on ranks besides `blocks`."""

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        """Let `load` fill blocks, and make them the state. `Gradients.publish` must follow.

        saved: the names of all that the checkpoint has; what it lacks of `errors` begins with zero.
        """


@dataclass(frozen=True)
class Place:
    """What a data-parallel rank reads of a batch that begins at `cursor`: it is number `rank` of
    `degree` that share the batch."""

    cursor: int
    rank: int
    degree: int


class Clock(Protocol):
    """Which step it is, and what of the data is read in it.

    Of one world of ranks, it is what its trainer counts; where several worlds (workers) train
    together, it is what they agree on.
    """

    step: int  # updates that are done
    cursor: int  # samples of the stream that all steps so far have read

    @property
    def place(self) -> Place:
        """What this rank reads in the next step."""

    @property
    def speaks(self) -> bool:
        """Is this the world that shows, records and saves the last step?"""

    @property
    def fellows(self) -> int:
        """Worlds that take such steps at the same time, each with totals of its own."""

    @property
    def has_begun(self) -> bool:
        """Does the run go on elsewhere already, so that there is nothing to load or to begin?"""

    def go_to(self, step: int, cursor: int) -> None:
        """Be where a checkpoint was; before `begin`."""

    def begin(self, items_per_sample: int) -> None:
        """Before the first step, once parameters are as they are to be."""

    def read(self, samples: list[int]) -> None:
        """Note which samples this rank has read in the step that it takes; before `agree`."""

    def counted(self) -> list[tuple[int, list[int]]]:
        """Return what this rank has read that is in updates, as far as is known after `advance` and
        was not told before: (step, samples)."""

    def agree(self, totals: torch.Tensor) -> torch.Tensor:
        """Return the sum of `totals` over all worlds whose gradients are in the update; after
        `Gradients.finish`."""

    def advance(self, batch: int, votes: list[float]) -> list[float]:
        """A step is over, of `batch` samples; return the votes to stop that count now."""

    def evaluation(self) -> Place | None:
        """Return this rank's place in an evaluation after the last step; None: in none."""

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        """Return the sum of `totals` over the worlds that evaluate."""

    def must_save(self, saved: bool) -> bool:
        """After the last step, wait until a world has saved it; return whether it is for this one,
        since the one that was to is gone. saved: has this world done it?"""

    def leave(self) -> None:
        """The run is over here."""
