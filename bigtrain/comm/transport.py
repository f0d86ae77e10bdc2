"""Bytes between the ranks of an axis, over MPI.

What is compressed goes as bytes, a message for each rank. Where the fabric of a cluster is fast by
MPI only, and torch was built without it, mpi4py carries them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from bigtrain.comm.collectives import Pending
from bigtrain.comm.mesh import Axis
from bigtrain.errors import LaunchError

_FIRST_TAG = 7000
_POLL_SECONDS = 50e-6


class Transport(Protocol):
    """Carries bytes between the ranks of an axis."""

    axis: Axis

    def exchange(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], what: str
    ) -> Pending[Sequence[torch.Tensor]]:
        """Begin to send `outgoing[i]` to rank i of the axis, and to fill `incoming[i]` from it.

        All are one-dimensional, contiguous, uint8; rank i's incoming for us is as long as our
        outgoing for it. What a rank has for itself is copied. None may be touched before `wait`.
        Every rank of the axis calls this in the same order.

        Raises (`wait`):
            CommError: a peer died or did not come in time.
        """


class MpiTransport:
    """Over MPI, for ranks that mpiexec (or srun with MPI) has started; makes no process group.

    Tensors that are not on the CPU go through copies there.
    """

    def __init__(self, axis: Axis, timeout_seconds: float = 300.0) -> None:
        """Make a communicator for the axis, together with all of its ranks.

        Raises:
            LaunchError: mpi4py is missing, or MPI numbers the ranks otherwise.
        """
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:  # no mpi4py, or no MPI that it can load
            raise LaunchError(
                "the MPI transport needs mpi4py",
                why=str(error),
                mend="pip install 'bigtrain[mpi]', or use the transport of torch.distributed",
            ) from error
        self.axis, self.timeout_seconds = axis, timeout_seconds
        world = MPI.COMM_WORLD
        here = axis.ranks[axis.rank]
        if world.rank != here or world.size <= max(axis.ranks):
            raise LaunchError(
                f"rank {here} of the run is rank {world.rank} of {world.size} in MPI",
                why="bytes for one rank would go to another",
                mend="start the ranks with mpiexec -n N bigtrain launch CONFIG",
            )
        self._comm = world.Create_group(world.group.Incl(axis.ranks), tag=axis.ranks[0])
        self._number = 0

    def exchange(
        self, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor], what: str
    ) -> Pending[Sequence[torch.Tensor]]:
        """Begin an exchange, as `Transport` says."""
        _check(self.axis, outgoing, incoming)
        self._number = (self._number + 1) % 1000
        tag = _FIRST_TAG + self._number
        requests, landings = [], []
        sent = [tensor.cpu() for tensor in outgoing]
        for step in range(1, self.axis.degree):
            to = (self.axis.rank + step) % self.axis.degree
            source = (self.axis.rank - step) % self.axis.degree
            landing = incoming[source]
            if landing.device.type != "cpu":
                landing = torch.empty_like(landing, device="cpu")
                landings.append((incoming[source], landing))
            requests.append(self._comm.Irecv(landing.numpy(), source=source, tag=tag))
            requests.append(self._comm.Isend(sent[to].numpy(), dest=to, tag=tag))
        work: Any = _Requests(requests, landings, sent, self.timeout_seconds)
        return Pending([work], what, self.axis, lambda: incoming)


def over_mpi(axis: Axis) -> Axis:
    """Return the same ranks, whose messages to each other go by MPI. All of them call this."""
    return replace(axis, transport=MpiTransport(axis)) if axis.degree > 1 else axis


class _Requests:
    """Messages of MPI under way, which wait as a work of torch.distributed does."""

    def __init__(
        self,
        requests: Sequence[Any],
        landings: Sequence[tuple[torch.Tensor, torch.Tensor]],
        kept: Sequence[torch.Tensor],
        timeout_seconds: float,
    ) -> None:
        self._requests, self._landings, self._kept = list(requests), landings, kept
        self._timeout_seconds = timeout_seconds

    def wait(self) -> None:
        end = time.monotonic() + self._timeout_seconds
        while self._requests:
            self._requests = [request for request in self._requests if not request.Test()]
            if self._requests and time.monotonic() > end:
                raise RuntimeError(
                    f"{len(self._requests)} messages of MPI have not come: Timed out after "
                    f"{self._timeout_seconds} s"
                )
            if self._requests:
                time.sleep(_POLL_SECONDS)
        for final, landing in self._landings:
            final.copy_(landing)


def _check(axis: Axis, outgoing: Sequence[torch.Tensor], incoming: Sequence[torch.Tensor]) -> None:
    assert len(outgoing) == len(incoming) == axis.degree
    for tensor in (*outgoing, *incoming):
        assert tensor.dtype == torch.uint8
        assert tensor.dim() == 1
        assert tensor.is_contiguous()
    incoming[axis.rank].copy_(outgoing[axis.rank])
