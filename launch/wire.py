"""The line between the launcher and its agent on a node: JSON messages over TCP, with a pulse."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from typing import Any

PULSE_SECONDS = 1.0
_AWAY_SECONDS = 4 * PULSE_SECONDS
_MOST_BYTES = 1 << 20  # of a message: what does not end by then is none

Message = dict[str, Any]


class Lost(Exception):
    """The other side is gone; the text says how that was noticed."""


class Line:
    """A connection. Both sides say something every second, so that silence means something."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(5.0)  # a send that takes longer has nobody at the other end
        self._connection, self._rest = connection, b""
        self.heard = self._said = self._listened = time.monotonic()

    def say(self, **message: Any) -> None:
        """Send a message.

        Raises:
            Lost: the connection is broken.
        """
        self._said = time.monotonic()
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Lost(f"its connection broke ({error.strerror or error})") from error

    def hear(self) -> list[Message]:
        """Return what has arrived, without waiting; keep the pulse.

        Raises:
            Lost: the connection is closed or broken, or what comes is no message.
        """
        now = time.monotonic()
        if now - self._listened > _AWAY_SECONDS:
            self.heard = now  # we were stopped (a suspended job): the silence was ours
        self._listened = now
        if now - self._said > PULSE_SECONDS:
            self.say(pulse=True)
        messages: list[Message] = []
        while select.select([self._connection], [], [], 0)[0]:
            try:
                chunk = self._connection.recv(1 << 16)
            except OSError as error:
                raise Lost(f"its connection broke ({error.strerror or error})") from error
            if not chunk:
                if messages:
                    break  # the last words first; the end is still there next time
                raise Lost("its connection was closed")
            self.heard = time.monotonic()
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            messages += [_read(line) for line in lines]
            if len(self._rest) > _MOST_BYTES:
                raise Lost("it sends what is no message")
        return [message for message in messages if "pulse" not in message]

    def wait(self, seconds: float) -> None:
        """Return when something has arrived, or after that time."""
        select.select([self._connection], [], [], seconds)

    @property
    def silence(self) -> float:
        """Seconds since something was heard."""
        return time.monotonic() - self.heard

    @property
    def peer(self) -> str:
        """Address of the other side, as it is seen from here."""
        return str(self._connection.getpeername()[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.close()


def _read(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise Lost("it sends what is no message")
    return message


def addresses_towards(names: list[str]) -> list[str]:
    """Return the addresses of this machine that lead to the machines of these names.

    Nothing is sent: the system is asked which way it would take.
    """
    found = []
    for name in names:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
            asks.connect((name, 9))
            found.append(asks.getsockname()[0])
    # Others cannot use loopback, which our own name may lead to.
    found.sort(key=lambda address: address.startswith("127."))
    return list(dict.fromkeys([*found, socket.gethostname()]))
