"""Replicas moved by small codes: what they lack of the parameters. See `message` for blocks."""

from __future__ import annotations

import torch

from bigtrain.ops.flat import LOW
from bigtrain.ops.library import Library
from bigtrain.ops.message import (
    Pair,
    check_bits,
    check_block,
    check_message,
    copy_into,
    outputs,
    per_element,
    quantized,
    unpacked,
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


def delta_pack_(
    main: torch.Tensor,
    replica: torch.Tensor,
    *,
    num_bits: int,
    block: int,
    scale_dtype: torch.dtype = torch.float32,
    out: Pair | None = None,
    kernels: Kernels = "auto",
) -> Pair:
    """Return (scales, codes) of main - replica, and move `replica` as its receivers move theirs.

    main [n] is fp32, replica [n] fp32, bf16 or fp16. What was lost is still in main - replica, and
    so part of the next codes. Receivers call `delta_apply_`.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or tensors that share memory.
    """
    name, n = "delta_pack_", main.numel()
    check_block(name, block)
    check_bits(name, num_bits)
    check_dtype(name, (torch.float32,), main=main)
    check_dtype(name, LOW, replica=replica)
    check_alike(name, main, replica=replica)
    check_flat(name, n, main=main, replica=replica)
    scales, codes = outputs(name, main, n, num_bits, block, scale_dtype, out)
    check_apart(name, main=main, replica=replica, scales=scales, codes=codes)
    use = chosen(name, kernels, main, replica)
    (_DELTA_PACK if use else _delta_pack_reference)(main, replica, scales, codes, num_bits, block)
    return scales, codes


def _delta_pack_kernel(
    library: Library,
    main: torch.Tensor,
    replica: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    num_bits: int,
    block: int,
) -> None:
    library.call(
        "bt_delta_pack",
        main.device,
        *(main.numel(), block, num_bits, main, replica, replica.dtype),
        *(scales, scales.dtype, codes),
    )


@torch.no_grad()
def _delta_pack_reference(
    main: torch.Tensor,
    replica: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    num_bits: int,
    block: int,
) -> None:
    old = replica.flatten()
    change, good = quantized(main.flatten() - old.float(), scales, codes, num_bits, block)
    copy_into(replica, torch.where(good, (old.float() + change).to(old.dtype), old))


_DELTA_PACK = Op(
    "delta_pack_(Tensor main, Tensor(a!) replica, Tensor(b!) scales, Tensor(c!) codes, "
    "int num_bits, int block) -> ()",
    kernel=_delta_pack_kernel,
    reference=_delta_pack_reference,
)


def delta_apply_(
    replica: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    *,
    num_bits: int,
    block: int,
    kernels: Kernels = "auto",
) -> None:
    """Move `replica` [n] (fp32, bf16 or fp16) by what `delta_pack_` returned: to the same bits.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit, or tensors that share memory.
    """
    name, n = "delta_apply_", replica.numel()
    check_block(name, block)
    check_bits(name, num_bits)
    check_dtype(name, LOW, replica=replica)
    check_flat(name, n, replica=replica)
    check_message(name, replica, scales, codes, n, num_bits, block)
    check_apart(name, replica=replica, scales=scales, codes=codes)
    use = chosen(name, kernels, replica, scales)
    (_DELTA_APPLY if use else _delta_apply_reference)(replica, scales, codes, num_bits, block)


def _delta_apply_kernel(
    library: Library,
    replica: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    num_bits: int,
    block: int,
) -> None:
    library.call(
        "bt_delta_apply",
        replica.device,
        *(replica.numel(), block, num_bits, codes, scales, scales.dtype, replica, replica.dtype),
    )


@torch.no_grad()
def _delta_apply_reference(
    replica: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, num_bits: int, block: int
) -> None:
    old, n = replica.flatten(), replica.numel()
    s = per_element(scales.flatten().float(), n, block)
    moved = old.float() + unpacked(codes.flatten()[None], n, num_bits)[0] * s
    copy_into(replica, torch.where(s.isnan(), old, moved.to(old.dtype)))


_DELTA_APPLY = Op(
    "delta_apply_(Tensor(a!) replica, Tensor scales, Tensor codes, int num_bits, int block) -> ()",
    kernel=_delta_apply_kernel,
    reference=_delta_apply_reference,
)
