"""The codecs of compressed training, for what goes between workers and servers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bigtrain.config.serving import CodingKind
from bigtrain.onebit.codec import Casts, Codec, Codes, Kept, Largest, Signs
from bigtrain.ops.message import Pair, num_blocks, num_bytes
from bigtrain.ops.op import Kernels
from bigtrain.server.coding import Coding, Exact

_BLOCK, _SIGNS_BLOCK = 256, 512  # elements of a scale


class Packed:
    """A codec's messages: scales in bf16, then codes."""

    exact = False

    def __init__(self, codec: Codec) -> None:
        self.codec = codec

    def num_bytes(self, n: int) -> int:
        return sum(self._sizes(n))

    def _sizes(self, n: int) -> list[int]:
        codec = self.codec
        scales = num_blocks(codec.count(n), codec.block) if codec.block else 0
        return [2 * scales, num_bytes(codec.count(n), codec.num_bits)]

    def _open(self, message: torch.Tensor, n: int) -> Pair:
        scales, codes = message.split(self._sizes(n))
        return scales.view(torch.bfloat16), codes

    def keep(self, n: int) -> Kept:
        return self.codec.keep(1, n, torch.device("cpu"))

    def pack(self, values: torch.Tensor, kept: Kept, out: torch.Tensor) -> None:
        self.codec.pack(values[None], kept, [self._open(out, values.numel())], 1.0)

    def add_up(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        self.codec.add_up([self._open(message, out.numel()) for message in messages], out, 1.0)

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: torch.Tensor) -> None:
        self.codec.follow(main, replica, self._open(out, main.numel()))

    def move(self, replica: torch.Tensor, message: torch.Tensor) -> None:
        self.codec.move(replica, self._open(message, replica.numel()))


def coding_of(kind: CodingKind, density: float = 0.125, kernels: Kernels = "auto") -> Coding:
    """Return the coding of that name."""
    codecs: dict[str, Codec] = {
        "bf16": Casts(torch.bfloat16),
        "int8": Codes(8, _BLOCK, kernels),
        "int4": Codes(4, _BLOCK, kernels),
        "onebit": Signs(_SIGNS_BLOCK, kernels),
        "topk": Largest(max(1, round(1 / density))),
    }
    return Exact() if kind == "fp32" else Packed(codecs[kind])
