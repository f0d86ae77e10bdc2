"""A model, a loss and a dataset of one's own: a small CNN on scikit-learn's handwritten digits.

`bigtrain launch configs/digits_cnn.yaml` trains it; the config names the three functions below.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset


def build_cnn(channels: int = 16) -> nn.Module:
    """Return a CNN for 8 x 8 grey images and ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 16, 10),
    )


def classification_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean cross entropy of a batch, in nats."""
    return F.cross_entropy(model(batch["images"]).float(), batch["labels"])


class Digits(Dataset):
    """Images [1, 8, 8] in 0 to 1, and their labels; every fifth one is held out."""

    def __init__(self, split: str) -> None:
        data = load_digits()
        held_out = torch.arange(len(data.target)) % 5 == 0
        chosen = held_out if split == "validation" else ~held_out
        self.images = torch.tensor(data.images, dtype=torch.float32)[chosen, None] / 16
        self.labels = torch.tensor(data.target)[chosen]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"images": self.images[index], "labels": self.labels[index]}


def digits(split: str) -> Dataset:
    """Return the training or the held-out digits."""
    return Digits(split)
