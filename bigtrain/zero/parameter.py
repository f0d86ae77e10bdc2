"""A parameter whose values may be elsewhere: whoever computes with it is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bigtrain.ops.op import ORDINARY

_PROPERTIES = (
    "shape dtype device ndim layout requires_grad grad is_leaf grad_fn names itemsize nbytes "
    "is_cuda is_cpu is_sparse is_meta is_quantized is_mkldnn retains_grad output_nr _version "
    "_backward_hooks"
)
_METHODS = (
    "size dim numel nelement ndimension stride is_contiguous element_size is_floating_point "
    "is_complex is_signed get_device requires_grad_ register_hook is_same_size __len__ __hash__ "
    "register_post_accumulate_grad_hook type storage_offset"
)


def _about() -> set[Any]:
    """Return the functions that ask about a tensor, and do not look at its values."""
    found: set[Any] = {torch.is_floating_point, torch.is_complex, torch.numel}
    for name in _METHODS.split():
        found.add(getattr(torch.Tensor, name))
    for name in _PROPERTIES.split():
        descriptor = getattr(torch.Tensor, name, None)
        if descriptor is None:  # another version of torch
            continue
        found.add(descriptor.__get__)
        if name in ("grad", "requires_grad"):
            found |= {descriptor.__set__, descriptor.__delete__}
    return found


_ABOUT = _about()


class KeptParameter(nn.Parameter):
    """A parameter that calls its `on_use` before any function of torch looks at its values.

    An existing parameter becomes one by `keep`, and a plain one again by `release`: it stays the
    same object, which the model and the autograd graph know.
    """

    on_use: Callable[[], None]
    plain: type[nn.Parameter]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in _ABOUT:
                for param in _kept_in(args):
                    param.on_use()
                if kwargs:
                    for param in _kept_in(kwargs.values()):
                        param.on_use()
            return func(*args, **(kwargs or {}))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"KeptParameter(shape={tuple(self.shape)}, dtype={self.dtype})"


ORDINARY.add(KeptParameter)  # a kernel asks for its memory, by data_ptr(), which is a use


def keep(param: nn.Parameter, on_use: Callable[[], None]) -> None:
    """Let `on_use` be called before the values of `param` are used."""
    if type(param) is not KeptParameter:
        plain = type(param)
        param.__class__ = KeptParameter
        assert isinstance(param, KeptParameter)
        param.plain, param.on_use = plain, on_use


def release(param: nn.Parameter) -> None:
    """Undo `keep`."""
    if type(param) is KeptParameter:
        param.__class__ = param.plain  # type: ignore[assignment]


def _kept_in(values: Any) -> Iterator[KeptParameter]:
    for value in values:
        if type(value) is KeptParameter:
            yield value
        elif isinstance(value, list | tuple):
            yield from _kept_in(value)
