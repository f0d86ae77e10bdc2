"""A shuffle without state: where sample i of an epoch is, as a pure function of (seed, epoch, i).

A keyed bijection on [0, 2^k), made of Feistel rounds, restricted to [0, n) by walking along its
cycles (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Nothing is stored, so a
resume costs nothing and any rank can look up any sample.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6
_MASK = 2**64 - 1


def shuffled(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return which samples of the endless stream stand at `positions` (int64, any shape).

    The stream is epoch after epoch of all n samples, each epoch in an order of its own.
    """
    assert n > 0
    epochs, within = np.divmod(positions.astype(np.int64), n)
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = permute(within[chosen], n, _mix(seed ^ _mix(int(epoch) + 1)))
    return out


def permute(values: np.ndarray, n: int, key: int) -> np.ndarray:
    """Return the images of `values`, all in [0, n), under the permutation of [0, n) named `key`."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = np.array([_mix(key + round_) for round_ in range(_ROUNDS)], dtype=np.uint64)
    out = values.astype(np.uint64)
    todo = np.ones(out.shape, dtype=bool)
    while todo.any():
        out[todo] = _feistel(out[todo], half, keys)
        todo = out >= n
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    mask = np.uint64((1 << half) - 1)
    left, right = x >> np.uint64(half), x & mask
    for key in keys:
        left, right = right, left ^ (_mix_array(right + key) & mask)
    return (left << np.uint64(half)) | right


def _mix_array(x: np.ndarray) -> np.ndarray:
    """Scramble 64 bits (the finalizer of splitmix64); unsigned arithmetic wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed that depends on all `parts` and their order."""
    state = 0
    for part in parts:
        state = _mix(state ^ _mix(part & _MASK))
    return state >> 1
