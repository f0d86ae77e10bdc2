"""What compressed messages are: blocks, scales, bits or codes; their checks and references.

A flat tensor of n elements is cut into blocks of `block` elements (a multiple of 64; the last may
be short). A block has one scale, fp32 or bf16, and its elements are bits, or codes of 4 or 8 bits,
in a uint8 tensor of (n + 7) // 8 or (n * num_bits + 7) // 8 bytes: what goes over the wire. What
was lost is kept and added the next time (error feedback, https://arxiv.org/abs/1901.09847).

A block with a NaN or infinity, or numbers so large that its scale would be infinite, has the scale
NaN; what is kept for it, and a replica, stay as they are.

`out` is where results go, so that they can be views of a message. Every implementation gives the
same bits (kernels/include/bt_abi.h says what is computed).
"""

from __future__ import annotations

import torch

from bigtrain.ops.flat import quotient
from bigtrain.ops.op import (
    check_alike,
    check_apart,
    check_dtype,
    check_flat,
    fail,
)

SCALES = (torch.float32, torch.bfloat16)
LANES = 64
MOST = {4: 7, 8: 127}  # by bits

Pair = tuple[torch.Tensor, torch.Tensor]


def num_blocks(n: int, block: int) -> int:
    """Return how many blocks, and so scales, n elements have."""
    return -(-n // block)


def num_bytes(n: int, num_bits: int) -> int:
    """Return how many bytes n elements of 1, 4 or 8 bits take."""
    return (n * num_bits + 7) // 8


# -- what references share -------------------------------------------------------------------------


def blocks_of(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return x as fp32 rows of a block each, with zeros behind the last element."""
    behind = num_blocks(x.numel(), block) * block - x.numel()
    return torch.nn.functional.pad(x.flatten().float(), (0, behind)).view(-1, block)


def column(scales: torch.Tensor) -> torch.Tensor:
    return scales.flatten()[:, None]


def rounded(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return s.to(dtype).float()


def quantized(
    v: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, num_bits: int, block: int
) -> Pair:
    """Write scales and codes of v [n]; return q * s, and whether the scale is finite, for each."""
    n, most = v.numel(), MOST[num_bits]
    s = rounded(quotient(blocks_of(v, block).abs().amax(1), most), scales.dtype)
    good = s.isfinite()
    copy_into(scales, torch.where(good, s, torch.nan))
    good, s = per_element(good, n, block), per_element(s, n, block)
    # A sum with zero is never minus zero.
    q = torch.where(s == 0, 0.0, torch.round(v / s).clamp(-most, most)) + 0.0
    raw = q.nan_to_num().to(torch.int32) + (8 if num_bits == 4 else 0)
    copy_into(codes, packed((torch.where(good, raw, 0) & 0xFF).to(torch.uint8), num_bits))
    return q * s, good


def packed(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Return uint8 values in as few bytes as their bits take, the first in the lowest bits."""
    a_byte = 8 // num_bits
    padded = torch.nn.functional.pad(values, (0, -len(values) % a_byte)).view(-1, a_byte)
    shifts = num_bits * torch.arange(a_byte, device=values.device)
    return (padded.int() << shifts).sum(1).to(torch.uint8)


def unpacked(rows: torch.Tensor, n: int, num_bits: int) -> torch.Tensor:
    """Return the n numbers of each row of bytes: 0 or 1, or fp32 codes."""
    shifts = num_bits * torch.arange(8 // num_bits, device=rows.device)
    raw = (rows.int()[:, :, None] >> shifts) & ((1 << num_bits) - 1)
    raw = raw.flatten(1)[:, :n]
    if num_bits == 1:
        return raw
    return (raw - 8 if num_bits == 4 else (raw ^ 128) - 128).float()


def per_element(per_block: torch.Tensor, n: int, block: int) -> torch.Tensor:
    return per_block.repeat_interleave(block, dim=-1)[..., :n]


def weighted_sum(
    numbers: torch.Tensor, scales: torch.Tensor, block: int, weight: float
) -> torch.Tensor:
    """Return weight * the sum of numbers [N, n] times their scales [N, blocks], row after row."""
    n = numbers.shape[1]
    total = torch.zeros(n, device=numbers.device)
    for row, s in zip(numbers, scales.float(), strict=True):
        total = total + row * per_element(s, n, block)
    return total * weight


def copy_into(place: torch.Tensor, new: torch.Tensor) -> None:
    place.copy_(new.view(place.shape))


def as_sources(data: torch.Tensor, scales: torch.Tensor) -> tuple[object, ...]:
    """Return sources as kernels take them: how many, and both with strides in bytes."""
    stride = scales.stride(0) * scales.element_size()
    return len(data), data, data.stride(0), scales, stride, scales.dtype


# -- argument checks -------------------------------------------------------------------------------


def check_block(name: str, block: int) -> None:
    if block <= 0 or block % LANES:
        raise fail(
            name,
            f"block is {block}",
            why="a sum over a block is in 64 lanes",
            mend="use a multiple of 64, such as 1024",
        )


def check_bits(name: str, num_bits: int) -> None:
    if num_bits not in MOST:
        raise fail(name, f"num_bits is {num_bits}", mend="use 4 or 8")


def outputs(
    name: str,
    like: torch.Tensor,
    n: int,
    num_bits: int,
    block: int,
    scale_dtype: torch.dtype,
    out: Pair | None,
) -> Pair:
    """Return where scales and bits or codes go: `out` once it is checked, or new memory."""
    if out is None:
        if scale_dtype not in SCALES:
            raise fail(name, f"scale_dtype is {scale_dtype}", mend="use float32 or bfloat16")
        scales = torch.empty(num_blocks(n, block), dtype=scale_dtype, device=like.device)
        return scales, torch.empty(num_bytes(n, num_bits), dtype=torch.uint8, device=like.device)
    scales, data = out
    if scales.dtype != scale_dtype:
        raise fail(
            name,
            f"out has {scales.dtype} scales, but scale_dtype is {scale_dtype}",
            mend="give both the same",
        )
    check_message(name, like, scales, data, n, num_bits, block)
    return out


def check_message(
    name: str,
    like: torch.Tensor,
    scales: torch.Tensor,
    data: torch.Tensor,
    n: int,
    num_bits: int,
    block: int,
) -> None:
    what = _data_name(num_bits)
    check_dtype(name, SCALES, scales=scales)
    check_dtype(name, (torch.uint8,), **{what: data})
    check_alike(name, like, scales=scales, **{what: data})
    check_flat(name, num_blocks(n, block), scales=scales)
    check_flat(name, num_bytes(n, num_bits), **{what: data})


def check_sources(
    name: str,
    data: torch.Tensor,
    scales: torch.Tensor,
    n: int,
    num_bits: int,
    block: int,
    out_dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Check what several sources sent, and return where the result goes."""
    check_block(name, block)
    if n < 0:
        raise fail(name, f"n is {n}", mend="pass the number of elements")
    what = _data_name(num_bits)
    check_dtype(name, SCALES, scales=scales)
    check_dtype(name, (torch.uint8,), **{what: data})
    _check_rows(name, what, data, num_bytes(n, num_bits))
    _check_rows(name, "scales", scales, num_blocks(n, block))
    if len(data) != len(scales):
        raise fail(
            name,
            f"{what} has {len(data)} rows, scales {len(scales)}",
            mend="pass a row of each for every source",
        )
    if out is None:
        out = torch.empty(n, dtype=out_dtype, device=data.device)
    elif out.dtype != out_dtype:
        raise fail(name, f"out is {out.dtype}", mend=f"it must be {out_dtype}")
    check_alike(name, out, scales=scales, **{what: data})
    check_flat(name, n, out=out)
    check_apart(name, out=out, scales=_extent(scales))
    check_apart(name, out=out, **{what: _extent(data)})
    return out


def _check_rows(name: str, argument: str, rows: torch.Tensor, size: int) -> None:
    """Refuse what is not [N, size], or has gaps inside of its rows."""
    if rows.ndim != 2 or rows.shape[1] != size:
        raise fail(
            name,
            f"{argument} has shape {list(rows.shape)}",
            why=f"n elements take {size} of it for each source",
            mend=f"pass [number of sources, {size}]",
        )
    if size > 1 and rows.stride(1) != 1:
        raise fail(
            name,
            f"the rows of {argument} are not contiguous (strides {tuple(rows.stride())})",
            why="a kernel walks through memory",
            mend="rows may be strides apart, their elements not",
        )


def _extent(rows: torch.Tensor) -> torch.Tensor:
    """Return all memory from the first to the last element, as a flat tensor."""
    if not rows.numel():
        return rows
    last = sum((size - 1) * stride for size, stride in zip(rows.shape, rows.stride(), strict=True))
    return rows.as_strided((last + 1,), (1,))


def _data_name(num_bits: int) -> str:
    return "bits" if num_bits == 1 else "codes"
