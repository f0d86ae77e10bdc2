"""Lion on flat blocks: every element moves by the same length, along a sign.

Source: https://arxiv.org/abs/2302.06675. A block is as `optimizer` says.
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import check_blocks, divided, dtype_of, write
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, chosen


def lion_(
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Do an update of Lion in place; weight decay is decoupled.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    check_blocks("lion_", main, grad, param, divisor, exp_avg=exp_avg)
    beta1, beta2 = betas
    numbers = (1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, lr)
    use = chosen("lion_", kernels, main, grad, param)
    (_LION if use else _reference)(main, param, grad, exp_avg, divisor, *numbers)


def _kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    divisor: torch.Tensor | None,
    *numbers: float,
) -> None:
    library.call(
        "bt_lion",
        main.device,
        *(main.numel(), main, param, dtype_of(param), grad, grad.dtype, exp_avg, divisor),
        *numbers,
    )


def _reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    divisor: torch.Tensor | None,
    decay: float,
    beta1: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    lr: float,
) -> None:
    g = divided(grad, divisor)
    c = exp_avg * beta1 + g * one_minus_beta1
    sign = torch.where(c > 0, 1.0, torch.where(c < 0, -1.0, c))  # zero and NaN stay
    new = main * decay - sign * lr
    write(divisor, (exp_avg, exp_avg * beta2 + g * one_minus_beta2), (main, new), (param, new))


_LION = Op(
    "lion_(Tensor(a!) main, Tensor(b!)? param, Tensor grad, Tensor(c!) exp_avg, Tensor? divisor, "
    "float decay, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2, "
    "float lr) -> ()",
    kernel=_kernel,
    reference=_reference,
)
