"""Adagrad on flat segments, one fused pass each."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.ops.adagrad import adagrad_
from bigtrain.ops.op import Kernels
from bigtrain.optim.optimizer import Optimizer, Source


class Adagrad(Optimizer):
    """Adagrad (https://jmlr.org/papers/v12/duchi11a.html), element by element, with L2 decay."""

    def __init__(
        self,
        source: Source,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.eps = eps
        self._add_moment("sum_sq")

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        adagrad_(
            segment.main_params,
            segment.main_grads,
            self._moment("sum_sq", index),
            lr=lr,
            eps=self.eps,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )
