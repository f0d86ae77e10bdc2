"""Dropout whose draws belong to samples: the same for any layout and any microbatch size.

Whether an element is dropped is a function of (seed of its sample, layer, call, place in the
sample): a counter-based generator, Philox-4x32-10 (https://doi.org/10.1145/2063384.2063405), is
asked for it where it is needed. Masks are never stored; backward asks again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.ops.library import Library
from bigtrain.ops.op import Kernels, Op, check_alike, check_dtype, chosen, fail, precision

Part = tuple[int, int, int]  # dim, rank, degree


def bias_dropout_residual(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    p: float,
    seeds: torch.Tensor | Sequence[int],
    *,
    salt: int = 0,
    part: Part | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return residual + dropout(x + bias), rounded once, in the dtype of x.

    x: [samples, ...]; bias: [last dim of x] or None; residual: as x, or None; all of one dtype,
    computed in fp32 (fp64 in fp64). p: the probability to be dropped, what is kept is multiplied by
    1 / (1 - p). seeds: one number a sample, from -2^63 to 2^63 - 1; `salt` is added to each (mod
    2^64). part: (dim, rank, degree) if x is part `rank` of `degree` equal parts along dim (not 0);
    it draws what belongs to its part of the whole. Twice differentiable in x, bias and residual.

    Raises:
        BigtrainError: shapes, dtypes or seeds that do not fit; p outside of [0, 1].
    """
    seeds = _as_tensor(seeds, x.device)
    _check(x, bias, residual, p, seeds, part)
    args = (x, bias, residual, seeds, _signed(salt), float(p), *_place(x, part))
    use = chosen("bias_dropout_residual", kernels, x, bias, residual)
    result: torch.Tensor = (_DROPOUT if use else _reference)(*args)
    return result


