"""Joining the world that a launcher started."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigtrain.comm.mesh import Mesh
from bigtrain.comm.started import adopt, interface_towards
from bigtrain.comm.world import World, read_world
from bigtrain.config.layout import Layout
from bigtrain.errors import CommError, PlanError

_SOMEWHERE = "192.0.2.1"  # in no network: the way there is that of the default route


def choose_device(wanted: str, world: World) -> torch.device:
    """Return this rank's device; `wanted` is auto, cpu or cuda.

    Raises:
        PlanError: CUDA is asked for and missing, or a node has more ranks than GPUs.
    """
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise PlanError(
            "run.device is cuda, but torch sees no GPU",
            why=f"torch {torch.__version__} on this machine, "
            f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(unset)')}",
            mend="set run.device=cpu, or install a torch for this machine's CUDA driver",
        )
    count = torch.cuda.device_count()
    a_task = "SLURM_STEP_NUM_TASKS" in os.environ and "BIGTRAIN_LAUNCHER_PID" not in os.environ
    if count == 1 and a_task:  # srun --gpus-per-task: it sees its own alone
        return torch.device("cuda", 0)
    if world.local_world_size > count:
        raise PlanError(
            f"{world.local_world_size} ranks on this node, but {count} GPUs",
            why="every rank needs a GPU of its own",
            mend=f"start at most {count} ranks a node, or set run.device=cpu",
        )
    return torch.device("cuda", world.local_rank)


def join(world: World, device: torch.device, timeout_seconds: float) -> None:
    """Form the default process group (gloo on CPU, NCCL on CUDA); alone, do nothing.

    The rendezvous is the one of torchrun (MASTER_ADDR, MASTER_PORT), except that rank 0 of
    `bigtrain launch` and under mpiexec has the listening socket itself (BIGTRAIN_STORE_FD), so that
    no other program can take the port in between.

    Raises:
        CommError: not all ranks came in time, or they cannot reach each other.
    """
    if world.world_size == 1:
        return
    timeout = datetime.timedelta(seconds=timeout_seconds)
    interface = interface_towards(os.environ.get("MASTER_ADDR", ""))
    if interface == "lo" and world.world_size > world.local_world_size:
        # Debian leads a machine's own name to loopback, by which others do not find it.
        interface = interface_towards(_SOMEWHERE)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=_local_store(world, timeout),
            init_method=None if "BIGTRAIN_STORE_FD" in os.environ else "env://",
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise CommError(
            f"rank {world.rank} of {world.world_size} could not join the world at {address}",
            why=str(error).strip().split("\n")[0],
            mend="see whether every rank started (logs/rank-*.log) and that address is reachable",
        ) from error


def set_timeout(seconds: float) -> None:
    """Bound every later wait in all groups of this process."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def _local_store(world: World, timeout: datetime.timedelta) -> dist.Store | None:
    """Return the store that `bigtrain launch` prepared, or None under another launcher."""
    descriptor = os.environ.get("BIGTRAIN_STORE_FD")
    if descriptor is None:
        return None
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=world.world_size,
        is_master=world.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=int(descriptor) if world.rank == 0 else None,
    )
    return dist.PrefixStore("bigtrain", store)


def _abort_on_error(abort: Callable[[int], None]) -> None:
    """Have an exception that nobody catches end all ranks: MPI would wait for this one for ever."""
    plain = sys.excepthook

    def hook(*about: Any) -> None:
        plain(*about)
        abort(1)

    sys.excepthook = hook


def leave() -> None:
    """Leave the world, if this process joined one; the last thing that a script does.

    Without it, a thread of gloo that wants to put down a tensor may find that the interpreter has
    ended, and torch aborts a process that has done its work.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # joins the threads of groups that nobody refers to any more
        _let_threads_rest()


def _let_threads_rest(most_seconds: float = 2.0) -> None:
    """Return when no other thread of this process has anything to do (elsewhere: after a bit).

    One that waits for the interpreter seems to rest, until it gets that while we sleep: look twice.
    """
    quiet, end = 0, time.monotonic() + most_seconds
    while quiet < 2 and time.monotonic() < end:
        time.sleep(0.005)
        quiet = 0 if _other_threads_run() else quiet + 1


def _other_threads_run() -> bool:
    for path in Path("/proc/self/task").glob("[0-9]*"):
        if int(path.name) != threading.get_native_id():
            with contextlib.suppress(OSError):  # it has ended
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if state == "R":
                    return True
    return False


def init(
    layout: Layout | None = None, *, device: str = "auto", timeout_seconds: float = 300.0
) -> Mesh:
    """Join the world that a launcher started (or stay alone) and return its mesh.

    For loops of one's own: torchrun, srun, mpiexec, what else sets RANK and WORLD_SIZE, and plain
    `python` work. Without a layout, every rank is data parallel. Call `leave()` at the end.

    Raises:
        PlanError: the environment makes no sense, or the layout is for another world size.
        CommError: not all ranks came in time.
    """
    started = adopt()
    world = read_world()
    chosen = choose_device(device, world)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    join(world, chosen, timeout_seconds)
    if started is not None and started.by == "mpiexec":
        _abort_on_error(started.abort)  # after torch's own hook, which prints only when it is left
    return Mesh.build(layout or Layout(dp=world.world_size), world, chosen)
