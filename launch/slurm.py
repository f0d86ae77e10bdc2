"""The script of a Slurm job, as a pure function of the config."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bigtrain.config.launching import SlurmSection
from bigtrain.config.schema import Config
from bigtrain.config.yaml_tree import write_value
from bigtrain.errors import PlanError

from .plan import Allocation, Plan, make_plan

COMMENT = "bigtrain:"  # what the comment of a job begins with, before its run folder
FIRST_LEAD_SECONDS = 120  # before the time limit, as long as nobody knows what saving takes
_SLACK_SECONDS = 30
_NO_CASE = '  *) echo "no job of this sweep: ${SLURM_ARRAY_TASK_ID:-none}" >&2; exit 2 ;;'
_SETUP_FAILED = "trap 'echo \"launch.slurm.setup failed: $BASH_COMMAND\" >&2; exit 2' ERR"


@dataclass(frozen=True)
class Script:
    """What a script says that is not in the config."""

    source: str  # the file that the user has named
    config_path: str  # the one that the job reads
    folder: str | None = None  # where the job starts; where sbatch is called, if nothing is said
    code: tuple[str, ...] = ()  # which code it was submitted from
    lead_seconds: int = FIRST_LEAD_SECONDS


def allocation_of(config: Config) -> Allocation:
    """Return what the job will be given, as far as ranks are counted by it.

    Raises:
        PlanError: nothing says how many ranks a node gets.
    """
    launch, slurm = config.launch, config.launch.slurm or SlurmSection()
    _, nodes = launch.node_range or (1, 1)
    if not (
        slurm.gpus_per_node
        or slurm.cpus_per_node
        or launch.processes != "auto"
        or config.parallel.dp != "auto"
    ):
        raise PlanError(
            "nothing says how many ranks each node of the Slurm job gets",
            why="the nodes are not known here, so their GPUs cannot be counted",
            mend="set launch.slurm.gpus_per_node or launch.slurm.cpus_per_node (a rank for each), "
            "launch.processes (ranks of a node), or parallel.dp",
        )
    names = tuple(f"node {i}" for i in range(nodes))
    apart = config.server.slurm.nodes if config.server.slurm else 0
    of_servers = tuple(f"server node {i}" for i in range(apart))
    return Allocation("", names, slurm.cpus_per_node or 1, slurm.gpus_per_node or 0, of_servers)


def make_submission(config: Config) -> Plan:
    """Return the plan of the job that Slurm is asked for.

    Raises:
        PlanError: nothing says how many ranks a node gets.
    """
    return replace(make_plan(config, {}, allocation_of(config)), start="sbatch")


def render(config: Config, script: Script) -> str:
    """Return the script that sbatch takes: it starts the run, or goes on with it."""
    lines = [
        "#!/bin/bash",
        f"# {Path(config.run.dir).name}, rendered by bigtrain from {script.source}.",
        *(f"# code: {line}" for line in script.code),
        *(f"#SBATCH {option}" for option in _options(config, script)),
        *(f"#SBATCH {option}" for option in _second_component(config)),
        "",
        *_setup(config),
        *_guards(script.config_path),
        *_overrides(config),
        f"exec bigtrain launch {shlex.quote(script.config_path)} --resume"
        + (' "${task[@]}"' if combinations(config) else ""),
    ]
    return "\n".join(lines) + "\n"


def _options(config: Config, script: Script) -> Iterator[str]:
    slurm, tasks = config.launch.slurm or SlurmSection(), len(combinations(config))
    cpus = slurm.cpus_per_node
    if cpus is None and not slurm.exclusive and not slurm.gpus_per_node:
        # One is all that a task gets unasked; for GPUs, sites set how many go with each.
        cpus = make_submission(config).processes_per_node
    least, most = config.launch.node_range or (1, 1)
    folder = Path(config.run.dir)
    yield f"--job-name={_quoted(slurm.job_name or folder.name)}"
    yield f"--comment={_quoted(COMMENT + str(Path(script.folder or '') / folder))}"
    yield f"--nodes={least}" + (f"-{most}" if most > least else "")
    if most == least:  # bigtrain starts the ranks of a node itself
        yield "--ntasks-per-node=1"
    wishes: list[tuple[str, Any]] = [
        # With tasks, Slurm takes the least nodes of a range, and not the most that are free.
        ("cpus-per-task" if most == least else "mincpus", cpus),
        ("gpus-per-node", slurm.gpus_per_node),
        ("mem", slurm.mem),
        ("time", slurm.time),
        ("account", slurm.account),
        ("partition", slurm.partition),
        ("qos", slurm.qos),
        ("constraint", slurm.constraint),
        ("exclude", slurm.exclude),
        ("reservation", slurm.reservation),
        ("dependency", slurm.after),
    ]
    yield from (f"--{name}={_quoted(str(value))}" for name, value in wishes if value is not None)
    if most > least or config.server.servers:
        yield "--no-kill"  # a node may be lost
    if slurm.exclusive:
        yield "--exclusive"
    if tasks:
        at_once = f"%{slurm.sweep_at_once}" if slurm.sweep_at_once else ""
        yield f"--array=0-{tasks - 1}{at_once}"
    log = str(folder / "slurm").replace("%", "%%") + ("/%A_%a.out" if tasks else "/%j.out")
    yield f"--output={_quoted(log)}"
    yield "--open-mode=append"
    yield f"--signal=B:USR1@{lead_seconds(config, script)}"
    yield "--requeue" if slurm.requeue else "--no-requeue"
    if script.folder is not None:
        yield f"--chdir={_quoted(script.folder)}"
    yield from slurm.options


def _second_component(config: Config) -> Iterator[str]:
    """Yield what is asked for servers, on nodes of another kind: a heterogeneous job of Slurm.

    What is not said again (time, account, queue, memory, ...) is as in the first component.
    """
    slurm = config.server.slurm
    if slurm is None or not config.server.servers:
        return
    yield "hetjob"
    yield f"--nodes={slurm.nodes}"
    yield "--ntasks-per-node=1"
    cpus = slurm.cpus_per_node or math.ceil(config.server.servers / slurm.nodes)
    wishes: list[tuple[str, Any]] = [
        ("cpus-per-task", cpus),
        ("mem", slurm.mem),
        ("partition", slurm.partition),
        ("constraint", slurm.constraint),
    ]
    yield from (f"--{name}={_quoted(str(value))}" for name, value in wishes if value is not None)
    yield "--no-kill"
    yield from slurm.options


def lead_seconds(config: Config, script: Script) -> int:
    """Return how long before its time limit the job is to save and end.

    Raises:
        PlanError: that is longer than the job may take.
    """
    slurm = config.launch.slurm or SlurmSection()
    wanted = slurm.signal_seconds
    lead = script.lead_seconds if wanted == "auto" else int(wanted)
    limit = seconds_of(slurm.time) if slurm.time else None
    if limit is not None and lead >= limit:
        raise PlanError(
            f"launch.slurm.time is {limit} s, and {lead} s before its end the run is to save",
            why="no time is left for the run itself",
            mend="ask for more time, or set launch.slurm.signal_seconds to what saving takes",
        )
    return lead


def measured_lead(save_seconds: float, step_seconds: float) -> int:
    """Return the time to keep for saving, by the longest step and save that were measured."""
    return round(2 * save_seconds + step_seconds + _SLACK_SECONDS)


def seconds_of(time: str) -> int:
    """Return the seconds of a time as Slurm writes it: "90" minutes, "1:30:00", "2-12"."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours, then minutes, then seconds
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes, then seconds
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def combinations(config: Config) -> list[list[str]]:
    """Return the overrides of every job of the sweep, each with a run folder of its own."""
    sweep = config.launch.slurm.sweep if config.launch.slurm else {}
    if not sweep:
        return []
    rows = []
    for number, values in enumerate(itertools.product(*sweep.values())):
        pairs = zip(sweep, values, strict=True)
        row = [f"{key}={write_value(value)}" for key, value in pairs]
        rows.append([*row, f"run.dir={Path(config.run.dir) / str(number)}"])
    return rows


