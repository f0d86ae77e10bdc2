"""What a server holds: blocks of parameters, the optimizer's state of them, gradients that wait.

A block is what a worker's rank owns of one of its buckets. Here it is a bucket again, all of it
owned, so that any optimizer on flat segments updates it as it would there. Copies of a block on
several servers get the same gradients, summed in the order of workers, and the same updates: they
stay equal bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bigtrain.comm.block import Shard
from bigtrain.comm.buckets import Bucket, Segment, Sharing, Slot
from bigtrain.comm.mesh import Axis
from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.op import Kernels
from bigtrain.server.protocol import Malformed, number

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RANK_KEYS = 1 << 16  # buckets of a rank, at most


def key_of(rank: int, bucket: int) -> int:
    """Return the number of a block: that of bucket `bucket` of the workers' ranks `rank`."""
    return rank * _RANK_KEYS + bucket


class Updates(Protocol):
    """An optimizer, as a server sees it."""

    num_updates: int
    moments: dict[str, list[torch.Tensor | None]]
    segments: list[Segment]

    def step(
        self,
        lr: float | None = None,
        grad_divisor: torch.Tensor | None = None,
        done: Callable[[Bucket], None] | None = None,
    ) -> None: ...


Source = tuple[int, int, int]
"""Whose gradient: worker, incarnation, and the round that it was computed for."""
MakeOptimizer = Callable[[Sequence[Segment]], Updates]


@dataclass(frozen=True)
class Stretch:
    """Elements [start, stop) of a block whose parameters are of one kind (see Segment)."""

    kind: str
    num_replicas: int
    start: int
    stop: int


@dataclass(frozen=True)
class BlockSpec:
    """A block as its workers declare it. servers: who hold it; dtype: of what they compute with."""

    key: int
    numel: int
    dtype: str
    servers: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    def to_message(self) -> dict[str, Any]:
        """Return it as what JSON can carry."""
        stretches = [[s.kind, s.num_replicas, s.start, s.stop] for s in self.stretches]
        return {
            "key": self.key,
            "numel": self.numel,
            "dtype": self.dtype,
            "servers": list(self.servers),
            "stretches": stretches,
        }

    @classmethod
    def from_message(cls, message: Any) -> BlockSpec:
        """Return what a message describes.

        Raises:
            Malformed: it is no block.
        """
        if not isinstance(message, dict) or message.get("dtype") not in DTYPES:
            raise Malformed("a block of no known dtype")
        numel = number(message, "numel", 2**40)
        try:
            stretches = tuple(Stretch(*row) for row in message["stretches"])
            servers = tuple(int(server) for server in message["servers"])
            ends = [0, *(end for s in stretches for end in (s.start, s.stop)), numel]
            good = bool(servers) and all(type(s.kind) is str for s in stretches)
            good = good and all(a <= b for a, b in itertools.pairwise(ends))
            good = good and all(1 <= s.num_replicas < 2**20 for s in stretches)
        except (KeyError, TypeError, ValueError):
            good = False
        if not good:
            raise Malformed("a block whose stretches make no sense")
        return cls(number(message, "key", 2**32 - 1), numel, message["dtype"], servers, stretches)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    flat: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass
class _Held:
    """A block that is held here."""

    spec: BlockSpec
    bucket: Bucket
    squares: float = 0.0  # of the sum of gradients of the last round
    num_sending: int = 0  # times that its parameters are on their way out
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


