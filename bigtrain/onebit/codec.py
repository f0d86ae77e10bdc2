"""How rows of numbers become messages, and what is kept of them.

Codes of 4 or 8 bits, signs, numbers of 16 bits, or the largest numbers alone, or their signs.

What is kept begins as zeros and is added to what is packed next. `gone` is the share of what was
sent that is taken off it: all of it is error feedback (https://arxiv.org/abs/1901.09847).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from bigtrain.ops.delta import delta_apply_, delta_pack_
from bigtrain.ops.flat import root, sum_in_lanes
from bigtrain.ops.message import Pair, blocks_of, num_blocks, packed, per_element, unpacked
from bigtrain.ops.op import Kernels
from bigtrain.ops.quantize import dequantize_mean, quantize_
from bigtrain.ops.signs import sign_pack_, sign_residual, sign_unpack_mean


@dataclass
class Kept:
    """What is kept of rows [rows, n], fp32: the values, less the sign of each times a scale.

    scales: [rows, blocks], for what keeps signs; None where values are all.
    """

    values: torch.Tensor
    scales: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def set(self, values: torch.Tensor | float) -> None:
        """Keep this, and nothing else."""
        if isinstance(values, torch.Tensor):
            self.values.copy_(values.view_as(self.values))
        else:
            self.values.fill_(values)
        if self.scales is not None:
            self.scales.zero_()

    def scale(self, factor: float) -> None:
        self.values.mul_(factor)
        if self.scales is not None:
            self.scales.mul_(factor)


class Codec(Protocol):
    """Packs rows and adds them up.

    num_bits: of an element that goes; block: such elements of a scale, 0 where there are no scales.
    """

    @property
    def num_bits(self) -> int: ...

    @property
    def block(self) -> int: ...

    def count(self, n: int) -> int:
        """Return how many of n elements go."""

    def keep(self, rows: int, n: int, device: torch.device) -> Kept:
        """Return room for what is kept of rows [rows, n]: nothing yet."""

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        """Write the scales and codes of rows [rows, n] with what is kept, and keep what is left."""

    def residual(self, kept: Kept) -> torch.Tensor:
        """Return what is kept, [rows, n]."""

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        """Let `out` [n] be `weight` times the sum of the messages, in their order."""

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: Pair) -> None:
        """Write what `replica` [n] lacks of `main`, and move it as `move` moves its copies."""

    def move(self, replica: torch.Tensor, pair: Pair) -> None:
        """Move a copy of `replica` as its owner has; where a scale is NaN it becomes NaN."""


class Common:
    """What most codecs do: all elements go, what is kept is values, and replicas move by what a
    message adds up to (of them, what is kept is main - replica anyway)."""

    def count(self, n: int) -> int:
        return n

    def keep(self, rows: int, n: int, device: torch.device) -> Kept:
        return Kept(torch.zeros(rows, n, device=device), None)

    def residual(self, kept: Kept) -> torch.Tensor:
        return kept.values

    def follow(self: Codec, main: torch.Tensor, replica: torch.Tensor, out: Pair) -> None:
        nothing = self.keep(1, main.numel(), main.device)
        self.pack((main - replica.float())[None], nothing, [out], 1.0)
        self.move(replica, out)

    def move(self: Codec, replica: torch.Tensor, pair: Pair) -> None:
        step = torch.empty(replica.numel(), dtype=torch.float32, device=replica.device)
        self.add_up([pair], step, 1.0)
        replica.copy_(replica.float() + step)  # rounded once, as on every rank


@dataclass(frozen=True)
class Codes(Common):
    """Integers of 4 or 8 bits; the largest in a block is 7 or 127."""

    num_bits: int
    block: int
    kernels: Kernels = "auto"

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        assert gone == 1.0, "a kernel takes off all that was sent"
        for row, error, pair in zip(rows, kept.values, out, strict=True):
            quantize_(
                row,
                error,
                num_bits=self.num_bits,
                block=self.block,
                scale_dtype=pair[0].dtype,
                out=pair,
                kernels=self.kernels,
            )

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        dequantize_mean(
            torch.stack([codes for _, codes in pairs]),
            torch.stack([scales for scales, _ in pairs]),
            out.numel(),
            num_bits=self.num_bits,
            block=self.block,
            weight=weight,
            out=out,
            kernels=self.kernels,
        )

    def follow(self, main: torch.Tensor, replica: torch.Tensor, out: Pair) -> None:
        delta_pack_(
            main,
            replica,
            num_bits=self.num_bits,
            block=self.block,
            scale_dtype=out[0].dtype,
            out=out,
            kernels=self.kernels,
        )
        _spread_nan(replica, out[0], self.block)

    def move(self, replica: torch.Tensor, pair: Pair) -> None:
        scales, codes = pair
        delta_apply_(
            replica,
            scales,
            codes,
            num_bits=self.num_bits,
            block=self.block,
            kernels=self.kernels,
        )
        _spread_nan(replica, scales, self.block)


@dataclass(frozen=True)
class Signs(Common):
    """One bit: a sign, of the root of its block's mean square."""

    block: int
    kernels: Kernels = "auto"
    num_bits: int = 1

    def keep(self, rows: int, n: int, device: torch.device) -> Kept:
        blocks = num_blocks(n, self.block)
        return Kept(torch.zeros(rows, n, device=device), torch.zeros(rows, blocks, device=device))

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        assert kept.scales is not None
        for row, v, s, pair in zip(rows, kept.values, kept.scales, out, strict=True):
            self._pack(row, v, s, pair)
        if gone != 1.0:
            kept.scales.mul_(gone)

    def _pack(self, x: torch.Tensor, v: torch.Tensor, s: torch.Tensor, pair: Pair) -> None:
        dtype = pair[0].dtype
        sign_pack_(x, v, s, block=self.block, scale_dtype=dtype, out=pair, kernels=self.kernels)

    def residual(self, kept: Kept) -> torch.Tensor:
        assert kept.scales is not None
        rows = zip(kept.values, kept.scales, strict=True)
        return torch.stack([sign_residual(v, s, self.block, kernels=self.kernels) for v, s in rows])

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        sign_unpack_mean(
            torch.stack([bits for _, bits in pairs]),
            torch.stack([scales for scales, _ in pairs]),
            out.numel(),
            self.block,
            weight=weight,
            out=out,
            kernels=self.kernels,
        )


