"""The line to an agent: whole messages, a pulse, and an end that is noticed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from bigtrain.launch import wire
from bigtrain.launch.wire import Line, Lost


@pytest.fixture
def pair() -> Iterator[tuple[Line, socket.socket]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        other = socket.create_connection(listener.getsockname())
        line = Line(listener.accept()[0])
    yield line, other
    line.close()
    other.close()


def heard(line: Line) -> list[wire.Message]:
    line.wait(2.0)
    return line.hear()


def test_messages_that_come_in_pieces(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    other.sendall(b'{"a": 1}\n{"b"')
    assert heard(line) == [{"a": 1}]
    other.sendall(b': 2}\n{"pulse": true}\n')
    assert heard(line) == [{"b": 2}]


def test_what_is_said_arrives_in_order(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    line.say(ended=3, report={"text": "ä\nb"})
    assert heard(Line(other)) == [{"ended": 3, "report": {"text": "ä\nb"}}]


def test_last_words_come_before_the_end(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    other.sendall(b'{"ended": 0}\n')
    other.close()
    assert heard(line) == [{"ended": 0}]
    with pytest.raises(Lost, match="closed"):
        heard(line)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n", b"[1]\n", b"\xff\xfe\n", b"x" * (3 << 20)])
def test_what_is_no_message(pair: tuple[Line, socket.socket], sent: bytes) -> None:
    line, other = pair
    other.setblocking(False)

    def flood() -> None:
        nonlocal sent
        for _ in range(50):
            if sent:
                sent = sent[other.send(sent) :]
            heard(line)

    with pytest.raises(Lost, match="no message"):
        flood()


def test_there_is_a_pulse(
    pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    line, other = pair
    monkeypatch.setattr(wire, "PULSE_SECONDS", 0.01)
    time.sleep(0.02)
    line.hear()
    assert other.recv(100) == b'{"pulse": true}\n'


def test_who_was_stopped_hears_no_silence(
    pair: tuple[Line, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suspended job: both sides slept, and find nothing in the line."""
    line, _ = pair
    monkeypatch.setattr(wire, "_AWAY_SECONDS", 0.02)
    line.heard -= 1000
    time.sleep(0.05)
    assert line.hear() == []
    assert line.silence < 100


def test_silence_is_counted_since_something_was_heard(pair: tuple[Line, socket.socket]) -> None:
    line, other = pair
    line.heard -= 1000
    assert line.silence >= 1000
    other.sendall(b'{"pulse": true}\n')
    assert heard(line) == []
    assert line.silence < 100
