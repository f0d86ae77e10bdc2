"""Codes of 4 or 8 bits an element, with error feedback. See `message` for blocks and scales."""

from __future__ import annotations

import torch

from bigtrain.ops.flat import LOW
from bigtrain.ops.library import Library
from bigtrain.ops.message import (
    Pair,
    as_sources,
    check_bits,
    check_block,
    check_sources,
    copy_into,
    outputs,
    quantized,
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


def quantize_(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    *,
    num_bits: int,
    block: int,
    scale_dtype: torch.dtype = torch.float32,
    out: Pair | None = None,
    kernels: Kernels = "auto",
) -> Pair:
    """Return (scales, codes) of x plus `residual` [n] fp32, which becomes what was lost.

    A scale is the largest size in its block, divided by 7 (4 bits) or 127 (8). x is fp32, bf16 or
    fp16; without a residual nothing is kept. Source: https://arxiv.org/abs/1901.09847.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or tensors that share memory.
    """
    name, n = "quantize_", x.numel()
    check_block(name, block)
    check_bits(name, num_bits)
    check_dtype(name, LOW, x=x)
    check_dtype(name, (torch.float32,), residual=residual)
    check_alike(name, x, residual=residual)
    check_flat(name, n, x=x, residual=residual)
    scales, codes = outputs(name, x, n, num_bits, block, scale_dtype, out)
    check_apart(name, x=x, residual=residual, scales=scales, codes=codes)
    use = chosen(name, kernels, x)
    (_QUANTIZE if use else _quantize_reference)(x, residual, scales, codes, num_bits, block)
    return scales, codes


def _quantize_kernel(
    library: Library,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scales: torch.Tensor,
    codes: torch.Tensor,
    num_bits: int,
    block: int,
) -> None:
    library.call(
        "bt_quantize",
        x.device,
        *(x.numel(), block, num_bits, x, x.dtype, residual, scales, scales.dtype, codes),
    )


@torch.no_grad()
def _quantize_reference(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    scales: torch.Tensor,
    codes: torch.Tensor,
    num_bits: int,
    block: int,
) -> None:
    v = x.flatten().float() if residual is None else x.flatten().float() + residual.flatten()
    change, good = quantized(v, scales, codes, num_bits, block)
    if residual is not None:
        copy_into(residual, torch.where(good, v - change, residual.flatten()))


_QUANTIZE = Op(
    "quantize_(Tensor x, Tensor(a!)? residual, Tensor(b!) scales, Tensor(c!) codes, int num_bits, "
    "int block) -> ()",
    kernel=_quantize_kernel,
    reference=_quantize_reference,
)


def dequantize_mean(
    codes: torch.Tensor,
    scales: torch.Tensor,
    n: int,
    *,
    num_bits: int,
    block: int,
    weight: float | None = None,
    out_dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return [n] of `out_dtype`: weight (the mean: 1 / N) times the sum over N sources of q * s.

    `codes` [N, bytes] and `scales` [N, blocks] may be strided views of messages, one a row; the sum
    is in the order of the rows, in fp32.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or `out` is part of a message.
    """
    name = "dequantize_mean"
    check_bits(name, num_bits)
    out = check_sources(name, codes, scales, n, num_bits, block, out_dtype, out)
    check_dtype(name, LOW, out=out)
    weight = 1 / max(len(codes), 1) if weight is None else weight
    use = chosen(name, kernels, scales, out)
    (_DEQUANTIZE_MEAN if use else _dequantize_mean_reference)(
        codes, scales, out, num_bits, block, weight
    )
    return out


def _dequantize_mean_kernel(
    library: Library,
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    num_bits: int,
    block: int,
    weight: float,
) -> None:
    library.call(
        "bt_dequantize_mean",
        out.device,
        *(out.numel(), block, num_bits, *as_sources(codes, scales), weight, out, out.dtype),
    )


@torch.no_grad()
def _dequantize_mean_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    num_bits: int,
    block: int,
    weight: float,
) -> None:
    q = unpacked(codes, out.numel(), num_bits)
    copy_into(out, weighted_sum(q, scales, block, weight))


_DEQUANTIZE_MEAN = Op(
    "dequantize_mean(Tensor codes, Tensor scales, Tensor(a!) out, int num_bits, int block, "
    "float weight) -> ()",
    kernel=_dequantize_mean_kernel,
    reference=_dequantize_mean_reference,
)
