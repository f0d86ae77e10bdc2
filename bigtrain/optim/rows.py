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


class _FlatRows:
    """Takes the rows out of the table, updates them as any flat block, and puts them back."""

    factor: float

    def moments(self, size: int) -> dict[str, int]:
        raise NotImplementedError

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
        tables = [values, *(moments[name] for name in self.moments(1))]
        own = [table.index_select(0, rows) for table in tables]
        flat = [tensor.view(-1) for tensor in own]
        self._update(flat, grad.reshape(-1), rate * self.factor, divisor, step)
        for table, new in zip(tables, own, strict=True):
            table.index_copy_(0, rows, new)

    def _update(
        self,
        own: list[torch.Tensor],
        grad: torch.Tensor,
        lr: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        """Update values and moments, each flat, in place."""
        raise NotImplementedError


class AdamRows(_FlatRows):
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

    def _update(
        self,
        own: list[torch.Tensor],
        grad: torch.Tensor,
        lr: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        values, *moments = own
        adamw_(
            values,
            grad,
            *moments,
            step=step,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            divisor=divisor,
            kernels=self.kernels,
        )


class SgdRows(_FlatRows):
    """Plain SGD of rows."""

    def __init__(self, factor: float, kernels: Kernels = "auto") -> None:
        self.factor, self.kernels = factor, kernels

    def moments(self, size: int) -> dict[str, int]:
        return {}

    def _update(
        self,
        own: list[torch.Tensor],
        grad: torch.Tensor,
        lr: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        sgd_(own[0], grad, None, lr=lr, divisor=divisor, kernels=self.kernels)


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
