"""One launch: the plan is told, the ranks are started by it, and watched to their end."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.run_folder import RunFolder

from .job import Job, Meeting
from .local import LocalTeam
from .plan import Plan
from .remote import RemoteTeam, starters
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
    )


def make_team(config: Config, plan: Plan, job: Job) -> Team:
    """Return the ranks of the plan, which do not run yet."""
    if plan.start == "here":
        return LocalTeam(job)
    return RemoteTeam(
        job,
        plan,
        ssh=config.launch.ssh,
        join_seconds=config.launch.join_seconds,
        silence_seconds=config.launch.silence_seconds,
    )


def lead(config: Config, plan: Plan, folder: RunFolder, resume: bool) -> int:
    """Run the ranks to their end and return the exit code for the shell.

    Raises:
        LaunchError: ranks could not be started, or one failed; its error comes first.
    """
    stderr_line(str(plan))
    job = make_job(config, plan, folder, resume)
    in_slurm = "SLURM_JOB_ID" in os.environ
    return run_team(
        job, make_team(config, plan, job), config.launch.stop_seconds, stderr_line, in_slurm
    )


def dry_lines(config: Config, plan: Plan, resume: bool) -> list[str]:
    """Return what `lead` would do: the plan, the commands, the environment of rank 0."""
    job = make_job(config, plan, RunFolder(Path(config.run.dir)), resume)
    lines = [str(plan)]
    if plan.start != "here":
        for command in starters(plan, config.launch.ssh, os.environ):
            lines.append(f"starts   {shlex.join(command)}")
    lines.append(f"command  {shlex.join(job.command())}")
    env = job.environment(0, Meeting(plan.nodes[0], 0, -1), -1, {})
    told = {name: value for name, value in env.items() if not name.startswith("BIGTRAIN_")}
    told["MASTER_PORT"] = "(free)"
    lines += [f"rank 0   {name}={value}" for name, value in told.items()]
    return lines
