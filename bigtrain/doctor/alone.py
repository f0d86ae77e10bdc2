"""What a rank measures without others on the wire: its device, its files, its clock."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import torch

from bigtrain.doctor.measured import Device
from bigtrain.doctor.ranks import Ranks

MIB = 1 << 20
_MOST_TURNS = 16  # with more ranks, one of every node measures at a time
_ROUNDS, _TIMES = 3, 4
_EXCHANGES = 20


def matmul_side(kind: str, most_cores: int, quick: bool) -> int:
    """Return the rows and columns of the matrices that a kind of device multiplies."""
    if kind == "cuda":
        return 4096 if quick else 8192
    return 1024 if most_cores <= 8 else 2048


def measure_device(ranks: Ranks, name: str, side: int) -> Device:
    """Measure this rank's device by a product of two square matrices, the best of several.

    fp32 on processors, fp16 on GPUs. Ranks take turns, several times over: all of a small world
    one by one, else one of every node at a time. Communicates barriers.
    """
    dtype = torch.float16 if ranks.device.type == "cuda" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=ranks.device)
    out = torch.empty_like(matrix)
    few = ranks.me.world_size <= _MOST_TURNS
    turns = ranks.me.world_size if few else ranks.me.local_world_size
    mine = ranks.me.rank if few else ranks.me.local_rank
    best = _product(matrix, out)  # and libraries are loaded
    for _ in range(_ROUNDS):
        for turn in range(turns):
            ranks.meet()
            if turn == mine:
                best = min(best, *(_product(matrix, out) for _ in range(_TIMES)))
    ranks.meet()
    kind, flops = ranks.device.type, 2.0 * side**3
    return Device(ranks.me.rank, ranks.me.node_rank, kind, name, best, flops, ranks.fault)


def _product(matrix: torch.Tensor, out: torch.Tensor) -> float:
    """Return the seconds that a product takes."""
    on_gpu = matrix.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(matrix.device)
    began = time.perf_counter()
    torch.mm(matrix, matrix, out=out)
    if on_gpu:
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - began


def measure_files(folder: Path, name: str, num_mib: int) -> tuple[float, float]:
    """Write a file, bring it to the disk, and read it; return the MB/s of both, the best of two.

    What is read is asked to be dropped from memory before.

    Raises:
        OSError: it cannot be written or read.
    """
    block = os.urandom(MIB)
    path = folder / name
    write = read = float("inf")
    try:
        for _ in range(2):
            began = time.perf_counter()
            with open(path, "wb", buffering=0) as file:
                for _ in range(num_mib):
                    file.write(block)
                os.fsync(file.fileno())
                write = min(write, time.perf_counter() - began)
            with open(path, "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                began = time.perf_counter()
                while file.read(MIB):
                    pass
                read = min(read, time.perf_counter() - began)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return num_mib * MIB / 1e6 / write, num_mib * MIB / 1e6 / read


def measure_clock(ranks: Ranks) -> tuple[float, float]:
    """Return how far this node's clock is ahead of the first node's, and the round trip; seconds.

    As NTP does it: of several exchanges with rank 0, the one with the shortest round trip says
    most. One node after the other; communicates 40 small messages for each.
    """
    best = (0.0, 0.0)
    for node in range(1, ranks.num_nodes):
        if ranks.me.rank == 0:
            for _ in range(_EXCHANGES):
                _answer(ranks, ranks.first_of(node))
        elif ranks.me.rank == ranks.first_of(node):
            exchanges = [_ask(ranks) for _ in range(_EXCHANGES)]
            best = min(exchanges, key=lambda exchange: exchange[1])
    ranks.meet()
    return best


def _ask(ranks: Ranks) -> tuple[float, float]:
    times = torch.zeros(2, dtype=torch.float64, device=ranks.carrier)
    sent, began = time.time(), time.perf_counter()
    ranks.send(times, 0)
    ranks.receive(times, 0)
    round_trip = time.perf_counter() - began
    arrived, answered = times.tolist()
    behind = ((arrived - sent) + (answered - (sent + round_trip))) / 2
    return -behind, round_trip


def _answer(ranks: Ranks, asker: int) -> None:
    times = torch.zeros(2, dtype=torch.float64, device=ranks.carrier)
    ranks.receive(times, asker)
    arrived = time.time()
    ranks.send(torch.tensor([arrived, time.time()], dtype=torch.float64).to(times.device), asker)
