"""Ranks that mpiexec starts for us: one process to watch, which passes on what it is asked."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.lifetime import end_with_parent

from .outcome import Ended, Rank, stop_code
from .plan import Plan
from .watch import Asked, watch


def mpi_command(config: Config, plan: Plan, words: Sequence[str]) -> list[str]:
    """Return the command that starts all ranks by MPI; `words` are those of a rank's command."""
    assert config.launch.mpi is not None
    mpi = config.launch.mpi
    rank = [sys.executable, "-m", "bigtrain.train", *words]
    return [*mpi.command, "-n", str(plan.num_ranks), *mpi.options, *rank]


def mpi_environment(config: Config, plan: Plan, env: Mapping[str, str]) -> dict[str, str]:
    """Return what mpiexec gets beside our environment `env`."""
    own = dict(config.launch.env)
    if "SLURM_JOB_ID" in env:
        # MPICH and Open MPI read here how many ranks a node takes; else neighbours, which a
        # tensor-parallel group is made of, may be on different nodes.
        own["SLURM_TASKS_PER_NODE"] = f"{plan.ranks_per_node}(x{len(plan.nodes)})"
    return own


class MpiTeam:
    """All ranks as one: of mpiexec alone we see how it ends."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.ranks = [Rank(0)]
        self._command, self._env = command, env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, asked: Sequence[int] = ()) -> None:
        """Start mpiexec.

        Raises:
            LaunchError: it cannot be started.
        """
        try:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # the terminal's Ctrl-C comes to us, we pass it on
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            raise LaunchError(
                f"could not start {self._command[0]}",
                why=str(error),
                mend="install an MPI (pip install mpich), or set launch.mpi.command",
            ) from error

    def update(self) -> None:
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            self.ranks[0].code = code
            self.ranks[0].report = {"done": True}  # what it ended by, ranks have told themselves

    def ask(self, number: int) -> None:
        """Have ranks stop: SIGUSR1 is passed on by every mpiexec, SIGTERM ends that of Open MPI."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)

    def end(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.end()
        if self._process is not None:
            self._process.wait()


def run_by_mpi(
    team: MpiTeam,
    patient: bool,
    stop_seconds: float,
    say: Callable[[str], None],
    is_time_up: Callable[[], bool],
) -> int:
    """Run mpiexec to its end, as `run_team` runs ranks, and return 0.

    Raises:
        LaunchError: it could not be started.
        Ended: it ended otherwise.
    """
    asked = Asked()
    with asked.listen():
        try:
            team.start()
            watch(team, asked, stop_seconds, say, patient, is_time_up)
        finally:
            team.close()
    code = team.ranks[0].code
    assert code is not None
    if code == 0:
        return 0
    if asked.numbers:
        first = signal.Signals(asked.numbers[0])
        text = f"mpiexec ended after {first.name}; what was saved is told above"
        raise Ended(stop_code(first), text, first)
    how = f"with exit code {code}" if code > 0 else f"by {signal.Signals(-code).name}"
    raise Ended(
        code if code > 0 else 128 - code,
        f"mpiexec ended {how} before the run was complete",
        None,
        why="a rank has failed; its error is above",
        mend="mend that; --resume goes on from the last checkpoint",
    )
