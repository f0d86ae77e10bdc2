"""Submitting a run to Slurm: freeze it, render its script, hand that to sbatch."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.run_folder import RunFolder, explained_io, open_run

from .frozen import freeze, frozen_path
from .plan import Plan
from .slurm import FIRST_LEAD_SECONDS, Script, measured_lead, render
from .slurm_commands import Ask, ask_slurm, queued_jobs


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
        LaunchError: a job of this run is queued already; sbatch is not there, or refuses.
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
    saves, steps = [0.0], [0.0]
    with contextlib.suppress(OSError), open(RunFolder(Path(config.run.dir)).metrics) as lines:
        for line in lines:
            with contextlib.suppress(ValueError, AttributeError, TypeError):  # cut by a crash
                record = json.loads(line)
                saves.append(float(record.get("save_seconds", 0)))
                if record.get("items_per_second"):
                    steps.append(record["items"] / record["items_per_second"])
    if max(saves) == 0:
        return FIRST_LEAD_SECONDS
    return measured_lead(max(saves), max(steps))
