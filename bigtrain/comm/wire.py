"""What gradients and updates look like between the ranks that share a bucket out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending, start_all_gather_into
from bigtrain.comm.mesh import Axis


class Wire(Protocol):
    """Carries a bucket's gradients to their owners, who add them up, and new parameters back.

    All ranks of an axis call it for the same buckets in the same order. What it keeps of a bucket
    between steps (errors that are not sent yet) is of this rank alone, until `consolidate`.
    """

    keeps: bool  # anything between steps

    def bytes_per_element(self, bucket: Bucket) -> float:
        """Return the bytes of an element of the gradient on the wire."""

    def bytes_of_update(self, bucket: Bucket) -> int:
        """Return the bytes that are held from `publish` until the parameters are used."""

    def leave(self, bucket: Bucket, axis: Axis) -> Pending[list[torch.Tensor]]:
        """Begin to send each rank its row of the gradients; the result is what came from all."""

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        """Let `out` [n] be the sum of what has arrived, or, if not `first`, add it to `out`."""

    def publish(self, bucket: Bucket, axis: Axis) -> Pending[torch.Tensor]:
        """Begin to bring the owners' new parameters to all ranks, once they have updated them."""

    def consolidate(self, bucket: Bucket) -> None:
        """Gather at each owner what ranks keep of its block; the next publish is exact."""

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        """Return what all ranks together keep of this rank's block [n], after `consolidate`."""

    def shrink(self, bucket: Bucket, factor: float) -> None:
        """Multiply what this rank keeps by a factor, the same on all ranks."""

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        """Keep that of this rank's block, and nothing of others; the next publish is exact."""


class PlainWire:
    """Parameters go as they are, and nothing is kept."""

    keeps = False

    def bytes_of_update(self, bucket: Bucket) -> int:
        return 0

    def publish(self, bucket: Bucket, axis: Axis) -> Pending[torch.Tensor]:
        bucket.round()
        rows = bucket.params.view(axis.degree, -1)
        return start_all_gather_into(rows, axis, f"all_gather of bucket {bucket.index}")

    def consolidate(self, bucket: Bucket) -> None:
        pass

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        return None

    def shrink(self, bucket: Bucket, factor: float) -> None:
        pass

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        pass
