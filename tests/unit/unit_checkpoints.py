"""Checkpoints for tests: of one rank, or of several ranks played by threads of this process."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bigtrain.checkpoint import load, save
from bigtrain.checkpoint.manifest import MANIFEST, Manifest, State, read_manifest
from bigtrain.comm.block import Block, NamedBlock
from bigtrain.comm.mesh import Axis

ALONE = Axis("world", 1, 0, (0,), None)


def state(step: int) -> State:
    return State(
        step=step,
        cursor=step * 16,
        seed=7,
        num_updates=step,
        data_fingerprint="abc",
        layout={"pp": 1, "dp": 1, "cp": 1, "tp": 1},
        config={"run": {"dir": "runs/é"}},
    )


def whole(name: str, tensor: torch.Tensor, replica: int = 0, num_replicas: int = 1) -> NamedBlock:
    """A tensor that is on this rank in full."""
    shape = tuple(tensor.shape)
    return NamedBlock(name, shape, Block.whole(shape), tensor, replica, num_replicas)


def part(name: str, full: torch.Tensor, offsets: tuple, sizes: tuple) -> NamedBlock:
    """One block of the tensor `full`."""
    block = Block(tuple(offsets), tuple(sizes))
    return NamedBlock(name, tuple(full.shape), block, full[block.slices].clone())


def tensors() -> dict[str, torch.Tensor]:
    """One of each kind: matrix, scalar, empty, half precision, integers, booleans."""
    return {
        "matrix": torch.arange(24.0).reshape(6, 4),
        "cube": torch.arange(60.0).reshape(4, 5, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "half": torch.linspace(-1, 1, 5).bfloat16(),
        "ids": torch.tensor([2**40, -1, 3]),
        "mask": torch.tensor([True, False]),
    }


MATRIX = tensors()["matrix"]


def rows(*cuts: int) -> list[NamedBlock]:
    """MATRIX in blocks of rows, cut before these rows."""
    edges = itertools.pairwise([0, *cuts, 6])
    return [part("matrix", MATRIX, (a, 0), (b - a, 4)) for a, b in edges]


def save_alone(folder: Path, step: int) -> Path:
    """Save `tensors()` as the checkpoint of `step`."""
    blocks = [whole(name, tensor) for name, tensor in tensors().items()]
    return save.save(folder, state(step), blocks, ALONE)


def read_into(path: Path, wanted: Iterable[NamedBlock]) -> None:
    load.load_blocks(path, read_manifest(path), wanted)


def edit_manifest(path: Path, edit: Callable[[dict], object]) -> None:
    """Change the manifest of a checkpoint as if it had been written so, digest included."""
    raw = json.loads((path / MANIFEST).read_text())
    edit(raw)
    manifest = Manifest.model_validate(raw)
    manifest.digest = manifest.compute_digest()
    (path / MANIFEST).write_text(manifest.model_dump_json())


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Return what the checkpoint has of `tensors()`, read into memory that held something else."""
    out = {name: torch.full_like(tensor, 1) for name, tensor in tensors().items()}
    read_into(path, [whole(name, tensor) for name, tensor in out.items()])
    return out


def run_threads(
    monkeypatch: pytest.MonkeyPatch, degree: int, action: Callable[[Axis], Any]
) -> list[Any]:
    """Run `action(world axis)` as `degree` ranks; results and exceptions in order of rank."""
    barrier = threading.Barrier(degree, timeout=20)
    values: list[Any] = [None] * degree

    def gather(value: Any, axis: Axis, what: str = "") -> list[Any]:
        values[axis.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def run(rank: int) -> Any:
        try:
            return action(Axis("world", degree, rank, tuple(range(degree)), None))
        except Exception as error:
            return error

    monkeypatch.setattr(save, "all_gather_object", gather)
    monkeypatch.setattr(load, "all_gather_object", gather)
    with ThreadPoolExecutor(degree) as pool:
        return list(pool.map(run, range(degree)))


def save_split(
    folder: Path, blocks: list[NamedBlock], monkeypatch: pytest.MonkeyPatch, step: int = 1
) -> Path:
    """Save a checkpoint with one rank per block."""
    results = run_threads(
        monkeypatch,
        len(blocks),
        lambda axis: save.save(folder, state(step), [blocks[axis.rank]], axis),
    )
    assert len(set(results)) == 1, results
    return results[0]
