"""Where this process is, and so which ranks are started where. Pure, but for what it is told."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from bigtrain.config.check import check
from bigtrain.config.launching import LaunchSection
from bigtrain.config.schema import Config
from bigtrain.config.serving import ServerSection
from bigtrain.errors import PlanError
from bigtrain.machine import num_cores, num_gpus
from bigtrain.slurm_lists import counts_per_node, node_names

from .seats import Seats, seat

Start = Literal["here", "srun", "ssh", "mpiexec", "sbatch"]
_SECOND = "SLURM_JOB_NODELIST_HET_GROUP_1"


@dataclass(frozen=True)
class Allocation:
    """The nodes that Slurm has given to the job that this process is in."""

    job: str
    nodes: tuple[str, ...]
    cores: int  # of a node, the least of all
    gpus: int | None  # of a node, where Slurm knows
    apart: tuple[str, ...] = ()  # nodes of the job's second component, for servers


@dataclass(frozen=True)
class Plan:
    """How many ranks are started on which nodes, and by what.

    With servers, ranks are those of each worker.
    """

    found: str
    start: Start
    nodes: tuple[str, ...]
    ranks_per_node: int
    least: int  # nodes that the run goes on with, when others are lost
    seats: Seats | None = None  # who is where, if there are servers
    apart: tuple[str, ...] = ()  # nodes of the second component of a Slurm job

    def is_local(self, launch: LaunchSection) -> bool:
        """Tell whether ranks are started by this process, with no agent between."""
        return self.start == "here" and launch.container is None

    @property
    def servers(self) -> int:
        return len(self.seats.servers) if self.seats else 0

    @property
    def num_nodes(self) -> int:
        """Nodes of the world, or of each worker's world."""
        return self.seats.nodes_per_worker if self.seats else len(self.nodes)

    @property
    def num_ranks(self) -> int:
        """Ranks of the world, or of each worker's world."""
        return self.num_nodes * self.ranks_per_node

    @property
    def processes_per_node(self) -> int:
        """Processes on the node that has most of them, of those with ranks."""
        if self.seats is None:
            return self.ranks_per_node
        nodes = {node for nodes in self.seats.workers for node in nodes}
        return max(self.seats.processes(node, self.ranks_per_node) for node in nodes)

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        if self.seats is not None:
            return f"{self.found}: {self._seated(self.seats, ranks)}"
        if self.start == "here":
            return f"{self.found}: {ranks} here"
        if self.start == "mpiexec":
            return f"{self.found}: {ranks}, started by mpiexec where its options say"
        each = f"{self.ranks_per_node} on each of {len(self.nodes)} nodes"
        if len(self.nodes) == 1:
            each = "on one node"
        if self.start == "sbatch":  # which ones, Slurm will say
            return f"{self.found}: {ranks}, {each}"
        return f"{self.found}: {ranks}, {each} ({shortened(self.nodes)}), started by {self.start}"

    def _seated(self, seats: Seats, ranks: str) -> str:
        count = len(seats.workers)
        servers = f"{self.servers} server{'s' * (self.servers > 1)}"
        workers = f"{count} worker{'s' * (count > 1)} of {ranks}"
        if self.start == "here":
            return f"{servers}, {workers} here"
        of_workers = list(dict.fromkeys(node for nodes in seats.workers for node in nodes))
        of_servers = list(dict.fromkeys(seats.servers))
        if self.start == "sbatch":  # which ones, Slurm will say
            where = "the same" if set(of_servers) <= set(of_workers) else _counted(of_servers)
            return f"{workers} on {_counted(of_workers)}, {servers} on {where}"
        return (
            f"{workers} on {shortened(of_workers)}; {servers} on {shortened(of_servers)}; started "
            f"by {self.start}"
        )


def find_allocation(
    env: Mapping[str, str], expand: Callable[[str], list[str]] = node_names
) -> Allocation | None:
    """Return the Slurm allocation that this process may start ranks in, if it is in one.

    Raises:
        PlanError: Slurm's variables contradict each other, or its commands are missing.
    """
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        return None
    nodes = expand(env["SLURM_JOB_NODELIST"])
    said = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    if said != str(len(nodes)):
        raise PlanError(
            f"Slurm says that job {env['SLURM_JOB_ID']} has {said or '(no number of)'} nodes, but "
            f"{env['SLURM_JOB_NODELIST']} is {len(nodes)}",
            where="environment",
            why="SLURM_JOB_NUM_NODES and SLURM_JOB_NODELIST are of different jobs",
            mend="start bigtrain with the environment that Slurm has given to the job",
        )
    return Allocation(
        job=env["SLURM_JOB_ID"],
        nodes=tuple(nodes),
        cores=fewest_cores(env) or num_cores(),
        gpus=_gpus_of_a_node(env),
        apart=tuple(expand(env[_SECOND]) if _SECOND in env else ()),
    )


