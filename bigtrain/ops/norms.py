"""LayerNorm and RMSNorm over the last dimension, with the sum in front of them in the same pass.

Sources: LayerNorm https://arxiv.org/abs/1607.06450, RMSNorm https://arxiv.org/abs/1910.07467.
Kernels compute in fp32 whatever the dtype. Gradients can be differentiated again: then plain torch
computes them. Under autocast, and for fp64, plain torch does all.
"""

from __future__ import annotations

from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, check_dtype, chosen, fail, precision

_Shape = int | list[int] | torch.Size
Pair = tuple[torch.Tensor, torch.Tensor]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = ...,
    *,
    residual: None = ...,
    kernels: Kernels = ...,
) -> torch.Tensor: ...
@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    kernels: Kernels = ...,
) -> Pair: ...
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor | Pair:
    """Return LayerNorm(x), or (LayerNorm(x + residual), x + residual) if there is a residual.

    x and residual [..., C]; weight and bias [C] or None; all of one floating dtype.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit.
    """
    return _norm("layer_norm", x, weight, bias, eps, residual, kernels)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = ...,
    *,
    residual: None = ...,
    kernels: Kernels = ...,
) -> torch.Tensor: ...
@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = ...,
    *,
    residual: torch.Tensor,
    kernels: Kernels = ...,
) -> Pair: ...
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor | Pair:
    """Return RMSNorm(x), or (RMSNorm(x + residual), x + residual) if there is a residual.

    x and residual [..., C]; weight [C] or None; all of one floating dtype.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit.
    """
    return _norm("rms_norm", x, weight, None, eps, residual, kernels)


def _norm(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    kernels: Kernels,
) -> torch.Tensor | Pair:
    autocast = torch.is_autocast_enabled(x.device.type)
    _check(name, x, weight, bias, residual, any_dtype=autocast)
    if autocast or not chosen(name, kernels, x, weight, bias, residual):
        return _plain(name, x, weight, bias, eps, residual)
    rms = name == "rms_norm"
    if residual is None:
        return _NORM(x, weight, bias, rms, eps)[0]
    y, total, _ = _ADD_NORM(x, residual, weight, bias, rms, eps)
    return y, total


def _plain(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor | Pair:
    total = x if residual is None else x + residual
    if name == "rms_norm":
        y = F.rms_norm(total, total.shape[-1:], weight, eps)
    else:
        y = F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    return y if residual is None else (y, total)


def _check(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    any_dtype: bool,
) -> None:
    if x.ndim == 0 or not x.is_floating_point():
        raise fail(name, f"x is {x.dtype} {tuple(x.shape)}", mend="pass floating [..., C]")
    check_alike(name, x, weight=weight, bias=bias, residual=residual)
    if not any_dtype:
        check_dtype(name, (x.dtype,), weight=weight, bias=bias, residual=residual)
    if residual is not None and residual.shape != x.shape:
        raise fail(
            name,
            f"residual is {tuple(residual.shape)}, x is {tuple(x.shape)}",
            why="they are added element by element",
            mend="expand the smaller one first",
        )
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise fail(
                name,
                f"{argument} is {tuple(tensor.shape)}, the rows of x have {x.shape[-1]} elements",
                mend=f"pass {argument} [{x.shape[-1]}], or None",
            )


# -- the operations --------------------------------------------------------------------------------


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _new_stats(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 2), dtype=precision(x))


def _stats(x: torch.Tensor, rms: bool, eps: float) -> torch.Tensor:
    """Return the mean (RMSNorm: 0) and 1 / sqrt(variance + eps) of each row, [..., 2]."""
    wide = x.to(precision(x))
    mean = wide.mean(-1, keepdim=True)
    if rms:
        mean = torch.zeros_like(mean)
    variance = (wide - mean).square().mean(-1, keepdim=True)
    return torch.cat((mean, (variance + eps).rsqrt()), -1)


def _normed(x: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    mean, rstd = stats.split(1, -1)
    return (x.to(stats.dtype) - mean) * rstd


def _forward_kernel(
    library: Library,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> Triple:
    x = x.contiguous()
    residual, weight, bias = map(_contiguous, (residual, weight, bias))
    y, stats = _like(x), _new_stats(x)
    total = y if residual is None else _like(x)
    if x.numel():
        cols = x.shape[-1]
        sizes = (int(rms), x.numel() // cols, cols)
        rest = (eps, None if residual is None else total, y, stats, x.dtype)
        library.call("bt_norm_forward", x.device, *sizes, x, residual, weight, bias, *rest)
    return y, total, stats


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> Pair:
    stats = _stats(x, rms, eps)
    y = _normed(x, stats)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype).contiguous(), stats


def _norm_kernel(
    library: Library,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> Pair:
    y, _, stats = _forward_kernel(library, x, None, weight, bias, rms, eps)
    return y, stats


def _add_norm_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rms: bool,
    eps: float,
) -> Triple:
    total = (x + residual).contiguous()
    y, stats = _forward_reference(total, weight, bias, rms, eps)
    return y, total, stats


def _backward_kernel(
    library: Library,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    dsum: torch.Tensor | None,
    rms: bool,
    for_weight: bool,
    for_bias: bool,
) -> Triple:
    cols = x.shape[-1]
    dx = _like(x)
    dweight, dbias = (
        x.new_zeros(cols * want, dtype=stats.dtype) for want in (for_weight, for_bias)
    )
    if x.numel():
        rows = x.numel() // cols
        columns = for_weight or for_bias
        space = x.new_empty(
            library.ask("bt_norm_workspace", rows, cols) if columns else 0, dtype=torch.float32
        )
        dy, x, stats = dy.contiguous(), x.contiguous(), stats.contiguous()
        library.call(
            "bt_norm_backward",
            x.device,
            *(int(rms), rows, cols, dy, x, _contiguous(weight), stats, _contiguous(dsum), dx),
            *(dweight if for_weight else None, dbias if for_bias else None, space, x.dtype),
        )
    return dx, dweight, dbias


def _backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    dsum: torch.Tensor | None,
    rms: bool,
    for_weight: bool,
    for_bias: bool,
) -> Triple:
    hat, rstd = _normed(x, stats), stats[..., 1:]
    wide = dy.to(stats.dtype)
    g = wide if weight is None else wide * weight
    dx = g - hat * (g * hat).mean(-1, keepdim=True)
    if not rms:
        dx = dx - g.mean(-1, keepdim=True)
    dx = dx * rstd
    if dsum is not None:
        dx = dx + dsum
    dims = list(range(x.ndim - 1))
    nothing = stats.new_zeros(0)

    def columns(values: torch.Tensor) -> torch.Tensor:
        return values.sum(dims) if dims else values.clone()

    dweight = columns(wide * hat) if for_weight else nothing
    dbias = columns(wide) if for_bias else nothing.clone()
    return dx.to(x.dtype).contiguous(), dweight, dbias


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    dsum: torch.Tensor | None,
    rms: bool,
    for_weight: bool,
    for_bias: bool,
) -> Triple:
    dweight, dbias = (stats.new_empty(x.shape[-1] * want) for want in (for_weight, for_bias))
    return _like(x), dweight, dbias


