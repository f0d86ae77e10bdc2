"""Who this rank is, read from the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.errors import PlanError


@dataclass(frozen=True)
class World:
    """Place of this process among all ranks; alone if nothing launched it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0


def read_world(env: Mapping[str, str] = os.environ) -> World:
    """Return this process's place, from RANK, WORLD_SIZE and so on as torchrun names them.

    Raises:
        PlanError: some are set and some are not, or a value makes no sense.
    """
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return World()
    rank, world_size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local_rank = _number(env, "LOCAL_RANK", default=rank)
    local_world_size = _number(env, "LOCAL_WORLD_SIZE", default=world_size)
    node_rank = _number(env, "GROUP_RANK", default=0)
    if not 0 <= rank < world_size or not 0 <= local_rank < local_world_size <= world_size:
        raise PlanError(
            f"RANK={rank} WORLD_SIZE={world_size} LOCAL_RANK={local_rank} "
            f"LOCAL_WORLD_SIZE={local_world_size} do not fit together",
            where="environment",
            why="a rank is below its world size, globally and on its node",
            mend="start ranks with `bigtrain launch` or torchrun, which set all of them",
        )
    return World(rank, world_size, local_rank, local_world_size, node_rank)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal() or len(text) > 9:
        raise PlanError(
            f"{name} is {'not set' if text is None else repr(text)}",
            where="environment",
            why="RANK and WORLD_SIZE together say which rank this process is",
            mend="start ranks with `bigtrain launch` or torchrun, or unset both to run alone",
        )
    return int(text)
