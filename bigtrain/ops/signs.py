"""Signs with error feedback: one bit an element. See `message` for blocks and scales.

Source: 1-bit Adam, https://arxiv.org/abs/2102.02888.
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import LOW, root, sum_in_lanes
from bigtrain.ops.library import Library
from bigtrain.ops.message import (
    Pair,
    as_sources,
    blocks_of,
    check_block,
    check_sources,
    column,
    copy_into,
    num_blocks,
    outputs,
    packed,
    rounded,
    unpacked,
    weighted_sum,
)
from bigtrain.ops.op import (
    Kernels,
    Op,
    check_alike,
    check_apart,
    check_dtype,
    check_flat,
    chosen,
)


def sign_pack_(
    x: torch.Tensor,
    state: torch.Tensor,
    state_scales: torch.Tensor,
    *,
    block: int,
    mean_abs: bool = False,
    scale_dtype: torch.dtype = torch.float32,
    out: Pair | None = None,
    kernels: Kernels = "auto",
) -> Pair:
    """Return (scales, bits) of the signs of x plus the residual, and keep the new residual.

    The residual is kept as `state` v [n] and `state_scales` s [blocks], fp32, both changed: it is
    v - copysign(s, v). So it begins as zeros, and a residual e is restored as v = e, s = 0. A scale
    is the root of the mean square of its block, or with `mean_abs` the mean size; a set bit is a
    minus. x is fp32, bf16 or fp16.

    Source: 1-bit Adam, https://arxiv.org/abs/2102.02888, with a scale a block.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or tensors that share memory.
    """
    name, n = "sign_pack_", x.numel()
    check_block(name, block)
    check_dtype(name, LOW, x=x)
    check_dtype(name, (torch.float32,), state=state, state_scales=state_scales)
    check_alike(name, x, state=state, state_scales=state_scales)
    check_flat(name, n, x=x, state=state)
    check_flat(name, num_blocks(n, block), state_scales=state_scales)
    scales, bits = outputs(name, x, n, 1, block, scale_dtype, out)
    check_apart(name, x=x, state=state, state_scales=state_scales, scales=scales, bits=bits)
    use = chosen(name, kernels, x, state)
    (_SIGN_PACK if use else _sign_pack_reference)(
        x, state, state_scales, scales, bits, block, mean_abs
    )
    return scales, bits


def _sign_pack_kernel(
    library: Library,
    x: torch.Tensor,
    state: torch.Tensor,
    state_scales: torch.Tensor,
    scales: torch.Tensor,
    bits: torch.Tensor,
    block: int,
    mean_abs: bool,
) -> None:
    library.call(
        "bt_sign_pack",
        x.device,
        *(x.numel(), block, x, x.dtype, state, state_scales),
        *(scales, scales.dtype, bits, int(mean_abs)),
    )


@torch.no_grad()
def _sign_pack_reference(
    x: torch.Tensor,
    state: torch.Tensor,
    state_scales: torch.Tensor,
    scales: torch.Tensor,
    bits: torch.Tensor,
    block: int,
    mean_abs: bool,
) -> None:
    n = x.numel()
    old = blocks_of(state, block)
    new = blocks_of(x, block) + (old - torch.copysign(column(state_scales), old))
    there = blocks_of(torch.ones_like(state), block)  # zero behind the last element
    new = torch.where(there != 0, new, 0.0)
    mean = sum_in_lanes(new.abs() if mean_abs else new * new, 64) / there.sum(1)
    s = rounded(mean if mean_abs else root(mean), scales.dtype)
    good = s.isfinite()
    signs = torch.where(column(good), torch.signbit(new), False)
    copy_into(bits, packed(signs.flatten()[:n].to(torch.uint8), 1))
    copy_into(scales, torch.where(good, s, torch.nan))
    copy_into(state, torch.where(column(good), new, old).flatten()[:n])
    copy_into(state_scales, torch.where(good, s, state_scales.flatten()))


_SIGN_PACK = Op(
    "sign_pack_(Tensor x, Tensor(a!) state, Tensor(b!) state_scales, Tensor(c!) scales, "
    "Tensor(d!) bits, int block, bool mean_abs) -> ()",
    kernel=_sign_pack_kernel,
    reference=_sign_pack_reference,
)


def sign_residual(
    state: torch.Tensor,
    state_scales: torch.Tensor,
    block: int,
    *,
    out: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return the residual [n], fp32, that a state of `sign_pack_` stands for: v - copysign(s, v).

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or tensors that share memory.
    """
    name, n = "sign_residual", state.numel()
    check_block(name, block)
    out = torch.empty_like(state) if out is None else out
    check_dtype(name, (torch.float32,), state=state, state_scales=state_scales, out=out)
    check_alike(name, state, state_scales=state_scales, out=out)
    check_flat(name, n, state=state, out=out)
    check_flat(name, num_blocks(n, block), state_scales=state_scales)
    check_apart(name, state=state, state_scales=state_scales, out=out)
    use = chosen(name, kernels, state, out)
    (_SIGN_RESIDUAL if use else _sign_residual_reference)(state, state_scales, out, block)
    return out


def _sign_residual_kernel(
    library: Library, state: torch.Tensor, state_scales: torch.Tensor, out: torch.Tensor, block: int
) -> None:
    library.call("bt_sign_residual", state.device, state.numel(), block, state, state_scales, out)


@torch.no_grad()
def _sign_residual_reference(
    state: torch.Tensor, state_scales: torch.Tensor, out: torch.Tensor, block: int
) -> None:
    v = blocks_of(state, block)
    copy_into(out, (v - torch.copysign(column(state_scales), v)).flatten()[: out.numel()])


_SIGN_RESIDUAL = Op(
    "sign_residual(Tensor state, Tensor state_scales, Tensor(a!) out, int block) -> ()",
    kernel=_sign_residual_kernel,
    reference=_sign_residual_reference,
)


def sign_unpack_mean(
    bits: torch.Tensor,
    scales: torch.Tensor,
    n: int,
    block: int,
    *,
    weight: float | None = None,
    out: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return [n] fp32: weight (the mean: 1 / N) times the sum over N sources of +-scale.

    `bits` [N, bytes] and `scales` [N, blocks] may be strided views of messages, one a row; the sum
    is in the order of the rows.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or `out` is part of a message.
    """
    name = "sign_unpack_mean"
    out = check_sources(name, bits, scales, n, 1, block, torch.float32, out)
    check_dtype(name, (torch.float32,), out=out)
    weight = 1 / max(len(bits), 1) if weight is None else weight
    use = chosen(name, kernels, scales, out)
    (_SIGN_UNPACK_MEAN if use else _sign_unpack_mean_reference)(bits, scales, out, block, weight)
    return out


def _sign_unpack_mean_kernel(
    library: Library,
    bits: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    block: int,
    weight: float,
) -> None:
    library.call(
        "bt_sign_unpack_mean",
        out.device,
        *(out.numel(), block, *as_sources(bits, scales), weight, out),
    )


@torch.no_grad()
def _sign_unpack_mean_reference(
    bits: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int, weight: float
) -> None:
    signs = 1 - 2 * unpacked(bits, out.numel(), 1).float()
    copy_into(out, weighted_sum(signs, scales, block, weight))


_SIGN_UNPACK_MEAN = Op(
    "sign_unpack_mean(Tensor bits, Tensor scales, Tensor(a!) out, int block, float weight) -> ()",
    kernel=_sign_unpack_mean_kernel,
    reference=_sign_unpack_mean_reference,
)
