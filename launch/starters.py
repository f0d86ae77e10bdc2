"""The commands that start an agent on every node: by srun, by ssh, in a container."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence

from bigtrain.config.launching import ContainerSection, LaunchSection
from bigtrain.errors import PlanError

from .plan import Plan, fewest_cores

_AGENT = ("-m", "bigtrain.launch.agent")
# What Python itself needs on a host, and what ranks get from here. srun passes all on.
_TO_START = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
_PASSED_ON = ("XDG_CACHE_HOME",)
_OF_THIS_MACHINE = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_PREFIXES = ("BIGTRAIN_", "OMP_", "GLOO_", "NCCL_", "CUDA_", "TORCH_", "HF_")


def starters(
    plan: Plan, launch: LaunchSection, env: Mapping[str, str], folder: str
) -> list[list[str]]:
    """Return the commands: one of srun for all nodes, or one for each node.

    Each reads the call of the launcher from its standard input. folder: where we are, which is seen
    in containers too.

    Raises:
        PlanError: pyxis is wanted where there is no srun.
    """
    container = launch.container
    agent = _in_container(container, folder)
    if plan.start == "srun":
        # srun has one command for nodes that are alike: those of each component of the job.
        first = [node for node in plan.nodes if node not in plan.apart]
        parts = [part for part in enumerate((first, plan.apart)) if part[1]]
        pyxis = _pyxis(container, folder)
        return [[*_srun(nodes, component, env), *pyxis, *agent] for component, nodes in parts]
    if container is not None and container.kind == "pyxis":
        raise PlanError(
            f"launch.container.kind = pyxis, but ranks are started by {plan.start}",
            why="pyxis is a plugin of Slurm's srun",
            mend="submit it (bigtrain launch CONFIG --slurm), or set kind: apptainer",
        )
    if plan.start == "here":
        return [agent]
    kept = [f"{name}={env[name]}" for name in _TO_START if name in env]
    words = shlex.join(["env", *kept, *agent])
    return [[*launch.ssh, node, words] for node in plan.nodes]


def passed_on(plan: Plan, env: Mapping[str, str]) -> dict[str, str]:
    """Return what ranks on other hosts get of our environment.

    It goes by the agents' standard input: words of a command are seen by every user of a machine,
    and some of these are secrets.
    """
    if plan.start != "ssh":
        return {}
    return {
        name: value
        for name, value in sorted(env.items())
        if name in _PASSED_ON or (name.startswith(_PREFIXES) and name not in _OF_THIS_MACHINE)
    }


def _srun(nodes: Sequence[str], component: int, env: Mapping[str, str]) -> list[str]:
    count, cores = str(len(nodes)), str(fewest_cores(env, component) or 1)
    return [
        *("srun", *([f"--het-group={component}"] if component else [])),
        *("--nodes", count, "--ntasks", count, "--ntasks-per-node", "1"),
        *("--nodelist", ",".join(nodes)),
        # All that the job has on a node is for the agent's ranks, which share it out.
        *("--cpus-per-task", cores, "--cpu-bind=none", "--overlap"),
        # Some sites submit with --export=NONE; agents are no tasks of MPI, whatever the default.
        *("--export=ALL", "--mpi=none", "--kill-on-bad-exit=0", "--input=all"),
        # A node that is lost is for us to notice: Slurm would end the agents of all others.
        "--no-kill",
    ]


def _in_container(container: ContainerSection | None, folder: str) -> list[str]:
    if container is None:
        return [sys.executable, *_AGENT]
    agent = [container.python, *_AGENT]
    if container.kind == "pyxis":
        return agent
    mounts = [word for mount in (folder, *container.mounts) for word in ("--bind", mount)]
    return [
        # --nv is for GPUs; where there are none, it says so and goes on.
        *("apptainer", "exec", "--nv", "--pwd", folder, *mounts),
        *(*container.options, container.image, *agent),
    ]


def _pyxis(container: ContainerSection | None, folder: str) -> Sequence[str]:
    if container is None or container.kind != "pyxis":
        return ()
    mounts = ",".join([folder, *container.mounts])
    return (
        f"--container-image={container.image}",
        f"--container-mounts={mounts}",
        f"--container-workdir={folder}",
        *container.options,
    )
