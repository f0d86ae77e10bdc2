"""Are copies still equal? What several ranks hold must be the same bits on all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.mesh import Axis


def find_divergence(blocks: Iterable[NamedBlock], world: Axis) -> list[str]:
    """Return what differs between ranks of `world` that hold the same block; the same on all.

    Every rank calls this with its own blocks. Communicates one hash for each replicated block.
    """
    mine = {
        (block.name, block.block): _digest(block.tensor)
        for block in blocks
        if block.num_replicas > 1
    }
    first: dict[object, tuple[int, str]] = {}
    differences: dict[str, str] = {}
    for rank, digests in enumerate(all_gather_object(mine, world, "comparison of replicas")):
        for key, digest in digests.items():
            holder, expected = first.setdefault(key, (rank, digest))
            if digest != expected:
                differences.setdefault(key[0], f"{key[0]} on rank {rank} and rank {holder}")
    return list(differences.values())


def _digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()
