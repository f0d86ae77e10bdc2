"""Embedding tables that servers keep: a worker fetches the rows of its batch, and pushes theirs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.server.client import Client
from bigtrain.server.placement import place
from bigtrain.server.rows import RowSpec, added_up, key_of_part, pack_ids, pack_rows
from bigtrain.server.table import bytes_of


class ServerEmbedding(nn.Module):
    """An embedding whose table is on the run's parameter servers: no worker has it whole.

    forward(ids), of any shape [...] int64 in 0 to num_rows: returns [..., size]. Fetches each row
    once; after backward, gradients of these rows go to servers with the step's other gradients, and
    `server.rows` in the config says how they update. Before that a row is uniform in +-scale (by
    default 1 / sqrt(size)), a function of its number and of the run's seed.

    Raises:
        BigtrainError: the run has no servers, or an id is outside of the table.
    """

    def __init__(self, num_rows: int, size: int, scale: float | None = None) -> None:
        super().__init__()
        if num_rows < 1 or size < 1:
            raise BigtrainError(
                f"ServerEmbedding({num_rows}, {size})", mend="give it rows, and numbers in each"
            )
        self.num_rows, self.size = num_rows, size
        self.scale = size**-0.5 if scale is None else scale
        self._tables: Tables | None = None
        self._name = ""
        # What it returns is of the dtype and on the device that the model was brought to.
        self.register_buffer("_like", torch.empty(0), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.size}"

    def connect(self, name: str, tables: Tables | None) -> None:
        """Fetch from `tables`, as table `name`, from now on."""
        self._name, self._tables = name, tables

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if self._tables is None:
            raise BigtrainError(
                "a ServerEmbedding is used, and there are no servers that keep its rows",
                why="server.servers is 0, or server.mode is local, where workers have all "
                "parameters themselves",
                mend="set server.servers=1 (or more), and server.mode=sync, ssp or async",
            )
        rows, places = torch.unique(ids, return_inverse=True)
        values = self._tables.lookup(self._name, rows.cpu())
        like: torch.Tensor = self._like  # type: ignore[assignment]
        return F.embedding(places, values.to(like.device, like.dtype))


def tables_of(model: nn.Module) -> dict[str, ServerEmbedding]:
    """Return the tables of a model that servers keep, by name; one that is used in several places
    has the first of their names."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ServerEmbedding)
    }


@dataclass
class _Table:
    layer: ServerEmbedding
    specs: list[RowSpec]  # of its parts
    looked_up: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def parts(self) -> int:
        return len(self.specs)


