"""Who shares what with whom, and the strategy that goes with it."""

from __future__ import annotations

from collections.abc import Callable, Set

import torch
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.buckets import Sharing
from bigtrain.comm.mesh import Axis, Mesh, Nodes
from bigtrain.comm.sync import GradientSync, Replicated
from bigtrain.comm.wire import Wire
from bigtrain.config.schema import ZeroSection
from bigtrain.zero.keeper import Keeper
from bigtrain.zero.sharded import Sharded
from bigtrain.zero.wire import make_wire


def as_it_is(axis: Axis) -> Axis:
    """Return the axis, whose messages go by its process group."""
    return axis


class Sharings:
    """How parameters are shared, by the pipeline ranks that hold them, as the `zero` section says.

    Every rank makes this, with the same `holders`: it makes process groups.
    wire: what carries gradients and parameters, if not what `zero` says. compresses(param, shard):
    whether that wire is free to lose something of a parameter, for as long as it keeps that.
    node_degree: neighbouring ranks that add up gradients among themselves, before the wire does;
    all ranks share everything then. carried: the same axis, with what carries messages on it.
    replicated: the strategy of ranks that have everything.
    """

    def __init__(
        self,
        mesh: Mesh,
        zero: ZeroSection,
        holders: Set[tuple[int, ...]],
        wire: Wire | None = None,
        compresses: Callable[[torch.Tensor, Shard], bool] = lambda param, shard: False,
        node_degree: int = 1,
        carried: Callable[[Axis], Axis] = as_it_is,
        replicated: Callable[[Axis], GradientSync] = Replicated,
    ) -> None:
        self.mesh, self.zero, self.carried = mesh, zero, carried
        self.replicated = replicated
        self.wire, self.compresses = wire or make_wire(zero.reduce_dtype), compresses
        tied = sorted(ranks for ranks in holders if len(ranks) > 1)
        self._axes = {ranks: mesh.across_stages(ranks) for ranks in tied}
        self.nodes = Nodes.apart(mesh.dp)
        if zero.stage:
            self.inner = mesh.share(zero.shard_degree)
            self.outer = mesh.beside(self.inner)
            self.nodes = self._nodes(node_degree, self.inner)
            self._outers = {ranks: mesh.beside(self.inner, ranks) for ranks in tied}
        self._known: dict[tuple[Axis, bool, bool], Sharing] = {}

    def _nodes(self, degree: int, share: Axis) -> Nodes:
        nodes = self.mesh.nodes(degree, share)
        across = self.carried(nodes.across)
        return Nodes(across if degree == 1 else share, nodes.node, across)

    def axis_of(self, holders: tuple[int, ...]) -> Axis:
        """Return the data-parallel ranks of those stages."""
        return self._axes.get(holders, self.mesh.dp)

    def of(self, holders: tuple[int, ...], param: nn.Parameter, shard: Shard) -> Sharing:
        """Return how one parameter is shared; the same object for all that are shared alike."""
        axis, zero = self.axis_of(holders), self.zero
        small = param.numel() < zero.persistent_numel
        compressed = param.requires_grad and self.compresses(param, shard)
        key = axis, small, compressed
        if key not in self._known:
            self._known[key] = Sharing.none(axis, own_grads=compressed)
            if zero.stage:
                shared = self.inner.degree > 1
                own_grads = shared and compressed and self.wire.once_a_step
                self._known[key] = Sharing(
                    axis,
                    self.inner,
                    self._outers.get(holders, self.outer),
                    self.nodes,
                    # Stages would wait for each other in every microbatch. And what leaves once
                    # a step beside what leaves in each microbatch would be in no one order.
                    sharded_grads=shared
                    and zero.stage >= 2
                    and axis is self.mesh.dp
                    and not self.wire.once_a_step,
                    sharded_params=shared and zero.stage == 3 and not small,
                    compressed=shared and compressed,
                    own_grads=own_grads,
                )
        return self._known[key]

    def sync(self) -> GradientSync:
        """Return the strategy. Every rank calls this."""
        mesh, zero = self.mesh, self.zero
        if not zero.stage:
            return self.replicated(mesh.dp)
        keeper = Keeper(
            mesh.share(zero.shard_degree, own_group=True),
            mesh.device,
            reshard_after_forward=zero.reshard_after_forward,
            prefetch=zero.prefetch,
            agreed=zero.order == "agreed",
        )
        publishing = self._nodes(self.nodes.node.degree, keeper.axis)
        return Sharded(
            mesh.dp, self.inner, self.outer, publishing, self.wire, keeper, zero.in_flight
        )
