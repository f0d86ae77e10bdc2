"""How a rank ends: with its launcher, on a signal, with an error that is told. No torch."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from types import FrameType

from bigtrain.errors import BigtrainError, CommError, Stopped

_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A signal that came while there was nothing to finish and save."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


class StopRequest:
    """Remembers SIGINT or SIGTERM. Outside of the training loop they end the process at once.

    Inside the loop (`finishing = True`) the first one only asks, the second one ends it.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.finishing = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        if again or not self.finishing:
            raise Interrupted(number)


def die_with_launcher() -> None:
    """End this process when the process that launched it is gone, however that ended (Linux)."""
    launcher = os.environ.get("BIGTRAIN_LAUNCHER_PID")
    if launcher is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before the line above
        os._exit(1)


def report_failure(error: BaseException) -> int:
    """Tell the user, or the launcher if there is one, why this rank ends; return its exit code.

    Errors made for the user have no traceback; all others do.
    """
    if isinstance(error, KeyboardInterrupt):
        number = getattr(error, "signal_number", signal.SIGINT)
        name = signal.Signals(number).name
        error = Stopped(number, f"stopped by {name} before the first step or after the last one")
    known = isinstance(error, BigtrainError)
    text = str(error) if known else "".join(traceback.format_exception(error)).rstrip()
    code = error.exit_code if isinstance(error, BigtrainError) else 1
    target = os.environ.get("BIGTRAIN_ERROR_FILE")
    sys.stdout.flush()
    if target is None:
        rank = os.environ.get("RANK", "0")
        print(f"error on rank {rank}: {text}" if known else text, file=sys.stderr)  # noqa: T201
        return code
    record = {
        "text": text,
        "exit_code": code,
        "consequence": isinstance(error, CommError),
        "orderly": isinstance(error, Stopped),
        "time": time.time(),
    }
    with open(target + ".tmp", "w", encoding="utf-8") as file:
        json.dump(record, file)
    os.replace(target + ".tmp", target)
    return code
