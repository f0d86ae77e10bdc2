"""What was measured on and between nodes: plain values that go through JSON. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bigtrain.errors import BigtrainError


@dataclass(frozen=True)
class Node:
    """One node: its facts (see facts.py) and what its first rank has measured.

    ahead_seconds: its clock minus that of the first node, exact to half of round_trip_seconds.
    kernels: by kind of device, what does the operations; missing: why there is no library that was
    wanted. MB are 10^6 bytes; None is what could not be measured, then file_error says why.
    """

    name: str
    facts: Mapping[str, Any]
    ahead_seconds: float = 0.0
    round_trip_seconds: float = 0.0
    kernels: Mapping[str, str] | None = None
    missing: str = ""
    write_mb_per_second: float | None = None
    read_mb_per_second: float | None = None
    file_error: str = ""


@dataclass(frozen=True)
class Device:
    """What a rank computes on; `fault` is why it is not what was wanted."""

    rank: int
    node: int
    kind: str  # cpu or cuda
    name: str
    matmul_seconds: float  # of one product, see measure.py
    matmul_flops: float
    fault: str = ""


@dataclass(frozen=True)
class Link:
    """One direction between two nodes, by their numbers."""

    source: int
    target: int
    gbit_per_second: float
    latency_seconds: float  # half of a round trip


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce over all ranks."""

    size_bytes: int
    num_ranks: int
    seconds: float

    @property
    def gbit_per_second(self) -> float:
        """What went over the wire of a rank: 2(n-1)/n of the bytes."""
        n = self.num_ranks
        return 2 * (n - 1) / n * self.size_bytes * 8 / 1e9 / self.seconds


@dataclass(frozen=True)
class Measured:
    """All of it, for one world."""

    nodes: tuple[Node, ...]
    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()
    all_reduce: AllReduce | None = None

    def to_message(self) -> dict[str, Any]:
        """Return it as what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_message(cls, message: Any) -> Measured:
        """Return what `to_message` has made a message of.

        Raises:
            BigtrainError: it is not that.
        """
        try:
            reduced = message["all_reduce"]
            return cls(
                tuple(Node(**one) for one in message["nodes"]),
                tuple(Device(**one) for one in message["devices"]),
                tuple(Link(**one) for one in message["links"]),
                AllReduce(**reduced) if reduced is not None else None,
            )
        except (TypeError, KeyError) as error:
            raise BigtrainError(
                "what was measured cannot be read",
                why=f"{type(error).__name__}: {error}",
                mend="use the same bigtrain on all nodes",
            ) from error
