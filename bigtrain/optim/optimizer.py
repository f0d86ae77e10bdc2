"""What all optimizers share: segments, state, the order of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from itertools import groupby

import torch

from bigtrain.comm.buckets import Bucket, Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.ops.op import Kernels
from bigtrain.optim.kinds import NO_DECAY

Source = GradientPath | Iterable[Segment]
"""A gradient path, or some of its segments."""


class Optimizer(ABC):
    """Updates the main parameters of segments from their main gradients, in place, on this rank.

    What the model computes with, if that is of a lower precision, is written in the same pass.
    Nothing is communicated, unless an optimizer says so. `moments` holds, by name, one flat fp32
    tensor per segment, or None for a segment that has no such state.
    """

    def __init__(self, source: Source, lr: float, weight_decay: float, kernels: Kernels) -> None:
        found = source.segments() if isinstance(source, GradientPath) else source
        self.segments: list[Segment] = list(found)
        self.lr = lr
        self.weight_decay = weight_decay
        self.kernels: Kernels = kernels
        self.num_updates = 0
        self.moments: dict[str, list[torch.Tensor | None]] = {}

    @torch.no_grad()
    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
    ) -> None:
        """Do one update with rate `lr`; gradients are first divided by the scalar `grad_divisor`.

        Clipping is such a division, fused into the update: no pass over memory of its own. If the
        divisor is NaN or infinite, neither parameters nor moments change. `done(bucket)` is called
        as soon as all segments of a bucket are updated, beginning with the last bucket, which is
        what the next forward uses first; not for a bucket of which there are none here.
        """
        self.num_updates += 1
        rate = self.lr if lr is None else lr
        if grad_divisor is not None and self.segments:
            grad_divisor = grad_divisor.to(self.segments[0].main_params.device)
        self._prepare(grad_divisor)
        backward = reversed(list(enumerate(self.segments)))
        for bucket, segments in groupby(backward, key=lambda item: item[1].bucket):
            for index, segment in segments:
                decay = 0.0 if segment.kind == NO_DECAY else self.weight_decay
                self._update(index, segment, rate, decay, grad_divisor)
            bucket.rounded = True
            if done is not None:
                done(bucket)

    def _prepare(self, divisor: torch.Tensor | None) -> None:  # noqa: B027 - most need nothing
        """Do what needs all segments, before any is updated."""

    @abstractmethod
    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        """Update this segment, the one with that index, and its `low_params` if it has any."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all moments on this rank."""
        flats = [flat for flats in self.moments.values() for flat in flats if flat is not None]
        return sum(flat.nbytes for flat in flats)

    def _keeps(self, name: str, kind: str) -> bool:
        """Return whether segments of this kind have the moment `name`."""
        return True

    def _add_moment(self, name: str) -> None:
        """Make room for the moment `name`, zeros."""
        self.moments[name] = [
            s.bucket.new_state(s.stop - s.start) if self._keeps(name, s.kind) else None
            for s in self.segments
        ]

    def _moment(self, name: str, index: int) -> torch.Tensor:
        flat = self.moments[name][index]
        assert flat is not None
        return flat