class Tables:
    """The tables of a model, as a rank of a worker fetches and pushes them, by `client`.

    Servers add up what all ranks push: the mean over ranks is in their losses.
    """

    def __init__(
        self,
        layers: Mapping[str, ServerEmbedding],
        client: Client,
        *,
        hosts: Sequence[str],
        replicas: int,
        seed: int,
    ) -> None:
        self.client = client
        self._tables: dict[str, _Table] = {}
        self.version = 0  # of the rows that are wanted
        self._messages: list[torch.Tensor] = []  # on their way
        for number, (name, layer) in enumerate(sorted(layers.items())):
            specs = _specs(number, name, layer, hosts, replicas, seed)
            self._tables[name] = _Table(layer, specs)
            layer.connect(name, self)

    @property
    def specs(self) -> list[RowSpec]:
        """What servers must know of all tables."""
        return [spec for table in self._tables.values() for spec in table.specs]

    @property
    def names(self) -> list[str]:
        return list(self._tables)

    def specs_of(self, name: str) -> list[RowSpec]:
        """Return the parts of a table."""
        return self._tables[name].specs

    def size(self, name: str) -> int:
        """Return the numbers of a row."""
        return self._tables[name].layer.size

    def num_rows(self, name: str) -> int:
        return self._tables[name].layer.num_rows

    def split(self, name: str, rows: torch.Tensor) -> list[tuple[RowSpec, torch.Tensor]]:
        """Return the places in `rows` of those of each part."""
        return _split(rows, self._tables[name])

    def begin(self, version: int) -> None:
        """From now on fetch rows of `version`, or later."""
        self.version = version
        self._messages = []
        self.drop()

    def drop(self) -> None:
        """Forget rows that were looked up, and their gradients."""
        for table in self._tables.values():
            table.looked_up = []

    def lookup(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Return values [k, size] fp32 of rows [k] int64, which increase; what backward leaves in
        `grad` is pushed. Rows of a step are fetched once, also if a forward is done again.

        Raises:
            BigtrainError: there is no such row.
            CommError: no server that holds them is left.
        """
        table = self._tables[name]
        for known, values in table.looked_up:
            if torch.equal(known, rows):
                return values
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= table.layer.num_rows):
            raise BigtrainError(
                f"table {name} has rows 0 to {table.layer.num_rows - 1}, and ids reach from "
                f"{int(rows[0])} to {int(rows[-1])}",
                why="an id is the number of a row",
                mend="take ids modulo the table's rows, or make it larger",
            )
        values = self._fetch(table, rows)
        if torch.is_grad_enabled():
            values.requires_grad_()
            table.looked_up.append((rows, values))
        return values

    def _fetch(self, table: _Table, rows: torch.Tensor) -> torch.Tensor:
        values = torch.empty(len(rows), table.layer.size)
        wanted = []
        for spec, mine in _split(rows, table):
            room = torch.empty(len(mine), spec.size)
            wanted.append((spec.key, mine, room))
        self.client.lookup(
            [
                (key, self.version, bytes_of(pack_ids(rows[mine] // table.parts)), bytes_of(room))
                for key, mine, room in wanted
            ]
        )
        for key, mine, room in wanted:
            self.client.wait_pulled(key)
            values.index_copy_(0, mine, room)
        return values

    def push(self, clock: int) -> None:
        """Send the gradients of this round's rows, of tables that were not looked at none."""
        for table in self._tables.values():
            rows, grad = self._gradient(table)
            parts = dict(_split(rows, table, empty=True))
            for spec, mine in parts.items():
                message = pack_rows(rows[mine] // table.parts, grad.index_select(0, mine))
                self._messages.append(message)
                self.client.push(clock, spec.key, bytes_of(message))
        self.drop()

    def _gradient(self, table: _Table) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows that have a gradient, each once, and the sum of theirs."""
        found = [(rows, values.grad) for rows, values in table.looked_up]
        some = [(rows, grad) for rows, grad in found if grad is not None]
        if not some:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, table.layer.size)
        return added_up(some)


def _specs(
    number: int, name: str, layer: ServerEmbedding, hosts: Sequence[str], replicas: int, seed: int
) -> list[RowSpec]:
    """Return the parts of a table: one for each server, or for each row if these are fewer."""
    parts = min(len(hosts), layer.num_rows)
    where = place([f"{name}/{part}" for part in range(parts)], [1] * parts, hosts, replicas)
    own_seed = (seed * 0x10001 + zlib.crc32(name.encode())) % 2**53
    return [
        RowSpec(
            key=key_of_part(number, part, len(hosts)),
            name=name,
            num_rows=layer.num_rows,
            size=layer.size,
            part=part,
            parts=parts,
            scale=layer.scale,
            seed=own_seed,
            servers=where[part],
        )
        for part in range(parts)
    ]


def _split(
    rows: torch.Tensor, table: _Table, *, empty: bool = False
) -> list[tuple[RowSpec, torch.Tensor]]:
    """Return the places in `rows` of those of each part. empty: of parts without any, too."""
    owner = rows % table.parts
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=table.parts).tolist()
    split = zip(table.specs, order.split(counts), strict=True)
    return [(spec, mine) for spec, mine in split if empty or len(mine)]
