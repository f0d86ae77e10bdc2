"""AdamW on flat segments, one fused pass each."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.ops.op import Kernels
from bigtrain.ops.optimizer import adamw_
from bigtrain.optim.optimizer import Optimizer, Source


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), with bias correction, moments in fp32."""

    takes_momentum = takes_own_momentum = True

    def __init__(
        self,
        source: Source,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.betas, self.eps = betas, eps
        self._add_moment("exp_avg")
        self._add_moment("exp_avg_sq")

    @property
    def decays(self) -> tuple[float, float]:
        return self.betas

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        given = segment.bucket.momentum is not None
        if given:
            self._take_momentum(index, segment, divisor)
            divisor = None
        adamw_(
            segment.main_params,
            segment.main_grads,
            self._moment("exp_avg", index),
            self._moment("exp_avg_sq", index),
            step=self.num_updates,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            moments_stay=given,
            kernels=self.kernels,
        )
