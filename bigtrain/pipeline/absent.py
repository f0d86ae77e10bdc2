"""Tensors that are on another rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bigtrain.errors import BigtrainError


class Absent(torch.Tensor):
    """A tensor whose values are on another rank: a shape, a dtype, a device, and no memory.

    What is computed from it is absent too. So a model's own code, between the modules of a stage,
    can run over what the other stages compute.
    """

    home: torch.device

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, home: torch.device) -> Absent:
        """Return an absent tensor that says it is on device `home`."""
        return _wrap(torch.empty(shape, dtype=dtype, device="meta"), home)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.home

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Absent(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        home = next(t.home for t in tensors if isinstance(t, Absent))
        with torch._C.DisableTorchFunctionSubclass():
            if changes_first(func) and not isinstance(args[0], Absent):
                raise _misuse(func, "a tensor of this stage is changed in place by one of another")
            args, kwargs = pytree.tree_map(_on_meta, (args, kwargs))
            try:
                out = func(*args, **kwargs)
            except (NotImplementedError, RuntimeError, TypeError) as error:
                raise _misuse(func, str(error).split("\n")[0]) from error
            return pytree.tree_map_only(torch.Tensor, lambda t: _wrap(t, home), out)


def _wrap(meta: torch.Tensor, home: torch.device) -> Absent:
    absent = torch.Tensor._make_subclass(Absent, meta.detach())
    absent.home = home
    return absent


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, Absent):
        return leaf.as_subclass(torch.Tensor)
    if isinstance(leaf, torch.Tensor):
        return torch.empty_like(leaf, device="meta")
    return torch.device("meta") if isinstance(leaf, torch.device) else leaf


def changes_first(func: Any) -> bool:
    """Is `func` a function of torch that changes its first argument in place?"""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _misuse(func: Any, why: str) -> BigtrainError:
    return BigtrainError(
        f"the model's own code looks at the values of a tensor that another stage has "
        f"({getattr(func, '__name__', func)})",
        where=_place(),
        why=f"between the units of a stage only shapes of other stages' tensors are known: {why}",
        mend="let stages begin elsewhere (pipeline.split), so that this code and what it looks at "
        "are in one unit",
    )


def _place() -> str:
    """Return file:line of the innermost code that is neither torch's nor ours."""
    ours = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back  # type: ignore[assignment]
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""
