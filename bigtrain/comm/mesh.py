"""A layout turned into process groups. A mesh is passed as an argument, never looked up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from bigtrain.comm.world import World
from bigtrain.config.layout import AXES, Layout
from bigtrain.errors import LaunchError


@dataclass(frozen=True)
class Axis:
    """One direction of the mesh through this rank.

    `rank` is this rank's coordinate on the axis, `ranks` the global ranks along it. `group` is
    None where there is nobody else to talk to.
    """

    name: str
    degree: int
    rank: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None


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
        return cls(layout, rank, me.local_rank, device, world=world, **axes)

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.layout} on {self.device}"
