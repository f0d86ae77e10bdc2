"""Write a checkpoint from all ranks, and publish it whole or not at all.

1. Rank 0 makes a hidden folder, and every rank writes its share of the blocks there, flushed to
   disk and hashed. Of a block that several ranks hold, one writes it; the choice balances bytes.
2. Rank 0 collects what was written. If any rank failed, all raise the same error.
3. Rank 0 writes the manifest and renames the folder into place: the one moment of publication.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any

from safetensors.torch import save_file

from bigtrain.checkpoint.manifest import (
    MANIFEST,
    REPLACED,
    BlockEntry,
    FileEntry,
    Manifest,
    State,
    TensorEntry,
    checkpoint_name,
    list_checkpoints,
    sha256_of,
)
from bigtrain.comm.block import NamedBlock
from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.mesh import Axis
from bigtrain.errors import CheckpointError, Overtaken
from bigtrain.machine import share

_STEP = re.compile(r"step-(\d+)")
_REMOVED = ".writing-removed-"  # begins the name of what is being removed

Further = Callable[[Path], list[str]]
"""Writes files of its own to a folder, and returns their names."""


def save(
    folder: Path,
    state: State,
    blocks: Sequence[NamedBlock],
    world: Axis,
    further: Further | None = None,
    *,
    alone: bool = True,
) -> Path:
    """Save `blocks` and `state` as the checkpoint of `state.step`; every rank calls this.

    further: called on rank 0; what it writes is part of the checkpoint. alone: no other process may
    be about to save in the same folder; else each has a hidden folder of its own, which goes when
    another saves a later step.
    Communicates three small gathers over `world`. Returns the checkpoint's folder.

    Raises:
        CheckpointError: on every rank alike, if any rank could not write; nothing is published.
        Overtaken: the same, if `further` has raised it, or another has saved meanwhile.
    """
    name = checkpoint_name(state.step)
    hidden = folder / f".writing-{name}-{token_hex(4)}"
    there: set[Path] = set()  # what others have published before
    failures: list[str] = []
    if world.rank == 0:
        remove_unfinished(folder, before=None if alone else state.step)
        there = _published(folder, state.step)
        failures = _try_make(hidden)
    # All know by this that rank 0 has removed what was there, and made a folder.
    chosen = all_gather_object((hidden.name, failures), world, "start of a checkpoint")[0]
    hidden, failures = folder / chosen[0], chosen[1]
    records: list[Any] = []
    if not failures:
        record = _try_write(hidden, blocks, world.rank, further if world.rank == 0 else None)
        records = all_gather_object(record, world, "gather of what the ranks have written")
    overtaken = next((record for record in records if isinstance(record, Overtaken)), None)
    failures = failures or [f"rank {i}: {r}" for i, r in enumerate(records) if isinstance(r, str)]
    if not failures and overtaken is None and world.rank == 0:
        tensors, files = _merge(records)
        manifest = Manifest(state=state, tensors=tensors, files=files)
        manifest.digest = manifest.compute_digest()
        failures = _untiled(tensors) or _try_publish(hidden, folder / name, manifest)
    if failures and records and not alone and world.rank == 0:
        # Whoever saves a later step takes away what is of an earlier one: see `remove_unfinished`.
        is_gone = folder.is_dir() and not hidden.is_dir()
        if is_gone or not _published(folder, state.step) <= there:
            overtaken = Overtaken("another worker has saved meanwhile")
    ending = all_gather_object((failures, overtaken), world, "end of a checkpoint")[0]
    failures, overtaken = ending
    if (failures or overtaken) and world.rank == 0:
        shutil.rmtree(hidden, ignore_errors=True)
    if overtaken is not None:
        raise overtaken
    if failures:
        raise CheckpointError(
            f"the checkpoint of step {state.step} was not written to {folder}",
            why="; ".join(failures),
            mend="make room or fix the folder, then resume from the checkpoint before",
        )
    return folder / name


def _published(folder: Path, step: int) -> set[Path]:
    """Return the checkpoints of this step, and of later ones."""
    found = [path for number, path in list_checkpoints(folder) if number >= step]
    return {path for path in found if not path.name.endswith(REPLACED)}


def remove_unfinished(folder: Path, before: int | None = None) -> None:
    """Remove what a killed run left half-written; published checkpoints are not touched.

    before: only what is of an earlier step; another may be at work on the rest.
    """
    for path in folder.glob(".writing-*"):
        step = _STEP.search(path.name)
        if before is None or step is None or int(step[1]) < before:
            with contextlib.suppress(OSError):
                _remove(path)


def prune(folder: Path, newest_step: int, keep_last: int, keep_every: int | None) -> None:
    """Remove published checkpoints before `newest_step`, which was just saved.

    What stays: the last `keep_last` up to it, and steps that are multiples of `keep_every`.
    """
    until_now = [item for item in list_checkpoints(folder) if item[0] <= newest_step]
    for step, path in until_now[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder that another may be about to publish, or to remove.

    It is renamed first, so that nobody publishes what is left of it, and a kill in the middle
    leaves no half of a published one.
    """
    hidden = path
    if not path.name.startswith(_REMOVED):
        hidden = path.with_name(f"{_REMOVED}{path.name.lstrip('.')}-{token_hex(4)}")
        with contextlib.suppress(FileNotFoundError):  # another was faster
            os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


