"""Gradients as signs or small codes, with error feedback, and replicas moved by small codes.

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

from bigtrain.ops.flat import LOW, quotient, root
from bigtrain.ops.library import Library
from bigtrain.ops.op import (
    Kernels,
    Op,
    check_alike,
    check_apart,
    check_dtype,
    check_flat,
    chosen,
    fail,
)

SCALES = (torch.float32, torch.bfloat16)
_LANES = 64
_MOST = {4: 7, 8: 127}  # by bits

Pair = tuple[torch.Tensor, torch.Tensor]


def num_blocks(n: int, block: int) -> int:
    """Return how many blocks, and so scales, n elements have."""
    return -(-n // block)


def num_bytes(n: int, num_bits: int) -> int:
    """Return how many bytes n elements of 1, 4 or 8 bits take."""
    return (n * num_bits + 7) // 8


# -- signs -----------------------------------------------------------------------------------------


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
    _check_block(name, block)
    check_dtype(name, LOW, x=x)
    check_dtype(name, (torch.float32,), state=state, state_scales=state_scales)
    check_alike(name, x, state=state, state_scales=state_scales)
    check_flat(name, n, x=x, state=state)
    check_flat(name, num_blocks(n, block), state_scales=state_scales)
    scales, bits = _outputs(name, x, n, 1, block, scale_dtype, out)
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
    old = _blocks(state, block)
    new = _blocks(x, block) + (old - torch.copysign(_column(state_scales), old))
    there = _blocks(torch.ones_like(state), block)  # zero behind the last element
    new = torch.where(there != 0, new, 0.0)
    mean = _sum64(new.abs() if mean_abs else new * new) / there.sum(1)
    s = _rounded(mean if mean_abs else root(mean), scales.dtype)
    good = s.isfinite()
    signs = torch.where(_column(good), torch.signbit(new), False)
    _copy(bits, _packed(signs.flatten()[:n].to(torch.uint8), 1))
    _copy(scales, torch.where(good, s, torch.nan))
    _copy(state, torch.where(_column(good), new, old).flatten()[:n])
    _copy(state_scales, torch.where(good, s, state_scales.flatten()))


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
    _check_block(name, block)
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
    v = _blocks(state, block)
    _copy(out, (v - torch.copysign(_column(state_scales), v)).flatten()[: out.numel()])


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
    out = _check_sources(name, bits, scales, n, 1, block, torch.float32, out)
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
        *(out.numel(), block, *_rows(bits, scales), weight, out),
    )


@torch.no_grad()
def _sign_unpack_mean_reference(
    bits: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, block: int, weight: float
) -> None:
    signs = 1 - 2 * _unpacked(bits, out.numel(), 1).float()
    _copy(out, _weighted_sum(signs, scales, block, weight))


_SIGN_UNPACK_MEAN = Op(
    "sign_unpack_mean(Tensor bits, Tensor scales, Tensor(a!) out, int block, float weight) -> ()",
    kernel=_sign_unpack_mean_kernel,
    reference=_sign_unpack_mean_reference,
)


# -- codes of 4 or 8 bits --------------------------------------------------------------------------


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
    _check_block(name, block)
    _check_bits(name, num_bits)
    check_dtype(name, LOW, x=x)
    check_dtype(name, (torch.float32,), residual=residual)
    check_alike(name, x, residual=residual)
    check_flat(name, n, x=x, residual=residual)
    scales, codes = _outputs(name, x, n, num_bits, block, scale_dtype, out)
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
    change, good = _quantized(v, scales, codes, num_bits, block)
    if residual is not None:
        _copy(residual, torch.where(good, v - change, residual.flatten()))


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
    _check_bits(name, num_bits)
    out = _check_sources(name, codes, scales, n, num_bits, block, out_dtype, out)
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
        *(out.numel(), block, num_bits, *_rows(codes, scales), weight, out, out.dtype),
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
    q = _unpacked(codes, out.numel(), num_bits)
    _copy(out, _weighted_sum(q, scales, block, weight))


_DEQUANTIZE_MEAN = Op(
    "dequantize_mean(Tensor codes, Tensor scales, Tensor(a!) out, int num_bits, int block, "
    "float weight) -> ()",
    kernel=_dequantize_mean_kernel,
    reference=_dequantize_mean_reference,
)


# -- replicas --------------------------------------------------------------------------------------


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
    _check_block(name, block)
    _check_bits(name, num_bits)
    check_dtype(name, (torch.float32,), main=main)
    check_dtype(name, LOW, replica=replica)
    check_alike(name, main, replica=replica)
    check_flat(name, n, main=main, replica=replica)
    scales, codes = _outputs(name, main, n, num_bits, block, scale_dtype, out)
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
    change, good = _quantized(main.flatten() - old.float(), scales, codes, num_bits, block)
    _copy(replica, torch.where(good, (old.float() + change).to(old.dtype), old))


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
    _check_block(name, block)
    _check_bits(name, num_bits)
    check_dtype(name, LOW, replica=replica)
    check_flat(name, n, replica=replica)
    _check_message(name, replica, scales, codes, n, num_bits, block)
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
    s = _per_element(scales.flatten().float(), n, block)
    moved = old.float() + _unpacked(codes.flatten()[None], n, num_bits)[0] * s
    _copy(replica, torch.where(s.isnan(), old, moved.to(old.dtype)))


_DELTA_APPLY = Op(
    "delta_apply_(Tensor(a!) replica, Tensor scales, Tensor codes, int num_bits, int block) -> ()",
    kernel=_delta_apply_kernel,
    reference=_delta_apply_reference,
)


# -- what references share -------------------------------------------------------------------------


def _blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return x as fp32 rows of a block each, with zeros behind the last element."""
    behind = num_blocks(x.numel(), block) * block - x.numel()
    return torch.nn.functional.pad(x.flatten().float(), (0, behind)).view(-1, block)


