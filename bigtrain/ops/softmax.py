"""Softmax of attention scores: scaled, over the keys that a query may see."""

from __future__ import annotations

from typing import Any

import torch

from bigtrain.ops.first_order import first_order
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, chosen, fail, precision


def masked_softmax(
    x: torch.Tensor,
    scale: float = 1.0,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return softmax(scale * x) along the last dim, over the allowed keys; others get zero.

    x: scores [B, H, queries, keys]. causal: key k is allowed for query t if k <= t + keys - queries
    (the last query sees all keys). mask: bool, broadcastable to x, True is allowed. A row with
    nothing allowed, or only -inf, is zero, and so is its gradient. Computed in fp32 (of fp64,
    fp64), in the dtype of x.

    Raises:
        BigtrainError: shapes that do not fit, a mask of numbers; a second derivative.
    """
    _check(x, mask)
    if not chosen("masked_softmax", kernels, x):
        return _reference(x, scale, causal, mask)
    result: torch.Tensor = _SOFTMAX(x, float(scale), causal, mask)
    return result


def _check(x: torch.Tensor, mask: torch.Tensor | None) -> None:
    name = "masked_softmax"
    if x.ndim != 4 or not x.is_floating_point():
        raise fail(name, f"x is {tuple(x.shape)}, {x.dtype}", mend="pass scores [B, H, Q, K]")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise fail(
            name,
            f"the mask is {mask.dtype}",
            why="it says which keys are allowed, and is not added to scores",
            mend="pass bool, True = allowed",
        )
    check_alike(name, x, mask=mask)
    places = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    if mask.ndim > 4 or any(own not in (1, full) for own, full in places):
        raise fail(
            name,
            f"a mask {tuple(mask.shape)} for scores {tuple(x.shape)}",
            mend="it must be broadcastable to the scores",
        )


def _reference(
    x: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> torch.Tensor:
    queries, keys = x.shape[-2:]
    scores = (x if x.dtype == torch.float64 else x.float()) * scale
    if causal:
        past = torch.ones(queries, keys, dtype=torch.bool, device=x.device).tril(keys - queries)
        mask = past if mask is None else mask & past
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    y = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    return y.to(x.dtype)


def _kernel(
    library: Library, x: torch.Tensor, scale: float, causal: bool, mask: torch.Tensor | None
) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    strides: tuple[int, ...] = (0, 0, 0)
    if mask is not None:
        full = mask.expand(x.shape)
        if full.stride(-1) != 1 and x.shape[-1] > 1:  # the same for all keys, or transposed
            mask = mask.expand(*mask.shape[:-1], x.shape[-1]).contiguous()
            full = mask.expand(x.shape)
        strides = full.stride()[:3]
    library.call(
        "bt_softmax_forward",
        x.device,
        *(*x.shape, x, scale, causal, mask, *strides, y, x.dtype),
    )
    return y


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    ctx.scale = inputs[1]
    ctx.save_for_backward(output)


@first_order("masked_softmax")
def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    (y,) = ctx.saved_tensors
    return _SOFTMAX_BACKWARD(grad, y, ctx.scale), None, None, None


_SOFTMAX = Op(
    "masked_softmax(Tensor x, float scale, bool causal, Tensor? mask) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=_setup,
    backward=_backward,
)


def _grad_reference(dy: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    wide = precision(y)
    grad, result = dy.to(wide), y.to(wide)
    total = (grad * result).sum(-1, keepdim=True)
    return (scale * (result * (grad - total))).to(y.dtype)


def _grad_kernel(library: Library, dy: torch.Tensor, y: torch.Tensor, scale: float) -> torch.Tensor:
    dy, y = dy.contiguous(), y.contiguous()
    dx = torch.empty_like(y)
    cols = y.shape[-1]
    rows = y.numel() // max(cols, 1)
    library.call("bt_softmax_backward", y.device, rows, cols, dy, y, scale, dx, y.dtype)
    return dx


_SOFTMAX_BACKWARD = Op(
    "masked_softmax_backward(Tensor dy, Tensor y, float scale) -> Tensor",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=lambda dy, y, scale: y.new_empty(y.shape),
)
