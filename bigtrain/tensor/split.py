"""How one dim of a tensor is shared out over the ranks of an axis.

Without units, sizes differ by at most one element. With units (the heads of a projection) no unit
is ever cut: `units=(8,)` is one part of 8 heads, `units=(8, 2, 2)` a fused projection of 8 query
heads, then 2 key heads, then 2 value heads, each part shared out by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from bigtrain.comm.block import Block, Piece, Shard
from bigtrain.comm.collectives import broadcast
from bigtrain.comm.mesh import Axis
from bigtrain.errors import BigtrainError


def even_split(size: int, degree: int, rank: int) -> tuple[int, int]:
    """Return [start, stop) of `rank`; the first size % degree ranks have one more."""
    small, more = divmod(size, degree)
    start = rank * small + min(rank, more)
    return start, start + small + (rank < more)


def legal_degrees(num_units: int) -> list[int]:
    """Return the degrees that `num_units` whole units can be shared out to evenly."""
    return [n for n in range(1, num_units + 1) if num_units % n == 0]


def shard_dim(
    shape: Sequence[int],
    dim: int,
    degree: int,
    rank: int,
    *,
    units: Sequence[int] = (),
    share: bool = False,
    name: str = "a parameter",
) -> Shard:
    """Return the shard that `rank` of `degree` has of a tensor of `shape`, split along `dim`.

    share: one part of fewer units than ranks may be held by several ranks each (key-value heads).

    Raises:
        BigtrainError: units do not make up the dim, or cannot be shared out; legal degrees are
            named.
    """
    if not units:
        return _assemble(shape, dim, [even_split(shape[dim], degree, rank)])
    size, odd = divmod(shape[dim], max(1, sum(units)))
    if odd or min(units) < 1:
        raise BigtrainError(
            f"{name}: dim {dim} has {shape[dim]} elements, which are not {sum(units)} equal units",
            why=f"units={tuple(units)} counts the units (heads) of each part",
            mend="let the units be a divisor of that size",
        )
    uncut = [num for num in units if num % degree]
    if uncut and not (share and len(units) == 1 and degree % units[0] == 0):
        legal = legal_degrees(math.gcd(*units))
        raise BigtrainError(
            f"{name}: {uncut[0]} units (heads) cannot be shared out to {degree} ranks",
            why="a rank takes whole units, the same number on every rank",
            mend=f"use a tensor-parallel degree of {', '.join(map(str, legal))}"
            + f", or a multiple of {units[0]}" * (share and len(units) == 1),
        )
    if uncut:
        sharers = degree // units[0]
        unit = rank // sharers
        cuts = [(unit * size, (unit + 1) * size)]
        return _assemble(shape, dim, cuts, rank % sharers, sharers)
    cuts, start = [], 0
    for num in units:
        own = num // degree * size
        cuts.append((start + rank * own, start + (rank + 1) * own))
        start += num * size
    return _assemble(shape, dim, cuts)


def take_part(full: torch.Tensor, shard: Shard, axis: Axis) -> nn.Parameter:
    """Return this rank's part of `full` as it is on the first rank of `axis`, as a parameter.

    Communicates a broadcast of `full`.
    """
    broadcast(full, axis, "broadcast of a full parameter")
    return nn.Parameter(shard.take(full.detach()), requires_grad=full.requires_grad)


def _assemble(
    shape: Sequence[int],
    dim: int,
    cuts: list[tuple[int, int]],
    replica: int = 0,
    num_replicas: int = 1,
) -> Shard:
    pieces, end = [], 0
    for start, stop in cuts:
        full, local = [(0, size) for size in shape], [(0, size) for size in shape]
        full[dim], local[dim] = (start, stop - start), (end, stop - start)
        end += stop - start
        pieces.append(Piece(_block(full), _block(local)))
    return Shard(tuple(shape), tuple(pieces), replica, num_replicas)


def _block(spans: list[tuple[int, int]]) -> Block:
    return Block(tuple(start for start, _ in spans), tuple(size for _, size in spans))