def _gpus_of_a_node(env: Mapping[str, str]) -> int | None:
    """Return what Slurm tells of GPUs: on a node of the job, or where salloc was called."""
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdecimal():
        return int(on_node)
    kinds = [kind.rpartition(":")[2] for kind in env.get("SLURM_GPUS_PER_NODE", "").split(",")]
    return sum(map(int, kinds)) if all(kind.isdecimal() for kind in kinds) else None


def fewest_cores(env: Mapping[str, str], component: int = 0) -> int | None:
    """Return the cores that a Slurm job has on each node at least, if Slurm says so."""
    name = "SLURM_JOB_CPUS_PER_NODE" + (f"_HET_GROUP_{component}" if component else "")
    return min(counts_per_node(env.get(name, "")), default=None)


def find_hosts(text: str) -> list[str]:
    """Return the machines of --hosts: names with commas between, or a file with one on each line.

    Raises:
        PlanError: a machine is named twice, or the file names none.
    """
    path = Path(text)
    if text and "," not in text and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            raise PlanError(
                f"--hosts {text} cannot be read: {error.strerror or error}",
                mend="give a file that you may read, or names like a,b",
            ) from error
        names = [words[0] for line in lines if (words := line.partition("#")[0].split())]
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or (text and not names):
        raise PlanError(
            f"--hosts {text}: " + (f"{', '.join(twice)} twice" if twice else "it names no machine"),
            why="each machine gets launch.processes ranks, and is named once",
            mend="give names like a,b, or a file with a name on each line",
        )
    return names


def make_plan(
    config: Config, env: Mapping[str, str], allocation: Allocation | None, hosts: Sequence[str] = ()
) -> Plan:
    """Return what to start where: on `hosts`, else in the allocation, else on this machine.

    Raises:
        PlanError: what is asked for and what is there differ; the arithmetic is shown.
    """
    hosts = tuple(hosts or config.launch.hosts or ())
    if config.launch.mpi is not None:
        return _by_mpi(config, env, allocation, hosts)
    if config.server.slurm is not None and config.launch.slurm is None and allocation is None:
        raise PlanError(
            "server.slurm without launch.slurm",
            why="this is no Slurm job and would not become one, so that servers would have no "
            "nodes of their own",
            mend="set launch.slurm={} (or give bigtrain launch --slurm), name server.hosts, or "
            "remove server.slurm",
        )
    if hosts:
        if config.launch.processes == "auto" and config.parallel.dp == "auto":
            raise PlanError(
                "nothing says how many ranks each host gets",
                why="their GPUs cannot be counted from here",
                mend="set launch.processes (ranks of each), or parallel.dp",
            )
        found = f"{len({*hosts, *(config.server.hosts or ())})} hosts"
        return _on(config, env, found, "ssh", hosts, None, config.server.hosts or ())
    _check_apart(config, allocation)
    if allocation is not None:
        found = f"Slurm job {allocation.job}" if allocation.job else "Slurm"
        # And not where salloc was called.
        here = allocation.nodes == (env.get("SLURMD_NODENAME"),) and not allocation.apart
        start: Start = "here" if here else "srun"
        return _on(config, env, found, start, allocation.nodes, allocation, allocation.apart)
    least, _ = config.launch.node_range or (1, 1)
    if least > 1:
        raise PlanError(
            f"launch.nodes = {config.launch.nodes}, but this is one machine",
            why="there is no Slurm allocation around this process, and no hosts are given",
            mend="submit it (bigtrain launch CONFIG --slurm), name machines (--hosts a,b), or set "
            "launch.nodes=1",
        )
    return _on(config, env, "this machine", "here", ("localhost",), None)


def _check_apart(config: Config, allocation: Allocation | None) -> None:
    """See that nodes for servers alone are there, if they are asked for.

    Raises:
        PlanError: they are not.
    """
    if config.server.hosts:
        raise PlanError(
            "server.hosts without hosts for workers",
            why="servers and workers are started in one way: here, by ssh, or in a Slurm job",
            mend="name those of workers too (--hosts a,b or launch.hosts), or remove server.hosts",
        )
    slurm = config.server.slurm
    if slurm is not None and allocation is not None and len(allocation.apart) != slurm.nodes:
        raise PlanError(
            f"server.slurm.nodes = {slurm.nodes}, but Slurm job {allocation.job} has "
            f"{len(allocation.apart)} in a second component",
            why="servers would be on other nodes than they are meant for",
            mend="submit it (bigtrain launch CONFIG --slurm), or set server.slurm=null",
        )


def _by_mpi(
    config: Config,
    env: Mapping[str, str],
    allocation: Allocation | None,
    hosts: Sequence[str],
) -> Plan:
    """Return the plan of ranks that MPI places: how many there are is all that we say."""
    if hosts:
        raise PlanError(
            "launch.mpi and hosts exclude each other",
            why="mpiexec places ranks itself",
            mend="name the hosts in launch.mpi.options: [-hosts, 'a,b'] of MPICH, "
            "[--host, 'a:8,b:8'] of Open MPI",
        )
    nodes = allocation.nodes if allocation else ("localhost",)
    if allocation is None and config.launch.node_range is not None:
        # Which ones, the options say; ranks compare their number when they have met.
        nodes = tuple(f"node {i}" for i in range(config.launch.node_range[1]))
    return replace(_on(config, env, "MPI", "mpiexec", nodes, allocation), least=len(nodes))