def _overrides(config: Config) -> list[str]:
    rows = combinations(config)
    if not rows:
        return []
    cases = [f"  {number}) task=({shlex.join(row)}) ;;" for number, row in enumerate(rows)]
    return ['case "${SLURM_ARRAY_TASK_ID:-}" in', *cases, _NO_CASE, "esac"]


def _setup(config: Config) -> list[str]:
    """Return the user's lines; the job ends where one of them fails."""
    lines = (config.launch.slurm or SlurmSection()).setup
    return [_SETUP_FAILED, *lines, "trap - ERR"] if lines else []


def _guards(config_path: str) -> list[str]:
    """Return lines that say what is missing, where Slurm would only tell an exit code."""
    quoted = shlex.quote(config_path)
    named = config_path if quoted == config_path else f'"{quoted}"'
    return [
        "command -v bigtrain > /dev/null || {",
        '  echo "bigtrain is not in PATH on $(hostname): activate its environment by a line in'
        ' launch.slurm.setup" >&2',
        "  exit 2",
        "}",
        f"[ -f {quoted} ] || {{",
        f'  echo "there is no {named} in $PWD: submit this with'
        ' bigtrain launch --slurm, or from the folder of the run" >&2',
        "  exit 2",
        "}",
    ]


def _quoted(text: str) -> str:
    """Return text as sbatch reads it in a script: with quotes where there are spaces."""
    if not set(text) & set(" \t#;&'\"\\"):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
