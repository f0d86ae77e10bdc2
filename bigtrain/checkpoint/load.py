"""Read a checkpoint under any layout: every wanted block is put together from the stored ones."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bigtrain.checkpoint.manifest import (
    DAMAGED,
    Manifest,
    TensorEntry,
    damaged_files,
    list_checkpoints,
    read_manifest,
)
from bigtrain.comm.block import Block, NamedBlock
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.mesh import Axis
from bigtrain.errors import CheckpointError

log = logging.getLogger(__name__)


def find_last_good(folder: Path, world: Axis) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint whose files are all as they were written, or None.

    Every rank calls this; each verifies a share of the files. Damaged ones that are newer are
    named in the log and renamed, so that they are not taken for good ones later.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    faults: dict[Path, str] = {}
    for _, path in reversed(all_gather_object(list_checkpoints(folder), world)[0]):
        try:
            manifest = read_manifest(path)
            damage = damaged_files(path, manifest, world.rank, world.degree)
        except CheckpointError as error:
            damage = [str(error)]
        everywhere = all_gather_object(damage, world, "verification of a checkpoint")
        all_damage = list(dict.fromkeys(line for lines in everywhere for line in lines))
        if not all_damage:
            if world.rank == 0:
                _set_aside(faults)
            return path, manifest
        faults[path] = "; ".join(all_damage)
    if faults:
        raise CheckpointError(
            f"all checkpoints in {folder} are damaged",
            why="; ".join(faults.values()),
            mend="bring back a copy of one, or --restart (which moves this run aside)",
        )
    return None


def _set_aside(faults: dict[Path, str]) -> None:
    for path, damage in faults.items():
        log.warning("%s is damaged, using the one before: %s", path, damage)
        with contextlib.suppress(OSError):  # a read-only folder: it stays, and is named again
            path.rename(path.with_name(DAMAGED + path.name))


def load_blocks(folder: Path, manifest: Manifest, wanted: Iterable[NamedBlock]) -> None:
    """Fill the tensors of `wanted` from the checkpoint in `folder`; nothing is communicated.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or cannot be read.
    """
    wanted = list(wanted)
    missing = [b.name for b in wanted if b.name not in manifest.tensors]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors: {_some(missing)}",
            why="the checkpoint is of another model or of another optimizer",
            mend="resume with the config that wrote it (it is in its manifest)",
        )
    for block in wanted:
        entry = manifest.tensors[block.name]
        if tuple(entry.shape) != block.shape:
            raise CheckpointError(
                f"{folder}: {block.name} has shape {entry.shape}, the model {list(block.shape)}",
                why="the checkpoint is of a model of another size",
                mend="resume with the config that wrote it (it is in its manifest)",
            )
    files = {b.file for w in wanted for b in manifest.tensors[w.name].blocks}
    for file in sorted(files):
        try:
            with safe_open(folder / file, framework="pt", device="cpu") as reader:
                for block in wanted:
                    _copy(reader, file, manifest.tensors[block.name], block)
        except (OSError, SafetensorError) as error:
            mend = "use another checkpoint; `bigtrain ckpt verify` tells which are good"
            raise CheckpointError(
                f"cannot read {folder / file}", why=str(error), mend=mend
            ) from error


@torch.no_grad()
def _copy(reader: safe_open, file: str, entry: TensorEntry, wanted: NamedBlock) -> None:
    """Copy what one file has of one wanted block."""
    for stored in entry.blocks:
        if stored.file != file:
            continue
        source = Block(tuple(stored.offsets), tuple(stored.sizes))
        found = reader.get_slice(stored.key)
        if tuple(found.get_shape()) != source.sizes:
            raise SafetensorError(f"{stored.key} has shape {found.get_shape()}, not {stored.sizes}")
        common = source.intersect(wanted.block)
        if not source.sizes:  # a scalar
            wanted.tensor.copy_(reader.get_tensor(stored.key))
        elif common is not None:
            part = found[common.within(source).slices]
            wanted.tensor[common.within(wanted.block).slices].copy_(part)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
