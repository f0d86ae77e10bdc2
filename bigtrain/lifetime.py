"""How a rank ends: with its launcher, on a signal, with an error that is told. No torch."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

from bigtrain.errors import BigtrainError, CommError, Stopped

_PR_SET_PDEATHSIG = 1
_MOST_TEXT_BYTES = 10_000  # JSON makes at most 6 of each; a pipe takes 64 KiB unread
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HEARD = (*STOP_SIGNALS, signal.SIGUSR1)  # what Slurm is asked to send before time is up
_ONE_REQUEST_SECONDS = 1.0  # a terminal and the launcher both send it


class Interrupted(KeyboardInterrupt):
    """A signal that came while there was nothing to finish and save."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StopRequest:
    """Remembers SIGINT or SIGTERM. Outside of the training loop they end the process at once.

    Inside the loop (`finishing = True`) the first one only asks, the second one ends it, unless
    the launcher is patient: then the same request may come by several ways. The
    launcher starts ranks with these signals blocked; from here on they are heard.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.finishing = False
        self.call: Callable[[], None] | None = None  # what ends this process in good order
        self._raised = -math.inf
        self.patient = os.environ.get("BIGTRAIN_PATIENT") == "1"
        for number in _HEARD:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        number = signal.SIGTERM if number == signal.SIGUSR1 else number
        self.signal = number
        if self.call is not None:
            self.call()
            return
        since = time.monotonic() - self._raised
        at_once = not self.finishing or (again and not self.patient)
        if at_once and since > _ONE_REQUEST_SECONDS:  # else it would interrupt the ending
            self._raised = time.monotonic()
            raise Interrupted(number)


def end_with_parent() -> None:
    """Have the system end this process when the one that started it ends, however (Linux)."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_launcher() -> None:
    """End this process when the process that launched it is gone, however that ended (Linux)."""
    launcher = os.environ.get("BIGTRAIN_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    end_with_parent()
    if os.getppid() != int(launcher):  # it ended before the line above
        sys.stderr.write("bigtrain: the launcher (BIGTRAIN_LAUNCHER_PID) is gone, so this ends\n")
        os._exit(1)


def report_success() -> None:
    """Tell the launcher, if there is one, that this rank has done all it had to do."""
    report({"done": True})


def report_failure(error: BaseException) -> int:
    """Tell the launcher, or the user if there is none, why this rank ends; return its exit code.

    Errors made for the user have no traceback; all others do. Signals are not heard any more.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    at_once = isinstance(error, KeyboardInterrupt)
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "signal_number", signal.SIGINT)
        name = signal.Signals(number).name
        error = Stopped(number, f"stopped by {name}; nothing was left to save")
    known = isinstance(error, BigtrainError)
    text = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
    code = error.exit_code if isinstance(error, BigtrainError) else 1
    record = {
        "text": text,
        "exit_code": code,
        "consequence": isinstance(error, CommError),
        "orderly": isinstance(error, Stopped),
        "at_once": at_once,  # it did not wait for the other ranks, so they must not wait for it
        "time": time.time(),
    }
    rank = os.environ.get("RANK", "0")
    if not report(record):
        sys.stderr.write((f"error on rank {rank}: {text}" if known else text) + "\n")
    return code


def report(record: dict) -> bool:
    """Write a line to the launcher's pipe, which works on a full disk too; False without a
    launcher."""
    descriptor = os.environ.get("BIGTRAIN_REPORT_FD")
    if descriptor is None:
        return False
    if "text" in record:
        text = record["text"].encode("utf-8", errors="replace")[-_MOST_TEXT_BYTES:]
        record["text"] = text.decode("utf-8", errors="ignore")
    try:
        os.write(int(descriptor), (json.dumps(record) + "\n").encode())
    except (OSError, ValueError):
        return False
    return True
