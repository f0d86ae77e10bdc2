"""Rotary position embedding. https://arxiv.org/abs/2104.09864"""

from __future__ import annotations

from typing import Any

import torch

from bigtrain.ops.library import Library
from bigtrain.ops.op import (
    Kernels,
    Op,
    check_alike,
    check_unfolded,
    chosen,
    fail,
    library_for,
    precision,
)


def rotary(
    x: torch.Tensor,
    table: torch.Tensor,
    *,
    seq_dim: int = 1,
    inplace: bool = False,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Turn each pair of channels (i, i + D/2) of x by the angle of its position.

    x: [B, T, H, D] (seq_dim 1) or [B, H, T, D] (seq_dim 2), of any strides; D is even. table: the
    cosines and sines [2, length, D/2], length at least T. Computed in fp32 (of fp64, fp64), with
    the dtype and memory layout of x. inplace: writes into x, and returns it. Twice differentiable.

    Raises:
        BigtrainError: shapes that do not fit, a table that is too short or wants a gradient.
    """
    _check(x, table, seq_dim)
    if inplace:
        check_unfolded("rotary", x=x)
    if table.dtype != torch.float32 or not table.is_contiguous():
        table = table.to(precision(x)).contiguous()
    seq_dim %= 4
    if not chosen("rotary", kernels, x, table):
        turned = _turned(x, table, seq_dim, 1.0)
        return x.copy_(turned) if inplace else turned
    if not inplace:
        result: torch.Tensor = _ROTARY(x, table, seq_dim, 1.0)
        return result
    if torch.compiler.is_compiling() or x.stride(-1) != 1:
        return x.copy_(_ROTARY(x, table, seq_dim, 1.0))
    return _InPlace.apply(x, table, seq_dim)


def _check(x: torch.Tensor, table: torch.Tensor, seq_dim: int) -> None:
    if x.ndim != 4 or x.shape[-1] % 2 or not x.is_floating_point():
        raise fail(
            "rotary",
            f"x is {tuple(x.shape)}, {x.dtype}",
            why="pairs of channels are turned, by the place in the sequence",
            mend="pass [B, T, H, D], or [B, H, T, D] with seq_dim=2, with an even D",
        )
    if seq_dim not in (1, 2, -3, -2):
        raise fail(
            "rotary", f"seq_dim={seq_dim}", mend="use 1 for [B, T, H, D], 2 for [B, H, T, D]"
        )
    length, half = x.shape[seq_dim], x.shape[-1] // 2
    if table.ndim != 3 or len(table) != 2 or table.shape[2] != half or table.shape[1] < length:
        raise fail(
            "rotary",
            f"a table {tuple(table.shape)} for {length} positions of {2 * half} channels",
            why="it has the cosines and the sines of every position and pair",
            mend=f"pass [2, {length} or more, {half}]",
        )
    if table.requires_grad or not table.is_floating_point():
        raise fail("rotary", "the table is no constant of floating-point numbers", mend="detach it")
    check_alike("rotary", x, table=table)


def _turned(x: torch.Tensor, table: torch.Tensor, seq_dim: int, direction: float) -> torch.Tensor:
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    cos, sin = table[:, : x.shape[seq_dim]].to(wide).unsqueeze(3 - seq_dim)
    first, second = x.to(wide).chunk(2, dim=-1)
    sin = sin * direction
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return (
        torch.empty_like(x).copy_(turned) if turned.stride() != x.stride() else turned.to(x.dtype)
    )


def _turn(
    library: Library,
    x: torch.Tensor,
    out: torch.Tensor,
    table: torch.Tensor,
    seq_dim: int,
    direction: float,
) -> None:
    head_dim = 3 - seq_dim
    library.call(
        "bt_rotary",
        x.device,
        *(len(x), x.shape[seq_dim], x.shape[head_dim], x.shape[3]),
        *(x, x.stride(0), x.stride(seq_dim), x.stride(head_dim)),
        *(out, out.stride(0), out.stride(seq_dim), out.stride(head_dim)),
        *(table, table.shape[1], direction, x.dtype),
    )


def _kernel(
    library: Library, x: torch.Tensor, table: torch.Tensor, seq_dim: int, direction: float
) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    if out.stride(-1) != 1:  # of views whose elements overlap
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _turn(library, x, out, table, seq_dim, direction)
    return out


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    _, table, ctx.seq_dim, ctx.direction = inputs
    ctx.save_for_backward(table)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    (table,) = ctx.saved_tensors
    return _ROTARY(grad, table, ctx.seq_dim, -ctx.direction), None, None, None


_ROTARY = Op(
    "rotary(Tensor x, Tensor table, int seq_dim, float direction) -> Tensor",
    kernel=_kernel,
    reference=_turned,
    fake=lambda x, *_: torch.empty_like(x),
    setup_context=_setup,
    backward=_backward,
)


class _InPlace(torch.autograd.Function):
    """The same, written into x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, table: torch.Tensor, seq_dim: int) -> torch.Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(table)
        ctx.seq_dim, ctx.direction = seq_dim, 1.0
        library = library_for(x, table)
        assert library is not None
        _turn(library, x, x, table, seq_dim, 1.0)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _backward(ctx, grad)[:3]
