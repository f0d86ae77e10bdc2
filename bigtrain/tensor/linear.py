"""Linear layers whose weight is split over the ranks of an axis (https://arxiv.org/abs/1909.08053).

    column:  Y_i = X A_i       A split by output features; every rank needs all of X
    row:     Y = sum_i X_i A_i   A split by input features; the sum is an all-reduce

A column layer followed by a row layer needs one all-reduce forward and one backward. With sequence
parallelism (https://arxiv.org/abs/2205.05198) X and Y are parts of the sequence outside of the two
layers, and instead of all-reduces there are all-gathers and reduce-scatters, for 1/n of the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from bigtrain.comm.block import Shard
from bigtrain.comm.collectives import broadcast, start_all_reduce
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.tensor.regions import (
    gather_channels,
    split_channels,
    start_gather_sequence,
    start_scatter_sum,
    sum_gradients,
)
from bigtrain.tensor.split import shard_dim


class _Visit:
    """One passage of an input through the layers that share it; see SharedInput."""

    def __init__(self, axis: Axis, sequence: bool, num_layers: int) -> None:
        self.axis, self.sequence = axis, sequence
        # Gradients of the layers' outputs, kept until the weights' gradients are computed.
        self.grads: list[torch.Tensor | None] = [None] * num_layers


class _Enter(torch.autograd.Function):
    """Identity, or all-gather of the sequence; backward sums the input's gradient over the axis.

    The gradients of the weights inside are computed here too, while that sum is on the wire.
    """

    @staticmethod
    def forward(ctx: Any, visit: _Visit, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.visit = visit
        ctx.save_for_backward(x)  # of a sequence only this rank's part
        return start_gather_sequence(x, visit.axis).wait() if visit.sequence else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        visit, axis = ctx.visit, ctx.visit.axis
        (x,) = ctx.saved_tensors
        gathering = start_gather_sequence(x, axis) if visit.sequence else None
        summing = None
        if ctx.needs_input_grad[1] and visit.sequence:
            summing = start_scatter_sum(grad, axis)
        elif ctx.needs_input_grad[1]:
            summing = start_all_reduce(grad.contiguous(), axis, "all_reduce of a gradient")
        full = x if gathering is None else gathering.wait()
        grads, visit.grads = visit.grads, [None] * len(visit.grads)
        weight_grads = [
            _weight_grad(g, full) if g is not None and needed else None
            for g, needed in zip(grads, ctx.needs_input_grad[2:], strict=True)
        ]
        return None, None if summing is None else summing.wait(), *weight_grads


class _ColumnProduct(torch.autograd.Function):
    """x @ weight.T + bias; leaves the gradient of the weight to _Enter."""

    @staticmethod
    def forward(
        ctx: Any,
        visit: _Visit,
        index: int,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.visit, ctx.index, ctx.has_bias = visit, index, bias is not None
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        ctx.visit.grads[ctx.index] = grad
        bias_grad = _bias_grad(grad) if ctx.has_bias and ctx.needs_input_grad[4] else None
        return None, None, grad @ weight, None, bias_grad


class _RowProduct(torch.autograd.Function):
    """The sum over the axis of x @ weight.T, whole or as this rank's part of the sequence.

    Rows of x (dim 0) go in `num_chunks` chunks: while one is on the wire, the next is multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        axis: Axis,
        sequence: bool,
        num_chunks: int,
    ) -> torch.Tensor:
        ctx.axis, ctx.sequence = axis, sequence
        ctx.save_for_backward(x, weight)
        if sequence:
            pending = [
                start_scatter_sum(F.linear(part, weight), axis) for part in x.chunk(num_chunks)
            ]
        else:
            pending = [
                start_all_reduce(F.linear(part, weight), axis, "all_reduce of activations")
                for part in x.chunk(num_chunks)
            ]
        done = [each.wait() for each in pending]
        return done[0] if len(done) == 1 else torch.cat(done)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        full = start_gather_sequence(grad, ctx.axis).wait() if ctx.sequence else grad
        input_grad = full @ weight if ctx.needs_input_grad[0] else None
        weight_grad = _weight_grad(full, x) if ctx.needs_input_grad[1] else None
        return input_grad, weight_grad, None, None, None


