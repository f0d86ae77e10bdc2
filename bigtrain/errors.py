"""What a user is told when something is wrong: where, what, why, and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a user's input.

    `keys` are the dotted config keys that take part in it; the first one says where to point.
    """

    what: str
    why: str = ""
    mend: str = ""
    where: str = ""
    keys: tuple[str, ...] = ()

    def render(self, indent: str = "") -> str:
        """Return the problem as lines of text: `where: what`, then why, then the mend."""
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.why:
            lines.append(f"  why:  {self.why}")
        if self.mend:
            lines.append(f"  mend: {self.mend}")
        return "\n".join(indent + line for text in lines for line in text.split("\n"))


class BigtrainError(Exception):
    """An error meant for the user: printed without a traceback, ends the run with `exit_code`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", mend: str = "") -> None:
        self.problem = Problem(what=what, why=why, mend=mend, where=where)
        super().__init__(self.problem.render())

    def __reduce__(self) -> tuple:
        # Exceptions are rebuilt from positional arguments; ours are by keyword.
        return _rebuild, (type(self), self.problem)


def _rebuild(kind: type[BigtrainError], problem: Problem) -> BigtrainError:
    return kind(problem.what, where=problem.where, why=problem.why, mend=problem.mend)


class ConfigError(BigtrainError):
    """Everything that is wrong with a config, in one report."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        report = [f"{source}: {count}"]
        report += [problem.render(indent="  ") for problem in self.problems]
        Exception.__init__(self, "\n\n".join(report))

    def __reduce__(self) -> tuple:
        return ConfigError, (self.source, self.problems)


class LaunchError(BigtrainError):
    """Ranks could not be started, or one of them failed."""


class PlanError(LaunchError):
    """What is asked for does not fit what is there, or the environment makes no sense."""

    exit_code = 2


class CommError(BigtrainError):
    """A collective failed: a peer died, the network was cut, or a wait timed out."""


class DataError(BigtrainError):
    """A data source is missing, damaged, or not what the config says it is."""


class CheckpointError(BigtrainError):
    """A checkpoint could not be written, is damaged, or does not fit the model."""


class Overtaken(Exception):
    """Others have gone on, and parts of what a checkpoint was to have are not there any more."""


class RunFolderError(BigtrainError):
    """The run folder cannot be used: not writable, in use, full, or already holds a run."""


class NonFiniteError(BigtrainError):
    """A loss or a gradient became NaN or infinite."""


class Stopped(BigtrainError):
    """The run was asked to stop (Ctrl-C, SIGTERM) and did so in an orderly way."""

    def __init__(self, signal_number: int, what: str, *, mend: str = "") -> None:
        super().__init__(what, mend=mend)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number

    def __reduce__(self) -> tuple:
        return _rebuild_stopped, (self.signal_number, self.problem)


def _rebuild_stopped(signal_number: int, problem: Problem) -> Stopped:
    return Stopped(signal_number, problem.what, mend=problem.mend)
