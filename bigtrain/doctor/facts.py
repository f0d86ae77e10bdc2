"""What a node is, asked in a moment: versions, room, clock. No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import socket
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from bigtrain.machine import num_cores, num_gpus

PACKAGES = ("bigtrain", "torch", "numpy")
DRIVER = "NVIDIA driver"
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_INFO = Path("/proc/cpuinfo")
_SHM = Path("/dev/shm")


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what this node is, as JSON can carry it; `folder` is where runs are kept.

    Bytes are bytes; what cannot be found out is None. `time` is this node's clock, read last.
    """
    return {
        **room_of(folder),
        "versions": versions(),
        "cores": num_cores(),
        "gpus": num_gpus(os.environ),
        "memory_bytes": _memory(),
        "time": time.time(),
    }


def room_of(folder: Path) -> dict[str, Any]:
    """Return of the facts those about room, which take no time to find out."""
    return {
        "host": socket.gethostname(),
        "folder": str(folder),
        "disk_free_bytes": _free(_existing(folder)),
        "shm_free_bytes": _free(_SHM),
    }


def versions() -> dict[str, str]:
    """Return the version of all that must be the same on every node; "missing" what is not there.

    `code` is a digest of the source files of bigtrain: the same version may have other code.
    """
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # bigtrain itself runs from a folder, then
            found[name] = "not installed" if name == "bigtrain" else "missing"
    found["code"] = code_digest(Path(__file__).resolve().parents[1])
    with contextlib.suppress(OSError, IndexError):
        words = _DRIVER.read_text().splitlines()[0].split("  ")
        found[DRIVER] = words[1].split()[0]
    return found


@functools.cache
def code_digest(package: Path) -> str:
    """Return a digest of the names and contents of the Python files of a package."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        with contextlib.suppress(OSError):  # it went away, or is being written
            content = path.read_bytes()
            digest.update(f"{path.relative_to(package)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()[:12]


def processor(cpu_info: Path = _CPU_INFO) -> str:
    """Return the name of the processors, as their maker writes it."""
    with contextlib.suppress(OSError):
        for line in cpu_info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _existing(folder: Path) -> Path:
    """Return the folder, or what of the way to it is there."""
    folder = folder.absolute()
    return next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:  # there is none
        return None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