_Record = tuple[dict[str, TensorEntry], dict[str, FileEntry]]


def _try_write(
    hidden: Path, blocks: Sequence[NamedBlock], rank: int, further: Further | None
) -> _Record | Overtaken | str | None:
    """Write this rank's share; return what was written, an error (text), or None for no share."""
    mine = _share(blocks)
    if not mine and further is None:
        return None
    file = f"rank-{rank:05d}.safetensors"
    tensors: dict[str, TensorEntry] = {}
    payload = {}
    for block in mine:
        key = f"{block.name}#{'_'.join(map(str, block.block.offsets))}"
        payload[key] = block.tensor.detach().cpu().contiguous()
        offsets, sizes = list(block.block.offsets), list(block.block.sizes)
        dtype = str(block.tensor.dtype).removeprefix("torch.")
        entry = TensorEntry(shape=list(block.shape), dtype=dtype, blocks=[])
        tensors.setdefault(block.name, entry).blocks.append(
            BlockEntry(offsets=offsets, sizes=sizes, file=file, key=key)
        )
    if not hidden.is_dir():
        return f"{hidden} is not there: run.dir must be shared by all nodes"
    try:
        files = further(hidden) if further is not None else []
        if mine:
            save_file(payload, hidden / file)
            size = (hidden / file).stat().st_size
            expected = sum(t.numel() * t.element_size() for t in payload.values())
            if size < expected:
                return f"{hidden / file} has {size} bytes, fewer than the {expected} written"
            files.append(file)
        return tensors, {name: _finished(hidden / name) for name in files}
    except Overtaken as error:
        return error
    except Exception as error:  # safetensors has exceptions of its own for I/O
        return f"{type(error).__name__}: {error}"


def _finished(path: Path) -> FileEntry:
    """Bring a file to the disk, and return what a manifest says of it."""
    share(path)
    _flush(path)
    return FileEntry(size=path.stat().st_size, sha256=sha256_of(path))


def _share(blocks: Sequence[NamedBlock]) -> list[NamedBlock]:
    """Return the blocks that this rank writes: of replicas, the one with the least so far.

    All replicas of a block hold the same blocks, but not always in the same order (where shards
    differ in size, so do buckets). Taken by name, they agree without talking.
    """
    mine = []
    load: dict[tuple[int, tuple[int, ...]], list[int]] = {}  # of each set of ranks that share
    for block in sorted(blocks, key=lambda block: (block.name, block.block.offsets)):
        holders = block.num_replicas, block.stages
        bytes_so_far = load.setdefault(holders, [0] * block.num_replicas)
        writer = bytes_so_far.index(min(bytes_so_far))
        bytes_so_far[writer] += block.tensor.numel() * block.tensor.element_size()
        if writer == block.replica:
            mine.append(block)
    return mine


def _merge(
    records: Sequence[_Record | None],
) -> tuple[dict[str, TensorEntry], dict[str, FileEntry]]:
    tensors: dict[str, TensorEntry] = {}
    files: dict[str, FileEntry] = {}
    for record in records:
        if record is None:
            continue
        entries, written = record
        files |= written
        for name, tensor in entries.items():
            if name in tensors:
                tensors[name].blocks.extend(tensor.blocks)
            else:
                tensors[name] = tensor
    return tensors, files


def _untiled(tensors: dict[str, TensorEntry]) -> list[str]:
    """Return what is wrong with blocks that do not make up their tensor: one twice, or missing."""
    return [
        f"{name}: its blocks have {found} elements, not {math.prod(entry.shape)}"
        for name, entry in tensors.items()
        for found in [sum(math.prod(block.sizes) for block in entry.blocks)]
        if found != math.prod(entry.shape)
    ]


def _try_make(hidden: Path) -> list[str]:
    """Make the folder; return what is wrong."""
    try:
        hidden.mkdir(parents=True)
    except OSError as error:
        return [f"rank 0: {error}"]
    return []


def _try_publish(hidden: Path, final: Path, manifest: Manifest) -> list[str]:
    missing = [name for name in manifest.files if not (hidden / name).is_file()]
    if missing:
        return [f"rank 0 does not see {', '.join(missing)}: run.dir must be shared by all nodes"]
    try:
        with open(hidden / MANIFEST, "w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        _flush(hidden)
        old = final.with_name(final.name + REPLACED)
        if final.exists():  # saved again at the same step: at any moment one of the two is listed
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(hidden, final)
        _flush(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        return [f"rank 0: {error}"]
    return []


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
