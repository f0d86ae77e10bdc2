"""What each rank does for `bigtrain doctor`: join, measure, and give rank 0 what was found."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bigtrain.comm.init import leave, set_timeout
from bigtrain.comm.world import read_world
from bigtrain.doctor.alone import matmul_side, measure_clock, measure_device, measure_files
from bigtrain.doctor.facts import facts_of, processor
from bigtrain.doctor.findings import slow_devices
from bigtrain.doctor.measured import Device, Measured, Node
from bigtrain.doctor.ranks import Ranks, join_all
from bigtrain.doctor.together import measure_all_reduce, measure_links
from bigtrain.errors import BigtrainError
from bigtrain.machine import threads_per_rank
from bigtrain.ops.library import Missing, find

RESULT = "result.json"
_JOIN_SECONDS = 660.0  # a node may have to build its kernels first
_WAIT_SECONDS = 120.0  # for another rank, once all have joined
_AGAIN = 2  # times that a device that looks slow is measured anew


def examine(path: Path) -> None:
    """Do what the wish at `path` (see launch/doctor.py) says; rank 0 writes the result beside it.

    Raises:
        BigtrainError: the wish cannot be read, or ranks cannot talk to each other.
    """
    wish = _read(path)
    me = read_world()
    torch.set_num_threads(threads_per_rank(wish["threads"], me.local_world_size))
    node = _node(wish) if me.local_rank == 0 else None
    ranks = join_all(me, wish["device"], _JOIN_SECONDS)
    set_timeout(_WAIT_SECONDS)
    nodes = tuple(one for one in ranks.gather(node) if one is not None)
    measured = _measure(ranks, nodes, path.parent, wish["quick"])
    if me.rank == 0:
        part = path.with_name(f"{RESULT}.part")
        part.write_text(json.dumps(measured.to_message()), encoding="utf-8")
        part.replace(path.with_name(RESULT))
    ranks.meet()
    leave()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BigtrainError(
            f"this node cannot read {path}: {error}",
            why="all nodes find there what they are to do",
            mend="start it in a folder that all nodes see",
        ) from error


def _node(wish: Mapping[str, Any]) -> Node:
    """Return this node, with what can be told without the others."""
    facts = facts_of(Path(wish["run_dir"]))
    facts["versions"]["CUDA of torch"] = torch.version.cuda or "none"
    kernels, missing = {}, []
    for kind in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            found = find(kind)
        except BigtrainError as error:  # required, and not there
            found = Missing(error.problem)
        if isinstance(found, Missing):
            kernels[kind] = "torch"
            it = found.problem
            missing += [": ".join(filter(None, (it.what.strip(" :\n"), it.why)))] * found.wanted
        else:
            kernels[kind] = found.target
    names = wish["nodes"]
    name = names[int(os.environ.get("GROUP_RANK", "0"))] if len(names) > 1 else facts["host"]
    return Node(name, facts, kernels=kernels, missing="; ".join(missing))


def _measure(ranks: Ranks, nodes: tuple[Node, ...], folder: Path, quick: bool) -> Measured:
    """Measure one thing after the other, so that none disturbs another. Collective."""
    clocks = ranks.gather(measure_clock(ranks))
    files = ranks.gather(_files(ranks, folder, 8 if quick else 32))
    devices = _devices(ranks, max(node.facts["cores"] for node in nodes), quick)
    found = []
    for number, node in enumerate(nodes):
        first = ranks.first_of(number)
        (ahead, trip), (write, read, error) = clocks[first], files[first]
        found.append(
            replace(
                node,
                ahead_seconds=ahead,
                round_trip_seconds=trip,
                write_mb_per_second=write,
                read_mb_per_second=read,
                file_error=error,
            )
        )
    measured = Measured(tuple(found), tuple(devices), tuple(measure_links(ranks, quick)))
    return replace(measured, all_reduce=measure_all_reduce(ranks, measured, quick))


def _files(ranks: Ranks, folder: Path, num_mib: int) -> tuple[float | None, float | None, str]:
    """Write and read on all nodes at the same time, as checkpoints do."""
    if not ranks.is_first:
        return None, None, ""
    try:
        return *measure_files(folder, f"node-{ranks.me.node_rank}.bin", num_mib), ""
    except OSError as error:
        return None, None, error.strerror or str(error)


def _devices(ranks: Ranks, most_cores: int, quick: bool) -> list[Device]:
    """Return the devices of all ranks; what looks slow is measured anew, the best counts."""
    side = matmul_side(ranks.device.type, most_cores, quick)
    on_gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if on_gpu else processor()
    best: list[Device] = ranks.gather(measure_device(ranks, name, side))
    for _ in range(_AGAIN):
        if not slow_devices(best):
            break
        again: list[Device] = ranks.gather(measure_device(ranks, name, side))
        pairs = zip(best, again, strict=True)
        best = [min(pair, key=lambda device: device.matmul_seconds) for pair in pairs]
    return best
