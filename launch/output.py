"""What ranks print: rank 0 on the screen and in its file, all others in their files."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import struct
import sys
import termios
import threading
from fcntl import ioctl
from pathlib import Path

# Control sequences of terminals (ECMA-48): titles and links, colours and cursor moves, the rest.
_CONTROL = re.compile(rb"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b\[[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]")


class ScreenAndFile:
    """Copies what rank 0 prints to the screen as it is, and to a file without control codes.

    On a terminal rank 0 is given a terminal of its own, so that its progress bar is live; not if
    the screen is to be `plain`, for several that write to it.
    """

    def __init__(self, path: Path, *, plain: bool = False) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        on_terminal = sys.stdout.isatty() and not plain
        self._read, self.write_end = os.openpty() if on_terminal else os.pipe()
        if on_terminal:
            columns, lines = shutil.get_terminal_size()
            ioctl(self._read, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._thread = threading.Thread(target=self._copy, daemon=True)

    def start(self) -> None:
        """Begin to copy; called once rank 0 holds the write end."""
        os.close(self.write_end)
        self._thread.start()

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Copy what is left, for a bounded time: a stray grandchild may hold the write end."""
        if self._thread.ident is None:  # rank 0 was never started
            os.close(self.write_end)
            os.close(self._read)
            self._file.close()
        else:
            self._thread.join(timeout_seconds)

    def _copy(self) -> None:
        rest = b""
        while True:
            try:
                chunk = os.read(self._read, 65536)
            except OSError:  # a terminal whose other side is closed reads as an I/O error
                chunk = b""
            if not chunk:
                break
            self._show(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            self._keep(lines)
        self._keep([rest] if rest else [])
        with contextlib.suppress(OSError):
            self._file.close()

    # The screen may go away (a closed terminal, `| head`) and the disk may be full. Rank 0 must not
    # notice: what nobody can read any more is read from it all the same.

    def _show(self, chunk: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            while chunk:
                chunk = chunk[os.write(sys.stdout.fileno(), chunk) :]

    def _keep(self, lines: list[bytes]) -> None:
        with contextlib.suppress(OSError):
            for line in lines:
                self._file.write(final_text(line) + b"\n")


def final_text(line: bytes) -> bytes:
    """Return what a line shows in the end: without colours, and its last redrawing only."""
    parts = [part for part in _CONTROL.sub(b"", line).split(b"\r") if part.strip()]
    return parts[-1].rstrip() if parts else b""