class Dropout(nn.Module):
    """Zero elements with probability p and scale the rest by 1 / (1 - p), in training only.

    `sample_seeds` holds one seed for each sample of the coming batch (its dim 0). Each call of
    each layer draws from streams of its own: a function of (sample seed, layer, call). Without
    seeds, or if not `per_sample`, it draws as torch's dropout does.

    What is split over ranks draws for the whole tensor and keeps its own part (`split`), so that
    all ranks together drop what one process would.

    forward(x, residual) is residual + dropout(x), in one pass over memory.
    """

    def __init__(self, p: float, *, per_sample: bool = True, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.p, self.per_sample, self.kernels = p, per_sample, kernels
        self.layer: int | None = None  # which of the model's dropout layers, counted by it
        self.sample_seeds: Sequence[int] | None = None
        self._calls = self._calls_before = 0  # in this forward, and in the one before
        self._dim, self._rank, self._degree = 0, 0, 1

    def split(self, dim: int, rank: int, degree: int) -> None:
        """Declare that inputs are part `rank` of `degree` equal parts along `dim` (not 0)."""
        self._dim, self._rank, self._degree = dim, rank, degree

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x if residual is None else residual + x
        if self.sample_seeds is None:
            dropped = self._of_torch(x)
            return dropped if residual is None else residual + dropped
        # Of another dtype (autocast) or shape, the sum is left to torch's rules.
        fused = residual is not None and (residual.dtype, residual.shape) == (x.dtype, x.shape)
        y = self._seeded(x, residual if fused else None)
        return y if fused or residual is None else residual + y

    def _of_torch(self, x: torch.Tensor) -> torch.Tensor:
        if self._degree == 1:
            return F.dropout(x, self.p)
        shape = list(x.shape)
        shape[self._dim] *= self._degree
        mask = F.dropout(x.new_ones(()).expand(shape), self.p)  # of ones that need no memory
        return x * mask.chunk(self._degree, self._dim)[self._rank]

    def _seeded(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        assert self.sample_seeds is not None
        assert self.layer is not None
        assert len(self.sample_seeds) == len(x)
        return bias_dropout_residual(
            x,
            None,
            residual,
            self.p,
            self.sample_seeds,
            salt=1_000_003 * self.layer + 7_919 * self._number_of_call(),
            part=None if self._degree == 1 else (self._dim, self._rank, self._degree),
            kernels=self.kernels,
        )

    def _number_of_call(self) -> int:
        """Return how many calls of this layer came before; activation checkpointing repeats one."""
        if torch._C._current_graph_task_id() == -1:
            self._calls += 1
            return self._calls - 1
        # Another microbatch may be about to go forward; its calls are as many.
        calls = self._calls or self._calls_before
        if calls != 1:
            raise BigtrainError(
                f"a dropout layer that is called {calls} times in a forward is recomputed",
                why="activation checkpointing repeats a call, and does not tell which one",
                mend="use a dropout layer of its own in each place",
            )
        return 0

    def extra_repr(self) -> str:
        return f"p={self.p}" + f", part {self._rank} of {self._degree}" * (self._degree > 1)


def number_dropout(model: nn.Module) -> None:
    """Number the dropout layers of a whole model, before it is cut into stages."""
    for layer, module in enumerate(_per_sample(model)):
        module.layer = layer


def seed_dropout(model: nn.Module, sample_seeds: Sequence[int], *, recompute: bool = False) -> None:
    """Give all dropout layers of `model` the seeds of the samples of the coming batch.

    recompute: the batch had its forward, which activation checkpointing is about to repeat.
    """
    layers = _per_sample(model)
    if any(module.layer is None for module in layers):
        number_dropout(model)
    for module in layers:
        module.sample_seeds = sample_seeds
        if not recompute:
            module._calls_before = module._calls or module._calls_before
            module._calls = 0


def _per_sample(model: nn.Module) -> list[Dropout]:
    return [m for m in model.modules() if isinstance(m, Dropout) and m.per_sample]


# -- arguments -------------------------------------------------------------------------------------


def _signed(number: int) -> int:
    """Return `number` modulo 2^64, as an int64."""
    return (number + 2**63) % 2**64 - 2**63


def _as_tensor(seeds: torch.Tensor | Sequence[int], device: torch.device) -> torch.Tensor:
    return seeds if isinstance(seeds, torch.Tensor) else _on_device(tuple(seeds), device)


@functools.lru_cache(maxsize=64)  # all layers of a model have the same seeds
def _on_device(seeds: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)


def _check(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    p: float,
    seeds: torch.Tensor,
    part: Part | None,
) -> None:
    name = "bias_dropout_residual"
    if not 0.0 <= p <= 1.0:
        raise fail(name, f"p is {p}", mend="a probability is from 0 to 1")
    if x.ndim == 0 or seeds.shape != x.shape[:1]:
        raise fail(
            name,
            f"{seeds.numel()} seeds for x {tuple(x.shape)}",
            why="each sample, along dim 0, draws from a stream of its own",
            mend="pass one seed a sample",
        )
    check_dtype(name, (torch.int64,), seeds=seeds)
    check_dtype(name, (x.dtype,), bias=bias, residual=residual)
    check_alike(name, x, bias=bias, residual=residual, seeds=seeds)
    if bias is not None and (x.ndim < 2 or bias.shape != x.shape[-1:]):
        raise fail(name, f"a bias {tuple(bias.shape)} for x {tuple(x.shape)}", mend="one a column")
    if residual is not None and residual.shape != x.shape:
        raise fail(
            name,
            f"a residual {tuple(residual.shape)} for x {tuple(x.shape)}",
            mend="pass them alike",
        )
    if part is not None:
        dim, rank, degree = part
        if not -x.ndim <= dim < x.ndim or dim % x.ndim == 0 or not 0 <= rank < degree:
            raise fail(
                name,
                f"part {rank} of {degree} along dim {dim} of x {tuple(x.shape)}",
                why="samples are split within themselves, and ranks count from 0",
                mend="name a dim behind the first",
            )


def _place(x: torch.Tensor, part: Part | None) -> tuple[int, int, int]:
    """Return columns of x, columns of the whole and the first of x among them, as matrices."""
    if part is None:
        inner = math.prod(x.shape[1:])
        return inner, inner, 0
    dim, rank, degree = part
    inner = math.prod(x.shape[dim % x.ndim :])
    return inner, inner * degree, inner * rank


def _numbers(p: float) -> tuple[int, float]:
    """Return the threshold below which 32 random bits drop, and what the rest is multiplied by."""
    return min(round(p * 2**32), 2**32 - 1), 0.0 if p == 1.0 else 1.0 / (1.0 - p)


# -- the generator, in plain torch -----------------------------------------------------------------

_HALF = 0xFFFFFFFF


def philox(counter: Sequence[torch.Tensor], key: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the four words of Philox-4x32-10; all are int64 tensors of numbers below 2^32."""
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64, the sign bit is one of the bits
        a, b, c, d = (
            (right >> 32) & _HALF ^ b ^ first,
            right & _HALF,
            (left >> 32) & _HALF ^ d ^ second,
            left & _HALF,
        )
        first, second = (first + 0x9E3779B9) & _HALF, (second + 0xBB67AE85) & _HALF
    return [a, b, c, d]


def draws(seeds: torch.Tensor, salt: int, numel: int) -> torch.Tensor:
    """Return the 32 random bits of each element of whole samples, [samples, numel] int64."""
    key = (seeds + salt)[:, None]
    counter = torch.arange(-(-numel // 64) * 16, device=seeds.device)
    zero = torch.zeros_like(counter)
    words = philox((counter & _HALF, counter >> 32, zero, zero), (key & _HALF, (key >> 32) & _HALF))
    groups = [word.unflatten(-1, (-1, 16)) for word in words]  # [samples, group, 16] each
    return torch.stack(groups, 2).flatten(1)[:, :numel]


# -- the operation ---------------------------------------------------------------------------------


def _reference(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seeds: torch.Tensor,
    salt: int,
    p: float,
    inner: int,
    full_inner: int,
    offset: int,
) -> torch.Tensor:
    threshold, keep_scale = _numbers(p)
    if x.numel() == 0:
        kept = torch.ones_like(x, dtype=torch.bool)
    else:
        outer = x[0].numel() // inner
        words = draws(seeds, salt, outer * full_inner).view(len(x), outer, full_inner)
        kept = (words[..., offset : offset + inner] >= threshold).reshape(x.shape)
    wide = precision(x)
    y = x.to(wide) if bias is None else x.to(wide) + bias.to(wide)
    y = torch.where(kept, y * keep_scale, 0.0)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


def _kernel(
    library: Library,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    seeds: torch.Tensor,
    salt: int,
    p: float,
    inner: int,
    full_inner: int,
    offset: int,
) -> torch.Tensor:
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    samples, size = len(x), x.numel() // max(len(x), 1)
    library.call(
        "bt_bias_dropout_residual",
        x.device,
        *(samples, size // max(inner, 1), inner, full_inner, offset, x.shape[-1]),
        *(x, bias, residual, seeds.contiguous(), salt, *_numbers(p), out, x.dtype),
    )
    return out


def _setup(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
    _, bias, residual, seeds, *ctx.numbers = inputs
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    ctx.save_for_backward(seeds)


def _backward(ctx: Any, grad: torch.Tensor) -> Any:
    (seeds,) = ctx.saved_tensors
    dx = _DROPOUT(grad, None, None, seeds, *ctx.numbers)
    dbias = dx.flatten(0, -2).sum(0) if ctx.has_bias else None
    return dx, dbias, grad if ctx.has_residual else None, *[None] * 6


_DROPOUT = Op(
    "bias_dropout_residual(Tensor x, Tensor? bias, Tensor? residual, Tensor seeds, int salt, "
    "float p, int inner, int full_inner, int offset) -> Tensor",
    kernel=_kernel,
    reference=_reference,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=_setup,
    backward=_backward,
)
