"""What a rank is started with: command and environment, as pure functions of the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bigtrain.machine import num_gpus, threads_per_rank


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet: the address of rank 0's node, and a port that is listened on there."""

    address: str
    port: int
    store_fd: int  # the listening socket, for rank 0; meaningless elsewhere


@dataclass(frozen=True)
class Job:
    """A run: its config file, where ranks log, how many there are."""

    config_path: Path
    logs: Path
    num_nodes: int
    ranks_per_node: int
    threads: int | str  # compute threads of a rank, or auto
    resume: bool
    env: Mapping[str, str] = field(default_factory=dict)  # what the user wants ranks to have
    module: str = "bigtrain.train"  # what a rank runs
    patient: bool = False  # signals that come again change nothing: Slurm sends them to everybody
    sharers: int | None = None  # processes of the run on a node, if not these ranks alone
    slot: int | None = None  # which of a node's worlds this is, and so which GPUs are its own

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def ranks_of(self, node: int) -> range:
        """Return the ranks of a node, by its number: neighbours are together."""
        return range(node * self.ranks_per_node, (node + 1) * self.ranks_per_node)

    def log(self, rank: int) -> Path:
        """Return the file that keeps all output of `rank`."""
        return self.logs / f"rank-{rank}.log"

    def command(self) -> list[str]:
        """Return the command line, the same for every rank."""
        command = [sys.executable, "-m", self.module, str(self.config_path)]
        return [*command, "--resume"] if self.resume else command

    def environment(
        self, rank: int, meeting: Meeting, report_fd: int, base: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the environment of `rank`: torchrun's names, and what only this launcher sets.

        report_fd: where the rank tells how it ended. base: the environment to start from.
        """
        node, local_rank = divmod(rank, self.ranks_per_node)
        sharers = self.sharers or self.ranks_per_node
        return {
            "OMP_NUM_THREADS": str(threads_per_rank(self.threads, sharers)),
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # it warns of each address that has no name
            **base,
            **self.env,
            **({} if self.slot is None else visible_gpus(base, self.slot, self.ranks_per_node)),
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
            "GROUP_RANK": str(node),
            "MASTER_ADDR": meeting.address,
            "MASTER_PORT": str(meeting.port),
            "PYTHONUNBUFFERED": "1",
            "BIGTRAIN_PATIENT": str(int(self.patient)),
            "BIGTRAIN_STORE_FD": str(meeting.store_fd),
            "BIGTRAIN_REPORT_FD": str(report_fd),
            "BIGTRAIN_LAUNCHER_PID": str(os.getpid()),
        }

    def to_message(self) -> dict[str, Any]:
        """Return the job as what JSON can carry."""
        paths = {"config_path": str(self.config_path), "logs": str(self.logs)}
        return {**asdict(self), **paths, "env": dict(self.env)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> Job:
        """Return the job that `to_message` has made a message of."""
        paths = {name: Path(message[name]) for name in ("config_path", "logs")}
        return cls(**{**message, **paths})


def visible_gpus(env: Mapping[str, str], slot: int, ranks: int) -> dict[str, str]:
    """Return which GPUs a world sees, as environment: as many as it has ranks, in order."""
    count = num_gpus(env)
    if count == 0:
        return {}
    given = env.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(gpu) for gpu in range(count)]
    mine = [names[(slot * ranks + rank) % len(names)] for rank in range(ranks)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(dict.fromkeys(mine))}
