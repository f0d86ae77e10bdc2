"""The manifest of a checkpoint: which block of which tensor is in which file. No torch.

A checkpoint is a folder `step-00000100` with one safetensors file per writing rank and
`manifest.json`, which is written last. In a file, the block of a tensor that starts at offsets
(i, j) has the key `name#i_j`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from bigtrain.errors import CheckpointError

FORMAT = "bigtrain-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
REPLACED = ".replaced"  # ends the name of a good checkpoint that a new one of its step replaces
DAMAGED = "damaged-"  # begins the name of one that a resume has found damaged


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, ser_json_inf_nan="constants")


class BlockEntry(_Entry):
    offsets: list[int]
    sizes: list[int]
    file: str
    key: str


class TensorEntry(_Entry):
    shape: list[int]
    dtype: str
    blocks: list[BlockEntry]


class FileEntry(_Entry):
    size: int
    sha256: str


class LossScaleEntry(_Entry):
    scale: float
    good_steps: int


class State(_Entry):
    """What a run needs besides tensors to go on exactly where it was.

    cursor: samples consumed. seed and cursor are all there is to the random state, since every
    random number of a run is a function of the seed and of stream positions. loss_scale: that of
    fp16, if it is dynamic. compression: where a run is that begins to compress, or has begun.
    """

    step: int
    cursor: int
    seed: int
    num_updates: int
    data_fingerprint: str
    layout: dict[str, int]
    config: dict[str, Any]
    loss_scale: LossScaleEntry | None = None
    compression: dict[str, Any] | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what a bigtrain that knows nothing of it would refuse."""
        fields: dict[str, Any] = serialize(self)
        if self.compression is None:
            del fields["compression"]
        return fields


class Manifest(_Entry):
    """All of a checkpoint but the bytes of its tensors; `digest` covers all other fields."""

    format: str = FORMAT
    version: int = VERSION
    state: State
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]
    digest: str = ""

    def compute_digest(self) -> str:
        """Return the hash of everything but the digest."""
        return _digest_of(json.loads(self.model_dump_json()))

    @property
    def num_bytes(self) -> int:
        """Size of all tensor files."""
        return sum(entry.size for entry in self.files.values())


def _digest_of(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: it is missing, damaged, of another format, or its blocks leave gaps.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{folder} has no readable {MANIFEST}", why=str(error), mend="use another checkpoint"
        ) from error
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no bigtrain manifest", mend="use another checkpoint")
        if raw.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {raw.get('version')}, this bigtrain reads {VERSION}",
                mend="read it with the bigtrain that wrote it",
            )
        manifest = Manifest.model_validate(raw)
    except (ValueError, RecursionError) as error:  # of json, and of pydantic
        why = str(error).split("\n")[0]
        mend = "use another checkpoint; `bigtrain ckpt list` shows them"
        raise CheckpointError(f"{path} is damaged", why=why, mend=mend) from error
    if manifest.digest != _digest_of(raw):  # as written: older ones lack keys of today
        raise CheckpointError(
            f"{path} is damaged",
            why="its content is another than was written (digest differs)",
            mend="use another checkpoint; `bigtrain ckpt list` shows them",
        )
    for name, tensor in manifest.tensors.items():
        fault = _fault(tensor, manifest.files)
        if fault:
            raise CheckpointError(f"{path}: {name} {fault}", mend="use another checkpoint")
    return manifest


def _fault(tensor: TensorEntry, files: dict[str, FileEntry]) -> str:
    """Return what is wrong with the blocks of a tensor: they must tile it."""
    for block in tensor.blocks:
        if not len(block.offsets) == len(block.sizes) == len(tensor.shape):
            return "has a block with another number of dims"
        ends = [o + s for o, s in zip(block.offsets, block.sizes, strict=True)]
        if min((*block.offsets, *block.sizes), default=0) < 0 or any(
            map(int.__gt__, ends, tensor.shape)
        ):
            return "has a block that reaches beyond it"
        if block.file not in files:
            return f"has a block in {block.file}, which is not part of the checkpoint"
    by_first_row = sorted(tensor.blocks, key=lambda block: block.offsets)
    for index, one in enumerate(by_first_row):
        for other in itertools.islice(by_first_row, index + 1, None):
            if other.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break  # neither this one nor any after it can reach back
            sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            if math.prod(tensor.shape) and all(a < b + m and b < a + n for a, n, b, m in sides):
                return "has blocks that overlap"
    covered = sum(math.prod(block.sizes) for block in tensor.blocks)
    if covered != math.prod(tensor.shape):
        return f"has blocks for {covered} of {math.prod(tensor.shape)} elements"
    return ""


def damaged_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """Return what is wrong with the tensor files, one line each; of `parts` readers, for one."""
    damage = []
    for index, (name, entry) in enumerate(sorted(manifest.files.items())):
        if index % parts != part:
            continue
        path = folder / name
        try:
            if not path.is_file():
                damage.append(f"{path} is missing")
            elif path.stat().st_size != entry.size:
                damage.append(f"{path} has {path.stat().st_size} bytes instead of {entry.size}")
            elif sha256_of(path) != entry.sha256:
                damage.append(f"{path} has another content than was written (sha256 differs)")
        except OSError as error:
            damage.append(f"{path} cannot be read: {error.strerror or error}")
    return damage


def sha256_of(path: Path) -> str:
    """Return the hash of a file as `sha256sum` prints it."""
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the published checkpoints in `folder`, oldest first."""
    found = []
    for path in folder.glob("step-*"):
        match = re.fullmatch(rf"step-([0-9]+)({re.escape(REPLACED)})?", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, key=lambda item: (item[0], REPLACED not in item[1].name))


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint of `step`."""
    return f"step-{step:08d}"
