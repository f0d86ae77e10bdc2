"""The data cursor: which samples a rank reads in a step, as a function of one number.

The cursor counts the samples that the run has consumed. Global batch `b` starting at cursor `c` is
positions [c, c + b) of the endless shuffled stream, and a rank takes the same share of every
microbatch, so the samples of a step are the same for any number of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from bigtrain.data.permutation import derive_seed, shuffled
from bigtrain.errors import BigtrainError, DataError

_VALIDATION_SHUFFLE = 0


def rank_positions(cursor: int, micro: int, microbatch: int, rank: int, degree: int) -> np.ndarray:
    """Return the stream positions of microbatch number `micro` of the step at `cursor`, for `rank`.

    Microbatches of all ranks lie side by side: position = cursor + (micro * degree + rank) *
    microbatch + 0, 1, ...
    """
    first = cursor + (micro * degree + rank) * microbatch
    return np.arange(first, first + microbatch, dtype=np.int64)


def seed_everything(seed: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def stream_positions(
    cursor: int, microbatch: int, num_microbatches: int, rank: int, degree: int
) -> Iterator[np.ndarray]:
    """Yield the positions of microbatch after microbatch of `rank`, step after step, for ever."""
    while True:
        for micro in range(num_microbatches):
            yield rank_positions(cursor, micro, microbatch, rank, degree)
        cursor += microbatch * num_microbatches * degree


class TrainStream:
    """Endless batches for one data-parallel rank, from `cursor` on.

    `next()` gives (sample ids, batch). Random augmentations of the dataset are seeded per
    (seed, position), so they too are the same for any number of ranks and loader processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        cursor: int,
        microbatch: int,
        num_microbatches: int,
        rank: int,
        degree: int,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        plan = (cursor, microbatch, num_microbatches, rank, degree)
        self._seed, self._length = seed, len(dataset)  # type: ignore[arg-type]
        self._positions = stream_positions(*plan)
        self._batches = iter(
            DataLoader(
                _Positioned(dataset, seed, self._length),
                batch_sampler=(positions.tolist() for positions in stream_positions(*plan)),
                collate_fn=_as_it_is,
                num_workers=num_workers,
                pin_memory=pin_memory,
            )
        )

    def next(self) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        """Return the ids of the next microbatch and its tensors (batch first).

        Raises:
            DataError: the dataset gave something else than a dict of tensors, or raised it.
        """
        ids = shuffled(next(self._positions), self._length, self._seed)
        batch = next(self._batches)
        if isinstance(batch, BigtrainError):
            raise batch
        return ids, batch


class _Positioned(Dataset):
    """A dataset indexed by stream position: looks up the shuffled sample and seeds its draws."""

    def __init__(self, dataset: Dataset, seed: int, length: int) -> None:
        self.dataset, self.seed, self.length = dataset, seed, length

    def __getitems__(self, positions: list[int]) -> Any:
        ids = shuffled(np.asarray(positions), self.length, self.seed).tolist()
        seeds = [derive_seed(self.seed, 1, position) for position in positions]
        try:
            return _collate(_fetch(self.dataset, ids, seeds))
        except BigtrainError as error:
            # As a value: a loader process would wrap what is raised into a traceback as text.
            return error

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])


def validation_batches(
    dataset: Dataset,
    num_samples: int,
    *,
    seed: int,
    microbatch: int,
    rank: int,
    degree: int,
    even: bool = False,
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Yield (samples, batch) of this rank's share of `num_samples` samples from all of `dataset`.

    They are the same ones for every run, seed and layout, scattered by a fixed shuffle. What the
    dataset draws for sample i is a function of (seed, i). With `even` all ranks have as many
    batches: one that has none left yields the first again, as (0, batch).
    """
    length = len(dataset)  # type: ignore[arg-type]
    total = min(num_samples, length)
    chosen = shuffled(np.arange(total), length, _VALIDATION_SHUFFLE)
    for first in range(0, total, microbatch * degree):
        start = first + rank * microbatch
        indices = chosen[start : start + microbatch].tolist()
        count = len(indices)
        if not count:
            if not even:
                return
            indices = chosen[:microbatch].tolist()
        seeds = [derive_seed(seed, 3, index) for index in indices]
        yield count, _collate(_fetch(dataset, indices, seeds))


def _fetch(dataset: Any, indices: list[int], seeds: list[int]) -> Any:
    """Return samples, each with its draws seeded, or the batch of a dataset that draws nothing.

    A dataset says that it draws nothing by having `read_batch(indices)`.
    """
    if hasattr(dataset, "read_batch"):
        return dataset.read_batch(indices)
    samples = []
    for index, seed in zip(indices, seeds, strict=True):
        seed_everything(seed)
        samples.append(dataset[index])
    return samples


def _collate(samples: Any) -> dict[str, torch.Tensor]:
    """Stack samples, unless the dataset has done so."""
    mend = "let __getitem__ return a dict of tensors, like {'images': ..., 'labels': ...}"
    if not isinstance(samples, dict) and not isinstance(samples[0], dict):
        raise DataError(
            f"a sample of the dataset is a {type(samples[0]).__name__}",
            where="data.factory",
            why="a batch is passed to the model by name: model(**batch)",
            mend=mend,
        )
    try:
        if not isinstance(samples, dict) and any(s.keys() != samples[0].keys() for s in samples):
            raise KeyError(f"the keys are {', '.join(sorted({str(list(s)) for s in samples}))}")
        batch = samples if isinstance(samples, dict) else default_collate(samples)
    except (AttributeError, TypeError, RuntimeError, KeyError, ValueError) as error:
        raise DataError(
            "the samples of a batch cannot be stacked",
            where="data.factory",
            why=str(error).split("\n")[0],
            mend="give all samples the same keys, and tensors of the same shape (pad them)",
        ) from error
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise DataError(
                f"{name} of a batch is a {type(value).__name__}, not a tensor",
                where="data.factory",
                mend=mend,
            )
    return batch


def _as_it_is(batch: Any) -> Any:
    return batch
