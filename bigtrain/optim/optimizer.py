"""What all optimizers share: segments, state, the order of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from itertools import groupby

import torch

from bigtrain.comm.buckets import Bucket, Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.ops.op import Kernels
from bigtrain.optim.kinds import NO_DECAY

MOST_ROOTS = 5.0  # of the variance that a mean which came in few bits may be, at least

Source = GradientPath | Iterable[Segment]
"""A gradient path, or some of its segments."""


class Optimizer(ABC):
    """Updates the main parameters of segments from their main gradients, in place, on this rank.

    What the model computes with, if that is of a lower precision, is written in the same pass.
    Nothing is communicated, unless an optimizer says so. `moments` holds, by name, one flat fp32
    tensor per segment, or None for a segment that has no such state. Where a path brings the mean
    of gradients over steps in place of a gradient (`bucket.momentum`), that is the first moment.
    """

    takes_momentum = False  # can it update from a mean of gradients that it has not made?
    takes_own_momentum = False  # and from one that is another on each rank, for some steps?

    def __init__(self, source: Source, lr: float, weight_decay: float, kernels: Kernels) -> None:
        path = source if isinstance(source, GradientPath) else None
        found = path.segments() if path is not None else source
        self.segments: list[Segment] = list(found)  # type: ignore[arg-type]
        self._path = path
        self.lr = lr
        self.weight_decay = weight_decay
        self.kernels: Kernels = kernels
        self.num_updates = 0
        self.rate, self.rising = 0.0, True
        self.moments: dict[str, list[torch.Tensor | None]] = {}
        if path is not None:
            path.updated_by(self)

    @torch.no_grad()
    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
        only: Collection[int] | None = None,
    ) -> None:
        """Do one update with rate `lr`; gradients are first divided by the scalar `grad_divisor`.

        Clipping is such a division, fused into the update: no pass over memory of its own. If the
        divisor is NaN or infinite, neither parameters nor moments change. `done(bucket)` is called
        as soon as all segments of a bucket are updated, beginning with the last bucket, which is
        what the next forward uses first; not for a bucket of which there are none here. `only`:
        indices of the buckets to update; None: all.
        """
        self.num_updates += 1
        rate = self.lr if lr is None else lr
        self.rate, self.rising = rate, rate > self.rate
        if self._path is not None:
            self._path.divided(grad_divisor)
        if grad_divisor is not None and self.segments:
            grad_divisor = grad_divisor.to(self.segments[0].main_params.device)
        self._prepare(grad_divisor)
        backward = reversed(list(enumerate(self.segments)))
        for bucket, segments in groupby(backward, key=lambda item: item[1].bucket):
            if only is not None and bucket.index not in only:
                continue
            for index, segment in segments:
                decay = 0.0 if segment.kind == NO_DECAY else self.weight_decay
                momentum = bucket.momentum
                given = rate if momentum is None or momentum.rate is None else momentum.rate
                self._update(index, segment, given, decay, grad_divisor)
            bucket.rounded = True
            if done is not None:
                done(bucket)

    # -- as a wire sees it ---------------------------------------------------------------------

    @property
    def decays(self) -> tuple[float, float]:
        """Of the running means of the gradient and its square, where it takes momentum."""
        raise NotImplementedError

    def first_moment(self, bucket: Bucket) -> torch.Tensor:
        """Return the running mean of the gradient of the owned block [n], a copy."""
        mean = torch.zeros_like(bucket.main_grads)
        for index, segment in self._of(bucket):
            segment.of(mean).copy_(self._moment("exp_avg", index))
        return mean

    def set_first_moment(self, bucket: Bucket, mean: torch.Tensor) -> None:
        for index, segment in self._of(bucket):
            self._moment("exp_avg", index).copy_(segment.of(mean))
            self._bound(index)

    def sum_of_variance(self, bucket: Bucket) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device=bucket.main_grads.device)
        for index, _ in self._of(bucket):
            total += self._moment("exp_avg_sq", index).sum(dtype=torch.float64)
        return total

    def _of(self, bucket: Bucket) -> list[tuple[int, Segment]]:
        return [(i, segment) for i, segment in enumerate(self.segments) if segment.bucket is bucket]

    def _take_momentum(self, index: int, segment: Segment, divisor: torch.Tensor | None) -> None:
        """Take the first moment as it came, and the second one's share of the gradient, if any.

        Nothing is left to divide by. (A divisor that forbids the update leaves no momentum.)
        """
        momentum = segment.bucket.momentum
        assert momentum is not None
        mean, square = self._moment("exp_avg", index), self._moment("exp_avg_sq", index)
        if momentum.gradient is not None:
            gradient = segment.of(momentum.gradient)
            gradient = gradient if divisor is None else gradient / divisor
            square.mul_(momentum.decay).addcmul_(gradient, gradient, value=1 - momentum.decay)
        if momentum.fades is not None:
            mean.mul_(momentum.fades)
            return
        mean.copy_(segment.main_grads)
        self._bound(index, alone=momentum.alone)

    def _bound(self, index: int, *, alone: bool = False) -> None:
        """Hold a first moment that came in few bits to what it can be beside the second.

        Signs are never zero, and share a scale with their neighbours. The mean of gradients of any
        sizes is `most` roots of the mean of their squares at most (Cauchy and Schwarz). Where there
        never was a gradient, this is taken for the first one; or for none, if other ranks do not
        have it (`alone`), since the second moment is the same on all.
        """
        mean, square = self._moment("exp_avg", index), self._moment("exp_avg_sq", index)
        beta1, beta2 = self.decays
        if not alone:
            first = mean**2 * ((1 - beta2) / (1 - beta1) ** 2)
            torch.where(square > 0, square, first, out=square)
        apart = (1 - beta2) * (1 - beta1**2 / beta2) if beta2 > beta1**2 else 0.0
        most = max(MOST_ROOTS, (1 - beta1) / apart**0.5 if apart > 0 else 0.0)
        roots = square.sqrt().mul_(most)
        torch.minimum(torch.maximum(mean, -roots, out=mean), roots, out=mean)

    @property
    def progress(self) -> dict[str, float] | None:
        """What it must know beside moments to go on in the same way, by parameters' names."""
        return None

    @progress.setter
    def progress(self, saved: dict[str, float] | None) -> None:
        return None  # most have nothing to take up

    # -- of each kind --------------------------------------------------------------------------

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
