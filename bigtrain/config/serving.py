"""The server section: owners of parameters that are processes of their own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bigtrain.config.launching import Line, Option
from bigtrain.config.section import PositiveInt, Section

CodingKind = Literal["fp32", "bf16", "int8", "int4", "onebit", "topk"]


class RowsSection(Section):
    optimizer: Literal["row_adagrad", "adagrad", "adam", "sgd"] = "row_adagrad"
    """How rows of tables update (ServerEmbedding). row_adagrad: Adagrad with one sum for a row;
    adam: with the moments of those rows alone that a batch has. optimizer.* is for all the rest."""
    lr: Annotated[float, Field(gt=0)] = 0.05
    """Peak rate of rows; it follows the schedule as optimizer.lr does."""
    folder: str | None = None
    """Folder on each server's own disk for tables that its memory does not hold; they are mapped
    from there. Empty: in memory."""


class ServerSlurmSection(Section):
    nodes: PositiveInt = 1
    """Nodes for servers, besides those of workers."""
    partition: Line | None = None
    """Which queue they are of. Empty: that of launch.slurm."""
    cpus_per_node: PositiveInt | None = None
    """Processors of each. Empty: one for each server."""
    mem: Line | None = None
    """Memory of each, like 64G. Empty: what launch.slurm says."""
    constraint: Line | None = None
    """Features that they must have."""
    options: list[Option] = []
    """More options for sbatch, for these nodes alone."""


class ServerSection(Section):
    servers: Annotated[int, Field(ge=0)] = 0
    """Parameter servers, which hold and update all parameters; 0: there are none."""
    workers: PositiveInt = 2
    """Workers that read shares of the data, each one or more ranks: parallel says how many."""
    replicas: PositiveInt = 1
    """Servers that hold each block, so that the run survives the end of all but one of them."""
    mode: Literal["local", "sync", "ssp", "async"] = "local"
    """local: workers take steps of their own, and servers move by the mean of how far they came.
    sync: a step is the sum of all workers' gradients. ssp: the same, but workers may be some
    rounds ahead. async: a step with each worker's gradient, as it comes."""
    local_steps: PositiveInt = 20
    """local: steps that a worker takes by itself in a round."""
    fragments: PositiveInt = 1
    """local: parts of the model which take turns to meet the servers, each after local_steps: then
    less is on the wire at a time. Before checkpoints and evaluations all meet."""
    outer_lr: Annotated[float, Field(gt=0)] = 0.7
    """local: the servers' learning rate; 1 is the mean of the workers' parameters."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """local: the servers' Nesterov momentum; 0: none."""
    push: CodingKind | Literal["auto"] = "auto"
    """What workers send: fp32, bf16, 8 or 4 bits, signs, the largest elements; what is lost goes
    with the next. auto: int4 for local, else fp32."""
    pull: CodingKind | Literal["auto"] = "auto"
    """What servers send back: parameters (fp32: in the model's precision), or what they lack, in so
    many bits. auto: int4 for local, else fp32."""
    density: Annotated[float, Field(gt=0, le=1)] = 0.125
    """topk: share of the elements of which something is sent: of each 1 / density neighbours, the
    place and the sign of the largest."""
    quorum: PositiveInt | None = None
    """Workers that make up a round, if others are late. Empty: for local more than half, else all
    that are there."""
    grace_seconds: Annotated[float, Field(ge=0)] | None = None
    """How long workers that have begun the round may take once there is a quorum. Empty: a tenth of
    what the round has taken."""
    staleness: Annotated[int, Field(ge=0)] = 2
    """ssp: rounds that a worker may be ahead of the one that is open."""
    rows: RowsSection = RowsSection()
    """Embedding tables that servers keep, of models that have some (ServerEmbedding)."""
    lease_seconds: Annotated[float, Field(ge=0.5)] = 5.0
    """After what silence a worker or a server counts as gone."""
    join_seconds: Annotated[float, Field(gt=0)] = 120.0
    """How long the first round waits for all workers, and servers for each other."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often a worker or a server that was killed is started again; it joins in the middle."""
    hosts: list[Line] | None = None
    """Machines for servers, by ssh; launch.hosts are then for workers. Empty: servers are spread
    over those of workers."""
    slurm: ServerSlurmSection | None = None
    """Nodes for servers in a Slurm job, its second component. Empty: servers are spread over those
    of workers."""

    def coding(self, way: Literal["push", "pull"]) -> CodingKind:
        """Return what messages of that way are."""
        given = self.push if way == "push" else self.pull
        if given != "auto":
            return given
        return "int4" if self.mode == "local" else "fp32"

    def nodes_per_worker(self, num_nodes: int) -> int:
        """Return how many of these nodes each worker has; several workers may share one."""
        return max(1, num_nodes // self.workers)

    @property
    def steps_of_round(self) -> int:
        """Steps of the run in a round."""
        return self.local_steps // self.fragments if self.mode == "local" else 1

    @property
    def least(self) -> int:
        """Workers that make up a round, if others are late."""
        if self.quorum is not None:
            return self.quorum
        return self.workers // 2 + 1 if self.mode == "local" else self.workers
