"""A model whose steps take a fixed time, more of it on one worker: for `servers.py straggler`."""

from __future__ import annotations

import os
import time

import torch
from torch import nn


class Uneven(nn.Module):
    """Sleeps `seconds` in each forward; `times` as long on worker `slow`."""

    def __init__(self, seconds: float, slow: int, times: float) -> None:
        super().__init__()
        mine = int(os.environ.get("BIGTRAIN_WORKER", "0"))
        self.seconds = seconds * (times if mine == slow else 1.0)
        self.body = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return (self.body(x).squeeze(-1) - y).square().mean()


class Points(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.sin(torch.arange(16) * (index + 1.0))
        return {"x": x, "y": x[0] - x[1]}


def data(split: str) -> torch.utils.data.Dataset:
    """Return points of a line, the same for every split."""
    return Points()


def model(seconds: float, slow: int, times: float) -> nn.Module:
    return Uneven(seconds, slow, times)
