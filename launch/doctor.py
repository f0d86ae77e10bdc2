"""`bigtrain doctor`: the ranks that measure are started as those of a run are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bigtrain.config.schema import Config
from bigtrain.config.serving import ServerSection
from bigtrain.doctor.measured import Measured
from bigtrain.errors import BigtrainError, LaunchError
from bigtrain.machine import num_gpus

from .fleet import Fleet
from .job import Job
from .local import LocalTeam
from .outcome import Ended
from .plan import Allocation, Plan, make_plan
from .remote import LoneTeam
from .watch import Team, run_team, stderr_line

_RESULT = "result.json"


def plan_of(
    config: Config,
    allocation: Allocation | None,
    hosts: Sequence[str] = (),
    ranks_per_node: int | None = None,
) -> tuple[Config, Plan]:
    """Return what to start where: on all nodes that there are, a rank for each GPU, else one.

    The config comes back with what the plan follows from.

    Raises:
        LaunchError: Slurm's environment makes no sense.
    """
    if ranks_per_node is None:
        known = allocation.gpus if allocation is not None else None
        gpus = known if known is not None else num_gpus(os.environ)
        ranks_per_node = max(1, gpus if config.run.device != "cpu" else 0)
    changes = {"nodes": "auto", "processes": ranks_per_node, "mpi": None}
    launch = config.launch.model_copy(update=changes)
    # Servers, and who is beside them, change nothing of what a node is.
    config = config.model_copy(update={"launch": launch, "server": ServerSection()})
    return config, make_plan(config, os.environ, allocation, hosts)


def examine(config: Config, plan: Plan, beside: Path, quick: bool) -> Measured:
    """Have ranks measure on all nodes of the plan, and return what they found.

    They meet in a folder that is made where the run folder is or would be (`beside`), or in one of
    those around it, and is removed at the end; it stays if a rank fails, for its log.

    Raises:
        LaunchError: the folder cannot be made, ranks could not be started, or one failed.
    """
    with _folder(beside) as folder:
        wish = folder / "wish.json"
        wish.write_text(json.dumps(_wish(config, plan, quick)), encoding="utf-8")
        job = Job(
            config_path=wish,
            logs=folder,
            num_nodes=len(plan.nodes),
            ranks_per_node=plan.ranks_per_node,
            threads=config.launch.threads_per_rank,
            resume=False,
            env=config.launch.env,
            module="bigtrain.doctor.rank",
        )
        run_team(job, _team(config, plan, job), config.launch.stop_seconds, stderr_line)
        return _read(folder / _RESULT)


def _team(config: Config, plan: Plan, job: Job) -> Team:
    if plan.is_local(config.launch):
        return LocalTeam(job)
    # To tell how nodes differ is what ranks are started for.
    fleet = Fleet(plan, config.launch, job.logs / "agents.log", stderr_line, may_differ=True)
    return LoneTeam(job, fleet)


def _wish(config: Config, plan: Plan, quick: bool) -> dict[str, Any]:
    return {
        "nodes": list(plan.nodes),
        "device": config.run.device,
        "threads": config.launch.threads_per_rank,
        "run_dir": str(Path(config.run.dir).absolute()),
        "quick": quick,
    }


@contextlib.contextmanager
def _folder(beside: Path) -> Iterator[Path]:
    """Yield a new folder that all nodes see, if they see where it is."""
    beside = beside.absolute()
    there = next(path for path in (beside, *beside.parents) if path.is_dir())
    try:
        folder = Path(tempfile.mkdtemp(prefix=".bigtrain-doctor-", dir=there))
    except OSError as error:
        raise LaunchError(
            f"cannot make a folder in {there}: {error.strerror or error}",
            why="all nodes find there what they are to do, and try how fast they can write",
            mend="start it in a folder that you can write to, and that all nodes see",
        ) from error
    keep = False
    try:
        yield folder
    except Ended as ended:
        keep = str(folder) in str(ended)  # it points at the log of the rank that failed
        raise
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> Measured:
    try:
        message = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BigtrainError(
            f"the ranks have measured, but {path} cannot be read: {error}",
            why="rank 0 writes there what they found",
            mend="start it in a folder that all nodes see",
        ) from error
    return Measured.from_message(message)
