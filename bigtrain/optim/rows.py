"""Optimizers of some rows of a table: what was not touched is not looked at."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bigtrain.config.serving import RowsSection
from bigtrain.ops.adagrad import adagrad_rows_
from bigtrain.ops.op import Kernels
from bigtrain.ops.optimizer import adamw_, sgd_


class AdagradRows:
    """Adagrad of rows (https://jmlr.org/papers/v12/duchi11a.html).

    per_row: one sum for a row, of its mean squares, in place of one for each number. factor: of the
    rate of dense parameters.
    """

    def __init__(
        self, factor: float, per_row: bool, eps: float = 1e-10, kernels: Kernels = "auto"
    ) -> None:
        self.factor, self.per_row, self.eps, self.kernels = factor, per_row, eps, kernels

    def moments(self, size: int) -> dict[str, int]:
        return {"sum_sq": 0 if self.per_row else size}

    def update(
        self,
        values: torch.Tensor,
        rows: torch.Tensor,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        *,
        rate: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        adagrad_rows_(
            values,
            rows,
            grad,
            moments["sum_sq"],
            lr=rate * self.factor,
            eps=self.eps,
            divisor=divisor,
            kernels=self.kernels,
        )


class AdamRows:
    """Adam of rows, without decay: moments of a row move when it is touched, their bias is
    corrected by the number of all updates, as in torch.optim.SparseAdam."""

    def __init__(
        self,
        factor: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        kernels: Kernels = "auto",
    ) -> None:
        self.factor, self.betas, self.eps, self.kernels = factor, betas, eps, kernels

    def moments(self, size: int) -> dict[str, int]:
        return {"exp_avg": size, "exp_avg_sq": size}

    def update(
        self,
        values: torch.Tensor,
        rows: torch.Tensor,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        *,
        rate: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        tensors = [values, moments["exp_avg"], moments["exp_avg_sq"]]
        own = [tensor.index_select(0, rows) for tensor in tensors]
        adamw_(
            own[0].view(-1),
            grad.reshape(-1),
            *(moment.view(-1) for moment in own[1:]),
            step=step,
            lr=rate * self.factor,
            betas=self.betas,
            eps=self.eps,
            divisor=divisor,
            kernels=self.kernels,
        )
        for tensor, new in zip(tensors, own, strict=True):
            tensor.index_copy_(0, rows, new)


class SgdRows:
    """Plain SGD of rows."""

    def __init__(self, factor: float, kernels: Kernels = "auto") -> None:
        self.factor, self.kernels = factor, kernels

    def moments(self, size: int) -> dict[str, int]:
        return {}

    def update(
        self,
        values: torch.Tensor,
        rows: torch.Tensor,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        *,
        rate: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        own = values.index_select(0, rows)
        sgd_(
            own.view(-1),
            grad.reshape(-1),
            None,
            lr=rate * self.factor,
            divisor=divisor,
            kernels=self.kernels,
        )
        values.index_copy_(0, rows, own)


def make_row_optimizer(
    config: RowsSection, dense_lr: float, kernels: Kernels = "auto"
) -> AdagradRows | AdamRows | SgdRows:
    """Return the optimizer of rows that `config` describes; dense_lr: peak rate of the others."""
    factor = config.lr / dense_lr
    if config.optimizer == "adam":
        return AdamRows(factor, kernels=kernels)
    if config.optimizer == "sgd":
        return SgdRows(factor, kernels=kernels)
    return AdagradRows(factor, config.optimizer == "row_adagrad", kernels=kernels)
