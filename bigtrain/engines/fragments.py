"""Which part of each parameter this rank updates under DeepSpeed, and where it lies.

A part is elements [start, stop) of the flattened parameter; what is said of it here are flat fp32
tensors of that length. Nothing is communicated.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from bigtrain.engines.flat_optimizer import FlatOptimizer


class Parts(Protocol):
    """What this rank updates of each parameter."""

    def span(self, param: Any) -> tuple[int, int]:
        """Return [start, stop)."""

    def main(self, param: Any, moment: str | None = None) -> torch.Tensor:
        """Return the fp32 values, or one of their moments."""

    def put(self, param: Any, value: torch.Tensor, moment: str | None = None) -> None:
        """Let `value` be what `main` returns."""

    def grad(self, param: Any) -> torch.Tensor:
        """Return the gradient, after the last backward of a step."""


class Whole:
    """Stage 0 in fp32: every rank updates everything."""

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self._optimizer = optimizer

    def span(self, param: Any) -> tuple[int, int]:
        return 0, param.numel()

    def main(self, param: Any, moment: str | None = None) -> torch.Tensor:
        tensor = self._optimizer.moment(param, moment) if moment else param.data
        return tensor.view(-1)

    def put(self, param: Any, value: torch.Tensor, moment: str | None = None) -> None:
        self.main(param, moment).copy_(value)

    def grad(self, param: Any) -> torch.Tensor:
        grad = torch.zeros_like(param) if param.grad is None else param.grad
        return grad.reshape(-1)


class Linked:
    """Stages 1 and 2: DeepSpeed links each parameter to its part of a flat fp32 partition."""

    def __init__(self, optimizer: FlatOptimizer) -> None:
        self._optimizer = optimizer

    def span(self, param: Any) -> tuple[int, int]:
        if param._hp_mapping is None:
            return 0, 0
        address = param._hp_mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def main(self, param: Any, moment: str | None = None) -> torch.Tensor:
        link = param._hp_mapping
        fragment: torch.Tensor = link.hp_fragment
        if moment is not None:
            (flat,) = self._optimizer.param_groups[link.param_group_index]["params"]
            place = link.hp_fragment_address
            fragment = self._optimizer.moment(flat, moment).narrow(0, place.start, place.numel)
        return fragment.data.view(-1)

    def put(self, param: Any, value: torch.Tensor, moment: str | None = None) -> None:
        self.main(param, moment).copy_(value)

    def grad(self, param: Any) -> torch.Tensor:
        start, stop = self.span(param)
        found: torch.Tensor = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group)
        flat = found.reshape(-1)
        return flat[start:stop] if flat.numel() == param.numel() else flat


class Partitioned:
    """Stage 3: each rank has one equal part of every parameter, the last ones padded."""

    def __init__(self, optimizer: FlatOptimizer, rank: int) -> None:
        from deepspeed import utils  # installed only where it is wanted

        self._optimizer, self._rank, self._ds = optimizer, rank, utils

    def span(self, param: Any) -> tuple[int, int]:
        size = param.ds_tensor.ds_numel
        start = min(self._rank * size, param.ds_numel)
        return start, min(start + size, param.ds_numel)

    def main(self, param: Any, moment: str | None = None) -> torch.Tensor:
        return self._padded(param, moment)[: self._length(param)]

    def put(self, param: Any, value: torch.Tensor, moment: str | None = None) -> None:
        padded = self._padded(param, moment)
        padded[: self._length(param)].copy_(value)
        if moment is None:
            self._ds.safe_set_local_fp32_param(param, padded)
        else:
            self._ds.safe_set_local_optimizer_state(param, padded, moment)

    def grad(self, param: Any) -> torch.Tensor:
        grad: torch.Tensor = self._ds.safe_get_local_grad(param)
        return grad.reshape(-1)[: self._length(param)]

    def _length(self, param: Any) -> int:
        start, stop = self.span(param)
        return stop - start

    def _padded(self, param: Any, moment: str | None) -> torch.Tensor:
        found: torch.Tensor
        if moment is None:
            found = self._ds.safe_get_local_fp32_param(param)
        else:
            found = self._ds.safe_get_local_optimizer_state(param, moment)
        return found.data.reshape(-1)
