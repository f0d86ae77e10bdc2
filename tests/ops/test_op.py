"""What every operation does with tensors that a kernel cannot take, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from bigtrain.errors import BigtrainError
from bigtrain.ops.activations import bias_gelu, swiglu
from bigtrain.ops.cross_entropy import cross_entropy
from bigtrain.ops.dropout import bias_dropout_residual
from bigtrain.ops.grad_norm import grad_norm, unscale_
from bigtrain.ops.norms import LayerNorm, layer_norm, rms_norm
from bigtrain.ops.optimizer import adamw_
from bigtrain.ops.quantize import quantize_
from bigtrain.ops.rotary import rotary
from bigtrain.ops.softmax import masked_softmax

WEIGHT = torch.linspace(0.5, 2.0, 16)
TABLE = torch.rand(2, 6, 8)


def test_a_negated_view() -> None:
    """Its memory has the other sign."""
    x = torch.randn(3, 16)
    negated = torch._neg_view(x)
    torch.testing.assert_close(
        layer_norm(negated, WEIGHT, None), layer_norm(-x, WEIGHT, None, kernels="off")
    )


def test_tracing() -> None:
    """While tracing, sizes are tensors, and what a kernel computes would be a constant."""
    norm, x = LayerNorm(16), torch.randn(3, 16)
    with torch.no_grad():
        traced = torch.jit.trace(norm, (x,))
        other = torch.randn(5, 16)
        torch.testing.assert_close(traced(other), norm(other))


def test_forward_mode() -> None:
    x, tangent = torch.randn(3, 16), torch.randn(3, 16)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent)
        got = forward_ad.unpack_dual(rms_norm(dual, WEIGHT, kernels="on")).tangent
        wanted = forward_ad.unpack_dual(rms_norm(dual, WEIGHT, kernels="off")).tangent
    torch.testing.assert_close(got, wanted)


def test_torch_func() -> None:
    x = torch.randn(4, 16)
    got = torch.vmap(torch.func.grad(lambda row: swiglu(row, row).sum()))(x)
    wanted = torch.vmap(torch.func.grad(lambda row: (torch.nn.functional.silu(row) * row).sum()))(x)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strides", [(100, 0, 1, 1), (1, 1, 1, 1), (0, 16, 16, 1), (96, 1, 6, 16)])
def test_rotary_of_any_strides(strides: tuple[int, ...]) -> None:
    x = torch.randn(400).as_strided((2, 6, 1, 16), strides)
    torch.testing.assert_close(
        rotary(x, TABLE, kernels="on"), rotary(x, TABLE, kernels="off"), rtol=1e-5, atol=1e-6
    )


def test_rotary_in_place_of_an_expanded_tensor() -> None:
    with pytest.raises(BigtrainError, match="x is expanded"):
        rotary(torch.randn(1, 6, 1, 16).expand(2, 6, 3, 16), TABLE, inplace=True)


def test_dividing_one_tensor_twice() -> None:
    x = torch.ones(8)
    with pytest.raises(BigtrainError, match="share memory"):
        unscale_([x, x[4:]], torch.tensor(2.0))
    assert float(grad_norm([x, x[4:]]).squares) == 12  # reading is no harm


def update(x: torch.Tensor) -> torch.Tensor:
    main, m, v = x.clone(), x * 0.1, x.abs()
    adamw_(main, x, m, v, step=1, lr=0.1)
    return main


COMPILED: dict[str, Callable[[torch.Tensor], Any]] = {
    "layer_norm": lambda x: layer_norm(x, WEIGHT, WEIGHT, residual=x),
    "rms_norm": lambda x: rms_norm(x, WEIGHT),
    "bias_gelu": lambda x: bias_gelu(x, WEIGHT, "tanh"),
    "swiglu": lambda x: swiglu(x, x),
    "rotary": lambda x: rotary(x.view(1, 6, 1, 16), TABLE),
    "masked_softmax": lambda x: masked_softmax(x.view(1, 1, 6, 16), causal=True),
    "cross_entropy": lambda x: cross_entropy(x, torch.arange(6)),
    "bias_dropout_residual": lambda x: bias_dropout_residual(x, WEIGHT, x, 0.5, torch.arange(6)),
    "adamw_": update,
    "grad_norm": lambda x: grad_norm([x]).squares,
    "quantize_": lambda x: quantize_(x.flatten(), None, num_bits=8, block=64),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name: str) -> None:
    x = torch.randn(6, 16)
    compiled = torch.compile(COMPILED[name], backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), COMPILED[name](x), rtol=1e-5, atol=1e-5)


def test_a_compiled_loss_refuses_what_an_eager_one_does() -> None:
    compiled = torch.compile(cross_entropy, backend="aot_eager", fullgraph=True)
    with pytest.raises(BigtrainError, match="target 99 is outside of the vocabulary of 16"):
        compiled(torch.randn(6, 16), torch.full((6,), 99))