class Table:
    """The blocks of one server.

    What computes (`add_up`, `apply`) runs on another thread than what takes and gives tensors; the
    server sees to it that they do not meet at the same block.
    """

    def __init__(self, make_optimizer: MakeOptimizer, kernels: Kernels = "auto") -> None:
        self._make, self._kernels = make_optimizer, kernels
        self._held: dict[int, _Held] = {}
        self._gradients: dict[Source, dict[int, torch.Tensor]] = {}
        self._spare: dict[int, list[torch.Tensor]] = {}  # numel -> memory to use again
        self.optimizer: Updates | None = None

    # -- what is held --------------------------------------------------------------------------

    def declare(self, specs: Iterable[BlockSpec]) -> None:
        """Make room for blocks, zeros; of those that are known, see that they are the same.

        Raises:
            Malformed: another worker has declared a block of this key that is another.
        """
        for spec in specs:
            if spec.key not in self._held:
                assert self.optimizer is None, "a block that comes too late"
                self._held[spec.key] = _Held(spec, _bucket(spec))
            elif self._held[spec.key].spec != spec:
                raise Malformed(
                    f"block {spec.key} is another than other workers have: their model, layout or "
                    "config differs"
                )

    def knows(self, keys: Collection[int]) -> bool:
        return all(key in self._held for key in keys)

    def build(self) -> None:
        """Make the optimizer, once all blocks are declared."""
        buckets = [self._held[key].bucket for key in sorted(self._held)]
        self.optimizer = self._make([s for bucket in buckets for s in bucket.segments()])
        for name, flats in self.optimizer.moments.items():
            for segment, flat in zip(self.optimizer.segments, flats, strict=True):
                held = self._held[segment.bucket.index]
                whole = held.moments.setdefault(name, torch.zeros(held.spec.numel))
                if flat is not None:
                    whole[segment.start : segment.stop].copy_(flat)
            # From now on the optimizer's is a view of it, so that it travels in one piece.
            views = [
                self._held[s.bucket.index].moments[name][s.start : s.stop]
                for s in self.optimizer.segments
            ]
            flats[:] = [v if f is not None else None for v, f in zip(views, flats, strict=True)]

    @property
    def moments(self) -> list[str]:
        """Names of the optimizer's moments, in the order of parts 1, 2, ..."""
        assert self.optimizer is not None
        return list(self.optimizer.moments)

    @property
    def keys(self) -> list[int]:
        return sorted(self._held)

    def servers_of(self, key: int) -> tuple[int, ...]:
        return self._held[key].spec.servers

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters, moments and sums."""
        held = self._held.values()
        return sum(4 * h.spec.numel * (2 + len(h.moments)) for h in held)

    # -- tensors that come and go --------------------------------------------------------------

    def room_for_values(self, key: int, part: int) -> memoryview:
        """Return where main parameters (part 0) or a moment of a block go.

        Raises:
            Malformed: there is no such tensor.
        """
        return bytes_of(self._tensor(key, part, main=True))

    def room_for_gradient(self, source: Source, key: int) -> memoryview:
        """Return where a worker's gradient of a block goes.

        Raises:
            Malformed: there is no such block.
        """
        held = self._held.get(key)
        if held is None:
            raise Malformed(f"a gradient of block {key}, which nobody has declared")
        mine = self._gradients.setdefault(source, {})
        if key not in mine:
            spare = self._spare.get(held.spec.numel)
            mine[key] = spare.pop() if spare else torch.empty(held.spec.numel)
        return bytes_of(mine[key])

    def send(
        self, key: int, part: int, *, main: bool = False
    ) -> tuple[memoryview, Callable[[], None]]:
        """Return the bytes of a tensor, and what to call when they are sent. main: of parameters,
        those in fp32.

        Raises:
            Malformed: there is no such tensor.
        """
        tensor = self._tensor(key, part, main=main)
        held = self._held[key]
        held.num_sending += 1

        def sent() -> None:
            held.num_sending -= 1

        return bytes_of(tensor), sent

    def _tensor(self, key: int, part: int, *, main: bool) -> torch.Tensor:
        """Return parameters (part 0: in the workers' dtype, or if `main` in fp32), a moment (1, 2,
        ...), or main parameters (the part after the moments)."""
        held = self._held.get(key)
        if held is None or self.optimizer is None or part > len(held.moments) + 1:
            raise Malformed(f"part {part} of block {key}, which there is not")
        if 1 <= part <= len(held.moments):
            return held.moments[self.moments[part - 1]]
        low = held.bucket.low_params
        return held.bucket.main_params if main or part or low is None else low

    def detach_sent(self) -> None:
        """Let what is on its way out be as it was when it left; updates go to new memory."""
        for held in self._held.values():
            if held.num_sending:
                bucket = held.bucket
                if bucket.low_params is not None:
                    bucket.low_params = bucket.low_params.clone()
                bucket.main_params = bucket.main_params.clone()
                bucket.params = bucket.shard = bucket.main_params

    # -- what computes -------------------------------------------------------------------------

    def rounded(self) -> None:
        """Let low-precision parameters be what main parameters have become by being filled."""
        for held in self._held.values():
            if held.bucket.low_params is not None:
                held.bucket.low_params.copy_(held.bucket.main_params)

    def add_up(self, sources: Sequence[Source]) -> list[tuple[Source, int]]:
        """Let each block's gradient be the sum of those of `sources`, in that order.

        Returns what is missing: (source, key); then nothing is changed.
        """
        missing = [
            (source, key)
            for source in sources
            for key in self._held
            if key not in self._gradients.get(source, {})
        ]
        if missing:
            return missing
        by_sort: dict[int, list[tuple[_Held, Segment]]] = {}
        for key, held in self._held.items():
            first, *others = (self._gradients[source][key] for source in sources)
            total = held.bucket.main_grads.copy_(first)
            for other in others:
                total += other
            held.squares = 0.0
            for segment in held.bucket.segments():
                by_sort.setdefault(segment.num_replicas, []).append((held, segment))
        for replicas, segments in by_sort.items():
            for held, segment in segments:
                own = grad_norm([segment.main_grads], kernels=self._kernels).squares
                held.squares += float(own) / replicas
        return []

    def squares(self, answers_for: Collection[int]) -> float:
        """Return the sum of squares of the summed gradient of these blocks."""
        return sum(self._held[key].squares for key in sorted(answers_for))

    @torch.no_grad()
    def apply(self, rate: float, divisor: float, done: Callable[[int], None]) -> None:
        """Update all blocks by their gradients divided by `divisor`; `done(key)` after each."""
        assert self.optimizer is not None
        by = None if divisor == 1.0 else torch.tensor(divisor, dtype=torch.float32)
        self.optimizer.step(rate, by, lambda bucket: done(bucket.index))

    def forget(self, is_over: Callable[[Source], bool]) -> None:
        """Drop gradients that no update will want."""
        for source in [source for source in self._gradients if is_over(source)]:
            for tensor in self._gradients.pop(source).values():
                self._spare.setdefault(tensor.numel(), []).append(tensor)

    @property
    def num_waiting(self) -> int:
        """Sources whose gradients are held."""
        return len(self._gradients)

    def checksum(self, key: int) -> str:
        """Return a hash of a block and its moments: equal on all servers that hold it."""
        held = self._held[key]
        found = hashlib.sha256(bytes_of(held.bucket.main_params))
        for name in self.moments:
            found.update(bytes_of(held.moments[name]))
        return found.hexdigest()


def _bucket(spec: BlockSpec) -> Bucket:
    main = torch.zeros(spec.numel)
    slots = [
        Slot(
            f"{spec.key}",
            torch.nn.Parameter(torch.empty(0), requires_grad=False),
            s.kind,
            Shard.whole((s.stop - s.start,), 0, s.num_replicas),
            torch.Size([s.stop - s.start]),
            s.start,
        )
        for s in spec.stretches
    ]
    low = None if spec.dtype == "float32" else torch.zeros(spec.numel, dtype=DTYPES[spec.dtype])
    return Bucket(
        index=spec.key,
        sharing=Sharing.none(Axis.of(None)),
        stages=(0,),
        slots=slots,
        params=main,
        shard=main,
        main_params=main,
        low_params=low,
        main_grads=torch.zeros(spec.numel),
        grads=None,
        new_state=torch.zeros,
    )
