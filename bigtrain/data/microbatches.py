"""The microbatches of a step, loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of this rank: ids of its samples, tensors, and its places in the stream."""

    ids: np.ndarray
    batch: dict[str, torch.Tensor]
    places: list[int]


class Microbatches(Sequence[dict[str, torch.Tensor]]):
    """The microbatches of a step, each loaded when it is asked for, once."""

    def __init__(self, load: Callable[[int], Microbatch], number: int) -> None:
        self._load, self._number = load, number
        self._ready: dict[int, dict[str, torch.Tensor]] = {}
        self.ids: dict[int, np.ndarray] = {}
        self.places: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, number: Any) -> Any:
        while len(self.ids) <= number:
            index = len(self.ids)
            micro = self._load(index)
            self.ids[index], self.places[index] = micro.ids, micro.places
            self._ready[index] = micro.batch
        return self._ready.pop(number)
