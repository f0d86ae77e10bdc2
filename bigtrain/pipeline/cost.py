"""What the units of a model cost, so that stages can be made equal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bigtrain.pipeline.stage import Call

log = logging.getLogger(__name__)

T = TypeVar("T")
_VALUES_WANTED = (DataDependentOutputException, DynamicOutputShapeException)

# An operation that multiplies no matrices (a norm, a softmax) is bound by memory: an element that
# it writes takes about as long as so many floating-point operations of a product.
FLOPS_PER_ELEMENT = 30.0
REPEATS = 3


def metered(
    model: nn.Module, how: str, call: Call, run: Callable[[Call, Callable[[], float]], T]
) -> list[T]:
    """Return what `run(call, read)` returns, which runs `model` once and reads the meter meanwhile.

    how: "counted": the meter counts operations, and the model runs on fake tensors, which have a
    shape and no memory; where it looks at values, on those of `call`. "measured": the meter is a
    clock, and there are a few runs.
    """
    with _quiet(model):
        if how == "measured":
            return [run(call, time.perf_counter) for _ in range(REPEATS)]
        counter = _Counter()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
                example = pytree.tree_map_only(torch.Tensor, fake.from_tensor, call)
                return [run(example, lambda: counter.total)]
        except _VALUES_WANTED as error:
            log.info("the model looks at values (%s), so an example is computed", error)
        counter = _Counter()
        with counter:
            return [run(call, lambda: counter.total)]


class _quiet:
    """No gradients, no dropout, no statistics that move; put back afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.modes: Mapping[nn.Module, bool] = {m: m.training for m in model.modules()}
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        for module in self.modes:
            module.training = False
        self.no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.no_grad.__exit__(*error)
        for module, training in self.modes.items():
            module.training = training


class _Counter(TorchDispatchMode):
    """Adds up the operations of what runs inside."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.total += flops(*args, **(kwargs or {}), out_val=out)
        elif not func.is_view:
            written = (t.numel() for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            self.total += FLOPS_PER_ELEMENT * sum(written)
        return out
