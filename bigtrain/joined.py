"""What has joined under another launcher, held against what was asked for and what Slurm gave."""

from __future__ import annotations

import logging
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.started import num_nodes_given
from bigtrain.comm.world import World
from bigtrain.config.launching import LaunchSection
from bigtrain.config.schema import Config
from bigtrain.doctor.facts import facts_of
from bigtrain.doctor.findings import differences
from bigtrain.errors import PlanError

log = logging.getLogger(__name__)


def check_joined(config: Config, mesh: Mesh, world: World) -> None:
    """Compare the nodes of the world with each other, with the config and with the Slurm job.

    Communicates a few hundred bytes from each rank to all.

    Raises:
        PlanError: the world is another one than was meant, or nodes do not run the same code.
    """
    mine = {
        "node": os.environ.get("GROUP_RANK", socket.gethostname()),
        "given": num_nodes_given(),
        "facts": facts_of(Path(config.run.dir)) if world.local_rank == 0 else None,
    }
    everyone = all_gather_object(mine, mesh.world, "what the nodes are")
    problem = wrong_world(config.launch, everyone)
    if problem is not None:
        raise problem
    found = differences(one["facts"] for one in everyone if one["facts"] is not None)
    serious = [one for one in found if one.forbids]
    if serious:
        raise PlanError("\n".join(one.render() for one in serious))
    if mesh.rank == 0:
        for one in found:
            log.warning(one.render())


def wrong_world(launch: LaunchSection, everyone: Sequence[Mapping[str, Any]]) -> PlanError | None:
    """Return what is wrong with a world, by what every rank tells of its node; None if it is right.

    node: something that the ranks of a node share; given: the nodes of their Slurm step or job, as
    far as they know.
    """
    nodes, world = len({one["node"] for one in everyone}), len(everyone)
    given = max((one["given"] or 0 for one in everyone), default=0)
    least, most = launch.node_range or (nodes, nodes)
    why = "a run on other nodes than it was meant for is refused, not made to fit"
    if not least <= nodes <= most:
        return PlanError(
            f"launch.nodes = {launch.nodes}, but the {world} ranks are on {nodes} node(s)",
            why=why,
            mend=f"start it on as many, or set launch.nodes to {nodes} or auto",
        )
    if launch.node_range is None and given > nodes:
        return PlanError(
            f"Slurm has given {given} nodes, but the {world} ranks are on {nodes}: the others idle",
            why="most often ranks were started on each node alone, and do not know of each other",
            mend="start bigtrain launch itself in the job, or torchrun by srun with --nnodes and a "
            f"--rdzv-endpoint; set launch.nodes to {nodes} if this is meant",
        )
    each = sorted(set(Counter(one["node"] for one in everyone).values()))
    if launch.processes != "auto" and each != [launch.processes]:
        return PlanError(
            f"launch.processes = {launch.processes}, but nodes have {', '.join(map(str, each))} "
            f"rank(s): {world} ranks on {nodes} node(s)",
            why=why,
            mend=f"start {launch.processes} ranks on each node, or set launch.processes=auto",
        )
    return None
