"""A codec that loses nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigtrain.onebit.codec import Kept
from bigtrain.ops.message import Pair


class Lossless:
    """A codec that sends fp32 as it is: what is left then is what the kind does with momentum."""

    num_bits, block = 32, 64

    def count(self, n: int) -> int:
        return n

    def keep(self, rows: int, n: int, device: torch.device) -> Kept:
        return Kept(torch.zeros(rows, n), torch.zeros(rows, 0))

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        kept.values.add_(rows)
        for value, (scales, codes) in zip(kept.values, out, strict=True):
            scales.zero_()
            codes.copy_(value.view(torch.uint8))
        kept.values.mul_(1 - gone)

    def residual(self, kept: Kept) -> torch.Tensor:
        return kept.values

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        out.copy_(sum(codes.clone().view(torch.float32) for _, codes in pairs) * weight)  # type: ignore[arg-type]

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: Pair) -> None:
        out[0].zero_()
        out[1].copy_(main.view(torch.uint8))
        replica.copy_(main)

    def move(self, replica: torch.Tensor, pair: Pair) -> None:
        replica.copy_(pair[1].clone().view(torch.float32))
