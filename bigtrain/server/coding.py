"""What gradients and updates look like on the way between workers and servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Coding(Protocol):
    """Turns a block of n numbers into bytes, and adds such bytes up.

    exact: nothing is lost. What is lost the sender keeps (`keep`), and adds to what it sends next.
    """

    exact: bool

    def num_bytes(self, n: int) -> int:
        """Return the bytes of n numbers."""

    def keep(self, n: int) -> Any:
        """Return room for what is lost of n numbers: nothing yet."""

    def pack(self, values: torch.Tensor, kept: Any, out: torch.Tensor) -> None:
        """Write the bytes of `values` [n, fp32] and what is kept into `out` [num_bytes, uint8]."""

    def add_up(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Let `out` [n, fp32] be the sum of what the messages say, in their order."""

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: torch.Tensor) -> None:
        """Write what `replica` lacks of `main` into `out`, and move it as `move` moves copies."""

    def move(self, replica: torch.Tensor, message: torch.Tensor) -> None:
        """Move a copy of `replica` as its owner has."""


class Exact:
    """Numbers as they are, 4 bytes each."""

    exact = True

    def num_bytes(self, n: int) -> int:
        return 4 * n

    def keep(self, n: int) -> Any:
        return None

    def pack(self, values: torch.Tensor, kept: Any, out: torch.Tensor) -> None:
        out.view(torch.float32).copy_(values)

    def add_up(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        first, *others = (message.view(torch.float32) for message in messages)
        out.copy_(first)
        for other in others:
            out += other

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: torch.Tensor) -> None:
        raise AssertionError("parameters go whole")

    def move(self, replica: torch.Tensor, message: torch.Tensor) -> None:
        raise AssertionError("parameters go whole")
