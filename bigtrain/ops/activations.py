"""SwiGLU and GELU with a bias, each in one pass.

Sources: SwiGLU https://arxiv.org/abs/2002.05202, GELU https://arxiv.org/abs/1606.08415. Kernels
compute in fp32 whatever the dtype. Gradients can be differentiated again: then plain torch computes
them. Under autocast, and for fp64, plain torch does all.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, check_dtype, chosen, fail, precision, widened

Pair = tuple[torch.Tensor, torch.Tensor]


def swiglu(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = "auto") -> torch.Tensor:
    """Return silu(gate) * up.

    gate and up [..., C], of one floating dtype; they may be the halves of one tensor.

    Raises:
        BigtrainError: shapes, dtypes or devices that differ.
    """
    autocast = torch.is_autocast_enabled(gate.device.type)
    _check_floating("swiglu", gate=gate)
    check_alike("swiglu", gate, up=up)
    if not autocast:
        check_dtype("swiglu", (gate.dtype,), up=up)
    if gate.shape != up.shape:
        raise fail(
            "swiglu",
            f"gate is {tuple(gate.shape)}, up is {tuple(up.shape)}",
            why="they are multiplied element by element",
            mend="pass two tensors of one shape",
        )
    if autocast or not chosen("swiglu", kernels, gate, up):
        return F.silu(gate) * up
    return _SWIGLU(gate, up)


def bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    approximate: Literal["tanh", "none"] = "tanh",
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return gelu(x + bias), by tanh or exact ("none").

    x [..., C]; bias [C] or None; of one floating dtype.

    Raises:
        BigtrainError: sizes, dtypes or devices that do not fit; another `approximate`.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    _check_floating("bias_gelu", x=x)
    check_alike("bias_gelu", x, bias=bias)
    if not autocast:
        check_dtype("bias_gelu", (x.dtype,), bias=bias)
    if approximate not in ("tanh", "none"):
        raise fail("bias_gelu", f"approximate={approximate!r}", mend="use tanh or none")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise fail(
            "bias_gelu",
            f"bias is {tuple(bias.shape)}, the rows of x have {x.shape[-1]} elements",
            mend=f"pass bias [{x.shape[-1]}], or None",
        )
    name = "bias_gelu" if approximate == "tanh" else "exact_gelu"
    if autocast or not chosen(name, kernels, x, bias):
        return F.gelu(x if bias is None else x + bias, approximate=approximate)
    return _BIAS_GELU(x, bias, approximate == "tanh")


def _check_floating(name: str, **tensors: torch.Tensor) -> None:
    for argument, tensor in tensors.items():
        if tensor.ndim == 0 or not tensor.is_floating_point():
            raise fail(
                name,
                f"{argument} is {tensor.dtype} {tuple(tensor.shape)}",
                mend="pass a floating tensor [..., C]",
            )


# -- shared ----------------------------------------------------------------------------------------


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the tensor, or a contiguous copy if it is not rows at one distance; the distance."""
    if not tensor.is_contiguous():
        expected, strides = 0, tensor.stride()
        for size, stride in zip(reversed(tensor.shape[:-1]), reversed(strides[:-1]), strict=True):
            if size == 1:
                continue
            if strides[-1] != 1 or stride < tensor.shape[-1] or expected not in (0, stride):
                return tensor.contiguous(), tensor.shape[-1]
            expected = stride * size
    for size, stride in zip(
        reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True
    ):
        if size != 1:
            return tensor, stride
    return tensor.contiguous(), tensor.shape[-1]


# -- SwiGLU ----------------------------------------------------------------------------------------


