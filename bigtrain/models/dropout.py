"""Dropout whose draws belong to samples: the same for any layout and any microbatch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn


class Dropout(nn.Module):
    """Zero elements with probability p and scale the rest by 1 / (1 - p), in training only.

    `sample_seeds` holds one seed for each sample of the coming batch (its dim 0). Each call of
    each layer draws from streams of its own: a function of (sample seed, layer, call). Without
    seeds it is torch's dropout.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0
        self.sample_seeds: Sequence[int] | None = None
        self._calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self.sample_seeds is None:
            return F.dropout(x, self.p)
        assert len(self.sample_seeds) == len(x)
        draw = torch.Generator(device=x.device)
        keep = torch.empty_like(x)
        for row, seed in zip(keep, self.sample_seeds, strict=True):
            draw.manual_seed((seed + 1_000_003 * self.layer + 7_919 * self._calls) % 2**63)
            row.bernoulli_(1 - self.p, generator=draw)
        self._calls += 1
        return x * keep / (1 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def seed_dropout(model: nn.Module, sample_seeds: Sequence[int]) -> None:
    """Give all dropout layers of `model` the seeds of the samples of the coming batch."""
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    for layer, module in enumerate(layers):
        module.layer = layer
        module.sample_seeds = sample_seeds
        module._calls = 0
