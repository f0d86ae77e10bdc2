"""Ratings of films, by a model most of which is one large embedding table on parameter servers.

`bigtrain launch configs/recommender_servers.yaml` trains it on MovieLens 100K
(https://doi.org/10.1145/2827872), out of the wheel of the package recbole, 2 MB, which pip fetches
once. Each rating is eight features, such as the user, the film, the user with a genre; each of them
is hashed to one of a hundred million rows, so that no worker could hold the table, and none does.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from bigtrain import ServerEmbedding
from bigtrain.errors import DataError

PACKAGE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/ml-100k."
NUM_FEATURES = 8


class Recommender(nn.Module):
    """Predicts a rating from the rows of its features: by what each tells, what each two tell
    together (a factorization machine, https://doi.org/10.1109/ICDM.2010.127), and a small MLP."""

    def __init__(self, rows: int, size: int, hidden: int, mean: float = 3.53) -> None:
        super().__init__()
        self.table = ServerEmbedding(rows, size, scale=0.01)
        self.each = nn.Linear(size, 1)
        self.mlp = nn.Sequential(
            nn.Linear(NUM_FEATURES * size, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )
        self.mean = mean

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        found = self.table(features % self.table.num_rows)  # [batch, features, size]
        pairs = (found.sum(1) ** 2 - (found**2).sum(1)).sum(1) / 2
        return self.mean + self.each(found.sum(1))[:, 0] + pairs + self.mlp(found.flatten(1))[:, 0]


def build_recommender(rows: int = 100_000_000, size: int = 16, hidden: int = 64) -> nn.Module:
    """Return the model."""
    return Recommender(rows, size, hidden)


def squared_error(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of a batch, in stars squared."""
    return F.mse_loss(model(batch["features"]).float(), batch["rating"].float())


class Ratings(Dataset):
    """Ratings of 1 to 5 stars; every tenth one is held out."""

    def __init__(self, features: np.ndarray, ratings: np.ndarray) -> None:
        self.features, self.ratings = torch.from_numpy(features), torch.from_numpy(ratings)

    def __len__(self) -> int:
        return len(self.ratings)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"features": self.features[index], "rating": self.ratings[index]}


def movielens(split: str, cache: str = ".cache") -> Dataset:
    """Return the training or the held-out ratings. cache: folder for the wheel."""
    wheel = _wheel(Path(cache))
    users, films = _by_id(wheel, "user"), _by_id(wheel, "item")
    ratings = _rows(wheel, "inter")
    held_out = np.arange(len(ratings)) % 10 == 0
    chosen = np.flatnonzero(held_out if split == "validation" else ~held_out)
    some = [ratings[index] for index in chosen]
    features = [_features(users[user], films[film]) for user, film, *_ in some]
    stars = np.array([float(rating) for _, _, rating, *_ in some], dtype=np.float32)
    return Ratings(np.array(features, dtype=np.int64), stars)


def _features(user: list[str], film: list[str]) -> list[int]:
    name, age, gender, occupation, _ = user
    title, _, year, genres = film
    first, *others = genres.split() or ["unknown"]
    second = others[0] if others else first
    pairs = [
        ("user", name),
        ("film", title),
        ("user, genre", name, first),
        ("user, second genre", name, second),
        ("user, years", name, year[:3]),
        ("film, age", title, str(int(age) // 10)),
        ("film, gender", title, gender),
        ("film, occupation", title, occupation),
    ]
    return [_hash(pair) for pair in pairs]


def _hash(words: tuple[str, ...]) -> int:
    """Return the same number for the same words, in every process (FNV-1a, 63 bits)."""
    number = 0xCBF29CE484222325
    for byte in "|".join(words).encode():
        number = ((number ^ byte) * 0x100000001B3) % 2**64
    return (number ^ (number >> 32)) % 2**63


def _by_id(wheel: Path, kind: str) -> dict[str, list[str]]:
    return {row[0]: row for row in _rows(wheel, kind)}


def _rows(wheel: Path, kind: str) -> list[list[str]]:
    with zipfile.ZipFile(wheel) as archive, archive.open(INSIDE + kind) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8")
        return list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]


def _wheel(cache: Path) -> Path:
    """Return the wheel that has the data, fetched by pip if it is not in `cache` yet."""
    found = cache / f"{PACKAGE.replace('==', '-')}.whl"
    if found.exists():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*fetch, PACKAGE], capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise DataError(
                f"pip could not fetch {PACKAGE}, whose wheel has the ratings",
                why=(done.stderr.strip().splitlines() or ["it says nothing"])[-1],
                mend=f"fetch it elsewhere (pip download --no-deps {PACKAGE}), and put it there "
                f"as {found}",
            )
        os.replace(wheels[0], found)  # another process may have done the same meanwhile
    return found
