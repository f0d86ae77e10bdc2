"""metrics.jsonl and TensorBoard: one record, one point per step. Written by rank 0."""

from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bigtrain.observe.jsonl import JsonLines
from bigtrain.observe.records import EvalRecord, SaveRecord, StepRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Metrics:
    """Appends records. On resume, TensorBoard forgets what came after the step resumed from."""

    def __init__(self, path: Path, tensorboard: Path, resume_step: int) -> None:
        self._lines = JsonLines(path)
        self._tensorboard = tensorboard
        self._resume_step = resume_step
        self._writer: SummaryWriter | None = None

    def add(self, record: StepRecord | EvalRecord | SaveRecord) -> None:
        """Append one record."""
        values = {name: value for name, value in asdict(record).items() if value is not None}
        values.pop("sample_ids", None)
        self._lines.add(values)
        step = values.pop("step")
        writer = self._summary_writer()
        for name, value in values.items():
            writer.add_scalar(name, float(value), step)

    def close(self) -> None:
        """Flush everything."""
        self._lines.close()
        if self._writer is not None:
            self._writer.close()

    def _summary_writer(self) -> SummaryWriter:
        if self._writer is None:  # at the first record: importing it is slow
            from torch.utils.tensorboard import SummaryWriter

            _silence_full_disk()
            purge = self._resume_step + 1 if self._resume_step else None
            self._writer = SummaryWriter(str(self._tensorboard), purge_step=purge)
        return self._writer


def _silence_full_disk() -> None:
    """Let TensorBoard's writer thread end without a traceback when it cannot write.

    The next record raises the same error where it can be explained.
    """
    plain = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, OSError):
            plain(arguments)

    threading.excepthook = hook
