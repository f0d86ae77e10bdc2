"""What workers and servers say to each other: frames, and how each proves that it may. No torch.

A frame is a header of 32 bytes and a body: JSON, or the bytes of a tensor, never pickle. Whoever
gets a frame that makes no sense closes the link that it came by, and nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import hmac
import json
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = 1
_MAGIC = b"btps"
_HEADER = struct.Struct("<4sBBHIQQ4x")  # magic, version, kind, part, key, step, length
HEADER_BYTES = _HEADER.size
MOST_TEXT = 64 << 20  # bytes of JSON: what a worker declares of a large model
MOST_BEFORE_WELCOME = 4096  # bytes of JSON of who has not shown yet that it has the token
TOKEN_BYTES = 32
NONCE_BYTES = 16
THE_END = "the end"  # what workers offer numbers for that have no round to begin any more
STEPS = 0xFFFF  # the part of a TENSOR that tells how parameters have moved, step by step
PAGE = 0xFFFE  # the part of a TENSOR or of VALUES that is some rows of a table, with moments


# Why servers end when what they are to hold is gone. The launcher knows by it that all must begin
# again from a checkpoint.
LOSS = "what they had since the last checkpoint is lost with them"


class Kind(enum.IntEnum):
    """What a frame is. `step` counts rounds: that which a frame is about, or the version it wants.

    Of a server's link with a worker's rank, then with another server; `key` is a block that the
    rank has declared, `part` which of its tensors: 0 is the gradient, or the parameters.
    """

    CHALLENGE = 1  # server: a number; show that you have the token
    HELLO = 2  # who I am, the proof, a number of my own
    WELCOME = 3  # server: its own proof
    REFUSE = 4  # why this link is closed
    PING = 5  # I am alive
    BYE = 6  # I leave in good order

    DECLARE = 10  # worker: the blocks that I have
    WANTED = 11  # server: which of them have no values yet; empty: none
    VALUES = 12  # worker: a tensor of a block, for a server that has none
    FILLED = 13  # worker: those were all
    PUSH = 14  # worker: a gradient
    HAVE = 15  # server: of this round I have all that you push
    PULL = 16  # worker: send me this tensor of a block, of this version or a later one; I have that
    TENSOR = 17  # server: here it is
    LOOKUP = 18  # worker: send me these rows of a table, of this version or a later one
    TURN_PAGE = 19  # worker: send me a page of the rows that were updated, from that row on

    READY = 20  # worker, to the board: I can begin
    REPORT = 21  # worker, to the board: my part of this round is with all servers
    TURN = 22  # board: what to do next, and what came of the rounds before
    OFFER = 23  # worker, to the board: numbers to be added up over workers
    TOTAL = 24  # board: their sum
    FOLLOWS = 25  # worker, to a server that asks: I follow these, and no others meanwhile

    ROUND = 30  # board, to servers: add up what these workers pushed
    SQUARES = 31  # server: done; the sum of squares of what it answers for
    APPLY = 32  # board: update by this
    APPLIED = 33  # server: done
    STATE = 34  # server, to a new board: the rounds that it knows of
    ADOPT = 35  # board, to servers and a guest: give it what it is to hold
    JOINED = 36  # guest, to the board: I have all
    ALIVE = 37  # board, to servers: it is one of us; server, to workers: these live


_TENSORS = frozenset({Kind.VALUES, Kind.PUSH, Kind.TENSOR, Kind.LOOKUP})
_EARLY = frozenset({Kind.CHALLENGE, Kind.HELLO, Kind.WELCOME, Kind.REFUSE})


class Malformed(Exception):
    """A frame makes no sense, or comes from nobody who may send it."""


@dataclass(frozen=True)
class Header:
    """The first 32 bytes of a frame; `length` is that of the body."""

    kind: Kind
    length: int = 0
    key: int = 0
    step: int = 0
    part: int = 0

    @property
    def is_tensor(self) -> bool:
        """Is the body a tensor? Else it is JSON."""
        return self.kind in _TENSORS

    def pack(self) -> bytes:
        numbers = (self.part, self.key, self.step, self.length)
        return _HEADER.pack(_MAGIC, VERSION, self.kind, *numbers)

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview, *, welcome: bool) -> Header:
        """Return what 32 bytes say; `welcome`: the peer has shown that it has the token.

        Raises:
            Malformed: they are no header, or one that must not come now.
        """
        magic, version, number, part, key, step, length = _HEADER.unpack(raw)
        if magic != _MAGIC:
            raise Malformed("it does not speak this protocol")
        if version != VERSION:
            raise Malformed(f"it speaks version {version} of the protocol, this is {VERSION}")
        try:
            header = cls(Kind(number), length, key, step, part)
        except ValueError:
            raise Malformed(f"there is no frame of kind {number}") from None
        if not welcome and header.kind not in _EARLY:
            raise Malformed(f"{header.kind.name} before it has shown that it has the token")
        most = MOST_TEXT if welcome else MOST_BEFORE_WELCOME
        if not header.is_tensor and length > most:
            raise Malformed(f"{header.kind.name} of {length} bytes, of {most} at most")
        return header


def text_frame(
    kind: Kind, content: Mapping[str, Any] | None = None, key: int = 0, step: int = 0, part: int = 0
) -> bytes:
    """Return a frame whose body is JSON."""
    body = json.dumps(content).encode() if content is not None else b""
    return Header(kind, len(body), key, step, part).pack() + body


def read_text(body: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Return the content of a body of JSON.

    Raises:
        Malformed: it is none.
    """
    if not len(body):
        return {}
    try:
        content = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise Malformed("a body that is no JSON") from None
    if not isinstance(content, dict):
        raise Malformed("a body that is no object")
    return content