def _on(
    config: Config,
    env: Mapping[str, str],
    found: str,
    start: Start,
    nodes: tuple[str, ...],
    allocation: Allocation | None,
    apart: Sequence[str] = (),
) -> Plan:
    least, most = config.launch.node_range or (len(nodes), len(nodes))
    if not least <= len(nodes) <= most:
        asked = config.launch.nodes
        raise PlanError(
            f"launch.nodes = {asked}, but {found} has {len(nodes)}: {shortened(nodes)}",
            why="a run on other nodes than it was meant for is refused, not made to fit",
            mend=f"ask for {asked} nodes, or set launch.nodes to {len(nodes)} or auto",
        )

    if config.server.servers:
        seats = seat(config.server, nodes, apart)
        count, sharing = seats.nodes_per_worker, seats.most_workers
        each = ranks_per_node(config, env, count, allocation, sharing)
        second = dict.fromkeys(n for n in seats.servers if allocation and n not in nodes)
        return Plan(found, start, seats.nodes, each, 1, seats, tuple(second))

    def plan(count: int) -> Plan:
        each = ranks_per_node(config, env, count, allocation)
        return Plan(found, start, nodes[:count], each, least)

    if least == most:
        return plan(len(nodes))
    return _largest(config, plan, least, len(nodes))


def _largest(config: Config, plan: Callable[[int], Plan], least: int, most: int) -> Plan:
    """Return the plan of the most nodes whose ranks can share out the model and the batch."""
    for count in range(most, least - 1, -1):
        with contextlib.suppress(PlanError):  # degrees that so many nodes cannot share
            if not check(config, plan(count).num_ranks):
                return plan(count)
    return plan(most)  # and what is wrong with it will be told


def smaller(config: Config, plan: Plan, lost: Collection[str]) -> Plan | None:
    """Return the plan for the nodes that are left of one, or None if the run needs more."""
    left = tuple(node for node in plan.nodes if node not in lost)
    for count in range(len(left), plan.least - 1, -1):
        smaller = replace(plan, nodes=left[:count])
        if count and not check(config, smaller.num_ranks):
            return smaller
    return None


def without(plan: Plan, server: ServerSection, lost: Collection[str]) -> Plan | None:
    """Return the plan whose servers and workers are all on the nodes that are left of one.

    None, if these are too few: a worker is as it was.
    """
    assert plan.seats is not None
    of_workers = {node: None for nodes in plan.seats.workers for node in nodes if node not in lost}
    of_servers = {node: None for node in plan.seats.servers if node not in lost}
    try:
        seats = seat(server, list(of_workers), list(of_servers)) if of_workers else None
    except PlanError:
        return None
    if seats is None or seats.nodes_per_worker != plan.num_nodes:
        return None
    left = tuple(node for node in plan.apart if node in seats.nodes)
    return replace(plan, nodes=seats.nodes, seats=seats, apart=left)


def ranks_per_node(
    config: Config,
    env: Mapping[str, str],
    num_nodes: int,
    allocation: Allocation | None = None,
    sharing: int = 1,
) -> int:
    """Return the ranks of a node: what the config fixes, else one per GPU, or core without GPUs.

    Of those, as many as make whole replicas of the model, and at least one replica; of a node that
    workers are `sharing`, those of one worker.

    Raises:
        PlanError: the degrees cannot be shared by the nodes.
    """
    parallel = config.parallel
    if config.launch.processes != "auto":
        return int(config.launch.processes)
    per_replica = parallel.pp * parallel.cp * parallel.tp
    if parallel.dp != "auto":
        world = per_replica * int(parallel.dp)
        if world % num_nodes:
            raise PlanError(
                f"{world} ranks cannot be shared by {num_nodes} nodes: {world} / {num_nodes} = "
                f"{world / num_nodes:.2f}",
                why=f"pp={parallel.pp} x dp={parallel.dp} x cp={parallel.cp} x tp={parallel.tp} = "
                f"{world}, and every node has as many ranks as the others",
                mend="change a degree or the number of nodes, or set parallel.dp=auto",
            )
        return world // num_nodes
    cores = allocation.cores if allocation else num_cores()
    gpus = allocation.gpus if allocation and allocation.gpus is not None else num_gpus(env)
    there = (0 if config.run.device == "cpu" else gpus) or cores
    there = max(1, there // sharing)
    whole = per_replica // math.gcd(per_replica, num_nodes)  # a node's part of whole replicas
    return max(1, there // whole) * whole


def _counted(nodes: Sequence[str]) -> str:
    return f"{len(nodes)} nodes" if len(nodes) > 1 else "one node"


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Return names in a line; of many, the first and the last."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, ... {names[-1]}"
