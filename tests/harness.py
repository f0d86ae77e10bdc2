"""Several gloo ranks on this machine inside one test: `run_ranks(fn, world_size, tmp_path)`.

Ranks are forked (a quarter of a second for four) and meet through a file. Every wait has a limit;
a rank that fails shows its traceback in the test, and all others are ended.
"""

from __future__ import annotations

import datetime
import multiprocessing
import pickle
import random
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.config.layout import Layout

COLLECTIVES = (
    "all_reduce",
    "all_gather_single",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
    "all_gather_object",
)
MESSAGES = ("isend", "irecv")


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *,
    args: Sequence[Any] = (),
    layout: Layout | None = None,
    delay_seed: int | None = None,
    timeout: float = 120.0,
) -> list[Any]:
    """Run `fn(mesh, *args)` on `world_size` ranks and return what each returned, in order.

    With `delay_seed`, every rank sleeps a random few milliseconds before every collective, and
    before every message that it sends or begins to receive.
    """
    context = multiprocessing.get_context("fork")
    meeting = tmp_path / f"meet-{uuid.uuid4().hex}"
    ranks = []
    for rank in range(world_size):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank_main,
            args=(fn, rank, world_size, meeting, layout, args, delay_seed, timeout, send),
        )
        process.start()
        send.close()
        ranks.append((process, receive))
    try:
        return _collect([receive for _, receive in ranks], timeout)
    finally:
        for process, _ in ranks:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} did not finish in {timeout} s")
        for rank, pipe in list(waiting.items()):
            if pipe in ready:
                del waiting[rank]
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} died without a word") from None
                if not good:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    meeting: Path,
    layout: Layout | None,
    args: Sequence[Any],
    delay_seed: int | None,
    timeout: float,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    try:
        if world_size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting}",
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=timeout),
            )
        if delay_seed is not None:
            _delay_collectives(random.Random(delay_seed * 1000 + rank))
        world = World(rank, world_size, rank, world_size)
        mesh = Mesh.build(layout or Layout(dp=world_size), world, torch.device("cpu"))
        outcome = (True, fn(mesh, *args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    # Plain bytes: a pipe would pass tensors as shared memory of a process that is about to end.
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()


def _delay_collectives(rng: random.Random) -> None:
    """Make this (forked) rank come late to everything it says, by a few random milliseconds."""
    for name in COLLECTIVES + MESSAGES:
        plain = getattr(dist, name, None)
        if plain is None:  # another version of torch
            continue

        def late(*args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            time.sleep(rng.random() * 0.008)
            return plain(*args, **kwargs)

        setattr(dist, name, late)
