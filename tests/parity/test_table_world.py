"""A table on servers, in one process: equal to one in one place, whoever dies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from server_world import (
    RATE,
    ROW,
    ROWS,
    World,
    ids_of,
    leaves_nothing,
    row_loss,
    row_tables,
    world,
)

from bigtrain.server.embedding import ServerEmbedding, Tables
from bigtrain.server.protocol import Kind
from bigtrain.server.rows import RowSpec, added_up, pack_ids, pack_rows
from bigtrain.server.table import bytes_of

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def alone(rounds: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Return the table after rounds of these shares of the data, computed in one place."""
    tables = row_tables()
    layer, everything = ServerEmbedding(ROWS, ROW), torch.arange(ROWS)
    [spec] = Tables({"table": layer}, None, hosts=["here"], replicas=1, seed=1).specs  # type: ignore[arg-type]
    tables.declare(spec)
    part = tables.parts[spec.key]
    for step, shares in enumerate(rounds):
        messages = []
        for cursor, number in shares:
            ids = ids_of(cursor, number)
            rows, places = torch.unique(ids, return_inverse=True)
            values = part.lookup(rows).requires_grad_()
            row_loss(values[places], cursor, number).backward()
            assert values.grad is not None
            messages.append((rows, values.grad))
        part.update(*added_up(messages), RATE, 1.0, step + 1)
    return part.lookup(everything)


def shares_of(some: World) -> list[list[tuple[int, int]]]:
    """Return the shares of the data that are in each round, in the order of workers."""
    given = {
        (worker.index, worker.incarnation, turn["clock"]): tuple(turn["share"])
        for worker in some.all_workers
        for turn in worker.turns
    }
    return [[given[p.worker, p.incarnation, p.clock] for p in c.parts] for c in some.rounds()]


def assert_as_in_one_place(some: World) -> None:
    some.wait()
    some.wait_servers()
    expected = alone(shares_of(some))
    torch.testing.assert_close(table_of(some), expected, rtol=1e-5, atol=1e-6)


def table_of(some: World) -> torch.Tensor:
    """Return the table of the servers; those that hold a part have the same of it."""
    whole = torch.full((ROWS, ROW), torch.nan)
    for server in some.servers:
        for part in server.table.rows.parts.values():
            mine = part.lookup(torch.arange(part.spec.count))
            place = slice(part.spec.part, None, part.spec.parts)
            assert whole[place].isnan().all() or torch.equal(whole[place], mine)
            whole[place] = mine
    return whole


@pytest.mark.parametrize(
    ("servers", "replicas", "workers"), [(1, 1, 1), (2, 1, 2), (3, 2, 3)], ids=str
)
def test_a_table_is_as_in_one_place(servers: int, replicas: int, workers: int) -> None:
    sizes = {"servers": servers, "replicas": replicas, "workers": workers}
    with world(**sizes, steps=8, table=True) as some:
        some.start()
        assert_as_in_one_place(some)


def test_messages_that_come_twice_change_nothing() -> None:
    with world(servers=2, replicas=2, workers=2, steps=6, table=True) as some:
        some.start(again=True)
        assert_as_in_one_place(some)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_server_that_was_killed_is_given_its_rows(victim: int) -> None:
    with world(servers=2, replicas=2, workers=2, steps=30, table=True, lease=2.0) as some:
        some.start(seconds=0.02)
        some.wait_version(3)
        some.kill_server(victim)
        some.wait_version(8)
        some.server(victim, incarnation=1)
        some.wait_whole()
        assert_as_in_one_place(some)
        assert all(part.num_updated for part in some.servers[victim].table.rows.parts.values())


def test_links_that_are_cut_while_rows_are_fetched() -> None:
    with world(servers=2, replicas=2, workers=2, steps=30, table=True) as some:
        workers = some.start(seconds=0.02)
        for version in (3, 6, 9):
            some.wait_version(version)
            for link in list(workers[version % 2].client._links.values()):
                some_loop = workers[version % 2].client._loop
                some_loop.call(lambda link=link: link.close("cut for a test"))
        assert_as_in_one_place(some)


def test_a_checkpoint_of_a_table() -> None:
    """All pages of all parts are what servers have; given to others, they are the same."""
    with world(servers=2, replicas=1, workers=1, steps=5, table=True) as some:
        [worker] = some.start()
        some.wait_version(4)
        found: dict[int, list[torch.Tensor]] = {}
        for spec in worker.tables.specs:
            after = 0
            while after < spec.count:
                page, after = worker.client.page(spec.key, after)
                found.setdefault(spec.key, []).append(torch.frombuffer(page, dtype=torch.uint8))
        some.wait()
        some.wait_servers()
        other = row_tables()
        for spec in worker.tables.specs:
            other.declare(spec)
            for page in found[spec.key]:
                other.parts[spec.key].take(page)
        assert sum(part.num_updated for part in other.parts.values()) > 10


def bad_frames(spec: RowSpec) -> dict[str, tuple[Kind, torch.Tensor, dict[str, int]]]:
    rows, grad = torch.arange(2), torch.ones(2, ROW)
    key = {"key": spec.key}
    return {
        "a push of no whole rows": (Kind.PUSH, pack_rows(rows, grad)[:-4], {**key, "step": 1}),
        "a push of a row too far": (Kind.PUSH, pack_rows(rows + ROWS, grad), {**key, "step": 1}),
        "a push twice the table": (
            Kind.PUSH,
            pack_rows(torch.arange(2 * ROWS), torch.ones(2 * ROWS, ROW)),
            {**key, "step": 1},
        ),
        "a push of rows that fall": (Kind.PUSH, pack_rows(rows.flip(0), grad), {**key, "step": 1}),
        "a lookup too far": (Kind.LOOKUP, pack_ids(rows - 1), key),
        "a lookup of another table": (Kind.LOOKUP, pack_ids(rows), {"key": spec.key + 7}),
        "a lookup that lies": (Kind.LOOKUP, torch.tensor([5, 1]), key),
        "a page nobody wants": (Kind.VALUES, pack_rows(rows, grad), {**key, "part": 0xFFFE}),
    }


@pytest.mark.parametrize("what", bad_frames(RowSpec(0, "", 1, 1, 0, 1, 0.0, 0, (0,))))
def test_rows_that_make_no_sense_close_a_link(what: str) -> None:
    """And nothing else: the worker comes by another one, and the run is as ever."""
    with world(servers=1, workers=2, steps=20, table=True) as some:
        workers = some.start(seconds=0.02)
        some.wait_version(3)
        client, spec = workers[1].client, workers[1].tables.specs[0]
        kind, message, where = bad_frames(spec)[what]
        known = client._links[0]
        client._loop.call(lambda: known.send(kind, bytes_of(message), **where))
        assert_as_in_one_place(some)
        assert not known.open
