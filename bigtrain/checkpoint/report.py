"""What `bigtrain ckpt` prints. No torch."""

from __future__ import annotations

from pathlib import Path

from bigtrain.checkpoint.manifest import (
    MANIFEST,
    damaged_files,
    list_checkpoints,
    read_manifest,
)
from bigtrain.errors import CheckpointError


def find(folder: str) -> list[Path]:
    """Return the checkpoints that `folder` is or holds, oldest first.

    Raises:
        CheckpointError: there are none.
    """
    path = Path(folder)
    if (path / MANIFEST).exists():
        return [path]
    for place in (path / "checkpoints", path):
        found = [checkpoint for _, checkpoint in list_checkpoints(place)]
        if found:
            return found
    raise CheckpointError(
        f"there is no checkpoint in {folder}",
        mend="give a run folder, its checkpoints folder, or one step-NNNNNNNN folder",
    )


def list_lines(folder: str) -> list[str]:
    """Return one line per checkpoint."""
    lines = []
    for path in find(folder):
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            lines.append(f"{path}  damaged: {error.problem.what}")
            continue
        state = manifest.state
        lines.append(
            f"{path}  step {state.step}, {state.cursor} samples, {len(manifest.tensors)} tensors, "
            f"{manifest.num_bytes / 2**20:.1f} MiB in {len(manifest.files)} file(s)"
        )
    return lines


def inspect_lines(folder: str) -> list[str]:
    """Return everything that the manifest of the newest checkpoint says, for people."""
    path = find(folder)[-1]
    manifest = read_manifest(path)
    state = manifest.state
    layout = " x ".join(f"{axis}={degree}" for axis, degree in state.layout.items())
    lines = [
        f"{path}",
        f"step {state.step}, {state.cursor} samples consumed, {state.num_updates} updates"
        + (f", loss scale {state.loss_scale.scale:g}" if state.loss_scale else ""),
        f"seed {state.seed}, data {state.data_fingerprint}, written by {layout}",
        "",
    ]
    for name, file in manifest.files.items():
        lines.append(f"{name}  {file.size:,} bytes  sha256 {file.sha256}")
    lines.append("")
    width = max((len(name) for name in manifest.tensors), default=0)
    for name, tensor in sorted(manifest.tensors.items()):
        shape = " x ".join(map(str, tensor.shape)) or "scalar"
        blocks = "" if len(tensor.blocks) == 1 else f"  in {len(tensor.blocks)} blocks"
        lines.append(f"{name:<{width}}  {tensor.dtype}  {shape}{blocks}")
    return lines


def verify_lines(folder: str) -> tuple[list[str], bool]:
    """Return a line per checkpoint, and whether any is damaged."""
    lines, damaged = [], False
    for path in find(folder):
        try:
            damage = damaged_files(path, read_manifest(path))
        except CheckpointError as error:
            damage = [str(error)]
        damaged = damaged or bool(damage)
        lines += [f"{path}  good"] if not damage else [f"{path}  DAMAGED: {d}" for d in damage]
    return lines, damaged
