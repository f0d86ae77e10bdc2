"""Submitting a run to Slurm: freeze it, render its script, hand that to sbatch."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.run_folder import RunFolder, explained_io, open_run

from .frozen import freeze, frozen_path
from .plan import Plan
from .slurm import FIRST_LEAD_SECONDS, Script, render
from .slurm_commands import Ask, ask_slurm, queued_jobs
from .time_limit import Saving


@dataclass(frozen=True)
class Submitted:
    """Jobs that Slurm has taken; several where they are chained."""

    numbers: tuple[str, ...]
    script: Path


def dry_script(config: Config, source: str) -> str:
    """Return the script, as it is for whoever submits it from this folder."""
    script = Script(source, str(frozen_path(config)), lead_seconds=_lead(config))
    return render(config, script)


def submit(
    config: Config, plan: Plan, source: str, *, resume: bool, restart: bool, ask: Ask = ask_slurm
) -> Submitted:
    """Freeze the config, write the script into the run folder, and submit it.

    Raises:
        LaunchError: a job of this run is queued already, or it is another sweep that is resumed;
            sbatch is not there, or refuses.
        RunFolderError: the folder holds a run, and neither `resume` nor `restart` is given.
    """
    folder = Path(config.run.dir)
    absolute = folder.absolute()
    for job in queued_jobs(ask):
        if Path(job.folder) == absolute:
            raise LaunchError(
                f"job {job.number} of this run is {job.state.lower()} already",
                why="two jobs in one run folder would overwrite each other",
                mend=f"bigtrain jobs cancel {job.number}, or take another run.dir",
            )
    if resume:
        _check_resumed_sweep(config)
    _, lock = open_run(config, resume=resume, restart=restart)
    with lock:
        RunFolder(folder).next_config.unlink(missing_ok=True)  # the job will write it
        code = freeze(config, plan.ranks_per_node)
        script = Script(source, str(frozen_path(config)), os.getcwd(), code, _lead(config))
        path = frozen_path(config).with_name("job.sh")
        with explained_io(path):
            path.write_text(render(config, script), encoding="utf-8")
    return Submitted(tuple(_hand_in(config, path, ask)), path)


def _hand_in(config: Config, path: Path, ask: Ask) -> list[str]:
    """Call sbatch; of a chain, each job waits for the one before to end unfinished."""
    numbers: list[str] = []
    chain = config.launch.slurm.chain if config.launch.slurm else 1
    for _ in range(chain):
        after = []
        if numbers:
            # When the run is complete, jobs that are left can never start, and Slurm removes them.
            after = [f"--dependency=afternotok:{numbers[-1]}", "--kill-on-invalid-dep=yes"]
        try:
            said = ask(["sbatch", "--parsable", *after, str(path)])
        except LaunchError:
            for number in numbers:
                with contextlib.suppress(LaunchError):  # the first error is the one to tell
                    ask(["scancel", number])
            raise
        numbers.append(said.strip().split(";")[0])
    return numbers


def _lead(config: Config) -> int:
    """Return the seconds that saving needs before the time limit, by what this run has measured."""
    return Saving(RunFolder(Path(config.run.dir))).lead() or FIRST_LEAD_SECONDS


def _check_resumed_sweep(config: Config) -> None:
    """See that each job of a resumed sweep goes on with the values that its folder is of.

    Raises:
        LaunchError: the sweep is another one.
    """
    now = config.launch.slurm.sweep if config.launch.slurm else {}
    before = now
    with contextlib.suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        frozen = yaml.safe_load(frozen_path(config).read_text(encoding="utf-8"))
        before = (frozen["launch"].get("slurm") or {}).get("sweep") or {}
    if now != before:
        raise LaunchError(
            f"{config.run.dir} holds another sweep: {before or 'none'}",
            why="its jobs would go on from checkpoints that were trained with other values",
            mend="give the same launch.slurm.sweep, --restart to begin anew, or another run.dir",
        )
