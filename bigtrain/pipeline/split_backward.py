"""Products with a parameter whose backward is in two halves: inputs at once, weights later.

Or, where both are wanted at once, the weights' is added to what earlier microbatches have left by
the product itself.

`splitting(later)` replaces torch's own linear, matmul, addmm and convolution, wherever a module or
a user's code calls them with a parameter, by ones that can leave the gradient of that parameter to
`later`. Other operations keep one whole backward: parameters together with inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import GradientEdge, _engine_run_backward
from torch.overrides import TorchFunctionMode

from bigtrain.ops.later import Compute, Later, Product, give, later_for, leaving_to, rows

Root = torch.Tensor | GradientEdge


@contextmanager
def splitting(later: Later) -> Iterator[None]:
    """Let what runs inside be able to leave weight gradients to `later`."""
    with leaving_to(later), _Replace():
        yield


def backward(roots: Sequence[Root], grads: Sequence[torch.Tensor | None], later: Later) -> None:
    """As torch.autograd.backward, with `splitting` in effect also while it runs.

    Activation checkpointing runs forward again inside of backward, and must run the same
    operations; torch.autograd.backward suspends function modes, the engine that it calls does not.
    """
    given = tuple(
        torch.ones_like(root) if grad is None and isinstance(root, torch.Tensor) else grad
        for root, grad in zip(roots, grads, strict=True)
    )

    def begin(*_: Any) -> None:  # one of the roots is the first node that runs
        if later.task is None:
            later.task = torch._C._current_graph_task_id()

    nodes = [root.grad_fn if isinstance(root, torch.Tensor) else root.node for root in roots]
    handles = [node.register_prehook(begin) for node in nodes if node is not None]
    _engine_run_backward(
        tuple(roots), given, False, False, (), allow_unreachable=True, accumulate_grad=True
    )
    for handle in handles:
        handle.remove()


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias, or x @ weight + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        later: Later,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.params, ctx.transposed, ctx.later = (weight, bias), transposed, later
        return F.linear(x, weight.T if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_input = None
        if ctx.needs_input_grad[0]:
            by_input = grad @ (weight.T if ctx.transposed else weight)

        def by_weight() -> Product:
            left, right = rows(grad), rows(x)
            return Product(right.T, left) if ctx.transposed else Product(left.T, right)

        return by_input, *_both(ctx, by_weight, lambda: rows(grad).sum(0)), None, None


class _Convolution(torch.autograd.Function):
    """A convolution of any number of dims; `options` are what comes after the bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        options: tuple[Any, ...],
        later: Later,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.params, ctx.options, ctx.later = (weight, bias), options, later
        return torch.convolution(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        options, needs = ctx.options, ctx.needs_input_grad

        def compute(mask: list[bool]) -> tuple[torch.Tensor, ...]:
            sizes = [weight.shape[0]]
            result: tuple[torch.Tensor, ...] = torch.ops.aten.convolution_backward(
                grad, x, weight, sizes, *options, mask
            )
            return result

        by_input = compute([True, False, False])[0] if needs[0] else None
        halves = _both(
            ctx,
            lambda: compute([False, True, False])[1],
            lambda: grad.transpose(0, 1).flatten(1).sum(1),
        )
        return by_input, *halves, None, None


def _both(
    ctx: Any, by_weight: Compute, by_bias: Compute
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Give the gradients of weight and bias away; None where they are not wanted."""
    grads = [
        give(ctx.later, param, compute) if wanted else None
        for param, compute, wanted in zip(
            ctx.params, (by_weight, by_bias), ctx.needs_input_grad[1:3], strict=True
        )
    ]
    return grads[0], grads[1]


class _Replace(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled():
            result = replacement(*args, **(kwargs or {}))
            if result is not None:
                return result
        return func(*args, **(kwargs or {}))


def _for(weight: Any, bias: Any, *others: Any) -> Later | None:
    """Return where the gradients may be left, if this is a plain product with a parameter."""
    if not (isinstance(weight, nn.Parameter) and weight.requires_grad):
        return None
    tensors = all(isinstance(other, torch.Tensor) for other in others)
    if not tensors or torch.is_autocast_enabled(weight.device.type):
        return None
    return later_for([weight, bias])


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    later = _for(weight, bias, input)
    return None if later is None else _Linear.apply(input, weight, bias, False, later)


def _matmul(input: Any, other: Any, **rest: Any) -> torch.Tensor | None:
    if rest or not isinstance(other, torch.Tensor) or other.ndim != 2:
        return None
    later = _for(other, None, input)
    return None if later is None else _Linear.apply(input, other, None, True, later)


def _addmm(input: Any, mat1: Any, mat2: Any, **rest: Any) -> torch.Tensor | None:
    bias = isinstance(input, nn.Parameter) and input.ndim == 1
    later = _for(mat2, input, mat1) if bias and not rest else None
    return None if later is None else _Linear.apply(mat1, mat2, input, True, later)


def _convolution(num_dims: int) -> Callable[..., torch.Tensor | None]:
    def convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> torch.Tensor | None:
        later = _for(weight, bias, input)
        if later is None or isinstance(padding, str) or input.ndim != num_dims + 2:
            return None

        def each(value: Any) -> list[int]:
            return [value] * num_dims if isinstance(value, int) else list(value)

        options = (each(stride), each(padding), each(dilation), False, [0] * num_dims, groups)
        return _Convolution.apply(input, weight, bias, options, later)

    return convolution


_REPLACEMENTS: dict[Any, Callable[..., torch.Tensor | None]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
}
