"""The collectives of one axis. On an axis of degree 1 there is nobody to talk to, and nothing runs.

Every wait is bounded by the timeout of the group, and a failure names the collective, the axis and
this rank. Backends often blame the wrong peer, so their text is quoted as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from bigtrain.comm.failure import published
from bigtrain.comm.mesh import Axis
from bigtrain.errors import BigtrainError, CommError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")

_SOURCE_LINE = re.compile(r"^\[[^\]]*:\d+\] ")  # where in the backend's own sources it came from
# What gloo and NCCL say when a peer is gone. Other errors (memory, a wrong dtype) are not about it.
_LOST_PEER = re.compile(
    r"connection|closed by peer|reset by peer|broken pipe|socket|nccl|aborted|remote|gloo.*peer",
    re.IGNORECASE,
)


class Pending(Generic[R]):
    """A collective under way; `wait` returns its result when it may be used."""

    def __init__(
        self,
        works: Sequence[dist.Work],
        what: str,
        axis: Axis,
        result: Callable[[], R],
    ) -> None:
        self._works, self._what, self._axis, self._result = works, what, axis, result

    def wait(self) -> R:
        """Block until done.

        Raises:
            CommError: a peer died or did not come in time.
        """
        if self._works:
            with explained(self._what, self._axis):
                for work in self._works:
                    work.wait()
            self._works = ()
        return self._result()

    def advance(self) -> None:
        """Begin what is to follow, if there is such, once that which goes before is done.

        Whoever began it calls this, in one order on all ranks; who needs the result may come in
        another.
        """

    def then(self, change: Callable[[R], S]) -> Pending[S]:
        """Return the same collective with a result that is `change` of this one's."""
        return Pending(self._works, self._what, self._axis, lambda: change(self._result()))


class Chain(Pending[R]):
    """A collective, and another that `begin` starts with its result."""

    def __init__(self, first: Pending[S], begin: Callable[[S], Pending[R]]) -> None:
        self._first: Pending[Any] | None = first
        self._begin: Callable[[Any], Pending[R]] = begin
        self._second: Pending[R] | None = None

    def advance(self) -> None:
        if self._first is not None:
            arrived = self._first.wait()
            self._first = None  # what it held is free before the second takes its own
            self._second = self._begin(arrived)

    def wait(self) -> R:
        self.advance()
        assert self._second is not None
        return self._second.wait()

    def then(self, change: Callable[[R], S]) -> Pending[S]:
        assert self._first is not None, "it has advanced already"
        begin = self._begin
        return Chain(self._first, lambda arrived: begin(arrived).then(change))


def all_reduce(tensor: torch.Tensor, axis: Axis, what: str = "all_reduce") -> None:
    """Replace `tensor` by its sum over `axis`."""
    start_all_reduce(tensor, axis, what).wait()


def start_all_reduce(
    tensor: torch.Tensor, axis: Axis, what: str = "all_reduce"
) -> Pending[torch.Tensor]:
    """Begin to replace `tensor` by its sum over `axis`; it must not be touched before `wait`.

    Wire: 2(n-1)/n of its bytes per rank.
    """
    assert tensor.is_contiguous()
    works = []
    if axis.group is not None and tensor.numel():
        with explained(what, axis):
            works = [dist.all_reduce(tensor, group=axis.group, async_op=True)]
    return Pending(works, what, axis, lambda: tensor)


def start_all_gather(
    tensor: torch.Tensor, axis: Axis, what: str = "all_gather"
) -> Pending[torch.Tensor]:
    """Begin to collect the tensors of all ranks, of one shape; the result is [degree, *shape].

    Wire: (n-1) times the bytes of `tensor` per rank.
    """
    if axis.group is None:
        return Pending((), what, axis, lambda: tensor[None])
    rows = tensor.new_empty((axis.degree, *tensor.shape))
    rows[axis.rank].copy_(tensor)
    return start_all_gather_into(rows, axis, what)


