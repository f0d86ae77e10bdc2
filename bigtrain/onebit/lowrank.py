"""Gradients as products of two thin matrices, updates in 8 bits back; errors go with the next.

Each parameter is a matrix M [first dim, rest], its gradient with what is kept of it. All ranks have
the same Q [rest, rank], and send the sum of their P = M Q; of what comes back they take a basis of
its columns, again P, and send the sum of their Q = M^T P. The sum of gradients is then P Q^T, which
each owner computes of its block, and each rank keeps what P does not span of its own M. The next
step begins with that Q. Source: PowerSGD (https://arxiv.org/abs/1905.13727).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.collectives import Chain, Pending, start_all_reduce
from bigtrain.comm.mesh import Axis
from bigtrain.comm.wire import Wire
from bigtrain.onebit.codec import Casts, Codec
from bigtrain.onebit.feedback import FeedbackWire

FP32 = 4


@dataclass(frozen=True)
class Part:
    """One parameter of a bucket: elements [start, stop), a matrix [rows, columns] of it.

    left, right: where its P [rows, rank] and Q [columns, rank] are in those of the bucket. `right`
    is empty for what would not be shorter so, and goes as it is where P would be.
    """

    start: int
    rows: int
    columns: int
    left: slice
    right: slice

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns

    @property
    def whole(self) -> bool:
        """Does it go as it is?"""
        return self.right.start == self.right.stop

    def matrix(self, flat: torch.Tensor) -> torch.Tensor:
        return flat[self.start : self.stop].view(self.rows, self.columns)

    def p(self, lefts: torch.Tensor) -> torch.Tensor:
        return lefts[self.left].view(self.rows, -1)

    def q(self, rights: torch.Tensor) -> torch.Tensor:
        return rights[self.right].view(self.columns, -1)


class LowRankWire(FeedbackWire):
    """Sends gradients as products of thin matrices, once a step; see the module.

    Wire, of a matrix [m, n]: 2(n-1)/n of rank * (m + n) fp32, in two all-reduces of all that a
    bucket has: the first begins when it leaves, the second when the next one does. Updates as
    `down` packs them. Kept: what is lost, and Q; where a run saves or resumes, and after a step
    that did not count, Q starts anew, with the same draws on all ranks.
    """

    once_a_step = True

    def __init__(self, plain: Wire, rank: int, down: Codec, *, resync_every: int = 500) -> None:
        # Nothing is packed on the way up: it says what is kept, fp32 for each element.
        super().__init__(plain, Casts(torch.float32), down, resync_every=resync_every)
        self.rank = rank
        self._rights: dict[int, torch.Tensor] = {}  # the Q of all matrices of a bucket

    def bytes_per_element(self, bucket: Bucket) -> float:
        if not bucket.sharing.compressed:
            return self.plain.bytes_per_element(bucket)
        lefts, rights = self._sizes(bucket)
        return 2 * FP32 * (lefts + rights) / max(1, bucket.numel)  # all-reduces send it twice

    def bytes_kept(self, bucket: Bucket) -> int:
        rights = self._sizes(bucket)[1] if bucket.sharing.compressed else 0
        return super().bytes_kept(bucket) + FP32 * rights

    def _sizes(self, bucket: Bucket) -> tuple[int, int]:
        """Return the elements of all P, with what goes as it is, and of all Q."""
        parts = list(self._parts(bucket))
        return parts[-1].left.stop, parts[-1].right.stop

    def _parts(self, bucket: Bucket) -> Iterator[Part]:
        left = right = 0
        for slot in bucket.slots:
            m = slot.shape[0]
            n = slot.shape[1:].numel()
            thin = self.rank * (m + n) < m * n
            p, q = (self.rank * m, self.rank * n) if thin else (m * n, 0)
            yield Part(slot.start, m, n, slice(left, left + p), slice(right, right + q))
            left, right = left + p, right + q

    # -- gradients -----------------------------------------------------------------------------

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        if not bucket.sharing.compressed:
            return self.plain.leave(bucket, rows, axis)
        assert rows.numel() == bucket.numel, "each rank is a node, and sends whole matrices"
        kept = self.errors(bucket)
        kept += rows.view(-1)
        rights = self._right_of(bucket)
        lefts = torch.empty(self._sizes(bucket)[0], device=kept.device)
        for part in self._parts(bucket):
            if part.whole:
                lefts[part.left] = kept[part.start : part.stop]
                kept[part.start : part.stop] = 0.0
            else:
                q = _directions(part.q(rights), seed=bucket.index << 32 | part.start)
                torch.mm(part.matrix(kept), q, out=part.p(lefts))
        first = start_all_reduce(lefts, axis, f"all_reduce of P of gradient bucket {bucket.index}")
        return Chain(first, lambda lefts: self._answer(bucket, axis, lefts))

    def _answer(
        self, bucket: Bucket, axis: Axis, lefts: torch.Tensor
    ) -> Pending[list[torch.Tensor]]:
        """Begin to send Q, once the sum of P is there, and keep what that will not bring."""
        kept, rights = self.errors(bucket), self._right_of(bucket)
        for part in self._parts(bucket):
            if not part.whole:
                p, q, matrix = part.p(lefts), part.q(rights), part.matrix(kept)
                # Of what is no number, Q tells.
                p.copy_(torch.linalg.qr(p.nan_to_num()).Q)
                torch.mm(matrix.T, p, out=q)
                matrix.addmm_(p, q.T, alpha=-1)  # of this rank's Q, before it is summed
        kept.nan_to_num_(0.0, 0.0, 0.0)
        what = f"all_reduce of Q of gradient bucket {bucket.index}"
        return start_all_reduce(rights, axis, what).then(lambda rights: [lefts, rights])

    def _right_of(self, bucket: Bucket) -> torch.Tensor:
        if bucket.index not in self._rights:
            numel = self._sizes(bucket)[1]
            self._rights[bucket.index] = torch.zeros(numel, device=bucket.params.device)
        return self._rights[bucket.index]

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        if not bucket.sharing.compressed:
            self.plain.add_up(bucket, arrived, out, first=first)
            return
        assert first, "it is sent once a step"
        lefts, rights = arrived
        begin, end = bucket.owned
        out.zero_()
        for part in self._parts(bucket):
            start, stop = max(begin, part.start), min(end, part.stop)
            if start < stop:
                a, b = start - part.start, stop - part.start
                out[start - begin : stop - begin] = _product(part, lefts, rights, a, b)

    # -- what is kept --------------------------------------------------------------------------

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        super().restore(bucket, kept)
        if bucket.index in self._rights:
            self._rights[bucket.index].zero_()


def _product(
    part: Part, lefts: torch.Tensor, rights: torch.Tensor, start: int, stop: int
) -> torch.Tensor:
    """Return elements [start, stop) of P Q^T."""
    if part.whole:
        return lefts[part.left][start:stop]
    above, n = start // part.columns, part.columns
    rows = part.p(lefts)[above : math.ceil(stop / n)] @ part.q(rights).T
    return rows.flatten()[start - above * n : stop - above * n]


def _directions(q: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the columns of Q at length 1; where there is nothing, or no number, they are drawn.

    Without that, a column that is zero once stays so.
    """
    norms = q.norm(dim=0)
    alive = norms > 0
    if not alive.all():
        draws = torch.Generator().manual_seed(seed)
        q = torch.where(alive, q, torch.randn(q.shape, generator=draws).to(q.device))
        norms = q.norm(dim=0)
    return q / norms
