"""The borders of tensor-parallel regions: autograd functions that communicate.

Each function names what travels forward and what travels backward. n is the degree of the axis. The
sequence is dim -2 of a tensor ([batch, sequence, channels] or [sequence, channels]). At degree 1
nothing travels and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.collectives import (
    Pending,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.ops.first_order import first_order as first_order_of

first_order = first_order_of(
    "a parallel layer",
    why="its backward communicates, and is not differentiable itself",
    mend="leave create_graph off, or use plain layers for what needs it",
)


class _SumGradients:
    """A forward pre-hook that sees to it that gradients are summed, also in a copy of a module."""

    def __init__(self, names: Sequence[str], axis: Axis, sharers: int) -> None:
        self.names, self.axis, self.sharers = tuple(names), axis, sharers

    def __call__(self, module: nn.Module, args: Any) -> None:
        for name in self.names:
            param = module.get_parameter(name)
            hooks = (param._backward_hooks or {}).values()
            mine = [h for h in hooks if isinstance(getattr(h, "__self__", None), _SumGradients)]
            if param.requires_grad and not mine:
                param.register_hook(self._summed)

    def _summed(self, grad: torch.Tensor | None) -> torch.Tensor | None:
        if grad is None:  # on all ranks alike: the parameter took no part
            return None
        if self.sharers == self.axis.degree:
            own = grad.clone(memory_format=torch.contiguous_format)
            return start_all_reduce(own, self.axis, "all_reduce of a shared gradient").wait()
        parts = start_all_gather(grad, self.axis, "all_gather of a shared gradient").wait()
        first = self.axis.rank // self.sharers * self.sharers
        return parts[first : first + self.sharers].sum(0)


def sum_gradients(module: nn.Module, group: Group, *, sharers: int | None = None) -> None:
    """Let parameters of which each rank computes a part of the gradient get the sum of the parts.

    For parameters that several ranks hold, but each applies to a part of the data only: norms on
    sequence shards, key-value heads that ranks share. `sharers` neighbouring ranks hold the same
    (all if None). Backward, once per backward pass and parameter of `module`: an all-reduce over
    the axis, 2(n-1)/n of the gradient's bytes, or for some sharers an all-gather, n-1 times its
    bytes. All holders get the same bits.
    """
    axis = Axis.of(group)
    if axis.degree > 1:
        names = [name for name, _ in module.named_parameters()]
        module.register_forward_pre_hook(_SumGradients(names, axis, sharers or axis.degree))


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        own = x.clone(memory_format=torch.contiguous_format)
        return start_all_reduce(own, axis, "all_reduce of activations").wait()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad, None


def reduce_sum(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum x over the group. Forward: all-reduce, 2(n-1)/n of its bytes. Backward: nothing."""
    axis = Axis.of(group)
    return x if axis.group is None else _Reduce.apply(x, axis)


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, summed: bool) -> torch.Tensor:
        ctx.axis = axis
        if summed:
            return start_scatter_sum(x, axis).wait()
        return _own_part(x, axis)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return start_gather_sequence(grad, ctx.axis).wait(), None, None


def reduce_to_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Sum x over the axis and keep this rank's part of the sequence.

    Forward: reduce-scatter, (n-1)/n of the bytes of x. Backward: all-gather, as much.
    """
    axis = Axis.of(group)
    return x if axis.group is None else _ScatterSequence.apply(x, axis, True)


def split_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Keep this rank's part of the sequence of x, which is the same on all ranks.

    Forward: nothing. Backward: all-gather, (n-1)/n of the bytes of x.
    """
    axis = Axis.of(group)
    return x if axis.group is None else _ScatterSequence.apply(x, axis, False)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return start_gather_sequence(x, axis).wait()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _own_part(grad, ctx.axis), None


def gather_sequence(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Put the parts of the sequence together, for what every rank then does alike.

    Forward: all-gather, n-1 times the bytes of x. Backward: nothing.
    """
    axis = Axis.of(group)
    return x if axis.group is None else _GatherSequence.apply(x, axis)


def start_gather_sequence(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to collect [..., t, C] from all ranks; the result is [..., n t, C]."""
    pending = start_all_gather(x, axis, "all_gather of a sequence")
    return pending.then(lambda parts: parts.movedim(0, -3).flatten(-3, -2))


def start_scatter_sum(x: torch.Tensor, axis: Axis) -> Pending:
    """Begin to sum [..., n t, C] over the axis; the result is this rank's [..., t, C].

    Raises:
        BigtrainError: the sequence cannot be shared out.
    """
    parts = _sequence_parts(x, axis).movedim(-3, 0).contiguous()
    return start_reduce_scatter(parts, axis, "reduce_scatter of a sequence")


def _own_part(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    return _sequence_parts(x, axis).select(-3, axis.rank).contiguous()


def _sequence_parts(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    length = x.shape[-2] if x.ndim > 1 else 1
    if length % axis.degree or x.ndim < 2:
        raise BigtrainError(
            f"a sequence of {length} cannot be shared out to {axis.degree} ranks",
            why="with sequence parallelism each rank holds an equal part of every sequence",
            mend=f"pad sequences to a multiple of {axis.degree}, or leave sequence_parallel off",
        )
    return x.unflatten(-2, (axis.degree, length // axis.degree))


def _collect_channels(x: torch.Tensor, axis: Axis, shards: Sequence[Shard]) -> torch.Tensor:
    most = max(shard.local_shape[0] for shard in shards)
    padded = nn.functional.pad(x, (0, most - x.shape[-1]))
    parts = start_all_gather(padded, axis, "all_gather of channels").wait()
    full = x.new_empty((*x.shape[:-1], shards[0].shape[0]))
    for part, shard in zip(parts, shards, strict=True):
        shard.put(part.movedim(-1, 0), full.movedim(-1, 0))
    return full


def _own_channels(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    return torch.cat([x[..., piece.full.slices[0]] for piece in shard.pieces], -1)


class _GatherChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, shards: Sequence[Shard]) -> torch.Tensor:
        ctx.shard = shards[axis.rank]
        return _collect_channels(x, axis, shards)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _own_channels(grad, ctx.shard), None, None


def gather_channels(x: torch.Tensor, group: Group, shards: Sequence[Shard]) -> torch.Tensor:
    """Put the last dim together; `shards` says for each rank which channels it has (dim 0).

    Forward: all-gather of x, padded to the widest rank, n-1 times its bytes. Backward: nothing,
    since every rank then does the same.
    """
    axis = Axis.of(group)
    return x if axis.group is None else _GatherChannels.apply(x, axis, shards)


class _SplitChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis, shards: Sequence[Shard]) -> torch.Tensor:
        ctx.axis, ctx.shards = axis, shards
        return _own_channels(x, shards[axis.rank])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return _collect_channels(grad, ctx.axis, ctx.shards), None, None


def split_channels(x: torch.Tensor, group: Group, shards: Sequence[Shard]) -> torch.Tensor:
    """Keep this rank's channels of x, which is the same on all ranks; see `gather_channels`.

    Forward: nothing. Backward: all-gather of the gradient, padded to the widest rank, n-1 times the
    bytes of its part.
    """
    axis = Axis.of(group)
    return x if axis.group is None else _SplitChannels.apply(x, axis, shards)