def _weight_grad(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _bias_grad(grad: torch.Tensor) -> torch.Tensor:
    return grad.reshape(-1, grad.shape[-1]).sum(0)


class SharedInput:
    """Lets column layers that are fed the same tensor (q, k and v) take it in together.

    The tensor enters once: one all-gather of its sequence if it is split, and one sum of its
    gradient, for all of them. It is recognised by being the same, unchanged object.
    """

    def __init__(self) -> None:
        self.layers: list[ColumnParallelLinear] = []
        self._key: tuple[Any, ...] | None = None
        self._entered: tuple[_Visit, torch.Tensor] | None = None
        self._served: set[int] = set()

    def join(self, layer: ColumnParallelLinear) -> int:
        """Take `layer` in; return its number."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def enter(self, index: int, x: torch.Tensor) -> tuple[_Visit, torch.Tensor]:
        """Return the visit of x and x as layer `index` shall see it."""
        version = 0 if x.is_inference() else x._version
        key = (id(x), version, x.dtype, torch.is_grad_enabled())
        if self._entered is None or self._key != key or index in self._served:
            layer = self.layers[index]
            visit = _Visit(layer.axis, layer.sequence_parallel, len(self.layers))
            weights = [_as_autocast(each.weight) for each in self.layers]
            self._entered = visit, _Enter.apply(visit, _as_autocast(x), *weights)
            # x itself is kept beside its id, so that no other tensor can take that id.
            self._key, self._input, self._served = key, x, set()
        entered = self._entered
        self._served.add(index)
        if len(self._served) == len(self.layers):
            self._entered = self._key = self._input = None
        return entered

    _input: torch.Tensor | None = None


def _as_autocast(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype that torch.autocast asks for, if it is on."""
    device = x.device.type
    if x.is_floating_point() and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _check_input(layer: nn.Module, x: torch.Tensor, weight: torch.Tensor, wanted: int) -> None:
    name = type(layer).__name__
    if x.shape[-1:] != (wanted,):
        raise BigtrainError(
            f"{name} was given a tensor of shape {tuple(x.shape)}, its last dim should be {wanted}",
            why=f"it is {layer}",
            mend="a row layer takes what a column layer gives (its part), unless "
            "input_is_parallel=False; a column layer takes all channels",
        )
    if _as_autocast(x).dtype != _as_autocast(weight).dtype:
        raise BigtrainError(
            f"{name} was given {x.dtype}, but its weight is {weight.dtype}",
            why="a product needs one dtype",
            mend="convert one of them (x.to(weight.dtype)), or use torch.autocast",
        )


class _ParallelLinear(nn.Module):
    """What both kinds share: taking this rank's part out of a full linear layer, and its face."""

    def __init__(
        self,
        linear: nn.Linear,
        group: Group,
        dim: int,
        units: Sequence[int],
        share: bool,
    ) -> None:
        super().__init__()
        self.axis = Axis.of(group)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        size = (self.out_features, self.in_features)[dim]
        degree, rank = self.axis.degree, self.axis.rank
        name = type(self).__name__
        self.channels = [
            shard_dim((size,), 0, degree, each, units=units, share=share, name=name)
            for each in range(degree)
        ]
        own = shard_dim(
            (self.out_features, self.in_features), dim, degree, rank, units=units, share=share
        )
        self.shards: dict[str, Shard] = {}
        self._take("weight", linear.weight, own)
        if linear.bias is None:
            self.register_parameter("bias", None)
        else:
            whole = Shard.whole(linear.bias.shape, rank, degree)
            self._take("bias", linear.bias, whole if dim else self.channels[rank])
        self.train(linear.training)

    weight: nn.Parameter
    bias: nn.Parameter | None

    def _take(self, name: str, full: torch.Tensor, shard: Shard) -> None:
        """Hold this rank's part of `full` as it is on the first rank of the axis."""
        broadcast(full, self.axis, f"broadcast of a {name}")
        param = nn.Parameter(shard.take(full.detach()), requires_grad=full.requires_grad)
        self.register_parameter(name, param)
        self.shards[name] = shard

    def extra_repr(self) -> str:
        axis, local = self.axis, " x ".join(map(str, self.weight.shape))
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rank {axis.rank} of {axis.degree}, own weight {local}"
        )


