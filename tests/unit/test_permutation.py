"""The shuffle without state."""

from __future__ import annotations

import numpy as np
import pytest

from bigtrain.data.permutation import derive_seed, permute, shuffled


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 4097, 65537])
def test_permute_is_a_bijection(n: int) -> None:
    for key in (0, 1, 2**64 - 1):
        assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


def test_every_epoch_has_every_sample_once() -> None:
    n = 37
    epochs = shuffled(np.arange(5 * n), n, seed=3).reshape(5, n)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (5, 1)))


def test_epochs_and_seeds_differ() -> None:
    """Every epoch of every seed has an order of its own, none of them the sorted one."""
    n = 100
    orders = [shuffled(np.arange(4 * n), n, seed).reshape(4, n) for seed in range(4)]
    rows = {tuple(row) for row in np.concatenate(orders)}
    assert len(rows) == 16
    assert tuple(range(n)) not in rows


def test_a_position_does_not_depend_on_the_others() -> None:
    """Any rank can look up any sample, in any order and shape."""
    n, seed = 53, 9
    stream = shuffled(np.arange(300), n, seed)
    picked = np.array([[299, 0, 52], [53, 106, 7]])
    assert np.array_equal(shuffled(picked, n, seed), stream[picked])


def test_far_positions() -> None:
    """Late epochs of a large dataset do not overflow."""
    n = 2**40 + 1
    there = shuffled(np.array([n * 1000, n * 1000 + 1, 2**62]), n, seed=2**63 - 1)
    assert ((there >= 0) & (there < n)).all()


def test_it_looks_shuffled() -> None:
    """No trend: samples of the first half of the epoch come from the whole dataset."""
    n = 10_000
    order = shuffled(np.arange(n), n, seed=0)
    assert abs(order[: n // 2].mean() / n - 0.5) < 0.02
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
    assert (np.diff(order) == 1).mean() < 0.01


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """A checkpoint's cursor means these samples, so this may never change."""
    order = shuffled(np.arange(12), 10, seed=1234).tolist()
    assert order == [0, 6, 1, 9, 4, 5, 7, 3, 2, 8, 0, 2]


def test_derived_seeds_depend_on_all_parts_and_their_order() -> None:
    parts = [(), (0,), (0, 0), (1, 2), (2, 1), (1, 2, 0), (-1, 2), (2**64, 1)]
    seeds = [derive_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
