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
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.tensor.products import ColumnProduct, Enter, RowProduct, Visit
from bigtrain.tensor.regions import gather_channels, split_channels, sum_gradients
from bigtrain.tensor.split import shard_dim, take_part


class SharedInput:
    """Lets column layers of one parent that are fed the same tensor (q, k, v) take it in together.

    During one forward of `parent`, a tensor enters once: one all-gather of its sequence if it is
    split, and one sum of its gradient, for all of the layers. It is recognised by being the same,
    unchanged object. Otherwise, and without a parent, each layer takes in what it is given alone.
    """

    def __init__(self, parent: nn.Module | None = None) -> None:
        self.layers: list[ColumnParallelLinear] = []
        self._in_forward = False
        self._forget()
        if parent is not None:
            parent.register_forward_pre_hook(self._begin)
            parent.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        self._forget()
        self._in_forward = True

    def _end(self, *_: Any) -> None:
        self._forget()
        self._in_forward = False

    def _forget(self) -> None:
        self._input: tuple[torch.Tensor, int] | None = None
        self._entered: tuple[Visit, torch.Tensor, torch.Tensor] | None = None

    def join(self, layer: ColumnParallelLinear) -> None:
        """Take `layer` in.

        Raises:
            BigtrainError: it is split otherwise than those that are in already.
        """
        first = (self.layers or [layer])[0]
        if (first.axis.ranks, first.sequence_parallel) != (
            layer.axis.ranks,
            layer.sequence_parallel,
        ):
            raise BigtrainError(
                "column layers that share an input are split in different ways",
                why="they take it in together, so their group and sequence_parallel must agree",
                mend="give them the same group and flag, or no shared_input",
            )
        self.layers.append(layer)

    def enter(
        self, layer: ColumnParallelLinear, x: torch.Tensor
    ) -> tuple[int, Visit, torch.Tensor, torch.Tensor]:
        """Return the number of `layer` in the visit of x, the visit, x as held, x as entered."""
        # With one layer there is nothing to share; an inference tensor cannot show its changes.
        if not self._in_forward or len(self.layers) == 1 or x.is_inference():
            return 0, *_enter([layer], x)
        known = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if self._entered is None or not known:
            self._input, self._entered = (x, x._version), _enter(self.layers, x)
        return self.layers.index(layer), *self._entered


def _enter(
    layers: Sequence[ColumnParallelLinear], x: torch.Tensor
) -> tuple[Visit, torch.Tensor, torch.Tensor]:
    weights = [_as_autocast(layer.weight) for layer in layers]
    biases = [None if layer.bias is None else _as_autocast(layer.bias) for layer in layers]
    visit = Visit(layers[0].axis, layers[0].sequence_parallel, weights)
    own = _as_autocast(x)
    return visit, own.detach(), Enter.apply(visit, own, *weights, *biases)


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
        self.register_parameter(name, take_part(full, shard, self.axis))
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
    shared_input: column layers of one parent that are given the same X take it in together.
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
        self._shared.join(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_input(self, x, self.weight, self.in_features)
        index, visit, own, entered = self._shared.enter(self, x)
        bias = None if self.bias is None else _as_autocast(self.bias).detach()
        weight = _as_autocast(self.weight).detach()
        y: torch.Tensor = ColumnProduct.apply(visit, index, own, entered, weight, bias)
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
    all-gather of dY, (n-1)/n b each. With input_is_parallel=False also backward an all-gather of
    dX.

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.weight.shape[1]
        _check_input(self, x, self.weight, own if self.input_is_parallel else self.in_features)
        if not self.input_is_parallel:
            x = split_channels(x, self.axis, self.channels)
        y: torch.Tensor = RowProduct.apply(
            _as_autocast(x),
            _as_autocast(self.weight),
            None if self.bias is None else _as_autocast(self.bias),
            self.axis,
            self.sequence_parallel,
            # Chunks are of dim 0, which must not be the sequence if that is to be scattered.
            max(1, min(self.num_chunks, len(x))) if x.ndim > 1 + self.sequence_parallel else 1,
        )
        return y

    def extra_repr(self) -> str:
        flags = ", input_is_parallel=False" * (not self.input_is_parallel)
        return super().extra_repr() + flags + ", sequence_parallel" * self.sequence_parallel
