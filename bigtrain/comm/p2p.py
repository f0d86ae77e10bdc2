"""Messages between two ranks of an axis: in order, and without waiting for each other."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.comm.collectives import Pending, explained
from bigtrain.comm.mesh import Axis, Mesh


class Links:
    """Sends and receives between the ranks of `axis`, which are named by their place on it.

    Each pair has two lanes, to the higher and to the lower rank, and on each lane messages arrive
    in the order in which they were sent. The lanes are groups of their own, so that a backend that
    works a group off in order (NCCL) lets no message wait for one in the other direction. Every
    rank of the mesh makes its links at the same time.
    """

    def __init__(self, mesh: Mesh, axis: Axis) -> None:
        self.axis, self.device = axis, mesh.device
        self._rising, self._falling = axis.group, mesh.second_group(axis)

    def send(self, tensor: torch.Tensor, to: int, what: str) -> Pending[torch.Tensor]:
        """Begin to send `tensor` (contiguous), which must not change before `wait`."""
        lane = self._rising if to > self.axis.rank else self._falling
        with explained(what, self.axis):
            work = dist.isend(tensor, group=lane, group_dst=to)
        return Pending([work] if work else (), what, self.axis, lambda: tensor)

    def receive(self, into: torch.Tensor, source: int, what: str) -> Pending[torch.Tensor]:
        """Begin to receive what `source` sends next into a tensor of the same shape and dtype."""
        lane = self._rising if source < self.axis.rank else self._falling
        with explained(what, self.axis):
            work = dist.irecv(into, group=lane, group_src=source)
        return Pending([work] if work else (), what, self.axis, lambda: into)

    def send_object(self, value: Any, to: int, what: str) -> list[Pending[torch.Tensor]]:
        """Begin to send a small picklable value, as two messages."""
        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        size = torch.tensor([len(content)], dtype=torch.int64)
        return [self.send(part.to(self.device), to, what) for part in (size, content)]

    def receive_object(self, source: int, what: str) -> Any:
        """Wait for a value that `source` sends with `send_object`."""
        size = torch.empty(1, dtype=torch.int64, device=self.device)
        length = int(self.receive(size, source, what).wait())
        content = torch.empty(length, dtype=torch.uint8, device=self.device)
        self.receive(content, source, what).wait()
        return pickle.loads(content.cpu().numpy().tobytes())
