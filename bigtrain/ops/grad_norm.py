"""The norm of many gradients, whether they are finite, and dividing them, all in one pass."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bigtrain.ops.flat import LOW, divided, sum_in_lanes
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, check_apart, check_dtype, check_flat, chosen

PART, CHUNK = 1024, 65536  # elements, as bt_abi.h cuts tensors


class GradNorm(NamedTuple):
    """Scalars in fp64 on the device of the gradients."""

    squares: torch.Tensor  # the sum of squares
    num_not_finite: torch.Tensor  # elements that are NaN or infinite


def grad_norm(
    tensors: Sequence[torch.Tensor],
    *,
    divisor: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> GradNorm:
    """Return the sum of squares of all elements, in fp64, and how many are not finite.

    tensors: contiguous, fp32, bf16 or fp16, on one device; one at least. divisor: a scalar fp32
    tensor that elements are divided by before. The same bits on every machine and any number of
    threads.

    Raises:
        BigtrainError: tensors on several devices, not contiguous, of other dtypes.
    """
    return _of_all("grad_norm", tensors, divisor, False, kernels)


def unscale_(
    tensors: Sequence[torch.Tensor], divisor: torch.Tensor, *, kernels: Kernels = "auto"
) -> GradNorm:
    """Divide all elements by `divisor` in place, and return what `grad_norm` would give of them.

    Raises:
        BigtrainError: as `grad_norm`.
    """
    return _of_all("unscale_", tensors, divisor, True, kernels)


def _of_all(
    name: str,
    tensors: Sequence[torch.Tensor],
    divisor: torch.Tensor | None,
    write: bool,
    kernels: Kernels,
) -> GradNorm:
    first = tensors[0]
    for number, tensor in enumerate(tensors):
        if tensor.dtype in LOW and tensor.device == first.device and tensor.is_contiguous():
            continue  # as all but always
        argument = {f"tensor {number}": tensor}
        check_dtype(name, LOW, **argument)
        check_alike(name, first, **argument)
        check_flat(name, tensor.numel(), **argument)
    check_dtype(name, (torch.float32,), divisor=divisor)
    check_alike(name, first, divisor=divisor)
    check_flat(name, 1, divisor=divisor)
    if write:
        check_apart(name, **{f"tensor {number}": tensor for number, tensor in enumerate(tensors)})
    total = torch.zeros(2, dtype=torch.float64, device=first.device)
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        use = chosen("grad_norm", kernels, *same)
        if write:
            total += (_UNSCALE if use else _unscale_reference)(same, divisor)
        else:
            total += (_NORM if use else _norm_reference)(same, divisor)
    return GradNorm(total[0], total[1])


def _run(
    library: Library, tensors: list[torch.Tensor], divisor: torch.Tensor | None, write: bool
) -> torch.Tensor:
    count, first = len(tensors), tensors[0]
    pointers = (ctypes.c_void_p * count)(*(tensor.data_ptr() for tensor in tensors))
    sizes = (ctypes.c_int64 * count)(*(tensor.numel() for tensor in tensors))
    num_chunks = sum(-(-tensor.numel() // CHUNK) for tensor in tensors)
    workspace = first.new_empty(2 * num_chunks, dtype=torch.float64)
    out = first.new_empty(2, dtype=torch.float64)
    library.call(
        "bt_grad_norm",
        first.device,
        *(count, pointers, sizes, first.dtype, divisor, write, workspace, out),
    )
    return out


def _norm_reference(tensors: list[torch.Tensor], divisor: torch.Tensor | None) -> torch.Tensor:
    chunks = [torch.zeros(0, 2, dtype=torch.float64, device=tensors[0].device)]
    for tensor in tensors:
        values = divided(tensor.flatten(), divisor)
        numbers = torch.stack((values.double().square(), (~values.isfinite()).double()))
        parts = sum_in_lanes(_cut(numbers, PART), 16)  # [2, parts]
        chunks.append(sum_in_lanes(_cut(parts, CHUNK // PART), 16).T)
    return sum_in_lanes(torch.cat(chunks).T, 16)


def _cut(x: torch.Tensor, size: int) -> torch.Tensor:
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))


def _unscale_reference(tensors: list[torch.Tensor], divisor: torch.Tensor | None) -> torch.Tensor:
    result = _norm_reference(tensors, divisor)
    for tensor in tensors:
        tensor.copy_(divided(tensor, divisor))
    return result


def _fake(tensors: list[torch.Tensor], divisor: torch.Tensor | None) -> torch.Tensor:
    return tensors[0].new_empty(2, dtype=torch.float64)


_NORM = Op(
    "grad_norm(Tensor[] tensors, Tensor? divisor) -> Tensor",
    kernel=lambda library, tensors, divisor: _run(library, tensors, divisor, False),
    reference=_norm_reference,
    fake=_fake,
)
_UNSCALE = Op(
    "unscale_(Tensor(a!)[] tensors, Tensor divisor) -> Tensor",
    kernel=lambda library, tensors, divisor: _run(library, tensors, divisor, True),
    reference=_unscale_reference,
    fake=_fake,
)
