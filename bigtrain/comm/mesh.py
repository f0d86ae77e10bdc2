"""A layout turned into process groups. A mesh is passed as an argument, never looked up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bigtrain.comm.world import World
from bigtrain.config.layout import AXES, Layout
from bigtrain.errors import BigtrainError, LaunchError

if TYPE_CHECKING:
    from bigtrain.comm.transport import Transport


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh through this rank.

    `rank` is this rank's coordinate on the axis, `ranks` the global ranks along it. `group` is
    None where there is nobody else to talk to. `transport` carries messages between each two
    ranks, if that is not the group.
    """

    name: str
    degree: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    transport: Transport | None = None

    @classmethod
    def of(cls, group: Group, name: str = "tp") -> Axis:
        """Return the axis of whatever says which ranks belong together.

        An axis is itself; a process group or a one-dimensional DeviceMesh of torch is taken as it
        is; None is this rank alone.

        Raises:
            BigtrainError: it is none of these, or this rank is not in it.
        """
        if isinstance(group, Axis):
            return group
        if isinstance(group, DeviceMesh):
            usable = group.ndim == 1 and group.get_coordinate() is not None
            group = group.get_group() if usable else object()  # type: ignore[assignment]
        elif group is None:
            here = dist.get_rank() if dist.is_initialized() else 0
            return cls(name, 1, 0, (here,), None)
        if not isinstance(group, dist.ProcessGroup):
            raise BigtrainError(
                "this is no group that this rank can use",
                why="a group is an axis of a Mesh, a process group of torch that this rank is in, "
                "a one-dimensional DeviceMesh, or None for this rank alone",
                mend="pass mesh.tp, or what torch.distributed.new_group() returned on its members",
            )
        ranks = tuple(dist.get_process_group_ranks(group))
        degree = len(ranks)
        return cls(name, degree, dist.get_rank(group), ranks, group if degree > 1 else None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Axis:
        return self  # a copied module talks to the same ranks


@dataclass(frozen=True)
class Nodes:
    """The ranks of an axis, `whole`, on nodes of as many neighbours each.

    `node` are those on this rank's own, `across` those with the same place on theirs. Where each
    rank is a node of its own, `across` is all there is.
    """

    whole: Axis
    node: Axis
    across: Axis

    @classmethod
    def apart(cls, axis: Axis) -> Nodes:
        """Return that each rank of `axis` is a node of its own."""
        return cls(axis, Axis.of(None, f"{axis.name} on a node"), axis)


Group = Axis | dist.ProcessGroup | DeviceMesh | None
"""What public functions take for the ranks of an axis."""


@dataclass(frozen=True)
class Mesh:
    """The axes through this rank, and the device it computes on."""

    layout: Layout
    rank: int
    local_rank: int
    device: torch.device
    world: Axis
    pp: Axis
    dp: Axis
    cp: Axis
    tp: Axis
    local_world_size: int | None = None  # ranks on this machine, where that is known

    @classmethod
    def build(cls, layout: Layout, me: World, device: torch.device) -> Mesh:
        """Make the process groups of `layout`; every rank calls this, once.

        Raises:
            LaunchError: the layout is for another world size than the one that was joined.
        """
        rank = me.rank
        joined = dist.get_world_size() if dist.is_initialized() else 1
        if layout.world_size != joined:
            raise LaunchError(
                f"the layout is for {layout.world_size} ranks ({layout}), "
                f"but {joined} joined the world",
                mend=f"start {layout.world_size} ranks, or make a layout for {joined}",
            )
        split = {axis: degree for axis, degree in layout.degrees.items() if degree > 1}
        device_mesh = None
        if split:
            device_mesh = init_device_mesh(
                device.type, tuple(split.values()), mesh_dim_names=tuple(split)
            )
        place = layout.coordinate(rank)
        axes = {
            name: Axis(
                name,
                layout.degrees[name],
                place[name],
                layout.ranks_along(name, rank),
                device_mesh.get_group(name) if device_mesh and name in split else None,
            )
            for name in AXES
        }
        everyone = tuple(range(joined))
        world = Axis("world", joined, rank, everyone, dist.group.WORLD if joined > 1 else None)
        size = me.local_world_size
        return cls(layout, rank, me.local_rank, device, world, **axes, local_world_size=size)

    def on_one_machine(self, axis: Axis) -> bool:
        """Are all ranks of `axis` on this rank's machine, as far as is known?"""
        first = self.rank - self.local_rank
        size = self.local_world_size
        return size is None or all(first <= rank < first + size for rank in axis.ranks)

    def across_stages(self, pp_ranks: Sequence[int]) -> Axis:
        """Return the axis of all data-parallel ranks of some pipeline ranks, for what they share.

        Every rank calls this; one that is not among them gets its own data-parallel axis.
        """
        group, ranks = self._grouped(
            lambda place: (place["cp"], place["tp"]) if place["pp"] in pp_ranks else None
        )
        if self.pp.rank not in pp_ranks:
            return self.dp
        return Axis("dp of tied stages", len(ranks), ranks.index(self.rank), ranks, group)

    def share(self, degree: int | None = None, *, own_group: bool = False) -> Axis:
        """Return the part of the data-parallel axis that shares something out: `degree` neighbours.

        By default all of it. With `own_group`, it has a process group that no other axis has. Every
        rank calls this.

        Raises:
            BigtrainError: the axis cannot be cut into equal parts of that degree.
        """
        degree = degree or self.dp.degree
        if degree == self.dp.degree and not own_group:
            return self.dp
        if self.dp.degree % degree:
            raise BigtrainError(
                f"dp={self.dp.degree} ranks cannot share in groups of {degree}",
                why="all groups are of one size",
                mend="use a shard_degree that divides the data-parallel degree",
            )
        group, ranks = self._grouped(
            lambda place: (place["pp"], place["dp"] // degree, place["cp"], place["tp"])
        )
        return Axis("dp in a group", degree, ranks.index(self.rank), ranks, group)

    def beside(self, share: Axis, pp_ranks: Sequence[int] = ()) -> Axis:
        """Return the axis of the ranks that have the same place in their `share`, this one's too.

        With `pp_ranks`, also in that of those pipeline ranks. Every rank calls this.
        """
        degree = share.degree

        def key(place: dict[str, int]) -> Hashable:
            stage = -1 if place["pp"] in pp_ranks else place["pp"]
            return stage, place["dp"] % degree, place["cp"], place["tp"]

        group, ranks = self._grouped(key)
        name = "dp across groups" + " and tied stages" * bool(pp_ranks)
        return Axis(name, len(ranks), ranks.index(self.rank), ranks, group)

    def nodes(self, degree: int, share: Axis) -> Nodes:
        """Return the nodes of `degree` neighbours of `share`, all of the data-parallel axis.

        With process groups that no other axis has. Every rank calls this.
        """
        if degree == 1:
            return Nodes.apart(share)
        node = self.share(degree, own_group=True)
        across = self.beside(node)
        return Nodes(
            share, replace(node, name="dp on a node"), replace(across, name="dp across nodes")
        )

    def second_group(self, axis: Axis) -> dist.ProcessGroup | None:
        """Return another process group of the ranks of `axis`; every rank calls this."""
        others = [name for name in AXES if name != axis.name]
        return self._grouped(lambda place: tuple(place[name] for name in others))[0]

    def _grouped(
        self, key_of: Callable[[dict[str, int]], Hashable | None]
    ) -> tuple[dist.ProcessGroup | None, tuple[int, ...]]:
        """Make a group of all ranks with the same key, for each key; return this rank's."""
        groups: dict[Hashable, list[int]] = {}
        for rank in range(self.layout.world_size):
            key = key_of(self.layout.coordinate(rank))
            if key is not None:
                groups.setdefault(key, []).append(rank)
        own: tuple[dist.ProcessGroup | None, tuple[int, ...]] = (None, ())
        for ranks in groups.values():
            group = dist.new_group(ranks) if len(ranks) > 1 else None
            if self.rank in ranks:
                own = group, tuple(ranks)
        return own

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.layout} on {self.device}"
