"""Tables in checkpoints: files of those rows that were updated, written and read page by page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bigtrain.errors import CheckpointError, Overtaken
from bigtrain.server.embedding import Tables
from bigtrain.server.rows import PAGE_BYTES, RowOptimizer, pack_rows, unpack_rows
from bigtrain.server.table import bytes_of

_FILE_BYTES = 64 << 20
_FILE = re.compile(r"rows-[0-9]{6}\.safetensors")
Rows = dict[str, torch.Tensor]  # `rows` [k] int64, `values` [k, size] fp32, and moments


def is_table_file(name: str) -> bool:
    """Is this the name of such a file?"""
    return _FILE.fullmatch(name) is not None


class TableFiles:
    """Brings the tables of a run from servers to checkpoints, and back.

    A file has `rows` [k] int64, `values` [k, size] fp32 and the optimizer's moments of them; its
    metadata says of which table. However large tables are, this takes the memory of a file.
    """

    def __init__(self, tables: Tables, optimizer: RowOptimizer) -> None:
        self.tables, self._optimizer = tables, optimizer
        self._found: list[Path] = []

    # -- out -----------------------------------------------------------------------------------

    def write(self, folder: Path) -> list[str]:
        """Write all rows that were updated to `folder`; returns the names of the files.

        Raises:
            CommError: no server that holds a table is left.
            Overtaken: the tables are of a later version than the parameters that are here.
        """
        names: list[str] = []
        for table in self.tables.names:
            for content in _joined(self._pages(table)):
                names.append(f"rows-{len(names):06d}.safetensors")
                save_file(content, folder / names[-1], {"table": table})
        return names

    def _pages(self, table: str) -> Iterator[Rows]:
        widths = self._optimizer.moments(self.tables.size(table))
        for spec in self.tables.specs_of(table):
            after = 0
            while after < spec.count:
                page, after = self.tables.client.page(spec.key, after, self.tables.version)
                if not after:
                    raise Overtaken(f"table {table} is of a later round than {self.tables.version}")
                message = torch.frombuffer(page, dtype=torch.uint8)
                columns = [spec.size, *(max(1, width) for width in widths.values())]
                rows, *found = unpack_rows(message, columns)
                if len(rows):
                    own = dict(zip(["values", *widths], found, strict=True))
                    yield {"rows": rows * spec.parts + spec.part, **own}

    # -- back ----------------------------------------------------------------------------------

    def take_up(self, folder: Path, names: Sequence[str]) -> None:
        """Look at a checkpoint's files; `give` sends what they have.

        Raises:
            CheckpointError: its tables are others, or cannot be read.
        """
        self._found = [folder / name for name in sorted(names)]
        for path in self._found:
            with _opened(path) as file:
                self._check(path, _table_of(file), file)

    def give(self) -> None:
        """Send servers the rows of the checkpoint that was taken up, if there is one.

        Raises:
            CheckpointError: it cannot be read any more.
        """
        for path in self._found:
            with _opened(path) as file:
                self._give_file(_table_of(file), file)
        self._found = []

    def _give_file(self, table: str, file: safe_open) -> None:
        size, names = self.tables.size(table), ["values", *self._optimizer.moments(1)]
        rows = file.get_tensor("rows")
        each = max(1, PAGE_BYTES // (8 + 4 * size * len(names)) - 1)
        for start in range(0, len(rows), each):
            some = rows[start : start + each]
            columns = [file.get_slice(name)[start : start + each] for name in names]
            for spec, mine in self.tables.split(table, some):
                mine = mine[some[mine].argsort()]
                own = (column[mine] for column in columns)
                message = pack_rows(some[mine] // spec.parts, *own)
                self.tables.client.give_page(spec.key, bytes_of(message))

    def _check(self, path: Path, table: str, file: safe_open) -> None:
        if table not in self.tables.names:
            raise CheckpointError(
                f"{path} has rows of a table {table!r}, and the model has {self.tables.names}",
                why="the checkpoint is of another model",
                mend="resume with the config that wrote it (it is in its manifest)",
            )
        size, count = self.tables.size(table), self.tables.num_rows(table)
        widths = {"values": size, **self._optimizer.moments(size)}
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if name != "rows"}  # noqa: SIM118
        expected = {name: [max(1, width)] for name, width in widths.items()}
        if {name: shape[1:] for name, shape in shapes.items()} != expected:
            raise CheckpointError(
                f"{path} has {sorted(shapes)} of table {table}, the run {sorted(expected)}",
                why="the table's rows have another size, or another optimizer updates them",
                mend="resume with the same table and server.rows.optimizer",
            )
        rows = file.get_tensor("rows")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise CheckpointError(
                f"{path} has row {int(rows.max())} of table {table}, which has {count}",
                why="the table has become smaller",
                mend="resume with a table of as many rows, or more",
            )


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        mend = "use another checkpoint; `bigtrain ckpt verify` tells which are good"
        raise CheckpointError(f"cannot read {path}", why=str(error), mend=mend) from error


def _table_of(file: safe_open) -> str:
    return str((file.metadata() or {}).get("table", ""))


def _joined(pages: Iterator[Rows]) -> Iterator[Rows]:
    """Yield pages joined to as much as a file takes."""
    waiting: list[Rows] = []
    for page in pages:
        waiting.append(page)
        if sum(t.nbytes for some in waiting for t in some.values()) >= _FILE_BYTES:
            yield _cat(waiting)
            waiting = []
    if waiting:
        yield _cat(waiting)


def _cat(pages: list[Rows]) -> Rows:
    return {name: torch.cat([page[name] for page in pages]) for name in pages[0]}
