"""The products of the parallel linear layers: autograd functions that multiply and communicate.

Where a product and a collective do not need each other, the collective is on the wire meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bigtrain.comm.collectives import Pending, start_all_reduce
from bigtrain.comm.mesh import Axis
from bigtrain.ops.later import Product, give, later_for, rows
from bigtrain.tensor.regions import first_order, start_gather_sequence, start_scatter_sum


class Visit:
    """One passage of an input through the layers that share it; see SharedInput."""

    def __init__(self, axis: Axis, sequence: bool, weights: Sequence[torch.Tensor]) -> None:
        self.axis, self.sequence = axis, sequence
        self.trains_weights = any(weight.requires_grad for weight in weights)
        self._pass = -1
        self._forget(len(weights))

    def _forget(self, num_layers: int) -> None:
        # Gradients of the layers' outputs, kept until those of the weights are computed, and the
        # sequence on its way to be whole again.
        self.grads: list[torch.Tensor | None] = [None] * num_layers
        self.gathering: Pending | None = None

    def in_backward(self) -> None:
        """Forget what an earlier backward pass has left, which did not go all the way."""
        now = torch._C._current_graph_task_id()
        if now != self._pass:
            self._pass = now
            self._forget(len(self.grads))


class Enter(torch.autograd.Function):
    """Identity, or all-gather of the sequence; backward sums the input's gradient over the axis.

    The gradients of the parameters inside (the weights, then the biases, of the layers) are
    computed here too, while that sum is on the wire; or later, where a pipeline asks for that.
    """

    @staticmethod
    def forward(
        ctx: Any, visit: Visit, own: torch.Tensor, *params: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.visit, ctx.params, ctx.later = visit, params, later_for(params)
        if visit.sequence:
            return start_gather_sequence(own, visit.axis).wait()
        ctx.save_for_backward(own)
        return own.view_as(own)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        visit, axis = ctx.visit, ctx.visit.axis
        visit.in_backward()
        grads, gathering = visit.grads, visit.gathering
        visit._forget(len(grads))
        summing = None
        if ctx.needs_input_grad[1] and visit.sequence:
            summing = start_scatter_sum(grad, axis)
        elif ctx.needs_input_grad[1]:
            summing = start_all_reduce(grad.contiguous(), axis, "all_reduce of a gradient")
        needed = ctx.needs_input_grad[2:]
        by_params: list[torch.Tensor | None] = [None] * len(needed)
        full: Any = None
        if visit.trains_weights:
            full = gathering.wait() if gathering is not None else ctx.saved_tensors[0]
        for index, own in enumerate(grads):
            bias = len(grads) + index
            if own is not None and needed[index]:
                by_params[index] = give(
                    ctx.later, ctx.params[index], partial(_weight_grad, own, full)
                )
            if own is not None and needed[bias]:
                by_params[bias] = give(ctx.later, ctx.params[bias], partial(_bias_grad, own))
        return None, None if summing is None else summing.wait(), *by_params


class ColumnProduct(torch.autograd.Function):
    """x @ weight.T + bias, of x as `Enter` gave it; leaves their gradients to Enter.

    Of a sequence only this rank's part, `own`, is kept. Backward gathers it again while the
    gradient of x is computed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        visit: Visit,
        index: int,
        own: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.visit, ctx.index = visit, index
        ctx.save_for_backward(weight, *[own] * visit.sequence)
        return F.linear(x, weight, bias)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, *own = ctx.saved_tensors
        visit: Visit = ctx.visit
        visit.in_backward()
        if own and visit.trains_weights and visit.gathering is None:
            visit.gathering = start_gather_sequence(own[0], visit.axis)
        visit.grads[ctx.index] = grad
        return None, None, None, grad @ weight, None, None


class RowProduct(torch.autograd.Function):
    """The sum over the axis of x @ weight.T, plus bias; whole, or this rank's part of the sequence.

    Each rank adds the bias to its share of the tokens, so that none does more than the others. Rows
    of x (dim 0) go in `num_chunks` chunks: while one is on the wire, the next is multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        axis: Axis,
        sequence: bool,
        num_chunks: int,
    ) -> torch.Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        ctx.params, ctx.later = (weight, bias), later_for((weight, bias))
        ctx.save_for_backward(x, weight)
        parts = x.chunk(num_chunks)
        if sequence:
            pending = [start_scatter_sum(F.linear(part, weight), axis) for part in parts]
            done = [each.wait() for each in pending]
            own = done[0] if len(done) == 1 else torch.cat(done)
            return own if bias is None else own.add_(bias)
        y = x.new_empty((*x.shape[:-1], len(weight)))
        pending = []
        for part, out in zip(parts, y.chunk(num_chunks), strict=True):
            matrix = rows(out)
            torch.mm(rows(part), weight.T, out=matrix)
            if bias is not None:
                matrix.tensor_split(axis.degree)[axis.rank].add_(bias)
            pending.append(start_all_reduce(out, axis, "all_reduce of activations"))
        for each in pending:
            each.wait()
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        full = start_gather_sequence(grad, ctx.axis).wait() if ctx.sequence else grad
        input_grad = full @ weight if ctx.needs_input_grad[0] else None
        weight_grad = bias_grad = None
        if ctx.needs_input_grad[1]:
            weight_grad = give(ctx.later, ctx.params[0], partial(_weight_grad, full, x))
        if ctx.needs_input_grad[2]:
            bias_grad = give(ctx.later, ctx.params[1], partial(_bias_grad, full))
        return input_grad, weight_grad, bias_grad, None, None, None


def _weight_grad(grad: torch.Tensor, x: torch.Tensor) -> Product:
    return Product(rows(grad).T, rows(x))


def _bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return rows(grad).sum(0)
