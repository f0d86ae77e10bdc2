"""Dropout whose draws belong to samples: the same for any layout and any microbatch size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.errors import BigtrainError


class Dropout(nn.Module):
    """Zero elements with probability p and scale the rest by 1 / (1 - p), in training only.

    `sample_seeds` holds one seed for each sample of the coming batch (its dim 0). Each call of
    each layer draws from streams of its own: a function of (sample seed, layer, call). Without
    seeds, or if not `per_sample`, it draws as torch's dropout does.

    What is split over ranks draws for the whole tensor and keeps its own part (`split`), so that
    all ranks together drop what one process would.
    """

    def __init__(self, p: float, *, per_sample: bool = True) -> None:
        super().__init__()
        self.p, self.per_sample = p, per_sample
        self.layer: int | None = None  # which of the model's dropout layers, counted by it
        self.sample_seeds: Sequence[int] | None = None
        self._calls = self._calls_before = 0  # in this forward, and in the one before
        self._dim, self._rank, self._degree = 0, 0, 1

    def split(self, dim: int, rank: int, degree: int) -> None:
        """Declare that inputs are part `rank` of `degree` equal parts along `dim` (not 0)."""
        self._dim, self._rank, self._degree = dim, rank, degree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        if self._degree == 1:
            return F.dropout(x, self.p) if self.sample_seeds is None else x * self._draw(x)
        shape = list(x.shape)
        shape[self._dim] *= self._degree
        whole = x.new_ones(()).expand(shape)  # no memory
        mask = F.dropout(whole, self.p) if self.sample_seeds is None else self._draw(whole)
        return x * mask.chunk(self._degree, self._dim)[self._rank]

    def _draw(self, like: torch.Tensor) -> torch.Tensor:
        """Return a mask of zeros and 1 / (1 - p), of the shape and dtype of `like`."""
        assert self.sample_seeds is not None
        assert self.layer is not None
        assert len(self.sample_seeds) == len(like)
        call = self._number_of_call()
        draw = torch.Generator(device=like.device)
        keep = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for row, seed in zip(keep, self.sample_seeds, strict=True):
            draw.manual_seed((seed + 1_000_003 * self.layer + 7_919 * call) % 2**63)
            row.bernoulli_(1 - self.p, generator=draw)
        return keep.div_(1 - self.p)

    def _number_of_call(self) -> int:
        """Return how many calls of this layer came before; activation checkpointing repeats one."""
        if torch._C._current_graph_task_id() == -1:
            self._calls += 1
            return self._calls - 1
        # Another microbatch may be about to go forward; its calls are as many.
        calls = self._calls or self._calls_before
        if calls != 1:
            raise BigtrainError(
                f"a dropout layer that is called {calls} times in a forward is recomputed",
                why="activation checkpointing repeats a call, and does not tell which one",
                mend="use a dropout layer of its own in each place",
            )
        return 0

    def extra_repr(self) -> str:
        return f"p={self.p}" + f", part {self._rank} of {self._degree}" * (self._degree > 1)


def number_dropout(model: nn.Module) -> None:
    """Number the dropout layers of a whole model, before it is cut into stages."""
    for layer, module in enumerate(_per_sample(model)):
        module.layer = layer


def seed_dropout(model: nn.Module, sample_seeds: Sequence[int], *, recompute: bool = False) -> None:
    """Give all dropout layers of `model` the seeds of the samples of the coming batch.

    recompute: the batch had its forward, which activation checkpointing is about to repeat.
    """
    layers = _per_sample(model)
    if any(module.layer is None for module in layers):
        number_dropout(model)
    for module in layers:
        module.sample_seeds = sample_seeds
        if not recompute:
            module._calls_before = module._calls or module._calls_before
            module._calls = 0


def _per_sample(model: nn.Module) -> list[Dropout]:
    return [m for m in model.modules() if isinstance(m, Dropout) and m.per_sample]
