"""Keeping a rank on the processors next to its GPU and its memory. No torch.

Memory is taken where the thread runs that first touches it, so processors are all that is set.
Ranks roam within their NUMA node: finer binding slows loader processes, which inherit it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_GPUS = Path("/proc/driver/nvidia/gpus")
_PCI = Path("/sys/bus/pci/devices")

Cores = frozenset[int]


def numa_nodes(folder: Path = _NODES) -> dict[int, Cores]:
    """Return the processors of each NUMA node that has some, as far as the system tells."""
    found = {}
    for path in folder.glob("node[0-9]*/cpulist"):
        with contextlib.suppress(OSError, ValueError):
            cores = parse_cores(path.read_text())
            if cores:
                found[int(path.parent.name.removeprefix("node"))] = cores
    return dict(sorted(found.items()))


def gpu_nodes(
    env: Mapping[str, str], driver: Path = _GPUS, devices: Path = _PCI
) -> list[int | None]:
    """Return the NUMA node of each visible GPU, in the order of their places on the bus."""
    if not driver.is_dir():
        return []
    nodes: list[int | None] = []
    for gpu in sorted(driver.iterdir()):
        node = None
        with contextlib.suppress(OSError, ValueError):
            number = int((devices / gpu.name.lower() / "numa_node").read_text())
            node = number if number >= 0 else None
        nodes.append(node)
    given = env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS")
    if given:  # of these alone the visible ones are counted, where Slurm hides the others
        try:
            nodes = [nodes[gpu] for gpu in sorted(parse_cores(given))]
        except (ValueError, IndexError):
            return []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nodes
    wanted = [word.strip() for word in visible.split(",") if word.strip()]
    return [nodes[int(w)] if w.isdecimal() and int(w) < len(nodes) else None for w in wanted]


def parse_cores(text: str) -> Cores:
    """Return {0, 1, 2, 8} for "0-2,8".

    Raises:
        ValueError: it is no list of processors.
    """
    cores: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def cores_for(
    local_rank: int,
    local_world_size: int,
    nodes: Mapping[int, Cores],
    gpus: Sequence[int | None],
    allowed: AbstractSet[int],
) -> Cores | None:
    """Return the processors that a rank should keep to, or None where it may roam.

    With GPUs, those next to the GPU of that number; else ranks are shared out to the NUMA nodes in
    order. Only of what is allowed, and only where there is a choice.
    """
    usable = {node: cores & allowed for node, cores in nodes.items() if cores & allowed}
    if len(usable) < 2:
        return None
    if gpus:
        node = gpus[local_rank % len(gpus)]
        return frozenset(usable[node]) if node in usable else None
    ordered = list(usable)
    return frozenset(usable[ordered[local_rank * len(ordered) // local_world_size]])


def is_bound(env: Mapping[str, str]) -> bool:
    """Tell whether Slurm has given this task processors of its own already."""
    of_node = env.get("SLURM_CPUS_ON_NODE", "")
    return (
        "BIGTRAIN_LAUNCHER_PID" not in env
        and of_node.isdecimal()
        and len(os.sched_getaffinity(0)) < int(of_node)
    )


def bind(local_rank: int, local_world_size: int, env: Mapping[str, str] = os.environ) -> None:
    """Keep all threads of this process on the processors of `cores_for`."""
    if not hasattr(os, "sched_setaffinity"):
        return
    allowed = os.sched_getaffinity(0)
    cores = cores_for(local_rank, local_world_size, numa_nodes(), gpu_nodes(env), allowed)
    if cores is None or cores == allowed:
        return
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)
