"""The mean of all ranks in one bit each way, with error feedback both ways.

Source: the compressed all-reduce of 1-bit Adam (https://arxiv.org/abs/2102.02888).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigtrain.comm.buckets import ALIGNMENT
from bigtrain.comm.collectives import (
    Chain,
    Pending,
    all_reduce,
    start_all_gather,
    start_all_to_all,
)
from bigtrain.comm.mesh import Axis
from bigtrain.onebit.codec import Kept, Signs
from bigtrain.onebit.frame import Content, Frame

FP32 = 4


class TwoPhase:
    """Means of all ranks in one bit each way.

    Wire, of n elements: 2(n-1)/n of a bit each, and of their scales. Kept: 4 bytes for each element
    of what goes to others, and for each of this rank's part of the sum.
    """

    def __init__(self, axis: Axis, signs: Signs) -> None:
        self.axis, self.signs = axis, signs
        self._sent: dict[int, Kept] = {}
        self._summed: dict[int, Kept] = {}
        self._turns: dict[tuple[str, int], int] = {}

    def part(self, numel: int) -> int:
        """Return of how many elements each rank makes the sum."""
        return -(-numel // (self.axis.degree * ALIGNMENT)) * ALIGNMENT

    def bytes_kept(self, numel: int) -> int:
        degree, part = self.axis.degree, self.part(numel)
        scales = -(-part // self.signs.block)
        return FP32 * (degree + 1) * (part + scales)

    def start(self, index: int, flat: torch.Tensor) -> Pending[torch.Tensor]:
        """Begin to add up `flat` [numel] of all ranks; the result is the sum, the same on all."""
        degree, part = self.axis.degree, self.part(flat.numel())
        rows = torch.nn.functional.pad(flat, (0, degree * part - flat.numel())).view(degree, part)
        sent, _ = self._kept_of(index, part, flat.device)
        frame = self._frame("momentum", index, part)
        messages = frame.messages(degree, flat.device)
        self.signs.pack(rows, sent, [frame.open(message) for message in messages], 1.0)
        first = start_all_to_all(messages, self.axis, f"all_to_all of {frame}")
        return Chain(first, lambda rows: self._return(index, frame, rows)).then(
            lambda every: every[: flat.numel()]
        )

    def _return(
        self, index: int, frame: Frame, arrived: Sequence[torch.Tensor]
    ) -> Pending[torch.Tensor]:
        """Begin to send the sum of this rank's part to all."""
        for rank, message in zip(self.axis.ranks, arrived, strict=True):
            frame.check(message, rank)
        own = torch.empty(1, frame.n, device=arrived[0].device)
        self.signs.add_up([frame.open(message) for message in arrived], own[0], 1.0)
        _, summed = self._kept_of(index, frame.n, own.device)
        answer = self._frame("sum", index, frame.n)
        [message] = answer.messages(1, own.device)
        self.signs.pack(own, summed, [answer.open(message)], 1.0)
        pending = start_all_gather(message, self.axis, f"all_gather of {answer}")
        return pending.then(lambda messages: self._open(answer, messages))

    def _open(self, frame: Frame, messages: torch.Tensor) -> torch.Tensor:
        rows = torch.empty(self.axis.degree, frame.n, device=messages.device)
        for rank, row, message in zip(self.axis.ranks, rows, messages, strict=True):
            frame.check(message, rank)
            self.signs.add_up([frame.open(message)], row, 1.0)
        return rows.view(-1)

    def take_errors(self, index: int, numel: int, device: torch.device) -> torch.Tensor:
        """Return all that ranks have lost of a sum [numel], the same on all, and forget it.

        Communicates an all-reduce of fp32.
        """
        part = self.part(numel)
        sent, summed = self._kept_of(index, part, device)
        lost = self.signs.residual(sent).clone()
        lost[self.axis.rank] += self.signs.residual(summed)[0]
        all_reduce(lost, self.axis, f"all_reduce of what bucket {index} has lost")
        sent.set(0.0)
        summed.set(0.0)
        return lost.view(-1)[:numel]

    def forget(self, index: int) -> None:
        self._sent.pop(index, None)
        self._summed.pop(index, None)

    def _kept_of(self, index: int, part: int, device: torch.device) -> tuple[Kept, Kept]:
        if index not in self._sent:
            self._sent[index] = self.signs.keep(self.axis.degree, part, device)
            self._summed[index] = self.signs.keep(1, part, device)
        return self._sent[index], self._summed[index]

    def _frame(self, content: Content, index: int, n: int) -> Frame:
        turn = self._turns.get((content, index), 0)
        self._turns[content, index] = turn + 1
        return self._framed(content, index, turn, n)

    def _framed(self, content: Content, index: int, turn: int, n: int) -> Frame:
        return Frame(content, index, turn, n, self.signs.num_bits, self.signs.block)
