"""SGD with momentum on flat segments, one fused pass each."""

from __future__ import annotations

import torch

from bigtrain.comm.buckets import Segment
from bigtrain.ops.op import Kernels
from bigtrain.ops.optimizer import sgd_
from bigtrain.optim.optimizer import Optimizer, Source


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, L2 decay, and Nesterov's form on request."""

    def __init__(
        self,
        source: Source,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(source, lr, weight_decay, kernels)
        self.momentum, self.nesterov = momentum, nesterov
        if momentum:
            self._add_moment("momentum")

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> None:
        sgd_(
            segment.main_params,
            segment.main_grads,
            self._moment("momentum", index) if self.momentum else None,
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )
