"""AdamW and SGD on flat segments, one fused pass each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket, Segment
from bigtrain.config.schema import AdamwOptimizer, SgdOptimizer
from bigtrain.ops.op import Kernels
from bigtrain.ops.optimizer import adamw_, sgd_

DECAY, NO_DECAY = "decay", "no_decay"


def decay_kind(name: str, param: nn.Parameter) -> str:
    """Return which kind a parameter is: matrices and embeddings decay, norms and biases do not."""
    return DECAY if param.ndim >= 2 else NO_DECAY


class Optimizer(ABC):
    """Updates the main parameters of `segments` from their main gradients, in place, on this rank.

    What the model computes with, if that is of a lower precision, is written in the same pass.
    Nothing is communicated. `moments` holds, by name, one flat fp32 tensor per segment.
    """

    def __init__(
        self, segments: Iterable[Segment], lr: float, weight_decay: float, kernels: Kernels
    ) -> None:
        self.segments = list(segments)
        self.lr = lr
        self.weight_decay = weight_decay
        self.kernels: Kernels = kernels
        self.num_updates = 0
        self.moments: dict[str, list[torch.Tensor]] = {}

    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] = lambda bucket: None,
    ) -> None:
        """Do one update with rate `lr`; gradients are first divided by the scalar `grad_divisor`.

        Clipping is such a division, fused into the update: no pass over memory of its own.
        done(bucket) is called as soon as all that this rank owns of a bucket is updated.
        """
        self.num_updates += 1
        rate = self.lr if lr is None else lr
        left = Counter(segment.bucket for segment in self.segments)
        # Backward, since the last bucket is what the next forward uses first.
        for index, segment in reversed(list(enumerate(self.segments))):
            decay = self.weight_decay if segment.kind == DECAY else 0.0
            divisor = None if grad_divisor is None else grad_divisor.to(segment.main_params.device)
            segment.bucket.rounded = self._update(index, segment, rate, decay, divisor)
            left[segment.bucket] -= 1
            if not left[segment.bucket]:
                done(segment.bucket)

    @abstractmethod
    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> bool:
        """Update this segment, the one with that index; return whether `low_params` too."""

    def _zeros(self) -> list[torch.Tensor]:
        return [segment.new_state() for segment in self.segments]


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), with bias correction, moments in fp32."""

    def __init__(
        self,
        segments: Iterable[Segment],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(segments, lr, weight_decay, kernels)
        self.betas, self.eps = betas, eps
        self.moments = {"exp_avg": self._zeros(), "exp_avg_sq": self._zeros()}

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> bool:
        adamw_(
            segment.main_params,
            segment.main_grads,
            self.moments["exp_avg"][index],
            self.moments["exp_avg_sq"][index],
            step=self.num_updates,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )
        return True


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, L2 decay, and Nesterov's form on request."""

    def __init__(
        self,
        segments: Iterable[Segment],
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(segments, lr, weight_decay, kernels)
        self.momentum, self.nesterov = momentum, nesterov
        self.moments = {"momentum": self._zeros()} if momentum else {}

    def _update(
        self,
        index: int,
        segment: Segment,
        lr: float,
        weight_decay: float,
        divisor: torch.Tensor | None,
    ) -> bool:
        sgd_(
            segment.main_params,
            segment.main_grads,
            self.moments["momentum"][index] if self.momentum else None,
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=weight_decay,
            param=segment.low_params,
            divisor=divisor,
            kernels=self.kernels,
        )
        return True


def build_optimizer(
    segments: Iterable[Segment], config: AdamwOptimizer | SgdOptimizer, kernels: Kernels = "auto"
) -> Optimizer:
    """Return the optimizer that `config` describes, for these segments."""
    if isinstance(config, SgdOptimizer):
        of_sgd = (config.momentum, config.nesterov, config.weight_decay)
        return SGD(segments, config.lr, *of_sgd, kernels=kernels)
    of_adamw = ((config.betas[0], config.betas[1]), config.eps, config.weight_decay)
    return AdamW(segments, config.lr, *of_adamw, kernels=kernels)
