"""Buffers of a model (running means and the like): the first rank's are everybody's."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.comm.collectives import broadcast
from bigtrain.comm.mesh import Axis


class ModelBuffers:
    """The saved buffers of `model`, kept equal over `axis`, and how they last were."""

    def __init__(self, model: nn.Module, axis: Axis) -> None:
        self._model, self._axis = model, axis
        self._published: list[torch.Tensor] = []

    def equalize(self) -> None:
        """Give every rank the buffers of the first rank: one broadcast per dtype."""
        buffers = self._buffers()
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for buffer in same])
            broadcast(flat, self._axis, "broadcast of the buffers")
            for buffer, part in zip(same, flat.split([b.numel() for b in same]), strict=True):
                buffer.copy_(part.view(buffer.shape))
        self._published = [buffer.clone() for buffer in buffers]

    def restore(self) -> None:
        """Let them be as they were when last made equal."""
        for buffer, before in zip(self._buffers(), self._published, strict=True):
            buffer.copy_(before)

    def _buffers(self) -> list[torch.Tensor]:
        # Looked up each time, since a module may put a new tensor in a buffer's place.
        saved = self._model.state_dict(keep_vars=True)
        return [buffer for name, buffer in self._model.named_buffers() if name in saved]
