"""A model of bags of ids with a table, on servers or its own, named by configs as `bags:...`."""

import time
import zlib

import torch
from torch import nn
from torch.utils.data import Dataset

from bigtrain.server.embedding import ServerEmbedding
from bigtrain.server.rows import initial_rows

ROWS, SIZE, SCALE = 1000, 8, 0.3


class Bags(nn.Module):
    """Predicts a number from the mean of the rows of eight ids."""

    def __init__(self, served: bool, rows: int, slow: float, size: int) -> None:
        super().__init__()
        self.slow = slow
        self.table: nn.Module
        if served:
            self.table = ServerEmbedding(rows, size, SCALE)
        else:  # what servers begin with: by the seed of the run, 1234, and the name
            first = initial_rows(
                torch.arange(rows), size, SCALE, 1234 * 0x10001 + zlib.crc32(b"table")
            )
            self.table = nn.Embedding(rows, size, _weight=first)
        self.head = nn.Linear(size, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        time.sleep(self.slow if self.training else 0.0)
        return self.head(self.table(ids).mean(1))[:, 0]


def bags(served: bool = True, rows: int = ROWS, slow: float = 0.0, size: int = SIZE) -> nn.Module:
    """The factory of the config."""
    return Bags(served, rows, slow, size)


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return ((model(batch["ids"]) - batch["target"]) ** 2).mean()


class Numbers(Dataset):
    """Ids in 0 to ROWS, of which small ones are more frequent."""

    def __init__(self, most: int) -> None:
        draw = torch.Generator().manual_seed(5)
        self.ids = (torch.rand(400, 8, generator=draw) ** 3 * most).long()
        self.targets = torch.sin(self.ids.float()).sum(1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"ids": self.ids[index], "target": self.targets[index]}


def numbers(split: str, most: int = ROWS) -> Dataset:
    """The factory of the config."""
    return Numbers(most)