def number(content: Mapping[str, Any], name: str, most: int = 2**53) -> int:
    """Return a whole number, 0 or more, of a body.

    Raises:
        Malformed: there is none.
    """
    value = content.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise Malformed(f"no {name} that makes sense")
    return value


def whole_numbers(content: Mapping[str, Any], name: str, count: int | None = None) -> list[int]:
    """Return a list of whole numbers, 0 or more, of a body.

    Raises:
        Malformed: there is none, or it has another length than `count`.
    """
    values = content.get(name)
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise Malformed(f"no {name} that make sense")
    return [number({name: value}, name) for value in values]


def section(content: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """Return an object of a body, None if there is nothing of that name.

    Raises:
        Malformed: it is something else.
    """
    value = content.get(name)
    if value is not None and not isinstance(value, dict):
        raise Malformed(f"a {name} that is no object")
    return value


def numbers(content: Mapping[str, Any], name: str, count: int | None = None) -> list[float]:
    """Return a list of numbers of a body, which may be infinite or NaN.

    Raises:
        Malformed: there is none, or it has another length than `count`.
    """
    values = content.get(name)
    if not isinstance(values, list) or (count is not None and len(values) != count):
        raise Malformed(f"no {name} that make sense")
    if not all(type(value) in (int, float) for value in values):
        raise Malformed(f"{name} that are no numbers")
    try:
        return [float(value) for value in values]
    except OverflowError:
        raise Malformed(f"{name} that are too large") from None


# -- who may speak ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Who:
    """Who is at the other end: a rank of a worker, or a server.

    index: of the worker, or of the server. incarnation: how often it was started before (a server
    that was is a guest: it holds nothing, until the board lets it in). rank, ranks: place of this
    process in the worker, and how many it has.
    """

    role: str
    index: int
    incarnation: int = 0
    rank: int = 0
    ranks: int = 1

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Who:
        """Return who a HELLO says it is.

        Raises:
            Malformed: it is nobody.
        """
        if content.get("role") not in ("worker", "server"):
            raise Malformed("a HELLO of neither a worker nor a server")
        who = cls(
            content["role"],
            *(number(content, name, 2**31) for name in ("index", "incarnation", "rank", "ranks")),
        )
        if who.rank >= who.ranks:
            raise Malformed("a HELLO of a rank that its worker has not")
        return who

    def __str__(self) -> str:
        return f"{self.role} {self.index}" + (f" rank {self.rank}" if self.ranks > 1 else "")


def new_token() -> str:
    """Return a secret that the processes of one run share."""
    return secrets.token_hex(TOKEN_BYTES)


def nonce() -> str:
    """Return a number that nobody has used before."""
    return secrets.token_hex(NONCE_BYTES)


def proof(token: str, speaker: str, theirs: str, own: str, who: Who) -> str:
    """Return what only who has the token can tell of two nonces: that of the other side, and one's
    own. `speaker`, "client" or "server", keeps one side from sending back what the other said."""
    about = json.dumps([speaker, theirs, own, *dataclasses.astuple(who)])
    return hmac.new(token.encode(), about.encode(), hashlib.sha256).hexdigest()


def check_proof(given: Any, token: str, speaker: str, theirs: str, own: str, who: Who) -> None:
    """Compare a proof, in a time that does not tell where it is wrong.

    Raises:
        Malformed: it is another.
    """
    expected = proof(token, speaker, theirs, own, who)
    as_bytes = given.encode(errors="replace") if isinstance(given, str) else b""
    if not hmac.compare_digest(as_bytes, expected.encode()):
        raise Malformed(f"{who} does not have the token of this run")
