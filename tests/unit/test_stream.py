"""The data cursor: one number says which samples come next, on any number of ranks."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

from bigtrain.data.permutation import shuffled
from bigtrain.data.stream import TrainStream, rank_positions, validation_batches

SEED, LENGTH = 5, 29
SHARES = [  # (degree, microbatches per rank) of a global batch of 16
    (degree, count) for degree in (1, 2, 4, 8) for count in (1, 2, 4, 8, 16) if degree * count <= 16
]


class Squares(torch.utils.data.Dataset):
    """Sample i is i * i, and a number that is drawn for it."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"square": torch.tensor(index * index), "drawn": torch.rand(())}


class SquaresInBatches(Squares):
    """The same, giving whole batches."""

    def read_batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
        return {"square": torch.tensor([i * i for i in indices])}


def stream(dataset: Squares, cursor: int = 0, rank: int = 0, **kwargs: int) -> TrainStream:
    settings = {"microbatch": 4, "num_microbatches": 2, "degree": 2, **kwargs}
    return TrainStream(dataset, seed=SEED, cursor=cursor, rank=rank, **settings)


def take(source: TrainStream, count: int) -> list[tuple[list[int], dict[str, list]]]:
    batches = itertools.islice(iter(source.next, None), count)
    return [(ids.tolist(), {k: v.tolist() for k, v in batch.items()}) for ids, batch in batches]


@pytest.mark.parametrize(("degree", "count"), SHARES)
def test_a_step_is_the_same_samples_on_any_number_of_ranks(degree: int, count: int) -> None:
    """Positions [cursor, cursor + 16), each read once, however they are shared."""
    microbatch = 16 // (degree * count)
    for cursor in (0, 16, 160):
        shares = [
            rank_positions(cursor, micro, microbatch, rank, degree)
            for micro in range(count)
            for rank in range(degree)
        ]
        assert np.concatenate(shares).tolist() == list(range(cursor, cursor + 16))


@pytest.mark.parametrize(("degree", "count"), SHARES)
def test_all_streams_together_read_the_shuffled_stream(degree: int, count: int) -> None:
    """Three steps over all ranks: the first 48 samples, nothing repeated or skipped."""
    microbatch = 16 // (degree * count)
    seen: list[int] = []
    for rank in range(degree):
        source = stream(
            Squares(), rank=rank, microbatch=microbatch, num_microbatches=count, degree=degree
        )
        for ids, batch in take(source, 3 * count):
            assert batch["square"] == [i * i for i in ids]
            seen += ids
    assert sorted(seen) == sorted(shuffled(np.arange(48), LENGTH, SEED).tolist())


@pytest.mark.parametrize("step", [0, 1, 2, 5, 7])
def test_resume_continues_exactly(step: int) -> None:
    """From any step, at another number of ranks too: ids, tensors and random draws."""
    whole = take(stream(Squares(), microbatch=2, num_microbatches=8, degree=1), 10 * 8)
    rest = take(stream(Squares(), step * 16, microbatch=2, num_microbatches=8, degree=1), 8)
    assert rest == whole[step * 8 : step * 8 + 8]
    by_two = [
        take(stream(Squares(), step * 16, rank, microbatch=2, num_microbatches=4), 4)
        for rank in range(2)
    ]
    assert [batch for pair in zip(*by_two, strict=True) for batch in pair] == rest


@pytest.mark.parametrize("dataset", [Squares(), SquaresInBatches()])
def test_workers_give_the_same_batches(dataset: Squares) -> None:
    """Loader processes change nothing, not even random augmentations."""
    source = stream(dataset, 8, num_workers=2)
    try:
        assert take(source, 6) == take(stream(dataset, 8), 6)
    finally:
        source._batches._shutdown_workers()  # see the test below


def test_an_unused_stream_ends_at_once() -> None:
    """And its loader processes with it."""
    source = stream(Squares())
    alive = weakref.ref(source)
    gc.disable()
    try:
        del source
        assert alive() is None
    finally:
        gc.enable()


def test_draws_differ_between_epochs() -> None:
    """A sample that comes again is augmented anew."""
    source = stream(Squares(), microbatch=LENGTH, num_microbatches=1, degree=1)
    first, second = take(source, 2)
    draws = [dict(zip(ids, batch["drawn"], strict=True)) for ids, batch in (first, second)]
    assert draws[0].keys() == draws[1].keys()
    assert all(draws[0][i] != draws[1][i] for i in draws[0])


def test_batch_may_be_longer_than_the_dataset() -> None:
    """Then a step spans epochs."""
    ((ids, batch),) = take(stream(Squares(), microbatch=70, num_microbatches=1, degree=1), 1)
    assert len(ids) == 70
    assert set(ids) == set(range(LENGTH))
    assert batch["square"] == [i * i for i in ids]


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("num_samples", [1, 10, 16, 1000])
@pytest.mark.parametrize("dataset", [Squares(), SquaresInBatches()])
def test_validation_reads_each_sample_once(dataset: Squares, num_samples: int, degree: int) -> None:
    """The same ones whatever the degree, shared among the ranks; a rank may have none."""
    seen: list[int] = []
    for rank in range(degree):
        for count, batch in validation_batches(
            dataset, num_samples, seed=SEED, microbatch=3, rank=rank, degree=degree
        ):
            assert len(batch["square"]) == count
            seen += batch["square"].tolist()
    chosen = shuffled(np.arange(min(num_samples, LENGTH)), LENGTH, seed=0)
    assert sorted(seen) == sorted(int(i) ** 2 for i in chosen)