@dataclass(frozen=True)
class Casts(Common):
    """Numbers of another dtype, without scales. What it cannot hold becomes an infinity, for all to
    see; what is kept there stays as it is."""

    dtype: torch.dtype
    block: int = 0

    @property
    def num_bits(self) -> int:
        return 8 * self.dtype.itemsize

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        assert gone == 1.0, "all that was sent is taken off"
        for row, error, (_, data) in zip(rows, kept.values, out, strict=True):
            left = row + error
            left -= data.view(self.dtype).copy_(left)
            _keep_finite(left, error)

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        out.zero_()
        for _, data in pairs:
            out += data.view(self.dtype)
        out *= weight


@dataclass(frozen=True)
class TopK(Common):
    """The largest elements of a row, `density` of them: places as int32, and values in bf16.

    What does not go is kept whole. A NaN and an infinity are larger than all else. Source: sparse
    SGD with memory (https://arxiv.org/abs/1809.07599).
    """

    density: float
    block: int = 0
    num_bits: int = 48

    def count(self, n: int) -> int:
        return max(1, math.ceil(self.density * n))

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        assert gone == 1.0, "all that was sent is taken off"
        for row, error, pair in zip(rows, kept.values, out, strict=True):
            left = row + error
            sizes = left.abs().nan_to_num_(torch.inf, torch.inf)
            chosen = sizes.topk(self.count(len(row)), sorted=False).indices
            places, values = self._open(pair)
            places.copy_(chosen)
            left[chosen] -= values.copy_(left[chosen])
            _keep_finite(left, error)

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        out.zero_()
        for pair in pairs:
            places, values = self._open(pair)
            out[places.long()] += values  # no place is twice in one message
        out *= weight

    @staticmethod
    def _open(pair: Pair) -> Pair:
        """Return places and values of a message, views of it."""
        places, values = pair[1].split([pair[1].numel() // 3 * 2, pair[1].numel() // 3])
        return places.view(torch.int32), values.view(torch.bfloat16)


@dataclass(frozen=True)
class Largest(Common):
    """Of each `group` neighbours the largest: its place among them, and its sign.

    A place takes as many bits as it needs, so that one in 8 costs half a bit an element. The scale
    of a block is the root mean square of what was chosen in it. Where that is no number, nothing is
    taken off what is kept, and all of the block becomes NaN.
    """

    group: int
    block: int = 128

    @property
    def num_bits(self) -> int:
        return (self.group - 1).bit_length() + 1

    def count(self, n: int) -> int:
        return num_blocks(n, self.group)

    def pack(self, rows: torch.Tensor, kept: Kept, out: Sequence[Pair], gone: float) -> None:
        assert gone == 1.0, "all that was sent is taken off"
        for row, error, pair in zip(rows, kept.values, out, strict=True):
            self._pack(row + error, error, pair)

    def _pack(self, there: torch.Tensor, error: torch.Tensor, pair: Pair) -> None:
        n, (scales, codes) = len(there), pair
        groups = blocks_of(there, self.group)
        places = groups.abs().argmax(1, keepdim=True)  # the first of equals
        values = groups.gather(1, places)
        squares = blocks_of(values * values, self.block)
        counts = sum_in_lanes(blocks_of(torch.ones_like(values), self.block), self.block)
        # In fixed order: all servers that hold a block send the same.
        s = root(sum_in_lanes(squares, self.block) / counts).to(scales.dtype)
        good = s.isfinite()
        scales.copy_(torch.where(good, s, torch.nan))
        minus = values < 0
        codes.copy_(self._bits(places, minus))
        sent = self._numbers(scales, minus.flatten())
        left = groups.scatter(1, places, values - sent[:, None]).flatten()[:n]
        error.copy_(torch.where(per_element(good, n, self.block * self.group), left, error))

    def _bits(self, places: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Return bytes: the lowest bit of all places, the next one of all, ..., signs."""
        shifts = torch.arange(self.num_bits - 1, device=places.device)
        planes = torch.cat([(places >> shifts) & 1, minus.long()], dim=1).T
        return packed(planes.flatten(), 1)

    def _numbers(self, scales: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        s = per_element(scales.float(), len(minus), self.block)
        return torch.where(minus, -s, s)

    def add_up(self, pairs: Sequence[Pair], out: torch.Tensor, weight: float) -> None:
        n = out.numel()
        total = torch.zeros(self.count(n), self.group, device=out.device)
        shifts = torch.arange(self.num_bits - 1, device=out.device)
        for scales, codes in pairs:
            bits = unpacked(codes[None], self.num_bits * len(total), 1).view(-1, len(total))
            places = (bits[:-1] << shifts[:, None]).sum(0, dtype=torch.int64)
            places.clamp_(max=self.group - 1)  # whatever a message says
            total.scatter_add_(1, places[:, None], self._numbers(scales, bits[-1] > 0)[:, None])
        torch.mul(total.flatten()[:n], weight, out=out)
        for scales, _ in pairs:
            _spread_nan(out, scales, self.block * self.group)


def _keep_finite(left: torch.Tensor, error: torch.Tensor) -> None:
    """Keep what is left, but for what is no number."""
    error.copy_(torch.where(left.isfinite(), left, error))


def _spread_nan(params: torch.Tensor, scales: torch.Tensor, block: int) -> None:
    """Let blocks whose scale is a NaN be NaN: main parameters have one there, for all to see."""
    bad = scales.isnan()
    if bad.any():
        params.masked_fill_(per_element(bad, params.numel(), block), torch.nan)
