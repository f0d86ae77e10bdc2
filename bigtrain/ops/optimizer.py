"""Optimizer updates of flat blocks, each in one pass over memory.

A block is a flat stretch of parameters: `main` fp32; `grad` fp32, bf16 or fp16; the moments fp32;
and `param`, what the model computes with, if that is of a lower precision: `main` is rounded to it
in the same pass. `divisor` is a scalar fp32 tensor on the device that gradients are divided by
first, for clipping and loss scaling; if it is NaN or infinite, nothing is changed, so that a step
can be skipped without asking the device.

Every implementation gives the same bits (kernels/include/bt_abi.h says what is computed).
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import check_blocks, divided, dtype_of, quotient, root, write
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, chosen


def adamw_(
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    moments_stay: bool = False,
    kernels: Kernels = "auto",
) -> None:
    """Do update number `step` (from 1) of AdamW, with bias correction, in place.

    moments_stay: they have what they need of `grad` already, which is not looked at.
    Source: https://arxiv.org/abs/1711.05101. See the module for shapes and dtypes.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    check_blocks("adamw_", main, grad, param, divisor, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    beta1, beta2 = betas
    gradient = (0.0, 1.0, 0.0) if moments_stay else (1 - beta1, beta2, 1 - beta2)
    numbers = (
        1 - lr * weight_decay,
        *gradient,
        lr / (1 - beta1**step),
        (1 - beta2**step) ** 0.5,
        eps,
    )
    blocks = (main, param, grad, exp_avg, exp_avg_sq, divisor)
    use = chosen("adamw_", kernels, main, grad, param)
    (_ADAMW if use else _adamw_reference)(*blocks, *numbers)


def _adamw_kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    *numbers: float,
) -> None:
    library.call(
        "bt_adamw",
        main.device,
        *(main.numel(), main, param, dtype_of(param), grad, grad.dtype),
        *(exp_avg, exp_avg_sq, divisor, *numbers),
    )


def _adamw_reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    decay: float,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    step_size: float,
    correction2: float,
    eps: float,
) -> None:
    g = divided(grad, divisor)
    m = exp_avg + (g - exp_avg) * one_minus_beta1
    v = exp_avg_sq * beta2 + g * one_minus_beta2 * g
    new = main * decay - m * step_size / (quotient(root(v), correction2) + eps)
    write(divisor, (exp_avg, m), (exp_avg_sq, v), (main, new), (param, new))


_ADAMW = Op(
    "adamw_(Tensor(a!) main, Tensor(b!)? param, Tensor grad, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor? divisor, float decay, float one_minus_beta1, float beta2, "
    "float one_minus_beta2, float step_size, float correction2, float eps) -> ()",
    kernel=_adamw_kernel,
    reference=_adamw_reference,
)


def sgd_(
    main: torch.Tensor,
    grad: torch.Tensor,
    momentum_buffer: torch.Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Do an update of stochastic gradient descent in place; no buffer: without momentum.

    As torch.optim.SGD with dampening 0 and a buffer that begins with zeros.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    check_blocks("sgd_", main, grad, param, divisor, momentum_buffer=momentum_buffer)
    use = chosen("sgd_", kernels, main, grad, param)
    (_SGD if use else _sgd_reference)(
        main, param, grad, momentum_buffer, divisor, lr, momentum, weight_decay, nesterov
    )


def _sgd_kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    buffer: torch.Tensor | None,
    divisor: torch.Tensor | None,
    *numbers: float,
) -> None:
    library.call(
        "bt_sgd",
        main.device,
        *(main.numel(), main, param, dtype_of(param), grad, grad.dtype, buffer, divisor, *numbers),
    )


def _sgd_reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    grad: torch.Tensor,
    buffer: torch.Tensor | None,
    divisor: torch.Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    d = g = divided(grad, divisor) + main * weight_decay
    if buffer is not None:
        moved = buffer * momentum + g
        d = g + moved * momentum if nesterov else moved
        write(divisor, (buffer, moved))
    new = main - d * lr
    write(divisor, (main, new), (param, new))


_SGD = Op(
    "sgd_(Tensor(a!) main, Tensor(b!)? param, Tensor grad, Tensor(c!)? momentum_buffer, "
    "Tensor? divisor, float lr, float momentum, float weight_decay, bool nesterov) -> ()",
    kernel=_sgd_kernel,
    reference=_sgd_reference,
)
