"""LAMB on flat blocks: AdamW's direction, its length for each tensor in proportion to the tensor's.

Source: https://arxiv.org/abs/1904.00962. A block (see `optimizer`) holds several tensors, number t
at elements [offsets[t], offsets[t + 1]). Norms need all of a tensor, so the update has two halves:
between them, ranks that have parts of one tensor add up what `lamb_moments_` gives.
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import check_blocks, divided, dtype_of, quotient, root, write
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, check_dtype, check_flat, chosen, fail


def lamb_(
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    offsets: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Do update number `step` (from 1) of LAMB of a block of whole tensors, in place.

    offsets: [num_tensors + 1] int64, on the device.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    norms = lamb_moments_(
        *(main, grad, exp_avg, exp_avg_sq, offsets),
        step=step,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        divisor=divisor,
        kernels=kernels,
    )
    lamb_apply_(
        *(main, exp_avg, exp_avg_sq, offsets, trust_ratios(norms)),
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        param=param,
        divisor=divisor,
        kernels=kernels,
    )


def trust_ratios(norms: torch.Tensor) -> torch.Tensor:
    """Return |tensor| / |direction| [num_tensors] fp32, of the sums that `lamb_moments_` gives.

    1 where one of them is zero.
    """
    main, direction = norms.sqrt().unbind(1)
    return torch.where((main > 0) & (direction > 0), main / direction, 1.0).float()


def lamb_moments_(
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    offsets: torch.Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    divisor: torch.Tensor | None = None,
    moments_stay: bool = False,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Update the moments; return the sums of squares [num_tensors, 2] fp64 of tensors, directions.

    moments_stay: they have what they need of `grad` already, and do not change.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    name = "lamb_moments_"
    check_blocks(name, main, grad, None, divisor, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_offsets(name, main, offsets)
    gradient = (0.0, 1.0, 0.0) if moments_stay else (1 - betas[0], betas[1], 1 - betas[1])
    numbers = (*gradient, *_corrections(betas, step), eps, weight_decay)
    use = chosen("lamb_", kernels, main, grad)
    result: torch.Tensor = (_MOMENTS if use else _moments_reference)(
        main, grad, exp_avg, exp_avg_sq, divisor, offsets, *numbers
    )
    return result


def lamb_apply_(
    main: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    offsets: torch.Tensor,
    ratios: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    param: torch.Tensor | None = None,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> None:
    """Move each tensor by lr times its ratio [num_tensors] fp32 along its direction.

    Raises:
        BigtrainError: arguments that are not flat blocks of one size, or share memory.
    """
    name = "lamb_apply_"
    check_blocks(name, main, None, param, divisor, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    _check_offsets(name, main, offsets)
    check_dtype(name, (torch.float32,), ratios=ratios)
    check_alike(name, main, ratios=ratios)
    check_flat(name, len(offsets) - 1, ratios=ratios)
    use = chosen("lamb_", kernels, main, param)
    (_APPLY if use else _apply_reference)(
        *(main, param, exp_avg, exp_avg_sq, divisor, offsets, ratios),
        *(lr, *_corrections(betas, step), eps, weight_decay),
    )


def _corrections(betas: tuple[float, float], step: int) -> tuple[float, float]:
    return 1 - betas[0] ** step, (1 - betas[1] ** step) ** 0.5


def _check_offsets(name: str, main: torch.Tensor, offsets: torch.Tensor) -> None:
    check_dtype(name, (torch.int64,), offsets=offsets)
    check_alike(name, main, offsets=offsets)
    check_flat(name, offsets.numel(), offsets=offsets)
    if offsets.ndim != 1 or not len(offsets):
        raise fail(
            name,
            f"offsets has shape {tuple(offsets.shape)}",
            mend="pass where each tensor begins, and where the last one ends",
        )


def _check_order(name: str, main: torch.Tensor, offsets: torch.Tensor) -> None:
    if offsets.device.type != "cpu":  # nobody waits for a GPU here
        return
    whole = torch.cat([offsets.new_zeros(1), offsets, offsets.new_tensor([main.numel()])])
    if bool((whole.diff() < 0).any()):
        raise fail(
            name,
            f"offsets {offsets.tolist()[:8]} do not rise within 0 and {main.numel()}",
            why="tensors lie one behind the other in the block",
            mend="pass where each tensor begins, and where the last one ends",
        )


# -- kernels ---------------------------------------------------------------------------------------


def _moments_kernel(
    library: Library,
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    offsets: torch.Tensor,
    *numbers: float,
) -> torch.Tensor:
    _check_order("lamb_moments_", main, offsets)
    n, count = main.numel(), len(offsets) - 1
    norms = main.new_zeros(count, 2, dtype=torch.float64)
    workspace = main.new_empty(library.ask("bt_lamb_workspace", n, count), dtype=torch.float64)
    library.call(
        "bt_lamb_moments",
        main.device,
        *(n, main, grad, grad.dtype, exp_avg, exp_avg_sq, divisor, count, offsets, norms),
        *(workspace, *numbers),
    )
    return norms


def _apply_kernel(
    library: Library,
    main: torch.Tensor,
    param: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    offsets: torch.Tensor,
    ratios: torch.Tensor,
    *numbers: float,
) -> None:
    _check_order("lamb_apply_", main, offsets)
    library.call(
        "bt_lamb_apply",
        main.device,
        *(main.numel(), main, param, dtype_of(param), exp_avg, exp_avg_sq, divisor),
        *(len(offsets) - 1, offsets, ratios, *numbers),
    )


# -- references ------------------------------------------------------------------------------------


def _moments_reference(
    main: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    offsets: torch.Tensor,
    one_minus_beta1: float,
    beta2: float,
    one_minus_beta2: float,
    *numbers: float,
) -> torch.Tensor:
    _check_order("lamb_moments_", main, offsets)
    g = divided(grad, divisor)
    m = exp_avg + (g - exp_avg) * one_minus_beta1
    v = exp_avg_sq * beta2 + g * one_minus_beta2 * g
    write(divisor, (exp_avg, m), (exp_avg_sq, v))
    norms = main.new_zeros(len(offsets) - 1, 2, dtype=torch.float64)
    places = _places(main, offsets)
    inside = places >= 0
    for column, block in enumerate((main, _direction(main, m, v, *numbers))):
        norms[:, column].index_add_(0, places[inside], block[inside].double().square())
    return norms


def _apply_reference(
    main: torch.Tensor,
    param: torch.Tensor | None,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    divisor: torch.Tensor | None,
    offsets: torch.Tensor,
    ratios: torch.Tensor,
    lr: float,
    *numbers: float,
) -> None:
    _check_order("lamb_apply_", main, offsets)
    places = _places(main, offsets)
    rate = ratios[places.clamp(min=0)] * lr if len(ratios) else torch.zeros_like(main)
    moved = main - rate * _direction(main, exp_avg, exp_avg_sq, *numbers)
    new = torch.where(places >= 0, moved, main)
    write(divisor, (main, new))
    if param is not None:
        write(divisor, (param, torch.where(places >= 0, moved, param.float())))


def _direction(
    main: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    correction1: float,
    correction2: float,
    eps: float,
    weight_decay: float,
) -> torch.Tensor:
    scaled = quotient(m, correction1) / (quotient(root(v), correction2) + eps)
    return scaled + main * weight_decay


def _places(main: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return for each element which tensor it is of; -1 for none."""
    elements = torch.arange(main.numel(), device=main.device)
    places = torch.searchsorted(offsets, elements, right=True) - 1
    return torch.where(places < len(offsets) - 1, places, -1)


_MOMENTS = Op(
    "lamb_moments_(Tensor main, Tensor grad, Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, "
    "Tensor? divisor, Tensor offsets, float one_minus_beta1, float beta2, float one_minus_beta2, "
    "float correction1, float correction2, float eps, float weight_decay) -> Tensor",
    kernel=_moments_kernel,
    reference=_moments_reference,
    fake=lambda main, grad, exp_avg, exp_avg_sq, divisor, offsets, *numbers: main.new_empty(
        len(offsets) - 1, 2, dtype=torch.float64
    ),
)
_APPLY = Op(
    "lamb_apply_(Tensor(a!) main, Tensor(b!)? param, Tensor exp_avg, Tensor exp_avg_sq, "
    "Tensor? divisor, Tensor offsets, Tensor ratios, float lr, float correction1, "
    "float correction2, float eps, float weight_decay) -> ()",
    kernel=_apply_kernel,
    reference=_apply_reference,
)
