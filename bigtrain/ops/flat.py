"""What updates of flat blocks share: checks, exact arithmetic for references, writing results."""

from __future__ import annotations

import torch

from bigtrain.ops.op import check_alike, check_apart, check_dtype, check_flat

LOW = (torch.float32, torch.bfloat16, torch.float16)


def check_blocks(
    name: str,
    main: torch.Tensor,
    grad: torch.Tensor | None,
    param: torch.Tensor | None,
    divisor: torch.Tensor | None,
    **moments: torch.Tensor | None,
) -> None:
    """Refuse what are not flat blocks of one size with memory of their own.

    Raises:
        BigtrainError: dtype, device, number of elements, contiguity or shared memory.
    """
    check_dtype(name, (torch.float32,), main=main, divisor=divisor, **moments)
    check_dtype(name, LOW, grad=grad, param=param)
    check_alike(name, main, grad=grad, param=param, divisor=divisor, **moments)
    check_flat(name, main.numel(), main=main, grad=grad, param=param, **moments)
    check_flat(name, 1, divisor=divisor)
    check_apart(name, main=main, grad=grad, param=param, divisor=divisor, **moments)


def dtype_of(param: torch.Tensor | None) -> torch.dtype:
    """Return what a kernel is told of a parameter that may not be there."""
    return torch.float32 if param is None else param.dtype


def divided(grad: torch.Tensor, divisor: torch.Tensor | None) -> torch.Tensor:
    """Return grad / divisor in fp32."""
    return grad.float() if divisor is None else quotient(grad.float(), divisor)


def quotient(x: torch.Tensor, number: float | torch.Tensor) -> torch.Tensor:
    """Return x / number, rounded once: on a GPU torch multiplies by the reciprocal of a scalar."""
    divisor = torch.as_tensor(number, dtype=x.dtype, device=x.device)
    return x / divisor.reshape([1] * max(x.ndim, 1))


def root(x: torch.Tensor) -> torch.Tensor:
    """Return the square root of fp32 numbers, rounded once: torch's, by MKL, is not always."""
    return x.double().sqrt().float()


def write(divisor: torch.Tensor | None, *pairs: tuple[torch.Tensor | None, torch.Tensor]) -> None:
    """Copy new values to their places, unless the divisor is NaN or infinite."""
    for place, new in pairs:
        if place is not None:
            fresh = new.to(place.dtype)
            place.copy_(fresh if divisor is None else torch.where(divisor.isfinite(), fresh, place))


def sum_in_lanes(x: torch.Tensor, num_lanes: int) -> torch.Tensor:
    """Return the sum over the last dim: lanes in turn, then halves added to each other."""
    lanes = torch.nn.functional.pad(x, (0, -x.shape[-1] % num_lanes)).unflatten(-1, (-1, num_lanes))
    total = x.new_zeros(*x.shape[:-1], num_lanes)
    for number in range(lanes.shape[-2]):
        total = total + lanes[..., number, :]
    while total.shape[-1] > 1:
        first, second = total.chunk(2, dim=-1)
        total = first + second
    return total[..., 0]
