"""What this machine has and how it keeps files, asked without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def num_cores() -> int:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_gpus(env: Mapping[str, str], driver: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """Return the NVIDIA GPUs that are visible, asked of the driver and not of torch."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def threads_per_rank(threads: int | str, local_world_size: int) -> int:
    """Return the compute threads of a rank; "auto" shares the cores among those of this machine."""
    return max(1, num_cores() // local_world_size) if threads == "auto" else int(threads)


def share(path: Path) -> None:
    """Give a file the mode that the user's umask wants; some writers make theirs private."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
