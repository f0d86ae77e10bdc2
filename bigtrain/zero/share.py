"""Who shares what with whom, and the strategy that goes with it."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from bigtrain.comm.buckets import Sharing
from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.comm.sync import GradientSync, Replicated
from bigtrain.config.schema import ZeroSection
from bigtrain.zero.keeper import Keeper
from bigtrain.zero.sharded import Sharded
from bigtrain.zero.wire import make_wire


class Sharings:
    """How parameters are shared, by the pipeline ranks that hold them, as the `zero` section says.

    Every rank makes this, with the same `holders`: it makes process groups.
    """

    def __init__(self, mesh: Mesh, zero: ZeroSection, holders: Set[tuple[int, ...]]) -> None:
        self.mesh, self.zero = mesh, zero
        tied = sorted(ranks for ranks in holders if len(ranks) > 1)
        self._axes = {ranks: mesh.across_stages(ranks) for ranks in tied}
        if zero.stage:
            self.inner = mesh.share(zero.shard_degree)
            self.outer = mesh.beside(self.inner)
            self._outers = {ranks: mesh.beside(self.inner, ranks) for ranks in tied}
        self._known: dict[tuple[Axis, bool], Sharing] = {}

    def axis_of(self, holders: tuple[int, ...]) -> Axis:
        """Return the data-parallel ranks of those stages."""
        return self._axes.get(holders, self.mesh.dp)

    def of(self, holders: tuple[int, ...], param: nn.Parameter) -> Sharing:
        """Return how one parameter is shared; the same object for all that are shared alike."""
        axis, zero = self.axis_of(holders), self.zero
        small = param.numel() < zero.persistent_numel
        if (axis, small) not in self._known:
            self._known[axis, small] = Sharing.none(axis)
            if zero.stage:
                shared = self.inner.degree > 1
                self._known[axis, small] = Sharing(
                    axis,
                    self.inner,
                    self._outers.get(holders, self.outer),
                    # Stages would wait for each other in every microbatch.
                    sharded_grads=shared and zero.stage >= 2 and axis is self.mesh.dp,
                    sharded_params=shared and zero.stage == 3 and not small,
                )
        return self._known[axis, small]

    def sync(self) -> GradientSync:
        """Return the strategy. Every rank calls this."""
        mesh, zero = self.mesh, self.zero
        if not zero.stage:
            return Replicated(mesh.dp)
        keeper = Keeper(
            mesh.share(zero.shard_degree, own_group=True),
            mesh.device,
            reshard_after_forward=zero.reshard_after_forward,
            prefetch=zero.prefetch,
            agreed=zero.order == "agreed",
        )
        wire = make_wire(zero.reduce_dtype)
        return Sharded(mesh.dp, self.inner, self.outer, wire, keeper, zero.in_flight)
