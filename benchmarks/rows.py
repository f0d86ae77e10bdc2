"""Rows of a table on a server: fetch, push and update 100,000 of them, from tables of any size.

    python benchmarks/rows.py

One server in a process of its own, whose table is mapped from a file, and one worker, over
loopback. Beside it, in the same run: the time to send the same bytes from one process to the other
and back, and torch's own embedding with sparse gradients and Adagrad in one process, where the
table fits.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from bigtrain.config.schema import SgdOptimizer
from bigtrain.config.serving import RowsSection
from bigtrain.optim import make_optimizer
from bigtrain.optim.rows import make_row_optimizer
from bigtrain.server.board import Update
from bigtrain.server.client import Client
from bigtrain.server.embedding import ServerEmbedding, Tables
from bigtrain.server.protocol import Who, new_token
from bigtrain.server.rounds import Closed, Rules
from bigtrain.server.rows import RowTables
from bigtrain.server.server import Server, Setup
from bigtrain.server.table import BlockSpec, Stretch, bytes_of, key_of

SIZES = (10**6, 10**7, 10**8)
BATCH, SIZE, STEPS = 10**5, 64, 12
BYTES = BATCH * SIZE * 4


class Policy:
    """A constant rate."""

    def begin(self, about: Mapping[str, Any]) -> None:
        pass

    def update(self, closed: Closed, squares: float) -> Update:
        return Update(0.1, 1.0, False, squares**0.5)

    def is_held(self, closed: Closed) -> bool:
        return False


def serve(sock: socket.socket, token: str, folder: Path) -> None:
    rules = Rules(mode="sync", workers=1, quorum=1)
    setup = Setup(0, [sock.getsockname()], token, rules, 1, 30.0)
    rows = RowTables(make_row_optimizer(RowsSection(lr=0.1), 0.1), folder)

    def make(segments: Any) -> Any:
        return make_optimizer(segments, SgdOptimizer(kind="sgd", lr=0.1))

    Server(setup, make, Policy(), rows=rows).serve(sock)


def served(num_rows: int, folder: Path) -> list[tuple[float, float]]:
    """Return (seconds of a lookup, of push and update) of each step."""
    sock, token = socket.create_server(("127.0.0.1", 0)), new_token()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sock, token, folder))
    server.start()
    client = Client(Who("worker", 0), [sock.getsockname()], token, lease_seconds=30.0)
    layer = ServerEmbedding(num_rows, SIZE)
    tables = Tables({"table": layer}, client, servers=1, replicas=1, seed=0)
    dense, spec = (
        torch.zeros(8),
        BlockSpec(key_of(0, 0), 8, "float32", (0,), (Stretch("decay", 1, 0, 8),)),
    )
    client.start([spec, *tables.specs])
    client.fill({(spec.key, 0): bytes_of(dense)}, {"step": 0, "num_updates": 0, "cursor": 0})
    client.ready()
    found, turn = [], client.next_turn(0)
    # The same rows come again, as frequent ones do; they are spread over the whole table.
    ids = torch.randint(num_rows, (BATCH,))
    for step in range(STEPS):
        batch = ids[torch.randperm(BATCH)]
        tables.begin(turn["version"])
        began = time.perf_counter()
        values = layer(batch)
        looked_up = time.perf_counter()
        values.sum().backward()
        computed = time.perf_counter()
        tables.push(turn["clock"])
        client.push(turn["clock"], spec.key, bytes_of(dense))
        servers = client.wait_pushed(turn["clock"])
        client.report(turn["clock"], turn["version"], [1.0, 1.0], servers)
        turn = client.next_turn(turn["clock"])
        if step >= 2:
            found.append((looked_up - began, time.perf_counter() - computed))
    client.leave()
    server.join()
    sock.close()
    return found


def in_one_process(num_rows: int) -> list[tuple[float, float]]:
    """The same by torch: (seconds of forward, of the update)."""
    layer = torch.nn.Embedding(num_rows, SIZE, sparse=True, _weight=torch.zeros(num_rows, SIZE))
    optimizer = torch.optim.Adagrad(layer.parameters(), lr=0.1)
    found = []
    for step in range(STEPS):
        batch = torch.randperm(num_rows)[:BATCH]
        began = time.perf_counter()
        values = layer(batch)
        looked_up = time.perf_counter()
        values.sum().backward()
        computed = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        if step >= 2:
            found.append((looked_up - began, time.perf_counter() - computed))
    return found


def copied() -> float:
    """Return the seconds in which as many bytes come from another process."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        data = bytes(BYTES)
        for _ in range(STEPS):
            theirs.recv(1)
            theirs.sendall(data)
        os._exit(0)
    seconds, room = [], bytearray(BYTES)
    for _ in range(STEPS):
        began, got = time.perf_counter(), 0
        ours.send(b"x")
        while got < BYTES:
            got += ours.recv_into(memoryview(room)[got:])
        seconds.append(time.perf_counter() - began)
    os.wait()
    return statistics.median(seconds)


def main() -> None:
    print(f"{BATCH:,} rows of {SIZE} numbers ({BYTES / 1e6:.1f} MB), ms, medians of {STEPS - 2}")
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in SIZES:
            tell(f"server, table of {num_rows:,} rows", lambda n=num_rows: served(n, Path(folder)))
    tell("torch in one process, 1,000,000 rows", lambda: in_one_process(10**6))
    print(f"{'a plain copy of the bytes':<44} {1000 * copied():8.1f}")


def tell(what: str, measure: Callable[[], list[tuple[float, float]]]) -> None:
    fetch, update = (1000 * statistics.median(times) for times in zip(*measure(), strict=True))
    print(f"{what:<44} fetch {fetch:8.1f}   push and update {update:8.1f}")


if __name__ == "__main__":
    main()
