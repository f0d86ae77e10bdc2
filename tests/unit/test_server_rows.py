"""Rows of tables on a server: what is touched alone costs anything, and nothing is believed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.config.serving import RowsSection
from bigtrain.optim.rows import AdamRows, make_row_optimizer
from bigtrain.server.protocol import Malformed
from bigtrain.server.rows import (
    PAGE_BYTES,
    RowPart,
    RowSpec,
    RowTables,
    added_up,
    initial_rows,
    key_of_part,
    pack_ids,
    pack_rows,
    unpack_rows,
)

KINDS = ["row_adagrad", "adagrad", "adam", "sgd"]
HUGE = 10**8
CHECKED: Any = {"check_invariants": True}


def spec_of(num_rows: int = 50, size: int = 4, part: int = 0, parts: int = 1) -> RowSpec:
    return RowSpec(key_of_part(0, part, parts), "users", num_rows, size, part, parts, 0.5, 3, (0,))


def part_of(
    kind: str = "adagrad", folder: Path | None = None, lr: float = 0.1, **spec: Any
) -> RowPart:
    config = RowsSection.model_validate({"optimizer": kind, "lr": lr})
    return RowPart(spec_of(**spec), make_row_optimizer(config, dense_lr=1.0), folder)


def numbers(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


@pytest.fixture(params=[False, True], ids=["memory", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path | None]:
    yield tmp_path if request.param else None
    assert not list(tmp_path.iterdir()), "a file is left"


# -- what rows begin with ------------------------------------------------------------------------


def test_initial_rows_are_a_function_of_number_and_seed() -> None:
    some = initial_rows(torch.arange(2000), 16, 0.5, 1)
    assert torch.equal(some[700:800], initial_rows(torch.arange(700, 800), 16, 0.5, 1))
    assert not torch.equal(some, initial_rows(torch.arange(2000), 16, 0.5, 2))
    assert some.unique().numel() > 0.99 * some.numel()
    assert abs(float(some.mean())) < 0.01
    assert float(some.std()) == pytest.approx(0.5 / 3**0.5, rel=0.02)
    assert float(some.abs().max()) <= 0.5
    far = initial_rows(numbers(HUGE - 1, 2**40 - 1), 16, 0.5, 1)
    assert far.isfinite().all()


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_together_are_the_table(parts: int) -> None:
    whole = part_of(num_rows=50)
    for part in range(parts):
        mine = part_of(num_rows=50, part=part, parts=parts)
        rows = torch.arange(part, 50, parts)
        assert mine.spec.count == len(rows)
        assert torch.equal(mine.lookup(torch.arange(len(rows))), whole.lookup(rows))


# -- updates -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # inside of torch's optimizers
@pytest.mark.parametrize("kind", ["adagrad", "adam", "sgd"])
def test_updates_are_those_of_torch(kind: str, folder: Path | None) -> None:
    part = part_of(kind, folder)
    if kind == "adam":  # torch has eps at another place
        part = RowPart(spec_of(), AdamRows(0.1, eps=1e-15), folder)
    table = torch.nn.Parameter(part.lookup(torch.arange(50)))
    peer: torch.optim.Optimizer = {
        "adagrad": lambda: torch.optim.Adagrad([table], lr=0.1, eps=1e-10),
        "adam": lambda: torch.optim.SparseAdam([table], lr=0.1, eps=1e-15),
        "sgd": lambda: torch.optim.SGD([table], lr=0.1),
    }[kind]()
    draw = torch.Generator().manual_seed(1)
    for step in range(1, 9):
        rows = torch.randperm(50, generator=draw)[: 1 + step].sort().values
        grad = torch.randn(len(rows), 4, generator=draw)
        table.grad = torch.sparse_coo_tensor(
            rows[None], grad / 2, (50, 4), is_coalesced=True, **CHECKED
        )
        peer.step()
        part.update(rows, grad, 1.0, 2.0, step)
    torch.testing.assert_close(part.lookup(torch.arange(50)), table.detach())


def test_row_adagrad_has_one_sum_for_a_row() -> None:
    part = part_of("row_adagrad")
    before, grad = part.lookup(numbers(7)), torch.tensor([[3.0, 4.0, 0.0, 0.0]])
    for step in (1, 2):
        part.update(numbers(7), grad, 1.0, 1.0, step)
    mean = 25 / 4
    expected = before - 0.1 * grad / mean**0.5 - 0.1 * grad / (2 * mean) ** 0.5
    torch.testing.assert_close(part.lookup(numbers(7)), expected)


def test_what_is_not_touched_stays(folder: Path | None) -> None:
    part = part_of(folder=folder)
    before = part.lookup(torch.arange(50))
    part.update(numbers(3, 9), torch.ones(2, 4), 1.0, 1.0, 1)
    after = part.lookup(torch.arange(50))
    changed = (before != after).any(1).nonzero()[:, 0]
    assert changed.tolist() == [3, 9]
    assert part.num_updated == 2


def test_a_table_larger_than_the_memory(folder: Path | None) -> None:
    """Of 25 GB, and as much of sums: what is not touched is not there."""
    part = part_of("adagrad", folder, num_rows=HUGE, size=64)
    rows = numbers(0, 1, HUGE // 2, HUGE - 1)
    before = resident()
    part.update(rows, torch.ones(4, 64), 1.0, 1.0, 1)
    assert part.lookup(rows).shape == (4, 64)
    assert resident() - before < 200e6  # also if the kernels are loaded now
    assert sum(len(page) - 8 for page in part.pages()) == 4 * (8 + 2 * 4 * 64)


def resident() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("VmRSS:")[2].split()[0])


# -- sums ----------------------------------------------------------------------------------------


def test_gradients_add_up_in_order() -> None:
    draw = torch.Generator().manual_seed(2)
    messages = []
    for count in (5, 0, 9, 30):
        rows = torch.randperm(30, generator=draw)[:count].sort().values
        messages.append((rows, torch.randn(count, 4, generator=draw)))
    rows, total = added_up(messages)
    expected = torch.zeros(30, 4)
    for some, grad in messages:
        expected[some] += grad
    assert rows.tolist() == list(range(30))
    assert torch.equal(total, expected)


def test_a_round_waits_for_all_ranks() -> None:
    tables = RowTables(make_row_optimizer(RowsSection(), 1.0))
    tables.declare(spec_of())
    tables.expect(0, 2)
    source, key = (0, 0, 1), spec_of().key
    message = pack_rows(numbers(1, 2), torch.ones(2, 4))
    tables.take(source, 0, key, message)
    assert tables.missing([source]) == [(source, key)]
    tables.take(source, 1, key, pack_rows(numbers(2), torch.ones(1, 4)))
    assert tables.missing([source]) == []
    tables.add_up([source])
    assert tables.squares([key]) == 4 + 16
    assert tables.squares([]) == 0
    tables.forget(lambda source: True)
    assert len(tables.missing([source])) == 2


def test_what_comes_twice_changes_nothing() -> None:
    tables = RowTables(make_row_optimizer(RowsSection(), 1.0))
    tables.declare(spec_of())
    source, key = (0, 0, 1), spec_of().key
    for value in (1.0, 100.0):
        tables.take(source, 0, key, pack_rows(numbers(1), torch.full((1, 4), value)))
    tables.add_up([source])
    assert tables.squares([key]) == 4


# -- pages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pages_carry_all_that_was_updated(kind: str, folder: Path | None) -> None:
    part, copy = part_of(kind, folder, num_rows=10**6), part_of(kind, num_rows=10**6)
    for step in (1, 2):
        rows = torch.arange(step, 10**6, 4 + step)
        part.update(rows, torch.ones(len(rows), 4), 1.0, 1.0, step)
    pages = list(part.pages())
    assert len(pages) > 1
    assert all(len(page) <= PAGE_BYTES + 8 for page in pages)
    for page in pages:
        copy.take(page)
    assert copy.num_updated == part.num_updated
    assert copy.checksum() == part.checksum()
    for one in (part, copy):
        one.update(numbers(1, 2, 3), torch.ones(3, 4), 1.0, 1.0, 3)
    assert copy.checksum() == part.checksum()


def test_a_page_of_nothing() -> None:
    part = part_of()
    assert part.page(0)[1] == part.page(50)[1] == 50
    assert [len(page) for page in part.pages()] == [8]


# -- messages that make no sense -------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(7, dtype=torch.uint8),
        torch.zeros(12, dtype=torch.uint8),
        torch.full((8,), 255, dtype=torch.uint8),
        pack_rows(numbers(1)),
        pack_rows(numbers(1), torch.ones(1, 3)),
        pack_rows(numbers(1), torch.ones(1, 4))[:-4],
        pack_rows(numbers(50), torch.ones(1, 4)),
        pack_rows(numbers(-1), torch.ones(1, 4)),
        pack_rows(numbers(2, 2), torch.ones(2, 4)),
        pack_rows(numbers(3, 2), torch.ones(2, 4)),
    ],
)
def test_a_push_that_makes_no_sense(message: torch.Tensor) -> None:
    tables = RowTables(make_row_optimizer(RowsSection(), 1.0))
    tables.declare(spec_of())
    with pytest.raises(Malformed):
        tables.take((0, 0, 1), 0, spec_of().key, message)
    assert tables.missing([(0, 0, 1)])


def test_room_for_messages_is_bounded() -> None:
    tables = RowTables(make_row_optimizer(RowsSection(), 1.0))
    tables.declare(spec_of())
    key = spec_of().key
    assert tables.message(key, 8 + 50 * 24, columns=True).numel() == 8 + 50 * 24
    assert tables.message(key, 8 + 50 * 8, columns=False).numel() == 8 + 50 * 8
    for length, columns, page in (
        (9 + 50 * 24, True, False),
        (9 + 50 * 8, False, False),
        (PAGE_BYTES + 9, True, True),
        (2**40, True, False),
    ):
        with pytest.raises(Malformed):
            tables.message(key, length, columns=columns, page=page)
    with pytest.raises(Malformed, match="nobody has declared"):
        tables.message(7, 8, columns=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 3},
        {"scale": "1"},
        {"scale": float("nan")},
        {"scale": -1.0},
        {"scale": None},
        {"num_rows": -1},
        {"num_rows": 2**50},
        {"size": 0},
        {"part": 1},
        {"servers": []},
        {"servers": [-1]},
        {"seed": 1.5},
        {"key": 2**32},
    ],
)
def test_a_table_that_makes_no_sense(change: dict[str, Any]) -> None:
    assert RowSpec.from_message(spec_of().to_message()) == spec_of()
    with pytest.raises(Malformed):
        RowSpec.from_message({**spec_of().to_message(), **change})


def test_tables_that_differ() -> None:
    tables = RowTables(make_row_optimizer(RowsSection(), 1.0))
    tables.declare(spec_of())
    tables.declare(spec_of())
    with pytest.raises(Malformed, match="another"):
        tables.declare(spec_of(num_rows=51))
    with pytest.raises(Malformed, match="has none"):
        RowTables().declare(spec_of())


def test_messages_come_through() -> None:
    rows, values = numbers(2, 5), torch.randn(2, 4)
    found, own, more = unpack_rows(pack_rows(rows, values, values[:, :1]), [4, 1])
    assert torch.equal(found, rows)
    assert torch.equal(own, values)
    assert torch.equal(more, values[:, :1])
    (ids,) = unpack_rows(pack_ids(rows).view(torch.uint8), [])
    assert torch.equal(ids, rows)
