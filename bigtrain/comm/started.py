"""Ranks that others than bigtrain have started: torchrun, srun, mpiexec. No torch.

Whoever it was, from here on the environment has torchrun's names, which all else reads.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

from bigtrain.errors import PlanError
from bigtrain.slurm_lists import counts_per_node, node_names

Starter = Literal["torchrun", "srun", "mpiexec"]
_NOT_A_TASK = 0xFFFFFFF0  # ids of steps from here on are Slurm's own: the batch script, a shell
_PORTS = range(20000, 32000)  # below those that systems give to outgoing connections
# Size of the world under mpiexec, by implementation: Open MPI; MPICH, Intel MPI, srun --mpi=pmi2.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_OF_A_TASK = (
    *("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"),
)
_SIOCGIFADDR = 0x8915
_LAST_WORDS_SECONDS = 0.3  # mpiexec drops what it has not passed on when it is told to abort


def _nothing(*_: int) -> None:
    """The starter sees by itself."""


@dataclass(frozen=True)
class Started:
    """Who has started this rank, and what it wants to be told at the end."""

    by: Starter
    abort: Callable[[int], None] = _nothing  # this rank fails alone, with that exit code
    finish: Callable[[], None] = _nothing  # all ranks end; waits for them


def starter_of(env: Mapping[str, str] = os.environ) -> Starter | None:
    """Return what has started this process as one rank of several; None if nothing has."""
    if "RANK" in env and "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    tasks = _count(env, "SLURM_STEP_NUM_TASKS")
    is_task = tasks > 1 and _in_step(env) and not _at_terminal(env)
    # mpiexec in a Slurm job starts its helpers by srun, one on each node.
    size = max(_count(env, name) for name in _MPI_SIZES)
    if size > 1 and not (is_task and tasks == size):
        return "mpiexec"
    return "srun" if is_task else None


def num_nodes_given(env: Mapping[str, str] = os.environ) -> int | None:
    """Return how many nodes Slurm has given to the step of this process, else to its job.

    None outside of Slurm, and after a restart of torchrun, which goes on with those that are left.
    """
    if _count(env, "TORCHELASTIC_RESTART_COUNT"):
        return None
    name = "SLURM_STEP_NUM_NODES" if _in_step(env) else "SLURM_JOB_NUM_NODES"
    return _count(env, name) or None


def _in_step(env: Mapping[str, str]) -> bool:
    return _count(env, "SLURM_STEP_ID", _NOT_A_TASK) < _NOT_A_TASK


def _at_terminal(env: Mapping[str, str]) -> bool:
    """Tell whether somebody types: in the shell of srun --pty, which is a task, but no rank."""
    in_shell = "SLURM_PTY_PORT" in env and env.get("SLURM_TASK_PID") != str(os.getpid())
    return in_shell and sys.stdin is not None and sys.stdin.isatty()


def restart_warning(env: Mapping[str, str] = os.environ) -> str | None:
    """Return why torchrun's restarts would not come up again, if it is set to restart."""
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or _count(env, "TORCHELASTIC_MAX_RESTARTS") == 0:
        return None
    return (
        "torchrun restarts ranks with the store of the attempt before, whose addresses are gone: "
        "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
    )


def adopt(env: MutableMapping[str, str] = os.environ) -> Started | None:
    """Give this rank torchrun's names in `env`, if something else than bigtrain has started it.

    Under mpiexec communicates two small messages, by MPI.

    Raises:
        PlanError: what the starter says does not fit together, or mpi4py is missing.
    """
    if "BIGTRAIN_LAUNCHER_PID" in env:
        return None
    starter = starter_of(env)
    if starter is not None:
        env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # it warns of each address without a name
    if starter == "srun":
        env.update(slurm_names(env))
    elif starter == "mpiexec":
        return _adopt_mpi(env)
    return Started(starter) if starter else None


