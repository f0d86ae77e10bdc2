"""Where this process is, and so which ranks are started where. Pure, but for what it is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.machine import num_cores, num_gpus
from bigtrain.slurm_lists import counts_per_node, node_names

Start = Literal["here", "srun", "ssh"]


@dataclass(frozen=True)
class Allocation:
    """The nodes that Slurm has given to the job that this process is in."""

    job: str
    nodes: tuple[str, ...]
    cores: int  # of a node, the least of all
    gpus: int | None  # of a node, where Slurm knows


@dataclass(frozen=True)
class Plan:
    """How many ranks are started on which nodes, and by what."""

    found: str
    start: Start
    nodes: tuple[str, ...]
    ranks_per_node: int

    @property
    def num_ranks(self) -> int:
        return len(self.nodes) * self.ranks_per_node

    def __str__(self) -> str:
        ranks = f"{self.num_ranks} rank{'s' * (self.num_ranks > 1)}"
        if self.start == "here":
            return f"{self.found}: {ranks} here"
        each = f"{self.ranks_per_node} on each of {len(self.nodes)} nodes"
        return f"{self.found}: {ranks}, {each} ({shortened(self.nodes)}), started by {self.start}"


def find_allocation(
    env: Mapping[str, str], expand: Callable[[str], list[str]] = node_names
) -> Allocation | None:
    """Return the Slurm allocation that this process may start ranks in, if it is in one.

    Raises:
        LaunchError: Slurm's variables contradict each other, or its commands are missing.
    """
    if "SLURM_JOB_ID" not in env or "SLURM_JOB_NODELIST" not in env:
        return None
    nodes = expand(env["SLURM_JOB_NODELIST"])
    said = env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", ""))
    if said != str(len(nodes)):
        raise LaunchError(
            f"Slurm says that job {env['SLURM_JOB_ID']} has {said or '(no number of)'} nodes, but "
            f"{env['SLURM_JOB_NODELIST']} is {len(nodes)}",
            where="environment",
            why="SLURM_JOB_NUM_NODES and SLURM_JOB_NODELIST are of different jobs",
            mend="start bigtrain with the environment that Slurm has given to the job",
        )
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    return Allocation(
        job=env["SLURM_JOB_ID"],
        nodes=tuple(nodes),
        cores=fewest_cores(env) or num_cores(),
        gpus=int(gpus) if gpus.isdecimal() else None,
    )


def fewest_cores(env: Mapping[str, str]) -> int | None:
    """Return the cores that a Slurm job has on each node at least, if Slurm says so."""
    return min(counts_per_node(env.get("SLURM_JOB_CPUS_PER_NODE", "")), default=None)


def make_plan(
    config: Config, env: Mapping[str, str], allocation: Allocation | None, hosts: Sequence[str] = ()
) -> Plan:
    """Return what to start where: on `hosts`, else in the allocation, else on this machine.

    Raises:
        LaunchError: what is asked for and what is there differ; the arithmetic is shown.
    """
    hosts = tuple(hosts or config.launch.hosts or ())
    if hosts:
        return _on(config, env, f"{len(hosts)} hosts", "ssh", hosts, None)
    if allocation is not None:
        found = f"Slurm job {allocation.job}"
        here = allocation.nodes == (env.get("SLURMD_NODENAME"),)  # and not where salloc was called
        start: Start = "here" if here else "srun"
        return _on(config, env, found, start, allocation.nodes, allocation)
    if config.launch.nodes not in ("auto", 1):
        raise LaunchError(
            f"launch.nodes = {config.launch.nodes}, but this is one machine",
            why="there is no Slurm allocation around this process, and no hosts are given",
            mend="submit it (bigtrain launch CONFIG --slurm), name machines (--hosts a,b), or set "
            "launch.nodes=1",
        )
    return _on(config, env, "this machine", "here", ("localhost",), None)


def _on(
    config: Config,
    env: Mapping[str, str],
    found: str,
    start: Start,
    nodes: tuple[str, ...],
    allocation: Allocation | None,
) -> Plan:
    asked = config.launch.nodes
    if asked not in ("auto", len(nodes)):
        raise LaunchError(
            f"launch.nodes = {asked}, but {found} has {len(nodes)}: {shortened(nodes)}",
            why="a run on other nodes than it was meant for is refused, not made to fit",
            mend=f"ask for {asked} nodes, or set launch.nodes to {len(nodes)} or auto",
        )
    return Plan(found, start, nodes, ranks_per_node(config, env, len(nodes), allocation))


def ranks_per_node(
    config: Config, env: Mapping[str, str], num_nodes: int, allocation: Allocation | None = None
) -> int:
    """Return the ranks of a node: what the config fixes, else one per GPU, or core without GPUs.

    Of those, as many as make whole replicas of the model, and at least one replica.

    Raises:
        LaunchError: the degrees cannot be shared by the nodes.
    """
    parallel = config.parallel
    if config.launch.processes != "auto":
        return int(config.launch.processes)
    per_replica = parallel.pp * parallel.cp * parallel.tp
    if parallel.dp != "auto":
        world = per_replica * int(parallel.dp)
        if world % num_nodes:
            raise LaunchError(
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
    whole = per_replica // math.gcd(per_replica, num_nodes)  # a node's part of whole replicas
    return max(1, there // whole) * whole


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Return names in a line; of many, the first and the last."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])}, ... {names[-1]}"
