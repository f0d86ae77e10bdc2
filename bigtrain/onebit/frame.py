"""A compressed message: a header that says what it is, scales, codes.

A message that is lost, repeated or out of order would leave ranks with different parameters, and
nobody would notice; so each says of what it is, and who receives it looks.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

import torch

from bigtrain.errors import CommError
from bigtrain.ops.message import Pair, num_blocks, num_bytes

Content = Literal["gradient", "delta", "momentum", "sum"]
_MAGIC, _VERSION = b"btcm", 1
_HEADER = struct.Struct("<4sBBBxIQQI")  # magic, version, content, bits; bucket, turn, n, block
_CONTENTS: tuple[Content, ...] = ("gradient", "delta", "momentum", "sum")
_ROOM = 64  # bytes of the header, and what messages are a multiple of
SCALES = torch.bfloat16


@dataclass(frozen=True)
class Frame:
    """What a message of n elements is: the turn counts the messages of a bucket.

    block: elements of a scale; 0: there are no scales.
    """

    content: Content
    bucket: int
    turn: int
    n: int
    num_bits: int
    block: int

    @property
    def _parts(self) -> list[int]:
        """Bytes of the header, the scales and the codes."""
        scales = num_blocks(self.n, self.block) if self.block else 0
        return [_ROOM, SCALES.itemsize * scales, num_bytes(self.n, self.num_bits)]

    @property
    def size(self) -> int:
        """Bytes."""
        return -(-sum(self._parts) // _ROOM) * _ROOM

    def header(self) -> bytes:
        """Return the first bytes of the message."""
        content = _CONTENTS.index(self.content)
        numbers = (self.num_bits, self.bucket, self.turn, self.n, self.block)
        return _HEADER.pack(_MAGIC, _VERSION, content, *numbers).ljust(_ROOM, b"\0")

    def open(self, message: torch.Tensor) -> Pair:
        """Return the scales and the codes of a message [size], views of it."""
        _, scales, codes = message[: sum(self._parts)].split(self._parts)
        return scales.view(SCALES), codes

    def messages(self, num: int, device: torch.device) -> torch.Tensor:
        """Return so many messages [num, size], of which the headers are written."""
        messages = torch.empty(num, self.size, dtype=torch.uint8, device=device)
        header = torch.frombuffer(bytearray(self.header()), dtype=torch.uint8)
        messages[:, :_ROOM] = header.to(device)
        messages[:, sum(self._parts) :] = 0
        return messages

    def check(self, message: torch.Tensor, rank: int) -> None:
        """See that what has come from `rank` is what is due.

        Raises:
            CommError: it is another message.
        """
        raw = bytes(message[:_ROOM].tolist())
        if raw == self.header():
            return
        raise CommError(
            f"what rank {rank} has sent is not {self}, but {describe(raw)}",
            why="a message was lost, repeated or changed on its way, or ranks run other code",
            mend="resume from the last checkpoint; see whether all ranks run the same bigtrain",
        )

    def __str__(self) -> str:
        return (
            f"{self.content} {self.turn} of bucket {self.bucket} ({self.n} x {self.num_bits} bit)"
        )


def describe(raw: bytes) -> str:
    """Return what a header says, for people."""
    magic, version, content, num_bits, bucket, turn, n, block = _HEADER.unpack_from(raw)
    if magic != _MAGIC or version != _VERSION or content >= len(_CONTENTS):
        return "no message of this bigtrain"
    return str(Frame(_CONTENTS[content], bucket, turn, n, num_bits, block))
