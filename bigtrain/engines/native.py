"""What bigtrain's own engine has in its memory, as named blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from bigtrain.comm.block import Block, NamedBlock
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Axis
from bigtrain.config.schema import ZeroSection
from bigtrain.engines.seam import Place
from bigtrain.errors import CheckpointError
from bigtrain.optim.optimizer import Optimizer
from bigtrain.pipeline.run import Pipeline
from bigtrain.zero.memory import Memory, predict

ERRORS = "compression.error."  # what a run without compression need not take up
OUTER = "server."  # the same of one without servers


class Moments(Protocol):
    """An optimizer, as its state is saved: by name, one flat tensor for each segment."""

    @property
    def moments(self) -> dict[str, list[torch.Tensor | None]]: ...

    progress: Any


@dataclass(eq=False)
class NativeState:
    """The state of a model in buckets and of their optimizer."""

    model: nn.Module
    path: GradientPath
    optimizer: Moments
    dp: Axis

    def blocks(self) -> Iterator[NamedBlock]:
        """Yield everything that a checkpoint holds, as blocks of this rank's own memory."""
        path, dp = self.path, self.dp
        yield from path.blocks("model.", [segment.main_params for segment in path.segments()])
        for moment, flats in self.optimizer.moments.items():
            yield from path.blocks(f"optimizer.{moment}.", flats)
        # What is in no bucket: persistent buffers and frozen parameters, the same on all ranks.
        yield from path.frozen_blocks("model.")
        every = [*path.buckets, *path.frozen]
        known = {slot.param for bucket in every for slot in bucket.slots}
        for name, tensor in saved_tensors(self.model):
            if tensor not in known:
                whole = Block.whole(tensor.shape)
                name = path.names.get(tensor, name)
                yield from path.shards[name].named_blocks(
                    f"model.{name}", whole, tensor.data, (dp.rank, dp.degree)
                )

    def consolidate(self) -> None:
        self.path.consolidate()

    def saved(self) -> None:
        pass

    @property
    def progress(self) -> dict[str, Any] | None:
        """What compression must know to go on; all ranks ask for it together.

        Communicates what optimizers know of parameters, over the axes that split the model.
        """
        wire, own = self.path.progress, self.optimizer.progress
        if wire is None:
            return None
        for axis in self.path.model_axes:
            every = all_gather_object(own, axis, "what optimizers know of parameters")
            own = {name: value for known in every for name, value in (known or {}).items()}
        return {"wire": wire, "optimizer": own}

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        self.path.progress = saved["wire"] if saved else None
        if saved:
            self.optimizer.progress = saved["optimizer"]

    def errors(self) -> Iterator[NamedBlock]:
        """Yield what compression has lost and not made good; call `consolidate` before."""
        for segment, flat in self.path.errors():
            yield from self.path.blocks(ERRORS, [flat], [segment])

    def replicas(self) -> Iterator[NamedBlock]:
        return self.path.replicas()

    def take_up(self, load: Callable[[Iterable[NamedBlock]], None], saved: Set[str]) -> None:
        """Let `load` fill this rank's memory; `saved` are the names that there are."""
        load(self.blocks())
        segments = [segment for segment, _ in self.path.errors()]
        flats = {s.bucket: torch.zeros_like(s.bucket.main_grads) for s in segments}
        wanted: list[NamedBlock] = []
        for segment in segments:
            wanted += self.path.blocks(ERRORS, [segment.of(flats[segment.bucket])], [segment])
        load([block for block in wanted if block.name in saved])
        self.path.restore(flats)


@dataclass(eq=False)
class OwnClock:
    """The clock of a world that trains alone."""

    dp: Axis
    step: int = 0
    cursor: int = 0
    samples: list[int] = field(default_factory=list)
    speaks = True
    has_begun = False
    fellows = 1

    @property
    def place(self) -> Place:
        return Place(self.cursor, self.dp.rank, self.dp.degree)

    def go_to(self, step: int, cursor: int) -> None:
        self.step, self.cursor = step, cursor

    def begin(self, items_per_sample: int) -> None:
        pass

    def read(self, samples: list[int]) -> None:
        self.samples = samples

    def counted(self) -> list[tuple[int, list[int]]]:
        return [(self.step, self.samples)]

    def agree(self, totals: torch.Tensor) -> torch.Tensor:
        return totals

    def advance(self, batch: int, votes: list[float]) -> list[float]:
        self.step += 1
        self.cursor += batch
        return votes

    def evaluation(self) -> Place | None:
        return self.place

    def add_up(self, totals: torch.Tensor, what: str) -> torch.Tensor:
        return totals

    def must_save(self, saved: bool) -> bool:
        return False

    def leave(self) -> None:
        pass


def predict_memory(
    pipeline: Pipeline, optimizer: Optimizer, zero: ZeroSection, num_microbatches: int
) -> Memory:
    """Return what the training state will take on this rank."""
    return predict(
        pipeline.path,
        zero,
        optimizer.num_bytes,
        num_microbatches=num_microbatches,
        row=pipeline.table_for(num_microbatches).rows[pipeline.axis.rank],
    )


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each tensor of the model's state once, under the first of its names.

    Raises:
        CheckpointError: the state has something else than a tensor.
    """
    known: set[torch.Tensor] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{name} in the model's state is a {type(tensor).__name__}, not a tensor",
                why="checkpoints hold tensors only, so that loading one runs no code",
                mend="keep that state in a buffer instead of get_extra_state",
            )
        if tensor not in known:
            known.add(tensor)
            yield name, tensor
