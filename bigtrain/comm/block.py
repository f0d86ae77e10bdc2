"""A shard is rectangular blocks of a full tensor: offsets and sizes per dim.

Everything that is saved, loaded or moved between layouts is a set of named blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn


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
    def cover(cls, shape: Sequence[int], start: int, stop: int) -> Iterator[Block]:
        """Yield the blocks that elements [start, stop) of the flattened tensor are, in order.

        Whole rows are one block; what is left of a row at either end is cut likewise, dim by dim.
        """
        if (start, stop) == (0, math.prod(shape)):
            yield cls.whole(shape)
            return
        row = math.prod(shape[1:])
        while start < stop:
            first, inside = divmod(start, row)
            if inside or stop - start < row:
                end = min(stop, (first + 1) * row)
                for part in cls.cover(shape[1:], inside, end - first * row):
                    yield cls((first, *part.offsets), (1, *part.sizes))
            else:
                end = stop // row * row
                yield cls((first, *(0 for _ in shape[1:])), ((end - start) // row, *shape[1:]))
            start = end

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
class Piece:
    """Where the block `full` of the full tensor lies in this rank's own tensor: at `local`."""

    full: Block
    local: Block


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a full tensor of `shape`: pieces that fill a tensor of its own.

    `num_replicas` ranks along the axes that shard a model hold the same pieces, this one being
    number `replica`; if stages of a pipeline differ in what they hold, `stages` are those. A fused
    projection has several pieces (its rows of q, of k and of v).
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    replica: int = 0
    num_replicas: int = 1
    stages: tuple[int, ...] = ()

    @classmethod
    def whole(cls, shape: Sequence[int], replica: int = 0, num_replicas: int = 1) -> Shard:
        """Return the shard that is all of the tensor, held by `num_replicas` ranks."""
        block = Block.whole(shape)
        return cls(tuple(shape), (Piece(block, block),), replica, num_replicas)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's own tensor."""
        ends = [
            [o + n for o, n in zip(p.local.offsets, p.local.sizes, strict=True)]
            for p in self.pieces
        ]
        return tuple(max(end) for end in zip(*ends, strict=True)) if ends else self.shape

    def take(self, full: torch.Tensor) -> torch.Tensor:
        """Return this rank's own tensor, a copy, out of the full one."""
        own = full.new_empty(self.local_shape)
        for piece in self.pieces:
            own[piece.local.slices] = full[piece.full.slices]
        return own

    def put(self, own: torch.Tensor, full: torch.Tensor) -> None:
        """Write a rank's own tensor to its places in the full one; the inverse of `take`."""
        for piece in self.pieces:
            full[piece.full.slices] = own[piece.local.slices]

    def named_blocks(
        self,
        name: str,
        part: Block,
        tensor: torch.Tensor,
        replica: tuple[int, int],
    ) -> Iterator[NamedBlock]:
        """Yield what `tensor`, the block `part` of this rank's own tensor, is of the full one.

        replica: (number of this rank, how many) among the ranks that hold the same `part` along
        the axes that do not shard the model.
        """
        number, many = replica
        for piece in self.pieces:
            common = part.intersect(piece.local)
            if common is None:
                continue
            inside = common.within(piece.local)
            offsets = tuple(a + b for a, b in zip(piece.full.offsets, inside.offsets, strict=True))
            yield NamedBlock(
                name,
                self.shape,
                Block(offsets, common.sizes),
                tensor[common.within(part).slices],
                self.replica * many + number,
                self.num_replicas * many,
                self.stages,
            )


def shards_of(model: nn.Module) -> dict[str, Shard]:
    """Return the shards of those parameters and buffers that are parts of full tensors, by name.

    A module that holds such parts says so in its attribute `shards`: own name -> Shard.
    """
    found: dict[str, Shard] = {}
    for prefix, module in model.named_modules():
        shards = getattr(module, "shards", None)
        if isinstance(shards, dict):
            found |= {f"{prefix}.{name}".lstrip("."): shard for name, shard in shards.items()}
    return found


@dataclass(frozen=True)
class NamedBlock:
    """A tensor on this rank that is `block` of the full tensor `name` of `shape`.

    `num_replicas` ranks hold the same block, this one being number `replica`; `stages` as in Shard.
    """

    name: str
    shape: tuple[int, ...]
    block: Block
    tensor: torch.Tensor
    replica: int = 0
    num_replicas: int = 1
    stages: tuple[int, ...] = ()
