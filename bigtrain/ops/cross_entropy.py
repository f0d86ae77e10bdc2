"""Cross entropy that reads logits once in each direction and makes no fp32 copy of them.

`cross_entropy` is the loss on one device. `cross_entropy_parts` and `cross_entropy_grad` are what
it is made of, for logits of which a rank has a part of the columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from bigtrain.errors import BigtrainError
from bigtrain.ops.first_order import first_order
from bigtrain.ops.library import Library
from bigtrain.ops.op import (
    Kernels,
    Op,
    check_alike,
    check_dtype,
    chosen,
    fail,
    library_for,
    precision,
    widened,
)

LOWEST = torch.finfo(torch.float32).min


class Parts(NamedTuple):
    """What a part of a row gives to its loss, each [N]: max x, sum exp(x - max), x[target], sum x.

    Of a row that is all -inf, or has no columns, `most` is the lowest fp32 number and `total` zero.
    """

    most: torch.Tensor
    total: torch.Tensor
    wanted: torch.Tensor
    sum: torch.Tensor | None


def cross_entropy_parts(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    with_sum: bool = False,
    kernels: Kernels = "auto",
) -> Parts:
    """Return what logits [N, v] give to the losses of N tokens, in fp32 (of fp64, fp64).

    targets: [N] int64, the column of each; one that is not in [0, v) gives `wanted` zero. Not
    differentiable: the gradient is `cross_entropy_grad`.

    Raises:
        BigtrainError: shapes or dtypes that do not fit.
    """
    _check("cross_entropy_parts", logits, targets)
    use = chosen("cross_entropy_parts", kernels, logits)
    with torch.no_grad():
        numbers = (_PARTS if use else _parts_reference)(logits, targets, with_sum)
    most, total, wanted, plain = numbers
    return Parts(most, total, wanted, plain if with_sum else None)


def cross_entropy_grad(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_sum: torch.Tensor,
    scale: torch.Tensor,
    *,
    z_loss: float = 0.0,
    uniform: float = 0.0,
    hit: float = 1.0,
    out: torch.Tensor | None = None,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return (exp(x - L) (1 + 2 z L) - uniform - hit [column is target]) scale, in logits' dtype.

    logits: [N, v]; targets: [N] int64 as in `cross_entropy_parts`; L = log_sum and scale: [N]. out:
    where to write it; it may be logits, and then there is no second matrix.

    Raises:
        BigtrainError: shapes or dtypes that do not fit.
    """
    name = "cross_entropy_grad"
    _check(name, logits, targets)
    check_alike(name, logits, log_sum=log_sum, scale=scale, out=out)
    for argument, tensor in (("log_sum", log_sum), ("scale", scale)):
        if tensor.shape != targets.shape:
            raise fail(name, f"{argument} is {tuple(tensor.shape)}", mend="pass one number a row")
    if out is not None and (out.shape, out.dtype) != (logits.shape, logits.dtype):
        raise fail(name, f"out is {tuple(out.shape)}, {out.dtype}", mend="make it as logits are")
    wide = precision(logits)
    args = (logits, targets, log_sum.to(wide), scale.to(wide), z_loss, uniform, hit)
    with torch.no_grad():
        if not chosen(name, kernels, logits, out):
            result = _grad_reference(*args)
        elif out is None or torch.compiler.is_compiling() or out.stride(-1) != 1:
            result = _GRAD(*args)
        else:
            library = library_for(logits, out)
            assert library is not None
            return _write_grad(library, *args, out)
        return result if out is None else out.copy_(result)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    inplace_backward: bool = False,
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return the cross entropy in nats, fp32 (of fp64, fp64), as F.cross_entropy computes it.

        loss = (1 - s) (L - x[target]) + s (L - mean(x)) + z L^2,  L = log sum exp x

    logits: [..., v] of any floating dtype; targets: [...] int64. s is `label_smoothing`; `z_loss`
    keeps L near zero (https://arxiv.org/abs/2204.02311). Tokens whose target is `ignore_index`
    count nothing. reduction: mean over the tokens that count (NaN if there are none), sum, or none.

    inplace_backward: the gradient may be written into the memory of logits. Only for logits that
    nobody else reads, the next step of backward included; a second backward is refused.

    Raises:
        BigtrainError: shapes that do not fit, a target outside of the vocabulary; a second
            derivative.
    """
    name = "cross_entropy"
    if logits.ndim == 0 or logits.shape[:-1] != targets.shape or not logits.shape[-1]:
        raise fail(
            name,
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit together",
            why="every token has a row of logits, and one target",
            mend="pass logits [..., vocabulary] and targets [...]",
        )
    if reduction not in ("mean", "sum", "none"):
        raise fail(name, f"reduction is {reduction!r}", mend="use mean, sum or none")
    if not 0.0 <= label_smoothing <= 1.0:
        raise fail(name, f"label_smoothing is {label_smoothing}", mend="it is from 0 to 1")
    flat, aims = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    _check(name, flat, aims)
    numbers = (ignore_index, label_smoothing, z_loss)
    if chosen(name, kernels, flat):
        inplace = inplace_backward and not torch.compiler.is_compiling()
        losses = _CROSS_ENTROPY(flat, aims, *numbers, inplace)[0]
    else:
        losses = _reference(flat, aims, *numbers, False)[0]
    if reduction == "none":
        return losses.view(targets.shape)
    total: torch.Tensor = losses.sum()
    return total if reduction == "sum" else total / (aims != ignore_index).sum()


# -- checks ----------------------------------------------------------------------------------------


def _check(name: str, logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or not logits.is_floating_point():
        raise fail(
            name,
            f"logits {tuple(logits.shape)}, {logits.dtype}, and targets {tuple(targets.shape)}",
            mend="pass logits [N, v] and targets [N]",
        )
    check_dtype(name, (torch.int64,), targets=targets)
    check_alike(name, logits, targets=targets)


def _refuse_outside(targets: torch.Tensor, size: int, ignore_index: int) -> None:
    """Refuse targets outside of [0, size). On a GPU asynchronously, so that nobody waits for it."""
    if not targets.numel():
        return
    if targets.device.type == "cpu":
        least, most = torch.aminmax(targets)
        if least >= 0 and most < size:
            return  # soon told
    bad = ((targets < 0) | (targets >= size)) & (targets != ignore_index)
    if targets.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bad.any():
        raise BigtrainError(
            f"cross_entropy: target {int(targets[bad][0])} is outside of the vocabulary of {size}",
            why=f"targets are numbers from 0 to {size - 1}, or ignore_index = {ignore_index}",
            mend="check the tokenizer against the vocabulary size of the model",
        )


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


# -- parts of rows ---------------------------------------------------------------------------------


def _parts_reference(
    logits: torch.Tensor, targets: torch.Tensor, with_sum: bool
) -> tuple[torch.Tensor, ...]:
    x, columns = widened(logits), logits.shape[1]
    if columns == 0:
        most, zero = x.new_full((len(x),), LOWEST), x.new_zeros(len(x))
        return most, zero, zero.clone(), zero.clone() if with_sum else x.new_empty(0)
    most = x.amax(-1).clamp(min=LOWEST)
    total = (x - most[:, None]).exp().sum(-1)
    mine = (targets >= 0) & (targets < columns)
    picked = x.gather(-1, targets.where(mine, 0)[:, None])[:, 0]
    wanted = picked.masked_fill(~mine, 0.0)
    return most, total, wanted, x.sum(-1) if with_sum else x.new_empty(0)


def _parts_kernel(
    library: Library, logits: torch.Tensor, targets: torch.Tensor, with_sum: bool
) -> tuple[torch.Tensor, ...]:
    logits, targets = _rows(logits), targets.contiguous()
    numbers = _parts_fake(logits, targets, with_sum)
    plain = numbers[3] if with_sum else None
    library.call(
        "bt_cross_entropy_forward",
        logits.device,
        *(*logits.shape, logits, logits.stride(0), targets, *numbers[:3], plain, logits.dtype),
    )
    return numbers


def _parts_fake(
    logits: torch.Tensor, targets: torch.Tensor, with_sum: bool
) -> tuple[torch.Tensor, ...]:
    """Return tensors to write the numbers into."""
    wide = precision(logits)
    sizes = (len(logits),) * 3 + (len(logits) if with_sum else 0,)
    return tuple(logits.new_empty(size, dtype=wide) for size in sizes)


_PARTS = Op(
    "cross_entropy_parts(Tensor logits, Tensor targets, bool with_sum) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_parts_kernel,
    reference=_parts_reference,
    fake=_parts_fake,
)


# -- gradient --------------------------------------------------------------------------------------


def _grad_reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_sum: torch.Tensor,
    scale: torch.Tensor,
    z_loss: float,
    uniform: float,
    hit: float,
) -> torch.Tensor:
    result = (widened(logits) - log_sum[:, None]).exp()
    if z_loss:
        result *= (1 + 2 * z_loss * log_sum)[:, None]
    if uniform:
        result -= uniform
    if result.shape[1]:
        mine = (targets >= 0) & (targets < result.shape[1])
        less = torch.where(mine, -hit, 0.0).to(result.dtype)
        result.scatter_add_(1, targets.where(mine, 0)[:, None], less[:, None])
    return (result * scale[:, None]).to(logits.dtype)


def _write_grad(library: Library, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    targets, log_sum, scale, z_loss, uniform, hit, out = rest
    in_place = out.data_ptr() == logits.data_ptr()
    logits = logits if in_place else _rows(logits)
    library.call(
        "bt_cross_entropy_backward",
        logits.device,
        *(*logits.shape, logits, logits.stride(0), targets.contiguous()),
        *(log_sum.contiguous(), scale.contiguous(), z_loss, uniform, hit),
        *(out, out.stride(0), logits.dtype),
    )
    return out


def _grad_kernel(library: Library, logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return _write_grad(library, logits, *rest, out)


_GRAD = Op(
    "cross_entropy_grad(Tensor logits, Tensor targets, Tensor log_sum, Tensor scale, float z_loss, "
    "float uniform, float hit) -> Tensor",
    kernel=_grad_kernel,
    reference=_grad_reference,
    fake=lambda logits, *_: logits.new_empty(logits.shape),
)


# -- the loss of one device ------------------------------------------------------------------------


def _finish(
    parts: tuple[torch.Tensor, ...], ignored: torch.Tensor, size: int, smoothing: float, z: float
) -> tuple[torch.Tensor, torch.Tensor]:
    most, total, wanted, plain = parts
    rest = total.log()
    log_sum = most + rest
    losses = (most - wanted).add_(rest)  # exact where log_sum is too large for the digits of `rest`
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * ((most - plain / size) + rest)
    if z:
        losses = losses + z * log_sum.square()
    return losses.masked_fill_(ignored, 0.0), log_sum


def _losses_kernel(
    library: Library,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse_outside(targets, logits.shape[1], ignore_index)
    parts = _parts_kernel(library, logits, targets, smoothing > 0)
    return _finish(parts, targets == ignore_index, logits.shape[1], smoothing, z_loss)


def _reference(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    inplace: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse_outside(targets, logits.shape[1], ignore_index)
    x = widened(logits)
    ignored = targets == ignore_index
    most = x.detach().amax(-1).clamp(min=LOWEST)
    rest = (x - most[:, None]).exp().sum(-1).log()
    log_sum = most + rest
    losses = (most - x.gather(-1, targets.masked_fill(ignored, 0)[:, None])[:, 0]) + rest
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * ((most - x.mean(-1)) + rest)
    if z_loss:
        losses = losses + z_loss * log_sum.square()
    return losses.masked_fill(ignored, 0.0), log_sum


def _losses_fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = precision(logits)
    return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, ctx.ignore_index, ctx.smoothing, ctx.z_loss, ctx.inplace = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, targets, output[1])


@first_order("cross_entropy")
def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    logits, targets, log_sum = ctx.saved_tensors
    grads = _GRAD if not ctx.inplace else _grad_in_place
    result = grads(
        logits,
        targets,
        log_sum,
        grad.masked_fill(targets == ctx.ignore_index, 0.0),
        ctx.z_loss,
        ctx.smoothing / max(logits.shape[1], 1),
        1.0 - ctx.smoothing,
    )
    return result, None, None, None, None, None


def _grad_in_place(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    library = library_for(logits)
    if library is None or logits.stride(-1) != 1:
        return _GRAD(logits, *rest)
    out = logits.detach()
    _write_grad(library, out, *rest, out)
    torch.autograd.graph.increment_version(logits)  # it is no more what forward has seen
    return out


_CROSS_ENTROPY = Op(
    "cross_entropy(Tensor logits, Tensor targets, int ignore_index, float smoothing, float z_loss, "
    "bool inplace) -> (Tensor, Tensor)",
    kernel=_losses_kernel,
    reference=_reference,
    fake=_losses_fake,
    setup_context=_setup,
    backward=_backward,
)
