"""A shard is a rectangular block of a full tensor: offsets and sizes per dim.

Everything that is saved, loaded or moved between layouts is a set of named blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bigtrain.errors import BigtrainError


@dataclass(frozen=True)
class Block:
    """The part of a tensor that starts at `offsets` and has `sizes`; one entry per dim."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Block:
        """Return the block that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @classmethod
    def rows(cls, shape: Sequence[int], start: int, stop: int) -> Block:
        """Return elements [start, stop) of the flattened tensor, which must be whole rows.

        Raises:
            BigtrainError: the cut is inside a row, so the part is no rectangle.
        """
        if (start, stop) == (0, math.prod(shape)):
            return cls.whole(shape)
        row = math.prod(shape[1:])
        if start % row or stop % row:
            raise BigtrainError(
                f"elements {start} to {stop} of a tensor of shape {tuple(shape)} are no block",
                why=f"a row has {row} elements, and cuts must fall between rows",
                mend="cut at a multiple of the row size",
            )
        first, last = start // row, stop // row
        return cls((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of this block in the full tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Block) -> Block | None:
        """Return what both blocks of one tensor cover, or None."""
        offsets, sizes = [], []
        for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True):
            start, stop = max(a, b), min(a + n, b + m)
            if stop <= start:
                return None
            offsets.append(start)
            sizes.append(stop - start)
        return Block(tuple(offsets), tuple(sizes))

    def within(self, outer: Block) -> Block:
        """Return this block in the coordinates of `outer`, which contains it."""
        offsets = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Block(offsets, self.sizes)


@dataclass(frozen=True)
class NamedBlock:
    """A tensor on this rank that is `block` of the full tensor `name` of `shape`.

    `num_replicas` ranks hold the same block, this one being number `replica`.
    """

    name: str
    shape: tuple[int, ...]
    block: Block
    tensor: torch.Tensor
    replica: int = 0
    num_replicas: int = 1
