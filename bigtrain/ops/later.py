"""Weight gradients that do not go the way through autograd: added in place, or left for later.

A pipeline's zero-bubble schedule (https://arxiv.org/abs/2401.10241) runs the two halves of backward
at different times: the gradient of the inputs, which another rank waits for, and that of the
weights, which nobody waits for. And over several microbatches, a product that adds to what is there
saves writing and reading a gradient of its own. Operations whose weight gradient is a product ask
for the `Later` of the forward pass that they are in, and hand it that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Product(NamedTuple):
    """The matrix left @ right, not computed yet."""

    left: torch.Tensor
    right: torch.Tensor

    def compute(self) -> torch.Tensor:
        return self.left @ self.right

    def add_to(self, total: torch.Tensor, *, first: bool) -> None:
        """Add it to `total`, or if it is the first replace that, in one pass where dtypes agree."""
        if total.dtype != self.left.dtype:
            product = self.compute()
            total.copy_(product) if first else total.add_(product)
        else:
            total.addmm_(self.left, self.right, beta=0 if first else 1)


Gradient = torch.Tensor | Product
Compute = Callable[[], Gradient]
Deliver = Callable[[nn.Parameter, Gradient], None]


class Later:
    """Takes the weight gradients of one backward pass.

    While it is `open` they are left until `compute`; else each goes to `deliver` at once. `task` is
    that backward's graph task: others, which a model's own forward starts (the gradient of an
    energy, a penalty), are none of its business.
    """

    def __init__(self, deliver: Deliver) -> None:
        self.open = False
        self.task: int | None = None
        self._deliver = deliver
        self._left: list[tuple[nn.Parameter, Compute] | None] = []

    def take(self, param: nn.Parameter, compute: Compute) -> None:
        """Take the gradient of `param`, now or later."""
        if self.open:
            self._left.append((param, compute))
        else:
            self._deliver(param, compute())

    def compute(self) -> None:
        """Deliver all that was left, in order, and forget it."""
        left, self._left = self._left, []
        with torch.no_grad():
            for index, item in enumerate(left):
                assert item is not None
                self._deliver(item[0], item[1]())
                left[index] = None  # frees what the product was made of


_current: list[Later] = []  # a stack; for all threads, since autograd may have some of its own


@contextmanager
def leaving_to(later: Later) -> Iterator[None]:
    """Let operations that run forward inside find `later`."""
    _current.append(later)
    try:
        yield
    finally:
        _current.pop()


def later_for(weights: Sequence[torch.Tensor | None]) -> Later | None:
    """Return what takes the gradients of all of `weights`, or None: autograd does.

    Only those of parameters themselves, which no hook of the user's wants to see.
    """
    later = _current[-1] if _current else None
    if later is None or not all(weight is None or _can_wait(weight) for weight in weights):
        return None
    return later


def give(later: Later | None, param: nn.Parameter, compute: Compute) -> torch.Tensor | None:
    """Give the gradient of `param` to `later`; without, return it for autograd to take."""
    if later is not None and later.task == torch._C._current_graph_task_id():
        later.take(param, compute)
        return None
    gradient = compute()
    return gradient.compute() if isinstance(gradient, Product) else gradient


def _can_wait(weight: torch.Tensor) -> bool:
    is_param = isinstance(weight, nn.Parameter) and weight.is_leaf
    return is_param and (not weight.requires_grad or not weight._backward_hooks)


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return x as a matrix, one row a token; there may be no rows, and no columns."""
    return x.flatten(0, -2) if x.ndim > 1 else x[None]
