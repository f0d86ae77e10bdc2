"""What gradients and updates look like between the ranks that share a bucket out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Pending
from bigtrain.comm.mesh import Axis, Nodes
from bigtrain.comm.nodes import start_all_gather_by_nodes

Agree = Callable[[torch.Tensor], torch.Tensor]
"""Returns the sum of a tensor over some axes, to all ranks."""


class Averages(Protocol):
    """An optimizer with running means of the gradient and of its square, as a wire sees it."""

    takes_momentum: bool  # can it do with a mean of the gradient that comes over the wire?
    takes_own_momentum: bool  # and for some steps with one that is this rank's alone?
    num_updates: int
    rate: float  # of the update under way, or of the last
    rising: bool  # is the rate above that of the update before?

    @property
    def decays(self) -> tuple[float, float]:
        """Of both means."""

    def first_moment(self, bucket: Bucket) -> torch.Tensor:
        """Return the mean of the gradient of this rank's block [n], a copy."""

    def set_first_moment(self, bucket: Bucket, mean: torch.Tensor) -> None:
        """Let it be `mean` [n]."""

    def sum_of_variance(self, bucket: Bucket) -> torch.Tensor:
        """Return the sum of the second moment over this rank's block, a scalar."""


class Ledger(Protocol):
    """What a strategy keeps of gradients between steps, and what it must know of each.

    What it keeps of a bucket (errors that are not sent yet) is of this rank alone, until
    `consolidate`. All ranks of an axis call it for the same buckets in the same order.
    """

    keeps: bool  # anything between steps

    def bytes_of_update(self, bucket: Bucket) -> int:
        """Return the bytes that are held from `publish` until the parameters are used."""

    def bytes_kept(self, bucket: Bucket) -> int:
        """Return the bytes that are kept between steps."""

    def squares(self, bucket: Bucket) -> torch.Tensor | None:
        """Return what this rank adds to the sum of squares of the gradient, a scalar in fp64.

        Where not all ranks sent finite numbers, the sum is not finite. None: main_grads tell.
        """

    def divided(self, buckets: Sequence[Bucket], divisor: float) -> None:
        """Note by what the gradient of this step is divided, before it is used."""

    def rescale(self, buckets: Sequence[Bucket], scale: float) -> None:
        """Note that losses, and so gradients, are multiplied by `scale` from now on; 1 at first."""

    def consolidate(self, bucket: Bucket) -> None:
        """Gather at each owner what ranks keep of its block; the next publish is exact."""

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        """Return what all ranks together keep of this rank's block [n], after `consolidate`, in
        units of gradients of a scale of 1."""

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        """Keep that of this rank's block, and nothing of others; the next publish is exact."""

    def abandon(self, bucket: Bucket) -> None:
        """Forget the step under way, whose gradient must not count; the next publish is exact."""

    def updated_by(self, averages: Averages) -> None:
        """Take note of the optimizer.

        Raises:
            BigtrainError: it cannot update from what comes.
        """

    def review(
        self, buckets: Sequence[Bucket], everybody: Agree, device: torch.device, *, stepped: bool
    ) -> None:
        """Once all is published, see whether to go on in another way, all ranks alike.

        stepped: after a step; else after what was saved or loaded. everybody: sums over all that
        trains the model, of tensors on `device`.
        """

    @property
    def progress(self) -> dict[str, Any] | None:
        """What a run must know to go on in the same way; numbers and words."""

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None: ...


class Wire(Ledger, Protocol):
    """Carries a bucket's gradients to their owners, who add them up, and new parameters back.

    It is between nodes: what it sends was added up on this rank's node (`Sharing.nodes`; often a
    rank is a node of its own).
    """

    once_a_step: bool  # of what is compressed: are gradients of a whole step needed together?

    def bytes_per_element(self, bucket: Bucket) -> float:
        """Return the bytes of an element of the gradient on the wire."""

    def hold(self, bucket: Bucket, rows: torch.Tensor) -> bool:
        """Keep gradients [nodes, n], to which others of this step will come, until these leave.

        False: it cannot, so they must leave now.
        """

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        """Begin to send each rank its row of the gradients; the result is what came from all.

        rows: [axis.degree, n], a view of the bucket's gradients; padding is zero. axis: across
        nodes.
        """

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        """Let `out` [n] be the sum of what has arrived, or, if not `first`, add it to `out`.

        It may be the mean of the gradient that an optimizer wants: `bucket.momentum` says so.
        """

    def publish(self, bucket: Bucket, nodes: Nodes) -> Pending[torch.Tensor]:
        """Begin to bring the owners' new parameters to all ranks, once they have updated them."""


class PlainWire:
    """Parameters go as they are, and nothing is kept."""

    keeps = False
    once_a_step = False

    def hold(self, bucket: Bucket, rows: torch.Tensor) -> bool:
        return False

    def bytes_of_update(self, bucket: Bucket) -> int:
        sharing = bucket.sharing
        in_place = sharing.sharded_params or sharing.nodes.node.degree == 1
        return 0 if in_place else bucket.params.nbytes

    def bytes_kept(self, bucket: Bucket) -> int:
        return 0

    def squares(self, bucket: Bucket) -> torch.Tensor | None:
        return None

    def divided(self, buckets: Sequence[Bucket], divisor: float) -> None:
        pass

    def rescale(self, buckets: Sequence[Bucket], scale: float) -> None:
        pass

    def publish(self, bucket: Bucket, nodes: Nodes) -> Pending[torch.Tensor]:
        bucket.round()
        rows = bucket.params.view(nodes.whole.degree, -1)
        what = f"all_gather of bucket {bucket.index}"
        return start_all_gather_by_nodes(bucket.shard, nodes, what, rows)

    def consolidate(self, bucket: Bucket) -> None:
        pass

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        return None

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        pass

    def abandon(self, bucket: Bucket) -> None:
        pass

    def updated_by(self, averages: Averages) -> None:
        pass

    def review(
        self, buckets: Sequence[Bucket], everybody: Agree, device: torch.device, *, stepped: bool
    ) -> None:
        pass

    @property
    def progress(self) -> dict[str, Any] | None:
        return None

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        pass
