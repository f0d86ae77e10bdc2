"""How a run looks: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Protocol

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bigtrain.observe.records import EvalRecord, StepRecord

log = logging.getLogger(__name__)


class Display(Protocol):
    """Shows the steps of a run to a person."""

    def step(self, record: StepRecord) -> None:
        """Show one step."""

    def evaluation(self, record: EvalRecord) -> None:
        """Show one evaluation."""

    def close(self) -> None:
        """Leave the screen in order."""


def setup_logging(rank: int, *, quiet: bool) -> Console | None:
    """Send log records to standard output; return the console if rank 0 has a terminal.

    quiet: only warnings, for ranks that share the screen with rank 0.
    """
    console = Console(highlight=False) if rank == 0 and sys.stdout.isatty() else None
    handler: logging.Handler = logging.StreamHandler(sys.stdout)
    if console is not None:
        handler = RichHandler(
            console=console, show_time=False, show_path=False, show_level=False, highlighter=None
        )
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("bigtrain").setLevel(logging.WARNING if quiet else logging.INFO)
    return console


def make_display(
    console: Console | None, first_step: int, steps: int, every: int, unit: str
) -> Display:
    """Return a live bar on `console`, the one that log lines go to, or else plain lines."""
    if console is not None:
        return LiveDisplay(console, first_step, steps, every, unit)
    return PlainDisplay(first_step, steps, every, unit)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _line(record: StepRecord, steps: int, unit: str) -> str:
    skipped = "  (update skipped)" if record.skipped else ""
    scale = f"loss scale {record.loss_scale:,.0f}  " if record.loss_scale is not None else ""
    return (
        f"step {record.step:>{len(str(steps))}}/{steps}  loss {record.loss:.4f}  "
        f"grad norm {record.grad_norm:.3f}  lr {record.lr:.2e}  {scale}"
        f"{record.items_per_second:,.0f} {unit}/s{skipped}"
    )


class PlainDisplay:
    """A line every `every` steps, with the time that is left."""

    def __init__(self, first_step: int, steps: int, every: int, unit: str) -> None:
        self._first, self._steps, self._every, self._unit = first_step, steps, every, unit
        self._start = time.monotonic()

    def step(self, record: StepRecord) -> None:
        if record.step % self._every == 0 or record.step in (self._first + 1, self._steps):
            done = record.step - self._first
            left = (time.monotonic() - self._start) / done * (self._steps - record.step)
            log.info("%s  %s left", _line(record, self._steps, self._unit), _duration(left))

    def evaluation(self, record: EvalRecord) -> None:
        log.info("step %d  validation loss %.4f", record.step, record.validation_loss)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A progress bar with loss, rate and time left; a lasting line every `every` steps."""

    def __init__(
        self, console: Console, first_step: int, steps: int, every: int, unit: str
    ) -> None:
        self._steps, self._every, self._unit = steps, every, unit
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps, completed=first_step, text="")
        self._progress.start()

    def step(self, record: StepRecord) -> None:
        rate = f"{record.items_per_second:,.0f} {self._unit}/s"
        text = f"loss [bold]{record.loss:.4f}[/]  {rate}"
        self._progress.update(self._task, completed=record.step, text=text)
        if record.step % self._every == 0 or record.step == self._steps:
            log.info("%s", _line(record, self._steps, self._unit))

    def evaluation(self, record: EvalRecord) -> None:
        log.info("step %d  validation loss %.4f", record.step, record.validation_loss)

    def close(self) -> None:
        self._progress.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
