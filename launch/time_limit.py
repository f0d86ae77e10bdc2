"""When a Slurm job must save: so long before its time is up as saving has taken in this run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial

from bigtrain.errors import LaunchError
from bigtrain.run_folder import RunFolder

from .requeue import job_number
from .slurm import measured_lead
from .slurm_commands import Ask, ask_slurm, job_facts

_LOOK_SECONDS = 15.0
_ASK = partial(ask_slurm, patience_seconds=3.0)  # meanwhile agents hear nothing


class Saving:
    """The longest save and step of a run, by its metrics; each look reads what is new."""

    def __init__(self, folder: RunFolder) -> None:
        self._metrics, self._read = folder.metrics, 0
        self._save = self._step = 0.0

    def lead(self) -> int | None:
        """Return the seconds that it needs before a time limit, None if the run has not saved."""
        with contextlib.suppress(OSError), open(self._metrics, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(self._read if self._read <= size else 0)  # a resumed run has cut it
            for line in file:
                self._take_up(line)
            self._read = file.tell()
        return measured_lead(self._save, self._step) if self._save else None

    def _take_up(self, line: bytes) -> None:
        with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):  # cut by a crash
            record = json.loads(line)
            self._save = max(self._save, float(record.get("save_seconds", 0)))
            if record.get("items_per_second"):
                self._step = max(self._step, record["items"] / record["items_per_second"])


class TimeLimit:
    """Tells when the time of the job that we are in is nearly up, by what saving takes by now.

    The signal that Slurm was told to send goes by what was known when the job was submitted.
    """

    def __init__(
        self,
        folder: RunFolder,
        env: Mapping[str, str],
        ask: Ask = _ASK,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._saving, self._job = Saving(folder), job_number(env)
        self._ask, self._clock = ask, clock
        self._began, self._next_look = clock(), 0.0
        self._end: float | None = None

    def is_near(self) -> bool:
        """Look, a few times a minute; before it is true, Slurm is asked whether the end moved."""
        now = self._clock()
        if now < self._next_look:
            return False
        self._next_look = now + _LOOK_SECONDS
        lead = self._saving.lead()
        if lead is None or (self._end is not None and now < self._latest(lead)):
            return False
        self._end = self._find_end() or self._end
        return self._end is not None and now >= self._latest(lead)

    def _latest(self, lead: int) -> float:
        """Return when to stop: half of the time that there was is for training, in any case."""
        assert self._end is not None
        return self._end - min(lead + _LOOK_SECONDS, (self._end - self._began) / 2)

    def _find_end(self) -> float | None:
        """Return when Slurm will end the job (never: infinity), None where it does not answer."""
        try:
            end = job_facts(self._job, self._ask).get("EndTime", "")
        except LaunchError:
            return None
        try:
            return time.mktime(time.strptime(end, "%Y-%m-%dT%H:%M:%S"))
        except (ValueError, OverflowError):  # Unknown: there is no limit
            return math.inf
