"""A backward that is a kernel has no derivative of its own, and says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bigtrain.errors import BigtrainError


def first_order(
    name: str,
    why: str = "its backward is a kernel, and is not differentiable itself",
    mend: str = 'leave create_graph off, or pass kernels="off"',
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Refuse to differentiate the backward of operation `name`: terms would silently be dropped."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():
                raise BigtrainError(f"second derivatives through {name}", why=why, mend=mend)
            return backward(ctx, *grads)

        return guarded

    return decorate
