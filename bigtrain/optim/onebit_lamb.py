"""1-bit LAMB: trust ratios that go on from those of the warm-up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from bigtrain.comm.buckets import Bucket, Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.errors import BigtrainError
from bigtrain.ops.lamb import trust_ratios
from bigtrain.optim.lamb import LAMB

FOLLOWS = 0.9  # what the mean of trust ratios keeps of itself
STEP = 0.1  # by which share the factor may change in a step
LEAST, MOST = 0.5, 4.0  # of the factor


class OneBitLAMB(LAMB):
    """LAMB whose mean of gradients comes in few bits (https://arxiv.org/abs/2104.06069).

    While gradients go exactly it is LAMB, and keeps a running mean of each trust ratio. That is the
    ratio from then on, times a factor: how much larger the frozen variance is than one of gradients
    that are reconstructed from the mean, where that is most. Costs 4 bytes for each element. Takes
    what LAMB takes.

    Raises:
        BigtrainError: ranks share out what they update.
    """

    def __init__(self, source: GradientPath, *args: Any, **options: Any) -> None:
        if any(bucket.sharing.inner.degree > 1 for bucket in source.buckets):
            raise BigtrainError(
                "1-bit LAMB with parameters that ranks share out",
                why="it needs all of a parameter's variance on each rank",
                mend="use compression=onebit without ZeRO, or LAMB with compression=default",
            )
        super().__init__(source, *args, **options)
        slots = len(source.slots)
        self._trust = torch.zeros(slots, device=source.device)  # running means; 0: none yet
        self._factors = torch.ones(slots, device=source.device)
        self._fresh: dict[int, torch.Tensor] = {}  # variances of reconstructed gradients
        degree = source.layer_axis.degree if source.layer_axis is not None else 1
        self._seen = torch.zeros(slots, degree, dtype=torch.float64, device=source.device)

    @property
    def num_bytes(self) -> int:
        few = [s for s in self.segments if s.bucket.sharing.in_few_bits]
        return super().num_bytes + sum(4 * (s.stop - s.start) for s in few)

    def set_first_moment(self, bucket: Bucket, mean: torch.Tensor) -> None:
        super().set_first_moment(bucket, mean)
        for index, _ in self._of(bucket):
            self._fresh.pop(index, None)  # what it was reconstructed from is gone

    def _take_momentum(self, index: int, segment: Segment, divisor: torch.Tensor | None) -> None:
        mean, variance = self._moment("exp_avg", index), self._moment("exp_avg_sq", index)
        beta1, beta2 = self.betas
        gradient = mean * -beta1
        super()._take_momentum(index, segment, divisor)
        gradient.add_(mean).div_(1 - beta1)
        fresh = self._fresh_of(index, variance)
        fresh.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        over = (variance.sqrt() + self.eps) / (fresh.sqrt() + self.eps)
        column = self.path.layer_axis.rank if self.path.layer_axis is not None else 0
        rows = self._places[index].rows.tolist()
        for row, (_, start, stop) in zip(rows, segment.parts(), strict=True):
            self._seen[row, column] = over[start:stop].max()

    def _fresh_of(self, index: int, variance: torch.Tensor) -> torch.Tensor:
        """Return the fresh variance; one that begins is such that the factor goes on."""
        if index not in self._fresh:
            fresh, factors = variance.clone(), self._factors[self._places[index].rows].tolist()
            for factor, (_, start, stop) in zip(factors, self.segments[index].parts(), strict=True):
                fresh[start:stop] /= factor**2
            self._fresh[index] = fresh
        return self._fresh[index]

    def _ratios_of(self, values: torch.Tensor, came: torch.Tensor, *, counts: bool) -> torch.Tensor:
        ratios = trust_ratios(values[:, :2])
        if not counts:
            return ratios
        self._exact = {b.index for b in self.path.buckets if b.momentum is None}
        seen = self.path.sum_over_parts(self._seen).amax(1).float()
        self._seen.zero_()
        mean = torch.where(self._trust > 0, FOLLOWS * self._trust + (1 - FOLLOWS) * ratios, ratios)
        self._trust = torch.where(came & (self._trust > 0), self._trust, mean)
        bounded = torch.minimum(
            torch.maximum(seen, self._factors * (1 - STEP)), self._factors * (1 + STEP)
        )
        self._factors = torch.where(came, bounded.clamp(LEAST, MOST), 1.0)
        return torch.where(came, self._trust * self._factors, ratios)

    @property
    def progress(self) -> dict[str, float] | None:
        slots, trust, factors = self.path.slots, self._trust.tolist(), self._factors.tolist()
        known = [row for row, value in enumerate(trust) if value > 0]
        return {
            **{f"trust of {slots[row].name}": trust[row] for row in known},
            **{f"factor of {slots[row].name}": factors[row] for row in known},
        }

    @progress.setter
    def progress(self, saved: dict[str, float] | None) -> None:
        for row, slot in enumerate(self.path.slots):
            self._trust[row] = _number(saved, f"trust of {slot.name}", 0.0)
            self._factors[row] = _number(saved, f"factor of {slot.name}", 1.0)


def _number(saved: Mapping[str, float] | None, name: str, otherwise: float) -> float:
    return (saved or {}).get(name, otherwise)
