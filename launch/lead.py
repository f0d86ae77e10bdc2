"""One launch: the plan is told, the ranks are started by it, and watched to their end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bigtrain.config.load import dump
from bigtrain.config.schema import Config
from bigtrain.run_folder import RunFolder

from .job import Job, Meeting
from .local import LocalTeam
from .outcome import Ended
from .plan import Plan, smaller
from .remote import RemoteTeam
from .requeue import queue_again
from .starters import starters
from .watch import Team, run_team, stderr_line


def make_job(config: Config, plan: Plan, folder: RunFolder, resume: bool) -> Job:
    """Return what is started."""
    return Job(
        config_path=folder.next_config,
        logs=folder.logs,
        num_nodes=len(plan.nodes),
        ranks_per_node=plan.ranks_per_node,
        threads=config.launch.threads_per_rank,
        resume=resume,
        env=config.launch.env,
        # Slurm sends a signal by several ways, and kills when time is up; a person means it.
        patient="SLURM_JOB_ID" in os.environ and not sys.stdin.isatty(),
    )


def make_team(config: Config, plan: Plan, job: Job) -> Team:
    """Return the ranks of the plan, which do not run yet."""
    if plan.start == "here" and config.launch.container is None:
        return LocalTeam(job)
    return RemoteTeam(job, plan, config.launch, stderr_line)


def lead(config: Config, plan: Plan, folder: RunFolder, resume: bool) -> int:
    """Run the ranks to their end and return the exit code for the shell.

    Where the run may do with fewer nodes, it goes on without those that are lost; a Slurm job whose
    time is up, or that lost a node, queues up again.

    Raises:
        LaunchError: ranks could not be started, or one failed; its error comes first.
    """
    in_slurm = "SLURM_JOB_ID" in os.environ
    before = _newest_checkpoint(folder)
    while True:
        stderr_line(str(plan))
        job = make_job(config, plan, folder, resume)
        team = make_team(config, plan, job)
        try:
            return run_team(job, team, config.launch.stop_seconds, stderr_line)
        except Ended as ended:
            left = smaller(config, plan, ended.lost_nodes) if ended.lost_nodes else None
            if left is None or ended.asked is not None:
                if in_slurm:
                    saved = _newest_checkpoint(folder) > before
                    ended = queue_again(ended, os.environ, saved, stderr_line)
                raise ended from None
            stderr_line(f"{ended}\ngoing on with {len(left.nodes)} of {len(plan.nodes)} nodes")
            plan, resume = left, True
            folder.next_config.write_text(dump(config), encoding="utf-8")


def _newest_checkpoint(folder: RunFolder) -> int:
    """Return the step of the newest checkpoint, 0 without any."""
    names = [path.name.removeprefix("step-") for path in folder.checkpoints.glob("step-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def mpi_command(config: Config, plan: Plan, words: Sequence[str]) -> list[str]:
    """Return the command that starts all ranks by MPI; `words` are those of a rank's command."""
    assert config.launch.mpi is not None
    mpi = config.launch.mpi
    count = str(plan.num_ranks)
    rank = [sys.executable, "-m", "bigtrain.train", *words]
    return [*mpi.command, "-n", count, *mpi.options, *rank]


def dry_lines(config: Config, plan: Plan, resume: bool) -> list[str]:
    """Return what `lead` would do: the plan, the commands, the environment of rank 0."""
    job = make_job(config, plan, RunFolder(Path(config.run.dir)), resume)
    lines = [str(plan)]
    if plan.start != "here" or config.launch.container is not None:
        for command in starters(plan, config.launch, os.environ, os.getcwd()):
            lines.append(f"starts   {shlex.join(command)}")
    lines.append(f"command  {shlex.join(job.command())}")
    env = job.environment(0, Meeting(plan.nodes[0], 0, -1), -1, {})
    told = {name: value for name, value in env.items() if not name.startswith("BIGTRAIN_")}
    told["MASTER_PORT"] = "(free)"
    lines += [f"rank 0   {name}={value}" for name, value in told.items()]
    return lines