def _sizes(x: torch.Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _swiglu_kernel(library: Library, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = _like(gate)
    if out.numel():
        (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
        inputs = (gate, gate_stride, up, up_stride)
        library.call("bt_swiglu_forward", out.device, *_sizes(out), *inputs, out, out.dtype)
    return out


def _swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return (F.silu(widened(gate)) * widened(up)).to(gate.dtype).contiguous()


def _swiglu_backward_kernel(
    library: Library, dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> Pair:
    dgate, dup = _like(gate), _like(up)
    if dgate.numel():
        rows, cols = _sizes(gate)
        (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
        inputs = (dout.contiguous(), gate, gate_stride, up, up_stride)
        outputs = (dgate, cols, dup, cols)
        library.call("bt_swiglu_backward", gate.device, rows, cols, *inputs, *outputs, gate.dtype)
    return dgate, dup


def _swiglu_backward_reference(dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> Pair:
    d, g = widened(dout), widened(gate)
    s = torch.sigmoid(g)
    dgate, dup = d * widened(up) * (s + g * s * (1 - s)), d * (g * s)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


_SWIGLU_BACKWARD = Op(
    "swiglu_backward(Tensor dout, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    kernel=_swiglu_backward_kernel,
    reference=_swiglu_backward_reference,
    fake=lambda dout, gate, up: (_like(gate), _like(up)),
)


def _swiglu_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    again = torch.is_grad_enabled()  # gradients are wanted of these gradients
    work: Any = _swiglu_backward_reference if again else _SWIGLU_BACKWARD
    return work(dout, *ctx.saved_tensors)


_SWIGLU = Op(
    "swiglu(Tensor gate, Tensor up) -> Tensor",
    kernel=_swiglu_kernel,
    reference=_swiglu_reference,
    fake=lambda gate, up: _like(gate),
    setup_context=_swiglu_setup,
    backward=_swiglu_backward,
)


# -- GELU ------------------------------------------------------------------------------------------


def _bias_gelu_kernel(
    library: Library, x: torch.Tensor, bias: torch.Tensor | None, by_tanh: bool
) -> torch.Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = _like(x)
    if x.numel():
        inputs = (x, bias, int(by_tanh))
        library.call("bt_bias_gelu_forward", x.device, *_sizes(x), *inputs, out, x.dtype)
    return out


def _bias_gelu_reference(x: torch.Tensor, bias: torch.Tensor | None, by_tanh: bool) -> torch.Tensor:
    wide = widened(x) if bias is None else widened(x) + widened(bias)
    y = F.gelu(wide, approximate="tanh" if by_tanh else "none")
    return y.to(x.dtype).contiguous()


def _bias_gelu_backward_kernel(
    library: Library,
    dout: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    by_tanh: bool,
    for_bias: bool,
) -> Pair:
    dx = _like(x)
    dbias = x.new_zeros(x.shape[-1] * for_bias, dtype=torch.float32)
    if x.numel():
        sizes = _sizes(x)
        amount = library.ask("bt_bias_gelu_workspace", *sizes) if for_bias else 0
        space = x.new_empty(amount, dtype=torch.float32)
        dout, x, bias = (
            dout.contiguous(),
            x.contiguous(),
            None if bias is None else bias.contiguous(),
        )
        inputs = (dout, x, bias, int(by_tanh))
        outputs = (dx, dbias if for_bias else None, space)
        library.call("bt_bias_gelu_backward", x.device, *sizes, *inputs, *outputs, x.dtype)
    return dx, dbias


def _bias_gelu_backward_reference(
    dout: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    by_tanh: bool,
    for_bias: bool,
) -> Pair:
    wide = widened(x) if bias is None else widened(x) + widened(bias)
    d = torch.ops.aten.gelu_backward(widened(dout), wide, approximate="tanh" if by_tanh else "none")
    if not for_bias:
        dbias = d.new_zeros(0)
    else:
        dbias = d.sum(list(range(x.ndim - 1))) if x.ndim > 1 else d.clone()
    return d.to(x.dtype).contiguous(), dbias


def _bias_gelu_backward_fake(
    dout: torch.Tensor, x: torch.Tensor, bias: Any, by_tanh: bool, for_bias: bool
) -> Pair:
    return _like(x), x.new_empty(x.shape[-1] * for_bias, dtype=precision(x))


_BIAS_GELU_BACKWARD = Op(
    "bias_gelu_backward(Tensor dout, Tensor x, Tensor? bias, bool by_tanh, bool for_bias) "
    "-> (Tensor, Tensor)",
    kernel=_bias_gelu_backward_kernel,
    reference=_bias_gelu_backward_reference,
    fake=_bias_gelu_backward_fake,
)


def _bias_gelu_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, bias, ctx.by_tanh = inputs
    ctx.save_for_backward(x, bias)


def _bias_gelu_backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
    x, bias = ctx.saved_tensors
    for_bias = ctx.needs_input_grad[1]
    again = torch.is_grad_enabled()  # gradients are wanted of these gradients
    work: Any = _bias_gelu_backward_reference if again else _BIAS_GELU_BACKWARD
    dx, dbias = work(dout, x, bias, ctx.by_tanh, for_bias)
    return dx, dbias.to(x.dtype) if for_bias else None, None


_BIAS_GELU = Op(
    "bias_gelu(Tensor x, Tensor? bias, bool by_tanh) -> Tensor",
    kernel=_bias_gelu_kernel,
    reference=_bias_gelu_reference,
    fake=lambda x, *_: _like(x),
    setup_context=_bias_gelu_setup,
    backward=_bias_gelu_backward,
)
