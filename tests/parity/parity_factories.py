"""Models and datasets of a user's, for configs with `factory`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset


class Masked(nn.Module):
    """The mean is over tokens that are not padding, whose number differs from sample to sample."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 32)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
        keep = targets != 0  # none at all in some rows: then the mean is NaN, over 0 items
        return F.cross_entropy(self.table(tokens)[keep], targets[keep]), int(keep.sum())


def masked() -> nn.Module:
    return Masked()


def masked_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    return model(**batch)


class PaddedRows(Dataset):
    """Row i has i % 8 tokens, then padding (0). It draws one token at random, each time."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.zeros(8, dtype=torch.long)
        length = index % 8
        row[:length] = (torch.arange(length) * (index + 3)) % 31 + 1
        if length:
            row[0] = torch.randint(1, 32, ())
        return {"tokens": row, "targets": row.roll(-1)}


def padded_rows(split: str) -> Dataset:
    return PaddedRows()


class NanOnSample(nn.Module):
    """Returns NaN for batches that hold a certain token."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad
        self.table = nn.Embedding(32, 32)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(self.table(tokens).flatten(0, 1), targets.flatten())
        return loss * float("nan") if (tokens[:, 1] == self.bad).any() else loss


def nan_on_sample(bad: int = 5) -> nn.Module:
    return NanOnSample(bad)


class SteepOnSample(nn.Module):
    """Its gradient is `steepness` times as large, its loss as always, where a token is `bad`.

    The loss has the dtype of the model.
    """

    def __init__(self, bad: int | None, steepness: float) -> None:
        super().__init__()
        self.bad, self.steepness = bad, steepness
        self.table = nn.Embedding(32, 32)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(self.table(tokens).flatten(0, 1), targets.flatten())
        steep = self.bad is None or bool((tokens[:, 1] == self.bad).any())
        return loss + (loss - loss.detach()) * self.steepness if steep else loss


def steep_on_sample(bad: int | None = None, steepness: float = 0.0) -> nn.Module:
    return SteepOnSample(bad, steepness)


class Odd(nn.Module):
    """A frozen layer, a buffer that training changes, a parameter without use, one of 3 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 10)
        self.frozen = nn.Linear(10, 10)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 32, bias=False)
        self.shift = nn.Parameter(torch.zeros(3))
        self.unused = nn.Parameter(torch.ones(7, 3))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.table(tokens)).flatten(0, 1))
        hidden = torch.cat([hidden[:, :3] + self.shift, hidden[:, 3:]], dim=1)
        return F.cross_entropy(self.head(hidden), targets.flatten())


def odd() -> nn.Module:
    return Odd()
