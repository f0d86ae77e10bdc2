"""Models and datasets that are slow or misbehave on request, named by configs as `parts:...`.

Imported in the ranks (tests put this folder on their PYTHONPATH). A part that is about to be slow
leaves a file `now-<part>-<rank>` in the working folder, so that a test knows when it is in there.
"""

import os
import shutil
import time
from pathlib import Path

import torch
from torch.utils.data import Dataset

from bigtrain.models import GPT

RANK = int(os.environ.get("RANK", "0"))


def dwell(part: str, seconds: float) -> None:
    """Stay here for a while, visibly."""
    if seconds:
        Path(f"now-{part}-{RANK}").touch()
        time.sleep(seconds)


class Trouble(GPT):
    """A small GPT. Its training forwards, counted from 1 in each process, are its steps.

    fail_at, nan_at: [rank, step]. nan_from: the step from which all losses are NaN.
    """

    def __init__(
        self,
        slow: float = 0.0,
        slow_first: float = 0.0,
        slow_eval: float = 0.0,
        slow_remove: float = 0.0,
        ballast_mb: int = 0,
        fail_at: list[int] | None = None,
        nan_at: list[int] | None = None,
        nan_from: int | None = None,
        hidden_size: int = 32,
    ) -> None:
        super().__init__(max_seq_len=32, num_layers=1, hidden_size=hidden_size, num_heads=2)
        self.slow, self.slow_first, self.slow_eval = slow, slow_first, slow_eval
        self.fail_at, self.nan_at, self.nan_from = fail_at, nan_at, nan_from
        if slow_remove:  # as on a busy network file system
            remove = shutil.rmtree
            shutil.rmtree = lambda *a, **k: (dwell("remove", slow_remove), remove(*a, **k))[1]
        if ballast_mb:  # makes checkpoints slow; no float, so nothing synchronizes it
            self.register_buffer("ballast", torch.zeros(ballast_mb * 2**20, dtype=torch.uint8))
        self.num_forwards = 0

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training:
            dwell("evaluation", self.slow_eval)
            return super().forward(tokens, targets)
        self.num_forwards += 1
        if self.num_forwards == 1:
            dwell("first", self.slow_first)
        time.sleep(self.slow)
        if self.fail_at == [RANK, self.num_forwards]:
            raise ValueError(f"the model of rank {RANK} has had enough")
        loss = super().forward(tokens, targets)
        bad = self.nan_at == [RANK, self.num_forwards]
        bad = bad or (self.nan_from is not None and self.num_forwards >= self.nan_from)
        return loss * float("nan") if bad else loss


def model(**args: object) -> Trouble:
    """The factory of the config."""
    return Trouble(**args)  # type: ignore[arg-type]


class Tokens(Dataset):
    """Samples that are a function of their index."""

    items_per_sample = 32

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(0, 256, (33,), generator=draw)
        return {"tokens": ids[:-1], "targets": ids[1:]}


def data(split: str, slow_rank: int = -1) -> Tokens:
    """The factory of the config. Rank `slow_rank` takes long to open it, once: not on resume."""
    if slow_rank == RANK and not Path(f"now-data-{RANK}").exists():
        dwell("data", 30.0)
    return Tokens(400 if split == "train" else 40)
