"""The collectives of one axis. On an axis of degree 1 there is nobody to talk to, and nothing runs.

Every wait is bounded by the timeout of the group, and a failure names the collective, the axis and
this rank. Backends often blame the wrong peer, so their text is quoted as what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from bigtrain.comm.failure import published
from bigtrain.comm.mesh import Axis
from bigtrain.errors import BigtrainError, CommError

T = TypeVar("T")

_SOURCE_LINE = re.compile(r"^\[[^\]]*:\d+\] ")  # where in the backend's own sources it came from
# What gloo and NCCL say when a peer is gone. Other errors (memory, a wrong dtype) are not about it.
_LOST_PEER = re.compile(
    r"connection|closed by peer|reset by peer|broken pipe|socket|nccl|aborted|remote|gloo.*peer",
    re.IGNORECASE,
)


class Pending:
    """A collective under way; `wait` returns its result when it may be used."""

    def __init__(
        self,
        work: dist.Work | None,
        what: str,
        axis: Axis,
        result: Callable[[], torch.Tensor],
    ) -> None:
        self._work, self._what, self._axis, self._result = work, what, axis, result

    def wait(self) -> torch.Tensor:
        """Block until done.

        Raises:
            CommError: a peer died or did not come in time.
        """
        if self._work is not None:
            with explained(self._what, self._axis):
                self._work.wait()
            self._work = None
        return self._result()

    def then(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Pending:
        """Return the same collective with a result that is `change` of this one's."""
        return Pending(self._work, self._what, self._axis, lambda: change(self._result()))


def all_reduce(tensor: torch.Tensor, axis: Axis, what: str = "all_reduce") -> None:
    """Replace `tensor` by its sum over `axis`."""
    start_all_reduce(tensor, axis, what).wait()


def start_all_reduce(tensor: torch.Tensor, axis: Axis, what: str = "all_reduce") -> Pending:
    """Begin to replace `tensor` by its sum over `axis`; it must not be touched before `wait`.

    Wire: 2(n-1)/n of its bytes per rank.
    """
    assert tensor.is_contiguous()
    work = None
    if axis.group is not None and tensor.numel():
        with explained(what, axis):
            work = dist.all_reduce(tensor, group=axis.group, async_op=True)
    return Pending(work, what, axis, lambda: tensor)


def start_all_gather(tensor: torch.Tensor, axis: Axis, what: str = "all_gather") -> Pending:
    """Begin to collect the tensors of all ranks, of one shape; the result is [degree, *shape].

    Wire: (n-1) times the bytes of `tensor` per rank.
    """
    if axis.group is None:
        return Pending(None, what, axis, lambda: tensor[None])
    own = tensor.contiguous()
    gathered = own.new_empty((axis.degree, *own.shape))
    work = None
    if own.numel():
        with explained(what, axis):
            gather = _newest("all_gather_single", "all_gather_into_tensor")
            work = gather(gathered.view(-1), own.view(-1), group=axis.group, async_op=True)
    return Pending(work, what, axis, lambda: gathered)


def start_reduce_scatter(tensor: torch.Tensor, axis: Axis, what: str = "reduce_scatter") -> Pending:
    """Begin to sum `tensor` [degree, *shape] over `axis`; the result is this rank's row, [*shape].

    Wire: (n-1)/n of its bytes per rank. On CPU an all-to-all and a sum here, since the
    reduce-scatter of gloo sends twice as much.
    """
    assert tensor.is_contiguous()
    assert len(tensor) == axis.degree
    if axis.group is None or not tensor.numel():
        return Pending(None, what, axis, lambda: tensor[axis.rank])
    with explained(what, axis):
        if tensor.device.type == "cpu":
            rows = torch.empty_like(tensor)
            work = dist.all_to_all_single(
                rows.view(-1), tensor.view(-1), group=axis.group, async_op=True
            )
            return Pending(work, what, axis, lambda: rows.sum(0))
        own = torch.empty_like(tensor[0])
        scatter = _newest("reduce_scatter_single", "reduce_scatter_tensor")
        work = scatter(own.view(-1), tensor.view(-1), group=axis.group, async_op=True)
        return Pending(work, what, axis, lambda: own)


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
