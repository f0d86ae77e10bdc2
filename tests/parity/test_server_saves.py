"""What a worker saves is of one version, or is not saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from server_world import RATE, Worker, World, leaves_nothing, wait_for, world

from bigtrain.comm.mesh import Axis
from bigtrain.config.serving import RowsSection
from bigtrain.engines.seat import Seat
from bigtrain.engines.served import bring
from bigtrain.engines.table_files import TableFiles
from bigtrain.errors import Overtaken
from bigtrain.optim.rows import make_row_optimizer
from bigtrain.server.protocol import THE_END

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    with leaves_nothing():
        yield


def save_at(version: int, overtaken: bool, save: Callable[[Worker, Any], None]) -> None:
    """Have a worker save after a round; `overtaken`: when the other has gone on without it."""
    done: list[int] = []

    def busy(turn: dict[str, Any]) -> None:
        me = some.workers[0]
        if turn["version"] != version or done:
            return
        done.append(version)
        me.tables.begin(version)
        if overtaken:
            some.wait_version(version + 2, 30.0, some.workers[1])
        save(me, SimpleNamespace(client=me.client, turn=turn, mesh=SimpleNamespace(world=ALONE)))

    held = frozenset() if overtaken else frozenset({version})
    rules = {"quorum": 1, "grace_seconds": 0.0, "held": held, "table": True}
    with world(servers=2, workers=2, steps=8, **rules) as some:
        some.worker(0, busy=busy)
        some.worker(1, seconds=0.02)
        finish(some)
    assert done


ALONE = Axis("world", 1, 0, (0,), None)


def seat_of(worker: Worker, turn: dict[str, Any]) -> Any:
    """Return what of a seat is needed to end."""
    return SimpleNamespace(
        client=worker.client,
        worker=worker.index,
        turn=turn,
        workers=[part[0] for part in turn["outcome"]["parts"]],
        server=worker.world.rules,
        mesh=SimpleNamespace(world=ALONE, rank=0),
    )


def at_the_end(some: World) -> set[int]:
    """Return the workers that wait there for each other."""
    boards = [server.board for server in some.servers if server.board and server.board.active]
    sums = boards[-1]._sums.get(THE_END) if boards else None
    return set(sums.offers) if sums is not None else set()


@pytest.mark.parametrize("board_dies", [False, True])
def test_another_saves_if_who_was_to_is_gone(board_dies: bool) -> None:
    """The first dies when all others are at the end; a worker comes back while the next saves."""
    saved: list[int] = []

    def busy(turn: dict[str, Any], me: Worker) -> None:
        if turn["version"] < 4:
            return
        if me.index == 0 and me.incarnation == 0:
            wait_for("the others", lambda: at_the_end(some) == {1, 2})
            if board_dies:
                some.kill_server(0)
            me.vanish()
            return
        done = False
        while Seat.must_save(seat_of(me, turn), done):
            start(0, 1)
            wait_for("who comes back", lambda: at_the_end(some) == {0, 2})
            saved.append(me.index)
            done = True

    def start(index: int, incarnation: int = 0) -> None:
        some.worker(index, incarnation, busy=lambda turn: busy(turn, some.workers[index]))

    with world(servers=2, replicas=2, workers=3, steps=4, last=4, held=frozenset({4})) as some:
        for index in range(3):
            start(index)
        for index in (1, 2, 0):  # by then it has come back
            some.wait(some.workers[index])
        some.wait_servers(*range(board_dies, 2))
    assert saved == [1]


def finish(some: World) -> None:
    some.wait()
    some.wait_servers()


@pytest.mark.parametrize("overtaken", [False, True])
def test_parts_of_another_version_are_not_saved(overtaken: bool) -> None:
    rooms = []

    def save(me: Worker, seat: Any) -> None:
        version = seat.turn["version"]
        rooms.extend((spec.key, 1, torch.full((spec.numel,), torch.nan)) for spec in me.specs)
        if overtaken:
            with pytest.raises(Overtaken):
                bring(seat, version, rooms)
        else:
            bring(seat, version, rooms)
            with pytest.raises(Overtaken):
                bring(seat, version + 1, rooms)

    save_at(3, overtaken, save)
    assert all(room.isfinite().all() for _, _, room in rooms)


@pytest.mark.parametrize("overtaken", [False, True])
def test_pages_of_another_version_are_not_saved(overtaken: bool, tmp_path: Path) -> None:
    def save(me: Worker, seat: Any) -> None:
        optimizer = make_row_optimizer(RowsSection(optimizer="adam", lr=RATE), RATE, "off")
        files = TableFiles(me.tables, optimizer)
        if overtaken:
            with pytest.raises(Overtaken):
                files.write(tmp_path)
        else:
            assert files.write(tmp_path) == ["rows-000000.safetensors"]

    save_at(3, overtaken, save)
