"""AdamW and SGD on flat segments, one fused pass each (torch's fused kernels, CPU and CUDA)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn

from bigtrain.comm.buckets import Segment
from bigtrain.config.schema import AdamwOptimizer, SgdOptimizer

DECAY, NO_DECAY = "decay", "no_decay"


def decay_kind(name: str, param: nn.Parameter) -> str:
    """Return which kind a parameter is: matrices and embeddings decay, norms and biases do not."""
    return DECAY if param.ndim >= 2 else NO_DECAY


class Optimizer(ABC):
    """Updates the main parameters of `segments` from their main gradients, in place, on this rank.

    Nothing is communicated. `moments` holds, by name, one flat fp32 tensor per segment.
    """

    def __init__(self, segments: Iterable[Segment], lr: float, weight_decay: float) -> None:
        self.segments = list(segments)
        self.lr = lr
        self.weight_decay = weight_decay
        self.num_updates = 0
        self.moments: dict[str, list[torch.Tensor]] = {}

    def step(self, lr: float | None = None, grad_divisor: torch.Tensor | None = None) -> None:
        """Do one update with rate `lr`; gradients are first divided by the scalar `grad_divisor`.

        Clipping is such a division, fused into the update: no pass over memory of its own.
        """
        self.num_updates += 1
        for kind, decay in ((DECAY, self.weight_decay), (NO_DECAY, 0.0)):
            chosen = [i for i, segment in enumerate(self.segments) if segment.kind == kind]
            if chosen:
                self._update(chosen, self.lr if lr is None else lr, decay, grad_divisor)

    @abstractmethod
    def _update(
        self, chosen: list[int], lr: float, weight_decay: float, divisor: torch.Tensor | None
    ) -> None:
        """Update the segments with these indices."""

    def _zeros(self) -> list[torch.Tensor]:
        return [torch.zeros_like(segment.main_params) for segment in self.segments]


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101), with bias correction, moments in fp32."""

    def __init__(
        self,
        segments: Iterable[Segment],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(segments, lr, weight_decay)
        self.betas, self.eps = betas, eps
        self.moments = {"exp_avg": self._zeros(), "exp_avg_sq": self._zeros()}

    def _update(
        self, chosen: list[int], lr: float, weight_decay: float, divisor: torch.Tensor | None
    ) -> None:
        segments = [self.segments[i] for i in chosen]
        device = segments[0].main_params.device
        steps = torch.tensor(float(self.num_updates), device=device)
        torch._fused_adamw_(
            [segment.main_params for segment in segments],
            [segment.main_grads for segment in segments],
            [self.moments["exp_avg"][i] for i in chosen],
            [self.moments["exp_avg_sq"][i] for i in chosen],
            [],
            [steps] * len(segments),
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
            found_inf=None,
        )


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, L2 decay, and Nesterov's form on request."""

    def __init__(
        self,
        segments: Iterable[Segment],
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(segments, lr, weight_decay)
        self.momentum, self.nesterov = momentum, nesterov
        self.moments = {"momentum": self._zeros()} if momentum else {}

    def _update(
        self, chosen: list[int], lr: float, weight_decay: float, divisor: torch.Tensor | None
    ) -> None:
        segments = [self.segments[i] for i in chosen]
        torch._fused_sgd_(
            [segment.main_params for segment in segments],
            [segment.main_grads for segment in segments],
            [self.moments["momentum"][i] for i in chosen] if self.momentum else [],
            weight_decay=weight_decay,
            momentum=self.momentum,
            lr=lr,
            dampening=0.0,
            nesterov=self.nesterov,
            maximize=False,
            # With zero momentum and no dampening a first step is like any other.
            is_first_step=False,
            grad_scale=divisor,
            found_inf=None,
        )


def build_optimizer(
    segments: Iterable[Segment], config: AdamwOptimizer | SgdOptimizer
) -> Optimizer:
    """Return the optimizer that `config` describes, for these segments."""
    if isinstance(config, SgdOptimizer):
        return SGD(segments, config.lr, config.momentum, config.nesterov, config.weight_decay)
    betas = (config.betas[0], config.betas[1])
    return AdamW(segments, config.lr, betas, config.eps, config.weight_decay)
