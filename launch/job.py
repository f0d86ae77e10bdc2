"""What a rank is started with: command and environment, as pure functions of the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bigtrain.config.check import fixed_world_size
from bigtrain.config.schema import Config
from bigtrain.machine import num_cores, num_gpus


@dataclass(frozen=True)
class Job:
    """A run on this machine: its config file, where ranks log, how many there are."""

    config_path: Path
    logs: Path
    num_ranks: int
    threads_per_rank: int
    resume: bool

    def log(self, rank: int) -> Path:
        """Return the file that keeps all output of `rank`."""
        return self.logs / f"rank-{rank}.log"

    def command(self) -> list[str]:
        """Return the command line, the same for every rank."""
        command = [sys.executable, "-m", "bigtrain.train", str(self.config_path)]
        return [*command, "--resume"] if self.resume else command

    def environment(
        self, rank: int, port: int, store_fd: int, report_fd: int, base: Mapping[str, str]
    ) -> dict[str, str]:
        """Return the environment of `rank`: torchrun's names, and what only this launcher sets.

        store_fd: the listening socket of the rendezvous. report_fd: where the rank tells how it
        ended. base: the environment to start from; what the user has set for gloo stays.
        """
        return {
            "OMP_NUM_THREADS": str(self.threads_per_rank),
            # Ranks of one machine talk over loopback, whatever the host name resolves to.
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform.startswith("linux") else "lo0",
            **base,
            "RANK": str(rank),
            "WORLD_SIZE": str(self.num_ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self.num_ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
            "BIGTRAIN_STORE_FD": str(store_fd),
            "BIGTRAIN_REPORT_FD": str(report_fd),
            "BIGTRAIN_LAUNCHER_PID": str(os.getpid()),
        }


def num_local_ranks(config: Config) -> int:
    """Return how many ranks the config starts here: what it fixes, else one per GPU or core.

    Of those, as many as make whole replicas of the model, and at least one replica.
    """
    fixed = fixed_world_size(config)
    if fixed is not None:
        return fixed
    gpus = 0 if config.run.device == "cpu" else num_gpus(os.environ)
    parallel = config.parallel
    per_replica = parallel.pp * parallel.cp * parallel.tp
    return max(1, (gpus or num_cores()) // per_replica) * per_replica