def _column(scales: torch.Tensor) -> torch.Tensor:
    return scales.flatten()[:, None]


def _sum64(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row, in the order that is the same everywhere."""
    lanes = torch.zeros(len(rows), _LANES, device=rows.device)
    for begin in range(0, rows.shape[1], _LANES):
        lanes = lanes + rows[:, begin : begin + _LANES]
    while lanes.shape[1] > 1:
        low, high = lanes.chunk(2, dim=1)
        lanes = low + high
    return lanes[:, 0]


def _rounded(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return s.to(dtype).float()


def _quantized(
    v: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor, num_bits: int, block: int
) -> Pair:
    """Write scales and codes of v [n]; return q * s, and whether the scale is finite, for each."""
    n, most = v.numel(), _MOST[num_bits]
    s = _rounded(quotient(_blocks(v, block).abs().amax(1), most), scales.dtype)
    good = s.isfinite()
    _copy(scales, torch.where(good, s, torch.nan))
    good, s = _per_element(good, n, block), _per_element(s, n, block)
    # A sum with zero is never minus zero.
    q = torch.where(s == 0, 0.0, torch.round(v / s).clamp(-most, most)) + 0.0
    raw = q.nan_to_num().to(torch.int32) + (8 if num_bits == 4 else 0)
    _copy(codes, _packed((torch.where(good, raw, 0) & 0xFF).to(torch.uint8), num_bits))
    return q * s, good


def _packed(values: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Return uint8 values in as few bytes as their bits take, the first in the lowest bits."""
    a_byte = 8 // num_bits
    padded = torch.nn.functional.pad(values, (0, -len(values) % a_byte)).view(-1, a_byte)
    shifts = num_bits * torch.arange(a_byte, device=values.device)
    return (padded.int() << shifts).sum(1).to(torch.uint8)


def _unpacked(rows: torch.Tensor, n: int, num_bits: int) -> torch.Tensor:
    """Return the n numbers of each row of bytes: 0 or 1, or fp32 codes."""
    shifts = num_bits * torch.arange(8 // num_bits, device=rows.device)
    raw = (rows.int()[:, :, None] >> shifts) & ((1 << num_bits) - 1)
    raw = raw.flatten(1)[:, :n]
    if num_bits == 1:
        return raw
    return (raw - 8 if num_bits == 4 else (raw ^ 128) - 128).float()


def _per_element(per_block: torch.Tensor, n: int, block: int) -> torch.Tensor:
    return per_block.repeat_interleave(block, dim=-1)[..., :n]


def _weighted_sum(
    numbers: torch.Tensor, scales: torch.Tensor, block: int, weight: float
) -> torch.Tensor:
    """Return weight * the sum of numbers [N, n] times their scales [N, blocks], row after row."""
    n = numbers.shape[1]
    total = torch.zeros(n, device=numbers.device)
    for row, s in zip(numbers, scales.float(), strict=True):
        total = total + row * _per_element(s, n, block)
    return total * weight


def _copy(place: torch.Tensor, new: torch.Tensor) -> None:
    place.copy_(new.view(place.shape))


def _rows(data: torch.Tensor, scales: torch.Tensor) -> tuple[object, ...]:
    """Return sources as kernels take them: how many, and both with strides in bytes."""
    stride = scales.stride(0) * scales.element_size()
    return len(data), data, data.stride(0), scales, stride, scales.dtype


# -- argument checks -------------------------------------------------------------------------------


def _check_block(name: str, block: int) -> None:
    if block <= 0 or block % _LANES:
        raise fail(
            name,
            f"block is {block}",
            why="a sum over a block is in 64 lanes",
            mend="use a multiple of 64, such as 1024",
        )


def _check_bits(name: str, num_bits: int) -> None:
    if num_bits not in _MOST:
        raise fail(name, f"num_bits is {num_bits}", mend="use 4 or 8")


def _outputs(
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
    _check_message(name, like, scales, data, n, num_bits, block)
    return out


def _check_message(
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


def _check_sources(
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
    _check_block(name, block)
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
