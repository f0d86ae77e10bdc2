"""What all operations share: who does the work, argument checks, autograd, torch.library.

An operation has a public function, which checks its arguments, and two ways of doing the work: a
kernel, and its reference in plain torch, which is its meaning. Users choose by `kernels`: "auto"
(a kernel where it was measured to win), "on" (wherever there is one), "off".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd import forward_ad

from bigtrain.errors import BigtrainError
from bigtrain.ops.library import DTYPES, Library, library_of

Kernels = Literal["auto", "on", "off"]

_NAMESPACE = torch.library.Library("bigtrain", "FRAGMENT")
ORDINARY: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Types of tensors whose memory a kernel may read and write. Others can add theirs."""


class Left(NamedTuple):
    """What "auto" leaves to torch: tensors of these dtypes, and why."""

    why: str
    dtypes: tuple[torch.dtype, ...] = tuple(DTYPES)


# By device and operation. What takes torch many passes (an update, the draws of dropout) is never
# left to it.
_UNMEASURED = (
    *("layer_norm", "rms_norm", "bias_gelu", "exact_gelu", "swiglu", "rotary", "masked_softmax"),
    "cross_entropy",
)
LEFT_TO_TORCH: dict[str, dict[str, Left]] = {
    "cpu": {
        "layer_norm": Left("torch is as fast in fp32", (torch.float32,)),
        "exact_gelu": Left("torch is as fast in bf16", (torch.bfloat16, torch.float16)),
    },
    "cuda": dict.fromkeys(_UNMEASURED, Left("not measured on a GPU yet")),
}


def library_for(*tensors: torch.Tensor | None) -> Library | None:
    """Return the library that can work on all these tensors, or None.

    It takes ordinary fp32, bf16 and fp16 tensors: not fp64, no subclasses (fake tensors, DTensors),
    no views that are negated lazily, nothing inside of torch.func, forward-mode differentiation or
    torch.jit.trace.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if type(tensor) not in ORDINARY or tensor.dtype not in DTYPES or tensor.is_neg():
            return None
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return None
    if torch._C._get_tracing_state() is not None:
        return None
    return library_of(given[0].device)


def chosen(name: str, kernels: Kernels, *tensors: torch.Tensor | None) -> bool:
    """Return whether a kernel does the operation `name` on these tensors.

    Raises:
        BigtrainError: `kernels` is none of auto, on, off.
    """
    if kernels not in ("auto", "on", "off"):
        raise BigtrainError(f"{name}: kernels={kernels!r}", mend="use auto, on or off")
    if kernels == "off":
        return False
    if torch.compiler.is_compiling():
        return True  # as one opaque operation; whoever runs it looks for the library
    first = next(tensor for tensor in tensors if tensor is not None)
    left = LEFT_TO_TORCH.get(first.device.type, {}).get(name)
    if kernels == "auto" and left is not None and first.dtype in left.dtypes:
        return False
    return library_for(*tensors) is not None


class Op:
    """One operation on tensors, called like a function; in torch.library as bigtrain::<name>.

    schema: as torch.library writes it, without the namespace: "f(Tensor x) -> (Tensor, Tensor)".
    kernel(library, *args), reference(*args): both return what the schema says. fake(*args): the
    same for tensors without memory; not needed where nothing is returned.
    setup_context(ctx, inputs, output), backward(ctx, *grads): as torch.autograd.Function has them;
    not given for what is not differentiable.
    """

    def __init__(
        self,
        schema: str,
        *,
        kernel: Callable[..., Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None = None,
        setup_context: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._kernel, self._reference = kernel, reference
        _NAMESPACE.define(schema)
        for key in ("CPU", "CUDA"):
            _NAMESPACE.impl(self.name, self.run, key)
        full = f"bigtrain::{self.name}"
        torch.library.register_fake(full, fake or (lambda *args: None), lib=_NAMESPACE)
        self._function: Any = None
        if backward is not None and setup_context is not None:
            torch.library.register_autograd(
                full, backward, setup_context=setup_context, lib=_NAMESPACE
            )

            def forward(ctx: Any, *args: Any) -> Any:  # a setup_context costs a signature a call
                output = self.run(*args)
                setup_context(ctx, args, output)
                return output

            members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            self._function = type(self.name, (torch.autograd.Function,), members)
        self.registered = getattr(torch.ops.bigtrain, self.name)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.registered(*args)
        if self._function is not None and torch.is_grad_enabled():
            return self._function.apply(*args)
        return self.run(*args)

    def run(self, *args: Any) -> Any:
        """Do the work, without autograd."""
        library = library_for(*_floats(args))
        return self._reference(*args) if library is None else self._kernel(library, *args)


def _floats(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the floating-point tensors among arguments, and in lists of them."""
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.is_floating_point():
            yield arg
        elif isinstance(arg, list | tuple):
            yield from _floats(arg)


def precision(x: torch.Tensor) -> torch.dtype:
    """Return what a reference computes in: fp32, but fp64 for fp64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return x in that precision."""
    return x.to(precision(x))


# -- argument checks -------------------------------------------------------------------------------


def fail(name: str, what: str, why: str = "", mend: str = "") -> BigtrainError:
    """Return the error of a call of operation `name` that cannot be."""
    return BigtrainError(f"{name}: {what}", why=why, mend=mend)


def check_alike(name: str, like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not on the device of `like`."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise fail(
                name,
                f"{argument} is on {tensor.device}, other arguments on {like.device}",
                mend="move it there first",
            )


def check_flat(name: str, numel: int, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that are not contiguous, or have not `numel` elements."""
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.numel() != numel:
            raise fail(
                name,
                f"{argument} has {tensor.numel()} elements, not {numel}",
                why="it is a flat block, element by element beside the others",
                mend="pass the same stretch of every buffer",
            )
        if not tensor.is_contiguous():
            raise fail(
                name,
                f"{argument} is not contiguous (strides {tuple(tensor.stride())})",
                why="a kernel walks through memory",
                mend="pass a contiguous tensor; a copy would not be updated",
            )


def check_dtype(
    name: str, allowed: tuple[torch.dtype, ...], **tensors: torch.Tensor | None
) -> None:
    """Refuse tensors of another dtype."""
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in allowed:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise fail(name, f"{argument} is {tensor.dtype}", mend=f"it must be {names}")


def check_unfolded(name: str, **tensors: torch.Tensor | None) -> None:
    """Refuse to write to tensors of which several elements are one place in memory."""
    for argument, tensor in tensors.items():
        if tensor is not None and any(
            stride == 0 and size > 1
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ):
            raise fail(
                name,
                f"{argument} is expanded: several of its elements are one place in memory",
                why="it would be written several times",
                mend="clone() it first",
            )


def check_apart(name: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that share memory with each other, which a compiler's graph does not tell."""
    if torch.compiler.is_compiling():
        return
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), argument)
        for argument, t in tensors.items()
        if t is not None and t.numel()
    )
    for (_, end, one), (start, _, other) in pairwise(spans):
        if start < end:
            raise fail(
                name,
                f"{one} and {other} share memory",
                why="one would be written while the other is still read",
                mend="give each its own memory",
            )
