"""The launch section: which ranks are started where, and what Slurm is asked for."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from bigtrain.config.section import CountOrAuto, PositiveInt, Section

_TIME = r"(\d+|\d+:\d+(:\d+)?|\d+-\d+(:\d+){0,2})"
_NODES = r"[1-9]\d{0,5}:[1-9]\d{0,5}"


def _one_line(value: Any) -> Any:
    if isinstance(value, str) and (not value.strip() or not value.isprintable()):
        raise PydanticCustomError("one_line", "it must be text in one line, and not empty")
    return value


def _slurm_time(value: Any) -> Any:
    if type(value) is int and value >= 1:
        return str(value)
    if isinstance(value, str) and re.fullmatch(_TIME, value):
        return value
    raise PydanticCustomError(
        "slurm_time",
        'it must be a time as Slurm writes it: 90 (minutes), "1:30:00", "2-12:00:00"',
    )


def _nodes(value: Any) -> Any:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    if isinstance(value, str) and re.fullmatch(_NODES, value):
        least, most = map(int, value.split(":"))
        if least <= most:
            return value
    raise PydanticCustomError("nodes", "it must be a positive whole number, auto, or like 2:4")


def _option(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("-") and value.isprintable():
        return value
    raise PydanticCustomError("option", "it must be an option of sbatch in one line, like --nice=5")


Line = Annotated[str, BeforeValidator(_one_line)]
SlurmTime = Annotated[
    str,
    BeforeValidator(_slurm_time),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}),
]
Option = Annotated[str, BeforeValidator(_option)]
Nodes = Annotated[
    int | str,
    BeforeValidator(_nodes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"const": "auto"},
                {"type": "string", "pattern": f"^{_NODES}$"},
            ]
        }
    ),
]


class ContainerSection(Section):
    kind: Literal["apptainer", "pyxis"]
    """What runs the image: the command apptainer, or Slurm's plugin pyxis."""
    image: Line
    """The image: a file, or a name that the container's runtime understands."""
    mounts: list[Line] = []
    """Folders to mount besides the current one, like /data or /data:/data:ro."""
    python: Line = "python3"
    """The Python in the image that has bigtrain."""
    options: list[Line] = []
    """More words for `apptainer exec`, or for srun with pyxis."""


class MpiSection(Section):
    command: Annotated[list[Line], Field(min_length=1)] = ["mpiexec"]
    """What starts processes by MPI; -n and the number of ranks are added."""
    options: list[Line] = []
    """More words for it, like -hosts and a,b (MPICH), or --host and a:8,b:8 (Open MPI)."""


class SlurmSection(Section):
    account: Line | None = None
    """Whose budget the job is on."""
    partition: Line | None = None
    """Which queue takes it."""
    qos: Line | None = None
    """Quality of service."""
    time: SlurmTime | None = None
    """Time limit, as Slurm writes it: 90 (minutes), "1:30:00", "2-12:00:00"."""
    gpus_per_node: PositiveInt | None = None
    """GPUs of each node; a rank is started for each."""
    cpus_per_node: PositiveInt | None = None
    """Processors of each node, shared out to its ranks."""
    mem: Line | None = None
    """Memory of each node, like 64G; "0" is all of it."""
    exclusive: bool = False
    """Whether the nodes are for this job alone, with all their processors."""
    constraint: Line | None = None
    """Features that nodes must have."""
    exclude: Line | None = None
    """Nodes that are not to be used."""
    reservation: Line | None = None
    """A reservation to run in."""
    job_name: Line | None = None
    """Name in the queue; without it, that of the run folder."""
    signal_seconds: CountOrAuto = "auto"
    """How long before the time limit the run saves and ends; auto goes by what saving has taken."""
    requeue: bool = True
    """Whether a job that is pre-empted, out of time or short of a node queues up again."""
    after: Line | None = None
    """What must happen before it may start, like afterok:1234."""
    chain: PositiveInt = 1
    """Jobs to submit, each going on where the one before ended unfinished."""
    sweep: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Keys and the values to try: one job of an array for each combination."""
    sweep_at_once: PositiveInt | None = None
    """Jobs of a sweep that may run at the same time."""
    setup: list[Line] = []
    """Lines of shell before the run, like `module load cuda` or `conda activate train`."""
    options: list[Option] = []
    """More options for sbatch, like --mail-type=END."""


class LaunchSection(Section):
    nodes: Nodes = "auto"
    """Machines; auto takes those of the Slurm job or of the hosts, else this one. 2:4: any number
    from 2 to 4, and when one is lost, the run goes on with those that are left."""
    hosts: list[Line] | None = None
    """Machines to start ranks on with ssh, the first one has rank 0. Empty: none."""
    processes: CountOrAuto = "auto"
    """Ranks on each node; auto shares out the product of the degrees, else one per GPU or core."""
    threads_per_rank: CountOrAuto = "auto"
    """Compute threads of a rank; auto shares the machine's cores among its ranks."""
    bind: Literal["auto", "none"] = "auto"
    """auto keeps a rank on the processors next to its GPU and memory; none lets it roam."""
    stop_seconds: Annotated[float, Field(gt=0)] = 60.0
    """After Ctrl-C, how long ranks may take to finish their step and save before they are ended."""
    join_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long nodes may take to join before the launch is given up."""
    silence_seconds: Annotated[float, Field(ge=5)] = 30.0
    """After what silence a node counts as gone."""
    ssh: Annotated[list[Line], Field(min_length=1)] = ["ssh", "-o", "BatchMode=yes"]
    """What starts a command on a host: these words, the host, the command."""
    env: dict[str, str] = {}
    """Environment variables for all ranks."""
    container: ContainerSection | None = None
    """The image that ranks run in. Empty: none."""
    mpi: MpiSection | None = None
    """Start ranks by MPI. Empty: bigtrain starts them itself."""
    slurm: SlurmSection | None = None
    """What a Slurm job of this run asks for. Empty: it is no job, unless --slurm is given."""

    @property
    def node_range(self) -> tuple[int, int] | None:
        """The least and the most nodes of a run, or None if it takes what is there."""
        if isinstance(self.nodes, int):
            return self.nodes, self.nodes
        if self.nodes == "auto":
            return None
        least, most = map(int, self.nodes.split(":"))
        return least, most
