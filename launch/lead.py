"""One launch: the plan is told, the ranks are started by it, and watched to their end."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bigtrain.config.launching import SlurmSection
from bigtrain.config.load import dump
from bigtrain.config.schema import Config
from bigtrain.doctor.facts import room_of
from bigtrain.doctor.findings import room
from bigtrain.run_folder import RunFolder
from bigtrain.server.chaos import Event

from .fleet import Fleet
from .job import Job, Meeting
from .local import LocalTeam
from .mpi import MpiTeam, mpi_command, mpi_environment, run_by_mpi
from .outcome import Ended
from .plan import Plan, fewest_cores, smaller
from .remote import LoneTeam
from .requeue import queue_again
from .served import lead_served
from .starters import passed_on, starters
from .time_limit import TimeLimit
from .watch import Team, run_team, stderr_line


def make_job(config: Config, plan: Plan, folder: RunFolder, resume: bool) -> Job:
    """Return what is started."""
    return Job(
        config_path=folder.next_config,
        logs=folder.logs,
        num_nodes=plan.num_nodes,
        ranks_per_node=plan.ranks_per_node,
        threads=config.launch.threads_per_rank,
        resume=resume,
        env=config.launch.env,
        patient=_is_patient(),
    )


def make_team(config: Config, plan: Plan, job: Job) -> Team:
    """Return the ranks of the plan, which do not run yet."""
    if plan.is_local(config.launch):
        return LocalTeam(job)
    return LoneTeam(job, Fleet(plan, config.launch, job.logs / "agents.log", stderr_line))


def lead(
    config: Config, plan: Plan, folder: RunFolder, resume: bool, chaos: Sequence[Event] = ()
) -> int:
    """Run the ranks, or servers and workers, to their end; return the exit code for the shell.

    Where the run may do with fewer nodes, it goes on without those that are lost; a Slurm job whose
    time is up, or that lost a node, queues up again. `chaos` is for runs with servers.

    Raises:
        LaunchError: ranks could not be started, or one failed; its error comes first.
    """
    again = _in_slurm() and resume  # else a job that starts again would not go on
    before, is_time_up = folder.newest_step, _time_limit(config, folder, again)
    _warn(plan, folder)
    try:
        if plan.servers:
            job = make_job(config, plan, folder, resume)
            return lead_served(config, plan, job, folder, stderr_line, chaos, is_time_up)
        return _lead_ranks(config, plan, folder, resume, is_time_up)
    except Ended as ended:
        raise _after(ended, folder, before, again) from None


def _lead_ranks(
    config: Config, plan: Plan, folder: RunFolder, resume: bool, is_time_up: Callable[[], bool]
) -> int:
    while True:
        stderr_line(str(plan))
        job = make_job(config, plan, folder, resume)
        team = make_team(config, plan, job)
        try:
            return run_team(job, team, config.launch.stop_seconds, stderr_line, is_time_up)
        except Ended as ended:
            left = smaller(config, plan, ended.lost_nodes) if ended.lost_nodes else None
            if left is None or ended.asked is not None:
                raise
            stderr_line(f"{ended}\ngoing on with {len(left.nodes)} of {len(plan.nodes)} nodes")
            plan, resume = left, True
            folder.next_config.write_text(dump(config), encoding="utf-8")


def lead_mpi(config: Config, plan: Plan, words: Sequence[str]) -> int:
    """Have mpiexec run the ranks to their end, and return the exit code for the shell.

    The ranks open the run folder themselves, as under an mpiexec of the user's; `words` are those
    of a rank's command.

    Raises:
        LaunchError: mpiexec could not be started, or ended before the run was complete.
    """
    folder, again = RunFolder(Path(config.run.dir)), _in_slurm() and "--resume" in words
    before, is_time_up = folder.newest_step, _time_limit(config, folder, again)
    stderr_line(str(plan))
    patient = _is_patient()
    env = {**mpi_environment(config, plan, os.environ), "BIGTRAIN_PATIENT": str(int(patient))}
    team = MpiTeam(mpi_command(config, plan, words), env)
    try:
        return run_by_mpi(team, patient, config.launch.stop_seconds, stderr_line, is_time_up)
    except Ended as ended:
        raise _after(ended, folder, before, again) from None


def _after(ended: Ended, folder: RunFolder, before: int, again: bool) -> Ended:
    """In a Slurm job, queue up again where that helps; return the error to end with."""
    if not again:
        return ended
    return queue_again(ended, os.environ, folder.newest_step > before, stderr_line)


def _in_slurm() -> bool:
    return "SLURM_JOB_ID" in os.environ


def _is_patient() -> bool:
    # Slurm sends a signal by several ways, and kills when time is up; a person means it.
    return _in_slurm() and not sys.stdin.isatty()


def _time_limit(config: Config, folder: RunFolder, again: bool) -> Callable[[], bool]:
    """Return what tells that the time of a job that will queue up again is nearly up."""
    slurm = config.launch.slurm or SlurmSection()
    if not again or slurm.signal_seconds != "auto":
        return lambda: False
    return TimeLimit(folder, os.environ).is_near


def _warn(plan: Plan, folder: RunFolder) -> None:
    """Say what will not stop the run, but may spoil it."""
    cores, what = fewest_cores(os.environ), "processes" if plan.servers else "ranks"
    if plan.start != "ssh" and cores is not None and cores < plan.processes_per_node:
        stderr_line(
            f"warning: {plan.processes_per_node} {what} share {cores} processor(s) of each node\n"
            "  mend: set launch.slurm.cpus_per_node (sbatch --cpus-per-task)"
        )
    if plan.start == "here":
        for one in room([room_of(folder.path)]):
            stderr_line(f"warning: {one.render()}")


def dry_mpi_lines(config: Config, plan: Plan, words: Sequence[str]) -> list[str]:
    """Return what `lead_mpi` would do: the plan, the environment, the command."""
    lines = [str(plan), f"command  {shlex.join(mpi_command(config, plan, words))}"]
    env = mpi_environment(config, plan, os.environ)
    return [*lines, *(f"mpiexec  {name}={value}" for name, value in env.items())]


def dry_lines(config: Config, plan: Plan, resume: bool) -> list[str]:
    """Return what `lead` would do: the plan, the commands, the environment of rank 0."""
    job = make_job(config, plan, RunFolder(Path(config.run.dir)), resume)
    lines = [str(plan)]
    if not plan.is_local(config.launch):
        for command in starters(plan, config.launch, os.environ, os.getcwd()):
            lines.append(f"starts   {shlex.join(command)}")
        if names := passed_on(plan, os.environ):
            lines.append(f"sends    {', '.join(names)}")
    lines.append(f"command  {shlex.join(job.command())}")
    env = job.environment(0, Meeting(plan.nodes[0], 0, -1), -1, {})
    told = {name: value for name, value in env.items() if not name.startswith("BIGTRAIN_")}
    told["MASTER_PORT"] = "(free)"
    lines += [f"rank 0   {name}={value}" for name, value in told.items()]
    return lines