class ColumnParallelLinear(_ParallelLinear):
    """Y_i = X A_i^T + b_i: each rank computes its part of the output features.

    The full weight A is [out_features, in_features]; a rank holds rows of it, and of the bias. X is
    [..., in_features], the same on all ranks; Y_i is [..., own features], or with `gather_output`
    [..., out_features]. Starts from the weights of the group's first rank, drawn as nn.Linear does.

    group: a process group, DeviceMesh or Axis; None for this rank alone.
    units: parts of the output that are split by whole heads, see `bigtrain.tensor.split`; without,
        sizes differ by at most one.
    share: with fewer units than ranks, several ranks hold the same unit (key-value heads).
    sequence_parallel: X is this rank's part of the sequence, [..., T/n, in_features].
    shared_input: column layers that are given the same X take it in together.
    linear: the full layer whose weights to start from, in place of new ones.

    Communicates, for X of b bytes and degree n: forward nothing, backward an all-reduce of dX,
    2(n-1)/n b, while dA is computed. With sequence_parallel (b for the whole sequence) forward an
    all-gather, (n-1)/n b; backward an all-gather of X again, so that only a part of it is kept, and
    a reduce-scatter of dX, 2(n-1)/n b together. With gather_output also an all-gather of Y.

    Raises:
        BigtrainError: units that cannot be shared out, a wrong shape or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group = None,
        *,
        bias: bool = True,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        units: Sequence[int] = (),
        share: bool = False,
        shared_input: SharedInput | None = None,
        linear: nn.Linear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if linear is None:
            linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(linear, group, 0, units, share)
        self.gather_output = gather_output
        self.sequence_parallel = sequence_parallel and self.axis.degree > 1
        sharers = self.shards["weight"].num_replicas
        if sharers > 1:
            if gather_output:
                raise BigtrainError(
                    "ColumnParallelLinear: gather_output with units that ranks share",
                    why="the gathered output would hold the shared units several times",
                    mend="leave gather_output off, or let the units be a multiple of the degree",
                )
            sum_gradients(self, self.axis, sharers=sharers)
        self._shared = shared_input or SharedInput()
        self._index = self._shared.join(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x, self.weight, self.in_features)
        visit, entered = self._shared.enter(self._index, x)
        bias = None if self.bias is None else _as_autocast(self.bias)
        weight = _as_autocast(self.weight).detach()
        y: torch.Tensor = _ColumnProduct.apply(visit, self._index, entered, weight, bias)
        return gather_channels(y, self.axis, self.channels) if self.gather_output else y

    def extra_repr(self) -> str:
        flags = ", gather_output" * self.gather_output
        return super().extra_repr() + flags + ", sequence_parallel" * self.sequence_parallel


class RowParallelLinear(_ParallelLinear):
    """Y = sum_i X_i A_i^T + b: each rank multiplies its part of the input features.

    The full weight A is [out_features, in_features]; a rank holds columns of it, and all of the
    bias, which is added once. X_i is [..., own features] as a column layer gives it; with
    `input_is_parallel=False` X is [..., in_features], the same on all ranks. Y is
    [..., out_features], the same on all ranks. Starts from the weights of the group's first rank.

    sequence_parallel: Y is this rank's part of the sequence, [..., T/n, out_features].
    linear: the full layer whose weights to start from, in place of new ones.
    num_chunks: dim 0 is multiplied in so many chunks; one is on the wire while the next is
        computed.

    Communicates, for Y of b bytes and degree n: forward an all-reduce, 2(n-1)/n b; backward
    nothing. With sequence_parallel (b for the whole sequence) forward a reduce-scatter, backward an
    all-gather of dY, (n-1)/n b each, and an all-reduce of the gradient of the bias. With
    input_is_parallel=False also backward an all-gather of dX.

    Raises:
        BigtrainError: units that cannot be shared out, a wrong shape or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: Group = None,
        *,
        bias: bool = True,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        units: Sequence[int] = (),
        num_chunks: int = 1,
        linear: nn.Linear | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if linear is None:
            linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(linear, group, 1, units, share=False)
        self.input_is_parallel, self.num_chunks = input_is_parallel, num_chunks
        self.sequence_parallel = sequence_parallel and self.axis.degree > 1
        if self.sequence_parallel and self.bias is not None:
            sum_gradients(self, self.axis, ["bias"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.weight.shape[1]
        _check_input(self, x, self.weight, own if self.input_is_parallel else self.in_features)
        if not self.input_is_parallel:
            x = split_channels(x, self.axis, self.channels)
        y: torch.Tensor = _RowProduct.apply(
            _as_autocast(x),
            _as_autocast(self.weight),
            self.axis,
            self.sequence_parallel,
            max(1, min(self.num_chunks, len(x))) if x.ndim > 1 else 1,
        )
        return y if self.bias is None else y + _as_autocast(self.bias)

    def extra_repr(self) -> str:
        flags = ", input_is_parallel=False" * (not self.input_is_parallel)
        return super().extra_repr() + flags + ", sequence_parallel" * self.sequence_parallel
