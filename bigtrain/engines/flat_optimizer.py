"""bigtrain's own updates behind the interface of a torch optimizer, as DeepSpeed wants one.

DeepSpeed gives it flat fp32 partitions in place of parameters. So an update has the same formula
and the same kernels as in a native run, on CPU too, and nothing is compiled by DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from bigtrain.config.schema import AdamwOptimizer, SgdOptimizer
from bigtrain.ops.op import Kernels
from bigtrain.ops.optimizer import adamw_, sgd_


class FlatOptimizer(torch.optim.Optimizer):
    """AdamW or SGD with moments in fp32; the weight decay is that of each parameter group.

    While not `armed`, `step` changes nothing: so DeepSpeed can do all else that it does in a step.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        config: AdamwOptimizer | SgdOptimizer,
        kernels: Kernels,
    ) -> None:
        super().__init__(groups, {"lr": config.lr, "weight_decay": config.weight_decay})
        self.config = config
        self.kernels: Kernels = kernels
        self.armed = False
        self.num_updates = 0
        self.rate = config.lr
        self.divisor: torch.Tensor | None = None

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the moments that each parameter has."""
        if isinstance(self.config, AdamwOptimizer):
            return "exp_avg", "exp_avg_sq"
        return ("momentum",) if self.config.momentum else ()

    def moment(self, param: torch.Tensor, name: str) -> torch.Tensor:
        """Return a moment of `param`, which is zero at first."""
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param.data, dtype=torch.float32)
        found: torch.Tensor = state[name]
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters of all groups."""
        if not self.armed:
            return
        for group in self.param_groups:
            for param in group["params"]:
                grad = torch.zeros_like(param) if param.grad is None else param.grad
                moments = [self.moment(param, name).view(-1) for name in self.moments]
                main = param.data.view(-1)
                self._update(main, grad.reshape(-1).float(), moments, group["weight_decay"])

    def _update(
        self,
        main: torch.Tensor,
        grad: torch.Tensor,
        moments: list[torch.Tensor],
        weight_decay: float,
    ) -> None:
        config = self.config
        if isinstance(config, AdamwOptimizer):
            adamw_(
                main,
                grad,
                *moments,
                step=self.num_updates,
                lr=self.rate,
                betas=(config.betas[0], config.betas[1]),
                eps=config.eps,
                weight_decay=weight_decay,
                divisor=self.divisor,
                kernels=self.kernels,
            )
        else:
            sgd_(
                main,
                grad,
                moments[0] if moments else None,
                lr=self.rate,
                momentum=config.momentum,
                nesterov=config.nesterov,
                weight_decay=weight_decay,
                divisor=self.divisor,
                kernels=self.kernels,
            )