def start_all_gather_into(
    rows: torch.Tensor, axis: Axis, what: str = "all_gather"
) -> Pending[torch.Tensor]:
    """Begin to fill `rows` [degree, *shape], of which this rank has its own, with the others'.

    Wire: (n-1) times the bytes of a row per rank. On CPU as messages between each two ranks: the
    all-gather of gloo passes rows around a ring, and takes twice as long.
    """
    assert rows.is_contiguous()
    assert len(rows) == axis.degree
    works: Sequence[dist.Work] = ()
    if axis.transport is not None:
        return _carried([rows[axis.rank]] * axis.degree, list(rows), axis, what).then(
            lambda _: rows
        )
    if axis.group is not None and rows.numel():
        with explained(what, axis):
            if rows.device.type == "cpu":
                works = _messages([rows[axis.rank]] * axis.degree, list(rows), axis)
            else:
                gather = _newest("all_gather_single", "all_gather_into_tensor")
                own = rows[axis.rank].view(-1)
                works = [gather(rows.view(-1), own, group=axis.group, async_op=True)]
    return Pending(works, what, axis, lambda: rows)


def start_all_to_all(
    rows: torch.Tensor, axis: Axis, what: str = "all_to_all"
) -> Pending[list[torch.Tensor]]:
    """Begin to send row r of `rows` [degree, *shape] to rank r; the result is a row of each rank.

    This rank's own is the one that it has, not a copy. Wire: (n-1)/n of the bytes per rank.
    """
    assert all(row.is_contiguous() for row in rows)
    assert len(rows) == axis.degree
    if axis.group is None or not rows.numel():
        return Pending((), what, axis, lambda: list(rows))
    received = [rows[r] if r == axis.rank else torch.empty_like(rows[r]) for r in range(len(rows))]
    if axis.transport is not None:
        return _carried(list(rows), received, axis, what).then(lambda _: received)
    with explained(what, axis):
        if rows.device.type == "cpu":
            works = _messages(list(rows), received, axis)
        else:
            own = received[axis.rank]
            received[axis.rank] = torch.empty_like(own)
            work = dist.all_to_all(received, list(rows), group=axis.group, async_op=True)
            works = [work]
    return Pending(works, what, axis, lambda: received)


def start_reduce_scatter(
    tensor: torch.Tensor, axis: Axis, what: str = "reduce_scatter"
) -> Pending[torch.Tensor]:
    """Begin to sum `tensor` [degree, *shape] over `axis`; the result is this rank's row, [*shape].

    Wire: (n-1)/n of its bytes per rank. On CPU an all-to-all and a sum here, since the
    reduce-scatter of gloo sends twice as much.
    """
    assert len(tensor) == axis.degree
    if axis.group is None or not tensor.numel():
        return Pending((), what, axis, lambda: tensor[axis.rank])
    if tensor.device.type == "cpu":
        return start_all_to_all(tensor, axis, what).then(
            lambda rows: add_up(rows, torch.empty_like(rows[0]))
        )
    tensor = tensor.contiguous()
    own = torch.empty_like(tensor[0])
    with explained(what, axis):
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        work = scatter(own.view(-1), tensor.view(-1), group=axis.group, async_op=True)
    return Pending([work], what, axis, lambda: own)


def add_up(rows: Sequence[torch.Tensor], out: torch.Tensor, first: bool = True) -> torch.Tensor:
    """Return the sum of `rows`, in their order, in `out` and in its dtype.

    One of the rows may be `out` itself; then what is before it is overwritten. What was in `out`
    counts unless this is the first sum.
    """
    own = [index for index, row in enumerate(rows) if row.data_ptr() == out.data_ptr()]
    if own:
        before = rows[: own[0]]
        for row in before[1:]:
            before[0].add_(row)
        for row in (*before[:1], *rows[own[0] + 1 :]):
            out.add_(row)
    elif not first:
        for row in rows:
            out.add_(row)
    elif len(rows) > 1 and rows[0].dtype == rows[1].dtype == out.dtype:
        torch.add(rows[0], rows[1], out=out)
        for row in rows[2:]:
            out.add_(row)
    else:
        out.copy_(rows[0])
        for row in rows[1:]:
            out.add_(row)
    return out


