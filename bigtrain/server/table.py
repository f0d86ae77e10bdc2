"""What a server holds: blocks of parameters, the optimizer's state of them, gradients that wait.

A block is what a worker's rank owns of one of its buckets. Here it is a bucket again, all of it
owned, so that any optimizer on flat segments updates it as it would there. Copies of a block on
several servers get the same gradients, summed in the order of workers, and the same updates: they
stay equal bit for bit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from bigtrain.comm.block import Shard
from bigtrain.comm.buckets import Bucket, Segment, Sharing, Slot
from bigtrain.comm.mesh import Axis
from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.op import Kernels
from bigtrain.server.coding import Coding, Exact
from bigtrain.server.fragments import Fragments
from bigtrain.server.protocol import Malformed, number, whole_numbers
from bigtrain.server.rows import RowSpec, RowTables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOST_STEPS = 4  # versions that a worker may be behind and still get what it lacks
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
        only: Collection[int] | None = None,
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

    @classmethod
    def read(cls, row: Any) -> Stretch:
        """Return what a row of a message describes.

        Raises:
            Malformed: it is no stretch.
        """
        good = isinstance(row, list) and len(row) == 4 and type(row[0]) is str
        if not good or not all(type(n) is int and n >= 0 for n in row[1:]) or row[1] < 1:
            raise Malformed("a stretch that makes no sense")
        return cls(*row)


@dataclass(frozen=True)
class BlockSpec:
    """A block as its workers declare it. servers: who hold it; dtype: of what they compute with;
    fragment: see Fragments."""

    key: int
    numel: int
    dtype: str
    servers: tuple[int, ...]
    stretches: tuple[Stretch, ...]
    fragment: int = 0

    def to_message(self) -> dict[str, Any]:
        """Return it as what JSON can carry."""
        stretches = [[s.kind, s.num_replicas, s.start, s.stop] for s in self.stretches]
        return {
            "key": self.key,
            "numel": self.numel,
            "dtype": self.dtype,
            "servers": list(self.servers),
            "stretches": stretches,
            "fragment": self.fragment,
        }

    @classmethod
    def from_message(cls, message: Any) -> BlockSpec:
        """Return what a message describes.

        Raises:
            Malformed: it is no block.
        """
        if not isinstance(message, dict) or message.get("dtype") not in [*DTYPES]:
            raise Malformed("a block of no known dtype")
        numel, servers = number(message, "numel", 2**40), whole_numbers(message, "servers")
        rows = message.get("stretches")
        if not isinstance(rows, list) or not servers:
            raise Malformed("a block without stretches or servers")
        stretches = tuple(Stretch.read(row) for row in rows)
        ends = [0, *(end for s in stretches for end in (s.start, s.stop)), numel]
        if not all(a <= b for a, b in itertools.pairwise(ends)):
            raise Malformed("a block whose stretches overlap, or reach beyond it")
        key = number(message, "key", 2**32 - 1)
        fragment = number(message, "fragment", 2**16)
        return cls(key, numel, message["dtype"], tuple(servers), stretches, fragment)


Spec = BlockSpec | RowSpec


def spec_from_message(message: Any) -> Spec:
    """Return what a message describes: a block, or a part of a table.

    Raises:
        Malformed: it is neither.
    """
    is_part = isinstance(message, dict) and "parts" in message
    return RowSpec.from_message(message) if is_part else BlockSpec.from_message(message)


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
    replica: torch.Tensor | None = None  # what workers have, where updates go as what it lacks
    steps: list[tuple[int, torch.Tensor]] = field(default_factory=list)  # version -> how it moved
    sending: list[None] = field(default_factory=list)  # its parameters, on their way out
    moments: dict[str, torch.Tensor] = field(default_factory=dict)


class Table:
    """The blocks of one server.

    push, pull: what gradients look like that come, and updates that go. If something is lost of
    these, all workers have the same replica of main parameters, which follows them.

    What computes (`add_up`, `apply`) runs on another thread than what takes and gives tensors; the
    server sees to it that they do not meet at the same block.
    """

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        kernels: Kernels = "auto",
        push: Coding | None = None,
        pull: Coding | None = None,
        rows: RowTables | None = None,
        fragments: Fragments | None = None,
    ) -> None:
        self.rows, self.fragments = rows or RowTables(), fragments or Fragments()
        self._make, self._kernels = make_optimizer, kernels
        self._push, self._pull = push or Exact(), pull or Exact()
        self._held: dict[int, _Held] = {}
        self._gradients: dict[Source, dict[int, torch.Tensor]] = {}
        self._here: dict[Source, set[int]] = {}  # keys of gradients that have come whole
        self._filling: Counter[tuple[Source, int]] = Counter()  # times that one is on its way
        self._spare: dict[int, list[torch.Tensor]] = {}  # numel -> memory to use again
        self.optimizer: Updates | None = None

    # -- what is held --------------------------------------------------------------------------

    def declare(self, specs: Iterable[Spec]) -> None:
        """Make room for blocks, zeros; of those that are known, see that they are the same.

        Raises:
            Malformed: another worker has declared a block of this key that is another.
        """
        for spec in specs:
            if isinstance(spec, RowSpec):
                self.rows.declare(spec)
            elif spec.key not in self._held:
                assert self.optimizer is None, "a block that comes too late"
                self._held[spec.key] = self._hold(spec)
            elif self._held[spec.key].spec != spec:
                raise Malformed(
                    f"block {spec.key} is another than other workers have: their model, layout or "
                    "config differs"
                )

    def _hold(self, spec: BlockSpec) -> _Held:
        held = _Held(spec, _bucket(spec, low=self._pull.exact))
        if not self._pull.exact:
            held.replica = torch.zeros(spec.numel, dtype=DTYPES[spec.dtype])
        return held

    def knows(self, keys: Collection[int]) -> bool:
        return all(key in self._held or key in self.rows.parts for key in keys)

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
        return sorted([*self._held, *self.rows.parts])

    def servers_of(self, key: int) -> tuple[int, ...]:
        part = self.rows.parts.get(key)
        return self._held[key].spec.servers if part is None else part.spec.servers

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters, moments and sums."""
        held = self._held.values()
        return sum(4 * h.spec.numel * (2 + len(h.moments)) for h in held) + self.rows.num_bytes

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
        size = self.gradient_bytes(key)
        mine = self._gradients.setdefault(source, {})
        if key not in mine:
            spare = self._spare.get(size)
            mine[key] = spare.pop() if spare else torch.empty(size, dtype=torch.uint8)
        self._filling[source, key] += 1
        return bytes_of(mine[key])

    def came(self, source: Source, key: int) -> None:
        """The bytes of a gradient are all here; if there was no room for it, nothing changes."""
        if self._filling.get((source, key), 0) > 0:
            self._filling[source, key] -= 1
            self._here.setdefault(source, set()).add(key)

    def has(self, source: Source, key: int) -> bool:
        """Is the gradient of a block here, whole?"""
        return key in self._here.get(source, ())

    def gradient_bytes(self, key: int) -> int:
        """Return the bytes of a gradient of a block.

        Raises:
            Malformed: there is no such block.
        """
        if key not in self._held:
            raise Malformed(f"a gradient of block {key}, which nobody has declared")
        return self._push.num_bytes(self._held[key].spec.numel)

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
        if 1 <= part <= len(held.moments):
            tensor = tensor.clone()  # an update writes to moments themselves
        held.sending.append(None)
        return bytes_of(tensor), held.sending.pop

    def steps_since(self, key: int, version: int, now: int) -> memoryview | None:
        """Return how a block's replica has moved from `version` to `now`, message after message;
        None where that is not known (any more), or not less than the whole."""
        held = self._held.get(key)
        steps = [message for v, message in held.steps if version < v <= now] if held else []
        if held is None or held.replica is None or not steps:
            return None
        if len(steps) != self.fragments.meetings(held.spec.fragment, version, now):
            return None
        return bytes_of(torch.cat(steps))

    def _tensor(self, key: int, part: int, *, main: bool) -> torch.Tensor:
        """Return parameters (part 0: what workers compute with, or if `main` in fp32), a moment (1,
        2, ...), main parameters (the part after the moments), or the replica (the part after)."""
        held = self._held.get(key)
        if held is None or self.optimizer is None or part > len(held.moments) + 2:
            raise Malformed(f"part {part} of block {key}, which there is not")
        if 1 <= part <= len(held.moments):
            return held.moments[self.moments[part - 1]]
        exact, low = held.bucket.main_params, held.bucket.low_params
        if part == len(held.moments) + 2:
            return exact if held.replica is None else held.replica
        if main or part:
            return exact
        if held.replica is not None:
            return held.replica
        return exact if low is None else low

    def detach_sent(self) -> None:
        """Let what is on its way out be as it was when it left; updates go to new memory."""
        for held in self._held.values():
            if held.sending:
                held.sending = []  # what is new is not on its way
                bucket = held.bucket
                held.replica = None if held.replica is None else held.replica.clone()
                if bucket.low_params is not None:
                    bucket.low_params = bucket.low_params.clone()
                bucket.main_params = bucket.main_params.clone()
                bucket.params = bucket.shard = bucket.main_params

    # -- what computes -------------------------------------------------------------------------

    def rounded(self, *, fresh: bool) -> None:
        """Let low-precision parameters be what main parameters have become by being filled, and
        replicas too, if these are `fresh`."""
        for held in self._held.values():
            for low in (held.bucket.low_params, held.replica if fresh else None):
                if low is not None:
                    low.copy_(held.bucket.main_params)
            held.steps.clear()

    def _meeting(self, version: int) -> dict[int, _Held]:
        """Return the blocks that are updated to make `version`."""
        meets = self.fragments.meets
        return {k: held for k, held in self._held.items() if meets(held.spec.fragment, version)}

    def add_up(self, version: int, sources: Sequence[Source]) -> list[tuple[Source, int]]:
        """Let each block's gradient in `version` be the sum of those of `sources`, in that order.

        Returns what is missing: (source, key); then nothing is changed.
        """
        meeting = self._meeting(version)
        missing = [
            (source, key)
            for source in sources
            for key in meeting
            if key not in self._here.get(source, ())
        ]
        missing += self.rows.missing(sources)
        if missing:
            return missing
        self.rows.add_up(sources)
        by_sort: dict[int, list[tuple[_Held, Segment]]] = {}
        for held in self._held.values():
            held.squares = 0.0
        for key, held in meeting.items():
            messages = [self._gradients[source][key] for source in sources]
            self._push.add_up(messages, held.bucket.main_grads)
            for segment in held.bucket.segments():
                by_sort.setdefault(segment.num_replicas, []).append((held, segment))
        for replicas, segments in by_sort.items():
            for held, segment in segments:
                own = grad_norm([segment.main_grads], kernels=self._kernels).squares
                held.squares += float(own) / replicas
        return []

    def squares(self, answers_for: Collection[int]) -> float:
        """Return the sum of squares of the summed gradient of these blocks."""
        dense = sum(self._held[key].squares for key in sorted(answers_for) if key in self._held)
        return dense + self.rows.squares(answers_for)

    @torch.no_grad()
    def apply(self, version: int, rate: float, divisor: float, done: Callable[[int], None]) -> None:
        """Make `version`: update its blocks by their gradients divided by `divisor`.

        `done(key)` is called after each.
        """
        assert self.optimizer is not None

        def follow(bucket: Bucket) -> None:
            held = self._held[bucket.index]
            if held.replica is not None:
                message = torch.zeros(self._pull.num_bytes(held.spec.numel), dtype=torch.uint8)
                self._pull.follow(bucket.main_params, held.replica, message)
                held.steps = [*held.steps[1 - _MOST_STEPS :], (version, message)]
            done(bucket.index)

        by = None if divisor == 1.0 else torch.tensor(divisor, dtype=torch.float32)
        self.optimizer.step(rate, by, follow, self._meeting(version).keys())
        self.rows.apply(rate, divisor, self.optimizer.num_updates)

    def forget(self, is_over: Callable[[Source], bool]) -> None:
        """Drop gradients that no update will want."""
        for source in [source for source in self._gradients if is_over(source)]:
            self._here.pop(source, None)
            for key, tensor in self._gradients.pop(source).items():
                if not self._filling.pop((source, key), 0):  # else a link still writes there
                    self._spare.setdefault(tensor.numel(), []).append(tensor)
        self.rows.forget(is_over)

    @property
    def num_waiting(self) -> int:
        """Sources whose gradients are held."""
        return len(self._gradients)

    def checksum(self, key: int) -> str:
        """Return a hash of a block and its moments: equal on all servers that hold it."""
        if key in self.rows.parts:
            return self.rows.parts[key].checksum()
        held = self._held[key]
        found = hashlib.sha256(bytes_of(held.bucket.main_params))
        for name in self.moments:
            found.update(bytes_of(held.moments[name]))
        return found.hexdigest()


def _bucket(spec: BlockSpec, *, low: bool) -> Bucket:
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
    rounded = None
    if low and spec.dtype != "float32":
        rounded = torch.zeros(spec.numel, dtype=DTYPES[spec.dtype])
    return Bucket(
        index=spec.key,
        sharing=Sharing.none(Axis.of(None)),
        stages=(0,),
        slots=slots,
        params=main,
        shard=main,
        main_params=main,
        low_params=rounded,
        main_grads=torch.zeros(spec.numel),
        grads=None,
        new_state=torch.zeros,
    )
