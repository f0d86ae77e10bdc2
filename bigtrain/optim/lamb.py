"""LAMB on flat segments: moments and norms of all, one collective, then the steps."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.ops.lamb import lamb_apply_, lamb_moments_, trust_ratios
from bigtrain.ops.op import Kernels
from bigtrain.optim.kinds import NO_DECAY
from bigtrain.optim.optimizer import Optimizer


class LAMB(Optimizer):
    """LAMB (https://arxiv.org/abs/1904.00962), with bias correction, moments in fp32.

    The length of a parameter's step is its learning rate times the parameter's own norm, whatever
    parts of it several ranks have: a step communicates two fp64 numbers a parameter, once.
    """

    def __init__(
        self,
        source: GradientPath,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.path = source
        self.betas, self.eps = betas, eps
        self._add_moment("exp_avg")
        self._add_moment("exp_avg_sq")
        rows = {slot.name: row for row, slot in enumerate(source.slots)}
        self._num_slots = len(rows)
        self._places = [_Place(segment, rows, source.device) for segment in self.segments]
        self._ratios = [torch.empty(0)] * len(self.segments)

    def _prepare(self, divisor: torch.Tensor | None) -> None:
        """Update all moments, and find the trust ratio of every parameter."""
        values = torch.zeros(self._num_slots, 2, dtype=torch.float64, device=self.path.device)
        for index, (segment, place) in enumerate(zip(self.segments, self._places, strict=True)):
            norms = lamb_moments_(
                segment.main_params,
                segment.main_grads,
                self._moment("exp_avg", index),
                self._moment("exp_avg_sq", index),
                place.offsets,
                step=self.num_updates,
                betas=self.betas,
                eps=self.eps,
                weight_decay=0.0 if segment.kind == NO_DECAY else self.weight_decay,
                divisor=divisor,
                kernels=self.kernels,
            )
            values[place.rows] = norms.to(values.device)
        ratios = trust_ratios(self.path.sum_over_parts(values))
        self._ratios = [ratios[place.rows].to(place.offsets.device) for place in self._places]

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        lamb_apply_(
            segment.main_params,
            self._moment("exp_avg", index),
            self._moment("exp_avg_sq", index),
            self._places[index].offsets,
            self._ratios[index],
            step=self.num_updates,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )


class _Place:
    """Where the parameters of a segment are: in it (`offsets`), and among all slots (`rows`).

    What is between two parameters counts to the first: it is padding, and zero.
    """

    def __init__(self, segment: Segment, rows: dict[str, int], device: torch.device) -> None:
        parts = list(segment.parts())
        bounds = [start for _, start, _ in parts] + [stop for _, _, stop in parts[-1:]]
        numbers = [rows[slot.name] for slot, _, _ in parts]
        self.offsets = torch.tensor(bounds or [0], device=segment.main_params.device)
        self.rows = torch.tensor(numbers, dtype=torch.int64, device=device)
