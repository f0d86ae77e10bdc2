"""Rows of embedding tables, as servers hold them: only what is touched costs anything.

A table is cut into parts, row by row: part p of P has rows p, p + P, p + 2P, ... Its memory is
mapped and begins as holes, so that a table may be larger than what a machine has. A row has its
initial value, a function of its number, until it is updated for the first time.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.op import Kernels
from bigtrain.server.protocol import Malformed, number, numbers, whole_numbers

PAGE_BYTES = 4 << 20  # of rows that travel together, in a checkpoint and to a server
_SCAN = 1 << 22  # rows that are looked at together for those that were updated
_NO_RESERVE = 0x4000  # MAP_NORESERVE of Linux: pages count when they are touched
_MOST_ROWS = 2**40
_KEYS = 0xFFFF << 16  # of tables: those of a rank that no worker has

Source = tuple[int, int, int]  # as in table.py


def key_of_part(table: int, part: int, parts: int) -> int:
    """Return the number of a part of table `table`, among those of blocks."""
    return _KEYS + table * parts + part


@dataclass(frozen=True)
class RowSpec:
    """Part `part` of `parts` of a table, as workers declare it. size: numbers of a row; scale,
    seed: of the initial values; servers: who hold it."""

    key: int
    name: str
    num_rows: int
    size: int
    part: int
    parts: int
    scale: float
    seed: int
    servers: tuple[int, ...]

    @property
    def fragment(self) -> int:
        """Tables are in no fragment: they are for modes that have none."""
        return 0

    @property
    def count(self) -> int:
        """Rows of this part."""
        return max(0, self.num_rows - self.part + self.parts - 1) // self.parts

    def to_message(self) -> dict[str, Any]:
        """Return it as what JSON can carry."""
        return {**asdict(self), "servers": list(self.servers)}

    @classmethod
    def from_message(cls, message: Mapping[str, Any]) -> RowSpec:
        """Return what a message describes.

        Raises:
            Malformed: it is no part of a table.
        """
        name = message.get("name")
        (scale,) = numbers({"scale": [message.get("scale")]}, "scale", 1)
        if not isinstance(name, str) or not 0 <= scale < 2**60:
            raise Malformed("a table without a name, or whose rows begin with no numbers")
        most = {
            "key": 2**32 - 1,
            "num_rows": _MOST_ROWS,
            "size": 2**20,
            "part": 2**16,
            "parts": 2**16,
            "seed": 2**53,
        }
        found = {key: number(message, key, limit) for key, limit in most.items()}
        servers = whole_numbers(message, "servers")
        if not servers or found["part"] >= found["parts"] or not found["size"]:
            raise Malformed("a part of a table that makes no sense")
        return cls(name=name, scale=scale, servers=tuple(servers), **found)


def initial_rows(rows: torch.Tensor, size: int, scale: float, seed: int) -> torch.Tensor:
    """Return what rows [k] int64 of a table begin with: [k, size] fp32, uniform in +-`scale`, a
    function of the row's number and the seed."""
    half = (size + 1) // 2  # two numbers of 24 bits from each word of 64
    words = rows.numpy().astype(np.uint64)[:, None] * np.uint64(half)
    words = words + np.arange(half, dtype=np.uint64)
    words += _mix(np.array([seed + 1], dtype=np.uint64))
    _mix(words)
    unit = np.empty((len(rows), half, 2), dtype=np.float32)
    unit[:, :, 0] = words >> np.uint64(40)
    unit[:, :, 1] = words & np.uint64(2**24 - 1)
    unit *= np.float32(scale * 2.0**-23)
    unit -= np.float32(scale)
    return torch.from_numpy(unit.reshape(len(rows), 2 * half)[:, :size])


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits in place: splitmix64 (https://doi.org/10.1145/2714064.2660195)."""
    x += np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


class RowOptimizer(Protocol):
    """Updates rows of a table."""

    def moments(self, size: int) -> dict[str, int]:
        """Return its moments, with the numbers that each has for a row of `size`; 0: one, of the
        whole row."""

    def update(
        self,
        values: torch.Tensor,
        rows: torch.Tensor,
        grad: torch.Tensor,
        moments: Mapping[str, torch.Tensor],
        *,
        rate: float,
        divisor: torch.Tensor | None,
        step: int,
    ) -> None:
        """Do update number `step` of rows [k], which strictly increase, by `grad` [k, size]
        divided by `divisor`; `rate`: that of dense parameters."""


class NoRows:
    """For servers of a run without tables."""

    def moments(self, size: int) -> dict[str, int]:
        raise Malformed("a table, in a run that has none")

    def update(self, *args: Any, **options: Any) -> None:
        raise AssertionError("there are no rows")


# -- messages --------------------------------------------------------------------------------------


def pack_ids(rows: torch.Tensor) -> torch.Tensor:
    """Return a message of rows [k] int64: k, then the rows."""
    return torch.cat([torch.tensor([len(rows)]), rows])


def pack_rows(rows: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
    """Return a message [uint8] of rows [k] and of columns, each [k, ...] fp32."""
    parts = [pack_ids(rows), *(column.contiguous().reshape(-1) for column in columns)]
    return torch.cat([part.view(torch.uint8) for part in parts])


def unpack_rows(message: torch.Tensor, widths: Sequence[int]) -> list[torch.Tensor]:
    """Return rows [k] and columns [k, width] fp32 of a message [uint8].

    Raises:
        Malformed: it has another length than it says.
    """
    width, count = sum(widths), -1
    if len(message) >= 8 and len(message) % 4 == 0:
        count = int(message[:8].view(torch.int64))
    if count < 0 or len(message) != 8 + count * (8 + 4 * width):
        raise Malformed(f"{len(message)} bytes, which are no rows of {width} numbers")
    rows = message[8 : 8 + 8 * count].view(torch.int64)
    rest = message[8 + 8 * count :].view(torch.float32)
    columns = rest.split([count * one for one in widths])
    return [rows, *(c.view(count, w) for c, w in zip(columns, widths, strict=True))]


# -- a part of a table -----------------------------------------------------------------------------


class RowPart:
    """The rows of one part, and the optimizer's state of them. Rows are counted within the part.

    folder: where its files are; None: anonymous memory.
    """

    def __init__(self, spec: RowSpec, optimizer: RowOptimizer, folder: Path | None) -> None:
        self.spec, self._optimizer = spec, optimizer
        self.values = _room(folder, spec.count, spec.size, torch.float32)
        self._updated = _room(folder, spec.count, 0, torch.uint8)  # 1: no longer initial
        self.widths = optimizer.moments(spec.size)
        self.moments = {
            name: _room(folder, spec.count, width, torch.float32)
            for name, width in self.widths.items()
        }
        self.num_updated = 0

    @property
    def columns(self) -> list[int]:
        """Numbers of a row's value, and of each of its moments, as they travel."""
        return [self.spec.size, *(max(1, width) for width in self.widths.values())]

    def check(self, rows: torch.Tensor, *, increase: bool) -> None:
        """See that rows are of this part.

        Raises:
            Malformed: they are not.
        """
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= self.spec.count):
            raise Malformed(f"rows that part {self.spec.part} of table {self.spec.name} has not")
        if increase and bool((rows.diff() <= 0).any()):
            raise Malformed("rows that do not increase")

    def lookup(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the values [k, size] of rows."""
        found = self.values.index_select(0, rows)  # several times as fast as [rows]
        fresh = self._updated[rows] == 0
        if bool(fresh.any()):
            found[fresh] = self._initial(rows[fresh])
        return found

    def _initial(self, rows: torch.Tensor) -> torch.Tensor:
        spec = self.spec
        return initial_rows(rows * spec.parts + spec.part, spec.size, spec.scale, spec.seed)

    def update(
        self, rows: torch.Tensor, grad: torch.Tensor, rate: float, divisor: float, step: int
    ) -> None:
        """Update rows, which strictly increase, by their gradients [k, size] over `divisor`."""
        if not len(rows):
            return
        fresh = rows[self._updated[rows] == 0]
        self.values[fresh] = self._initial(fresh)
        self._note(fresh)
        by = None if divisor == 1.0 else torch.tensor(divisor, dtype=torch.float32)
        self._optimizer.update(
            self.values, rows, grad, self.moments, rate=rate, divisor=by, step=step
        )

    def _note(self, fresh: torch.Tensor) -> None:
        self._updated[fresh] = 1
        self.num_updated += len(fresh)

    # -- all that were updated, page by page ---------------------------------------------------

    def page(self, after: int) -> tuple[torch.Tensor, int]:
        """Return the next updated rows from row `after` on: a message, and where to go on; at the
        end, `spec.count`."""
        most = max(1, PAGE_BYTES // (8 + 4 * sum(self.columns)))
        while after < self.spec.count:
            rows = after + self._updated[after : after + _SCAN].nonzero()[:, 0]
            end = min(after + _SCAN, self.spec.count)
            if len(rows):
                rows, more = rows[:most], len(rows) > most
                columns = [self.values, *(self.moments[name] for name in self.widths)]
                message = pack_rows(rows, *(c.index_select(0, rows) for c in columns))
                return message, int(rows[-1]) + 1 if more else end
            after = end
        return pack_rows(torch.zeros(0, dtype=torch.int64)), self.spec.count

    def pages(self) -> Iterator[torch.Tensor]:
        """Yield all updated rows."""
        after = 0
        while after < self.spec.count:
            message, after = self.page(after)
            yield message

    def take(self, message: torch.Tensor) -> None:
        """Take rows of a page for one's own.

        Raises:
            Malformed: it is none of this part.
        """
        rows, values, *states = unpack_rows(message, self.columns)
        self.check(rows, increase=True)
        self.values[rows] = values
        for name, state in zip(self.widths, states, strict=True):
            self.moments[name][rows] = state.view(len(rows), *self.moments[name].shape[1:])
        self._note(rows[self._updated[rows] == 0])

    def checksum(self) -> str:
        """Return a hash of all that was updated: equal on all servers that hold the part."""
        found = hashlib.sha256()
        for message in self.pages():
            found.update(memoryview(message.numpy()))  # type: ignore[arg-type]
        return found.hexdigest()


def _room(folder: Path | None, count: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return zeros [count, width] (width 0: [count]) that cost nothing before they are touched."""
    numel = count * max(1, width)
    size = max(1, numel * dtype.itemsize)
    if folder is None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        memory = mmap.mmap(-1, size, flags=flags)
    else:
        # It has no name: it ends with this process, however that ends.
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            memory = mmap.mmap(file.fileno(), size)
        memory.madvise(mmap.MADV_RANDOM)
    flat = torch.frombuffer(memory, dtype=dtype, count=numel) if numel else torch.empty(0).to(dtype)
    return flat.view(count, width) if width else flat


# -- all tables of a server ------------------------------------------------------------------------


@dataclass
class _Sum:
    """The summed gradient of a part in the round that is open."""

    rows: torch.Tensor
    grad: torch.Tensor
    squares: float


@dataclass
class RowTables:
    """The parts of tables that a server holds, gradients of rows that wait, and their sums.

    folder: for files; None: in memory. What computes (`add_up`, `apply`, `lookup`) runs on another
    thread than what takes messages.
    """

    optimizer: RowOptimizer = field(default_factory=NoRows)
    folder: Path | None = None
    kernels: Kernels = "auto"
    parts: dict[int, RowPart] = field(default_factory=dict)
    _pushed: dict[Source, dict[tuple[int, int], torch.Tensor]] = field(default_factory=dict)
    _ranks: dict[int, int] = field(default_factory=dict)  # of a worker
    _sums: dict[int, _Sum] = field(default_factory=dict)

    def declare(self, spec: RowSpec) -> None:
        """Make room for a part of a table.

        Raises:
            Malformed: another worker has declared another table.
        """
        if spec.key not in self.parts:
            self.parts[spec.key] = RowPart(spec, self.optimizer, self.folder)
        elif self.parts[spec.key].spec != spec:
            raise Malformed(f"table {spec.name} is another than other workers have")

    def expect(self, worker: int, ranks: int) -> None:
        """Take note of how many ranks of a worker push rows."""
        self._ranks[worker] = ranks

    def message(self, key: int, length: int, *, columns: bool, page: bool = False) -> torch.Tensor:
        """Return room for a message of `length` bytes, of rows of a part; columns: with a gradient
        of each; page: with values and moments, and no more of them than a page has.

        Raises:
            Malformed: there is no such part, or it has not so many rows.
        """
        part = self.parts.get(key)
        if part is None:
            raise Malformed(f"rows of table {key}, which nobody has declared")
        numbers = sum(part.columns) if page else part.spec.size * columns
        row = 8 + 4 * numbers
        if length > (max(PAGE_BYTES, row) if page else part.spec.count * row) + 8:
            raise Malformed(f"{length} bytes of rows, more than there are")
        return torch.empty(length, dtype=torch.uint8)

    def take(self, source: Source, rank: int, key: int, message: torch.Tensor) -> None:
        """Take a rank's gradients of rows; if they were here already, nothing changes.

        Raises:
            Malformed: they make no sense.
        """
        part = self.parts[key]
        rows, _ = unpack_rows(message, [part.spec.size])
        part.check(rows, increase=True)
        self._pushed.setdefault(source, {}).setdefault((key, rank), message)

    def missing(self, sources: Sequence[Source]) -> list[tuple[Source, int]]:
        """Return what is not here: (source, key)."""
        return [
            (source, key)
            for source in sources
            for key in self.parts
            for rank in range(self._ranks.get(source[0], 1))
            if (key, rank) not in self._pushed.get(source, {})
        ]

    def add_up(self, sources: Sequence[Source]) -> None:
        """Let each part's gradient be the sum of those of `sources`, in that order."""
        for key, part in self.parts.items():
            messages = [
                unpack_rows(self._pushed[source][key, rank], [part.spec.size])
                for source in sources
                for rank in range(self._ranks.get(source[0], 1))
            ]
            rows, grad = added_up([(rows, grad) for rows, grad in messages])
            squares = float(grad_norm([grad], kernels=self.kernels).squares) if len(rows) else 0.0
            self._sums[key] = _Sum(rows, grad, squares)

    def squares(self, keys: Collection[int]) -> float:
        """Return the sum of squares of the summed gradients of these parts."""
        return sum(self._sums[key].squares for key in sorted(keys) if key in self._sums)

    def apply(self, rate: float, divisor: float, step: int) -> None:
        """Do update number `step` by the sums."""
        for key, total in self._sums.items():
            self.parts[key].update(total.rows, total.grad, rate, divisor, step)

    def forget(self, is_over: Callable[[Source], bool]) -> None:
        """Drop gradients that no update will want."""
        for source in [source for source in self._pushed if is_over(source)]:
            del self._pushed[source]

    @property
    def num_bytes(self) -> int:
        """Bytes of rows that were updated, and of their moments."""
        return sum(4 * sum(part.columns) * part.num_updated for part in self.parts.values())


def added_up(
    messages: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return distinct rows, which increase, and the sum of their gradients, in order of messages.

    messages: rows [k], each once in a message, and gradients [k, size].
    """
    if len(messages) == 1:
        return messages[0]
    rows = torch.unique(torch.cat([rows for rows, _ in messages]))
    total = messages[0][1].new_zeros(len(rows), messages[0][1].shape[1])
    for some, grad in messages:
        places = torch.searchsorted(rows, some)
        total.index_copy_(0, places, total.index_select(0, places) + grad)  # each place once
    return rows, total
