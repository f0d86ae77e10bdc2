"""Where main parameters and the optimizer's state live, if that is not where the model is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from bigtrain.errors import BigtrainError

NewState = Callable[[int], torch.Tensor]


def state_memory(offload: str, folder: str | None, device: torch.device) -> NewState | None:
    """Return what makes zeroed fp32 tensors for the state, or None for the device's own memory.

    offload: "none"; "cpu", pinned if the model is on a GPU; "file", memory-mapped files in `folder`
    (by default where temporary files are), which the kernel writes back when memory is short. Files
    have no name, so nothing is left of them when the process ends, however it ends.
    """
    if offload == "none" or (offload == "cpu" and device.type == "cpu"):
        return None
    if offload == "cpu":
        return lambda numel: torch.zeros(numel, dtype=torch.float32, pin_memory=True)
    place = Path(folder or tempfile.gettempdir())
    return lambda numel: _mapped(place, numel)


def _mapped(folder: Path, numel: int) -> torch.Tensor:
    """Return zeros in a mapped file of `folder`.

    Raises:
        BigtrainError: the file cannot be made, or the disk has no room for it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="bigtrain-state-", dir=folder)
        try:
            # All of it now: a full disk found later would end the process by a signal.
            os.posix_fallocate(descriptor, 0, max(4 * numel, 1))
            return torch.from_file(name, shared=True, size=numel, dtype=torch.float32)
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        raise BigtrainError(
            f"cannot keep optimizer state in {folder}: {error.strerror or error}",
            why=f"it takes a file of {4 * numel / 2**20:.0f} MiB here",
            mend="set zero.offload_dir to a folder on a local disk with room",
        ) from error
