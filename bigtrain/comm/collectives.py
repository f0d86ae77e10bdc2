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
    """A collective under way; `wait` returns when its result may be used."""

    def __init__(self, work: dist.Work | None, what: str, axis: Axis) -> None:
        self._work, self._what, self._axis = work, what, axis

    def wait(self) -> None:
        """Block until done.

        Raises:
            CommError: a peer died or did not come in time.
        """
        if self._work is not None:
            with _explained(self._what, self._axis):
                self._work.wait()
            self._work = None


def all_reduce(tensor: torch.Tensor, axis: Axis, what: str = "all_reduce") -> None:
    """Replace `tensor` by its sum over `axis`."""
    start_all_reduce(tensor, axis, what).wait()


def start_all_reduce(tensor: torch.Tensor, axis: Axis, what: str = "all_reduce") -> Pending:
    """Begin to replace `tensor` by its sum over `axis`; it must not be touched before `wait`."""
    assert tensor.is_contiguous()
    if axis.group is None:
        return Pending(None, what, axis)
    with _explained(what, axis):
        return Pending(dist.all_reduce(tensor, group=axis.group, async_op=True), what, axis)


def broadcast(tensor: torch.Tensor, axis: Axis, what: str = "broadcast") -> None:
    """Replace `tensor` by the one of the first rank of `axis`; any strides will do."""
    if axis.group is not None and tensor.numel():
        # Backends copy raw memory, so what is not contiguous goes through a copy that is.
        dense = tensor.detach().contiguous()
        with _explained(what, axis):
            dist.broadcast(dense, src=axis.ranks[0], group=axis.group)
        if dense.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(dense)


def all_gather_object(value: Any, axis: Axis, what: str = "all_gather_object") -> list[Any]:
    """Return the (small, picklable) values of all ranks of `axis`, in order."""
    if axis.group is None:
        return [value]
    values: list[Any] = [None] * axis.degree
    with _explained(what, axis):
        dist.all_gather_object(values, value, group=axis.group)
    return values


@contextmanager
def _explained(what: str, axis: Axis) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        text = _SOURCE_LINE.sub("", str(error).strip().split("\n")[0])
        timed_out = "timed out" in text.lower() or "timeout" in text.lower()
        if not (timed_out or isinstance(error, dist.DistError) or _LOST_PEER.search(text)):
            raise
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