def slurm_names(
    env: Mapping[str, str], expand: Callable[[str], list[str]] = node_names
) -> dict[str, str]:
    """Return torchrun's names for a task of srun. What the user has set of the address stays.

    Raises:
        PlanError: a variable of Slurm is missing or makes no sense.
    """
    missing = [name for name in _OF_A_TASK if not env.get(name)]
    if missing:
        raise PlanError(
            f"this is a task of srun, but {', '.join(missing)} is not set",
            where="environment",
            why="they say which rank this process is",
            mend="start it with srun itself, and let it pass its environment on",
        )
    node = _count(env, "SLURM_NODEID", 0)
    per_node = counts_per_node(env["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(per_node):
        raise PlanError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE="
            f"{env['SLURM_STEP_TASKS_PER_NODE']} is for {len(per_node)} node(s)",
            where="environment",
            why="they are of different steps",
            mend="start it with srun itself, and let it pass its environment on",
        )
    names = {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "GROUP_RANK": str(node),
    }
    if "MASTER_ADDR" not in env:
        names["MASTER_ADDR"] = expand(env["SLURM_STEP_NODELIST"])[0]
    if "MASTER_PORT" not in env:
        # The same on all ranks; of another job or step on this node, most likely another one.
        number = 31 * _count(env, "SLURM_JOB_ID", 0) + _count(env, "SLURM_STEP_ID", 0)
        names["MASTER_PORT"] = str(_PORTS[number % len(_PORTS)])
    return names


def _adopt_mpi(env: MutableMapping[str, str]) -> Started:
    """Ask MPI who we are; rank 0 listens on a port that the system chooses, and tells it."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI that it can load
        raise PlanError(
            "mpiexec has started this process, but mpi4py cannot be imported",
            why=f"it says which rank this is: {error}",
            mend="pip install 'bigtrain[mpi]', or start ranks with torchrun or srun",
        ) from error
    comm = MPI.COMM_WORLD
    said = max(_count(env, name) for name in _MPI_SIZES)
    if comm.size != said:
        raise PlanError(
            f"mpiexec has started {said} processes, but mpi4py knows of {comm.size}",
            why=f"they are of different MPIs; mpi4py uses {MPI.Get_library_version().strip()[:60]}",
            mend="start it with the mpiexec of that MPI, or build mpi4py for the other one",
        )
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first_of_node = local.bcast(comm.rank)
    firsts = sorted(set(comm.allgather(first_of_node)))
    where = None
    if comm.rank == 0:
        listener = socket.socket()
        listener.bind(("0.0.0.0", 0))
        listener.listen(1024)
        listener.set_inheritable(True)
        address = "127.0.0.1" if len(firsts) == 1 else socket.gethostname()
        address = env.get("MASTER_ADDR", address)
        where = address, listener.getsockname()[1], listener.detach()
    address, port, descriptor = comm.bcast(where)
    env.update(
        RANK=str(comm.rank),
        WORLD_SIZE=str(comm.size),
        LOCAL_RANK=str(local.rank),
        LOCAL_WORLD_SIZE=str(local.size),
        GROUP_RANK=str(firsts.index(first_of_node)),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        BIGTRAIN_STORE_FD=str(descriptor),
    )

    def abort(code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LAST_WORDS_SECONDS)
        comm.Abort(code)

    def finish() -> None:
        comm.Barrier()  # mpiexec would end the others when the first one leaves
        MPI.Finalize()

    return Started("mpiexec", abort, finish)


def interface_towards(address: str) -> str | None:
    """Return the network interface that leads to `address`, if the system can tell.

    Nothing is sent. gloo itself takes what the machine's own name leads to, often loopback.
    """
    if not address:
        return None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
            asks.connect((address, 9))
            mine = asks.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(name, asks) == mine:
                    return name
    except OSError:
        return None
    return "lo" if mine.startswith("127.") else None


def _address_of(interface: str, any_socket: Any) -> str | None:
    try:
        answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has none
        return None
    return socket.inet_ntoa(answer[20:24])


def _count(env: Mapping[str, str], name: str, default: int = 0) -> int:
    text = env.get(name, "").strip()
    return int(text) if text.isdecimal() and len(text) <= 10 else default