def _carried(
    leaving: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor], axis: Axis, what: str
) -> Pending[Any]:
    """Begin the same as bytes, over the transport of the axis."""
    assert axis.transport is not None
    outgoing, incoming = (
        [row.view(-1).view(torch.uint8) for row in r] for r in (leaving, arriving)
    )
    return axis.transport.exchange(outgoing, incoming, what)


def _messages(
    leaving: Sequence[torch.Tensor], arriving: Sequence[torch.Tensor], axis: Axis
) -> list[dist.Work]:
    """Begin to send entry r of `leaving` to rank r, and to receive entry r of `arriving` from it.

    Every rank begins with another neighbour, so that none is sent to by all at once.
    """
    works = []
    for step in range(1, axis.degree):
        source, target = (axis.rank - step) % axis.degree, (axis.rank + step) % axis.degree
        works.append(dist.irecv(arriving[source], group=axis.group, group_src=source))
        works.append(dist.isend(leaving[target], group=axis.group, group_dst=target))
    return [work for work in works if work is not None]


def _newest(name: str, before: str) -> Callable[..., dist.Work]:
    """Return what torch.distributed calls `name` since 2.13 and `before` until then."""
    function: Callable[..., dist.Work] = getattr(dist, name, None) or getattr(dist, before)
    return function


def broadcast(tensor: torch.Tensor, axis: Axis, what: str = "broadcast") -> None:
    """Replace `tensor` by the one of the first rank of `axis`; any strides will do."""
    if axis.group is not None and tensor.numel():
        # Backends copy raw memory, so what is not contiguous goes through a copy that is.
        dense = tensor.detach().contiguous()
        with explained(what, axis):
            dist.broadcast(dense, src=axis.ranks[0], group=axis.group)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)


def all_gather_object(value: Any, axis: Axis, what: str = "all_gather_object") -> list[Any]:
    """Return the (small, picklable) values of all ranks of `axis`, in order."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.degree
    with explained(what, axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


@contextmanager
def explained(what: str, axis: Axis) -> Iterator[None]:
    """Turn what a backend raises when a peer is gone or late into a CommError that says so."""
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE_LINE.sub("", str(error).strip().split("\n")[0])
        timed_out = "timed out" in text.lower() or "timeout" in text.lower()
        if not (timed_out or isinstance(error, dist.DistError) or _LOST_PEER.search(text)):
            raise
        told = published()
        if told is not None:
            raise told from error
        raise CommError(
            f"{what} over axis {axis.name} (ranks {', '.join(map(str, axis.ranks))}) failed "
            f"on rank {axis.ranks[axis.rank]}",
            why=("another rank did not come in time: " if timed_out else "another rank went away: ")
            + text,
            mend="find the rank that hangs: its log (logs/rank-*.log) ends before the others' do; "
            "parallel.timeout_seconds bounds the wait"
            if timed_out
            else "look at the rank that failed first",
        ) from error


def together(action: Callable[[], T], axis: Axis, what: str) -> T:
    """Run `action` on every rank of `axis` and return this rank's result, once all are done.

    What fails on one rank fails on all: each raises the error of the first rank that has one, so
    that nobody is left waiting.

    Raises:
        BigtrainError: what `action` raised, on this rank or another.
    """
    failure: BigtrainError | None = None
    try:
        result = action()
    except BigtrainError as error:
        failure = error
    failures = [error for error in all_gather_object(failure, axis, what) if error is not None]
    if failures:
        raise failure or failures[0]
    return result
