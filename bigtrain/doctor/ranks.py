"""The ranks that measure: who is first on its node, and how they talk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.comm.collectives import all_gather_object, explained
from bigtrain.comm.init import choose_device, join
from bigtrain.comm.mesh import Axis
from bigtrain.comm.world import World
from bigtrain.errors import BigtrainError
from bigtrain.machine import num_gpus


@dataclass(frozen=True)
class Ranks:
    """All ranks, as one of them sees them.

    `everyone` is a gloo group, for results and for the clock; `wire` is what tensors of `carrier`
    go by: NCCL where all ranks have a GPU, else the same gloo group.
    """

    me: World
    device: torch.device
    fault: str  # why the device is not the one that was wanted
    everyone: Axis
    wire: dist.ProcessGroup | None
    carrier: torch.device

    @property
    def num_nodes(self) -> int:
        return self.me.world_size // self.me.local_world_size

    @property
    def is_first(self) -> bool:
        """Is this the rank that speaks for its node?"""
        return self.me.local_rank == 0

    def first_of(self, node: int) -> int:
        """Return the rank that speaks for a node."""
        return node * self.me.local_world_size

    def gather(self, value: Any) -> list[Any]:
        """Return the (small, picklable) values of all ranks, in order."""
        return all_gather_object(value, self.everyone, "gathering what was measured")

    def meet(self) -> None:
        """Wait for all ranks."""
        if self.everyone.group is not None:
            with explained("waiting for all ranks", self.everyone):
                dist.barrier(group=self.everyone.group)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Send a tensor of `carrier` to a rank, and wait until it is on its way."""
        with explained(f"sending to rank {to}", self.everyone):
            dist.send(tensor, group=self.wire, group_dst=to)
        self._settle()

    def receive(self, into: torch.Tensor, source: int) -> torch.Tensor:
        """Wait for a tensor of a rank."""
        with explained(f"receiving from rank {source}", self.everyone):
            dist.recv(into, group=self.wire, group_src=source)
        self._settle()
        return into

    def _settle(self) -> None:
        if self.carrier.type == "cuda":
            torch.cuda.synchronize(self.carrier)


def join_all(me: World, wanted: str, timeout_seconds: float) -> Ranks:
    """Join the world; `wanted` is the device: auto, cpu or cuda. Collective.

    A rank without the device that was wanted goes on with its processors, and tells why.

    Raises:
        CommError: not all ranks came in time.
    """
    device, fault = _device(me, wanted)
    join(me, torch.device("cpu"), timeout_seconds)
    group = dist.group.WORLD if me.world_size > 1 else None
    everyone = Axis("world", me.world_size, me.rank, tuple(range(me.world_size)), group)
    kinds = set(all_gather_object(device.type, everyone, "gathering the kinds of devices"))
    wire, carrier = group, torch.device("cpu")
    if kinds == {"cuda"}:
        carrier = device
        wire = dist.new_group(backend="nccl") if group is not None else None
    return Ranks(me, device, fault, everyone, wire, carrier)


def _device(me: World, wanted: str) -> tuple[torch.device, str]:
    """Return the device of this rank, and what is wrong with it."""
    try:
        device = choose_device(wanted, me)
    except BigtrainError as error:
        return torch.device("cpu"), f"{error.problem.what} ({error.problem.why})"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        return device, ""
    count = num_gpus(os.environ)
    if wanted == "auto" and count:
        return device, f"it has {count} GPU(s), but torch {torch.__version__} sees none"
    return device, ""