_BACKWARD = Op(
    "norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor stats, Tensor? dsum, bool rms, "
    "bool for_weight, bool for_bias) -> (Tensor, Tensor, Tensor)",
    kernel=_backward_kernel,
    reference=_backward_reference,
    fake=_backward_fake,
)


# -- autograd --------------------------------------------------------------------------------------


def _keep(
    ctx: Any,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    stats: torch.Tensor,
    rms: bool,
    eps: float,
) -> None:
    ctx.save_for_backward(x, weight, stats)
    ctx.rms, ctx.eps = rms, eps
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, dy: torch.Tensor, dsum: torch.Tensor | None, for_weight: bool, for_bias: bool
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of what was normalised, of the weight and of the bias."""
    x, weight, stats = ctx.saved_tensors
    work: Any = _BACKWARD
    if torch.is_grad_enabled():  # gradients are wanted of these gradients
        work, stats = _backward_reference, _stats(x, ctx.rms, ctx.eps)
    dx, dweight, dbias = work(dy, x, weight, stats, dsum, ctx.rms, for_weight, for_bias)
    return (
        dx,
        dweight.to(x.dtype) if for_weight else None,
        dbias.to(x.dtype) if for_bias else None,
    )


def _norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    x, weight, _, rms, eps = inputs
    _keep(ctx, x, weight, output[1], rms, eps)


def _norm_backward(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 5
    dx, dweight, dbias = _gradients(ctx, dy, None, *ctx.needs_input_grad[1:3])
    return dx, dweight, dbias, None, None


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Triple) -> None:
    _, _, weight, _, rms, eps = inputs
    _keep(ctx, output[1], weight, output[2], rms, eps)


def _add_norm_backward(
    ctx: Any, dy: torch.Tensor | None, dsum: torch.Tensor | None, _: Any
) -> tuple[Any, ...]:
    if dy is None:
        return dsum, dsum, None, None, None, None
    dx, dweight, dbias = _gradients(ctx, dy, dsum, *ctx.needs_input_grad[2:4])
    return dx, dx, dweight, dbias, None, None


_NORM = Op(
    "norm(Tensor x, Tensor? weight, Tensor? bias, bool rms, float eps) -> (Tensor, Tensor)",
    kernel=_norm_kernel,
    reference=_forward_reference,
    fake=lambda x, *_: (_like(x), _new_stats(x)),
    setup_context=_norm_setup,
    backward=_norm_backward,
)
_ADD_NORM = Op(
    "add_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, bool rms, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    kernel=_forward_kernel,
    reference=_add_norm_reference,
    fake=lambda x, *_: (_like(x), _like(x), _new_stats(x)),
    setup_context=_add_norm_setup,
    backward=_add_norm_backward,
)


# -- modules ---------------------------------------------------------------------------------------


def _of_module(module: LayerNorm | RMSNorm, x: torch.Tensor) -> tuple[Any, ...]:
    """Return x, weight and bias with the dimensions that are normalised as one."""
    shape = module.normalized_shape
    if tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise fail(
            type(module).__name__,
            f"x is {tuple(x.shape)}",
            why=f"the module normalises over {tuple(shape)}",
            mend=f"pass [..., {', '.join(map(str, shape))}]",
        )
    tensors = (module.weight, getattr(module, "bias", None))
    if len(shape) == 1:
        return x, *tensors
    return x.flatten(-len(shape)), *(None if t is None else t.flatten() for t in tensors)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by layer_norm: the same parameters and state."""

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.kernels = kernels

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input, [..., *normalized_shape], normalised."""
        x, weight, bias = _of_module(self, input)
        return layer_norm(x, weight, bias, self.eps, kernels=self.kernels).view_as(input)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm by rms_norm: the same parameters and state."""

    def __init__(
        self,
        normalized_shape: _Shape,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.kernels = kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, [..., *normalized_shape], normalised."""
        rows, weight, _ = _of_module(self, x)
        eps = torch.finfo(precision(x)).eps if self.eps is None else self.eps  # as torch has it
        return rms_norm(rows, weight, eps, kernels=self.kernels).view_as(x)
