"""Lion on flat segments, one fused pass each."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.ops.lion import lion_
from bigtrain.ops.op import Kernels
from bigtrain.optim.optimizer import Optimizer, Source


class Lion(Optimizer):
    """Lion (https://arxiv.org/abs/2302.06675): the sign of a momentum, with decoupled decay."""

    def __init__(
        self,
        source: Source,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1.0,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.betas = betas
        self._add_moment("exp_avg")

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        lion_(
            segment.main_params,
            segment.main_grads,
            self._moment("exp_avg", index),
            lr=lr,
            betas=self.betas,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )
