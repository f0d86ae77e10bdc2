"""Weight gradients that backward leaves for later, so that it gets to a layer's input sooner.

A pipeline's zero-bubble schedule (https://arxiv.org/abs/2401.10241) runs the two halves of backward
at different times: the gradient of the inputs, which another rank waits for, and that of the
weights, which nobody waits for. Operations whose weight gradient is a product of its own ask for
the `Later` of the forward pass that they are in, and hand it that product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

Compute = Callable[[], torch.Tensor]


class Later:
    """What one backward pass has left: parameters, and how their gradients are computed.

    Only while it is `open` anything may be left; else operations compute at once.
    """

    def __init__(self) -> None:
        self.open = False
        self._left: list[tuple[nn.Parameter, Compute]] = []

    def leave(self, param: nn.Parameter, compute: Compute) -> None:
        """Leave the gradient of `param` for later."""
        self._left.append((param, compute))

    def compute(self, deliver: Callable[[nn.Parameter, torch.Tensor], None]) -> None:
        """Compute all that was left, in order, and forget it."""
        left, self._left = self._left, []
        with torch.no_grad():
            for index, (param, compute) in enumerate(left):
                deliver(param, compute())
                left[index] = (param, _done)  # frees what the product was made of


def _done() -> torch.Tensor:
    raise AssertionError("computed already")


_current: ContextVar[Later | None] = ContextVar("later", default=None)


@contextmanager
def leaving_to(later: Later) -> Iterator[None]:
    """Let operations that run forward inside find `later`."""
    token = _current.set(later)
    try:
        yield
    finally:
        _current.reset(token)


def later_for(weights: Sequence[torch.Tensor | None]) -> Later | None:
    """Return where the gradients of all of `weights` may be left, or None: compute them at once.

    Only those of parameters themselves, which no hook of the user's wants to see.
    """
    later = _current.get()
    if later is None or not all(weight is None or _can_wait(weight) for weight in weights):
        return None
    return later


def _can_wait(weight: torch.Tensor) -> bool:
    is_param = isinstance(weight, nn.Parameter) and weight.is_leaf
    return is_param and (not weight.requires_grad or not weight._backward_hooks)
