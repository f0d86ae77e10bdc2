"""Cross entropy of logits whose vocabulary is split over the ranks of an axis.

Logits are never gathered: each rank reduces its own to three or four numbers a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bigtrain.comm.collectives import start_all_gather
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.ops.cross_entropy import cross_entropy_grad, cross_entropy_parts
from bigtrain.ops.op import Kernels
from bigtrain.tensor.embedding import refuse_outside
from bigtrain.tensor.regions import first_order
from bigtrain.tensor.split import even_split


class _CrossEntropy(torch.autograd.Function):
    """Loss of each token [N] fp32 of own logits [N, v]; targets [N] are in the full vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        axis: Axis,
        vocab_size: int,
        smoothing: float,
        z_loss: float,
        ignore_index: int,
        kernels: Kernels,
    ) -> torch.Tensor:
        start, stop = even_split(vocab_size, axis.degree, axis.rank)
        valid = targets != ignore_index
        mine = valid & (targets >= start) & (targets < stop)
        own = torch.where(mine, targets - start, -1)
        parts = cross_entropy_parts(logits, own, with_sum=smoothing > 0, kernels=kernels)
        numbers = [number.float() for number in parts if number is not None]
        everyone = start_all_gather(torch.stack(numbers), axis, "all_gather of the loss").wait()
        highest = everyone[:, 0].amax(0)
        scaled = everyone[:, 1] * (everyone[:, 0] - highest).exp()
        rest = scaled.sum(0).log()
        log_sum = highest + rest
        loss = (highest - everyone[:, 2].sum(0)) + rest
        if smoothing:
            uniform = (highest - everyone[:, 3].sum(0) / vocab_size) + rest
            loss = (1 - smoothing) * loss + smoothing * uniform
        if z_loss:
            loss = loss + z_loss * log_sum.square()
        ctx.save_for_backward(logits, log_sum, own, valid)
        ctx.options = {
            "z_loss": z_loss,
            "uniform": smoothing / vocab_size,
            "hit": 1 - smoothing,
            "kernels": kernels,
        }
        return loss.masked_fill(~valid, 0.0)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        logits, log_sum, own, valid = ctx.saved_tensors
        scale = grad.masked_fill(~valid, 0.0)
        result = cross_entropy_grad(logits, own, log_sum, scale, **ctx.options)
        return result, None, None, None, None, None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    group: Group = None,
    *,
    vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    kernels: Kernels = "auto",
) -> torch.Tensor:
    """Return the cross entropy in nats, fp32, the same bits on all ranks of the group.

        loss = (1 - s) (L - x[target]) + s (L - mean(x)) + z L^2,  L = log sum exp x

    logits: [..., own part of the vocabulary], as a ColumnParallelLinear of vocab_size output
    features gives it; targets: [...] ids in the full vocabulary. Computed in fp32 whatever the
    dtype. s is `label_smoothing` as torch defines it; `z_loss` keeps L near zero
    (https://arxiv.org/abs/2204.02311). Tokens whose target is `ignore_index` count nothing.
    reduction: mean over the tokens that count (NaN if there are none, as in torch), sum, or none.
    vocab_size: of the full vocabulary; needed at a degree above 1, since it may not divide.

    Communicates forward an all-gather of three fp32 numbers a token (four with label smoothing),
    n-1 times 12 (16) bytes a token; backward nothing.

    Raises:
        BigtrainError: shapes that do not fit, a target outside of the vocabulary.
    """
    axis = Axis.of(group)
    if vocab_size is None:
        if axis.degree > 1:
            raise BigtrainError(
                "vocab_parallel_cross_entropy without vocab_size",
                why="a rank sees its own part of the vocabulary, which may be larger or smaller "
                "than the others'",
                mend="pass the out_features of the layer that the logits come from",
            )
        vocab_size = logits.shape[-1]
    start, stop = even_split(vocab_size, axis.degree, axis.rank)
    if logits.shape[:-1] != targets.shape or logits.shape[-1] != stop - start:
        raise BigtrainError(
            f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} do not fit together",
            why=f"of a vocabulary of {vocab_size} this rank ({axis.rank} of {axis.degree}) has "
            f"{stop - start} columns, and every token has a target",
            mend="pass the own part of the logits (no gather_output), and the full vocab_size",
        )
    if reduction not in ("mean", "sum", "none"):
        raise BigtrainError(f"reduction is {reduction!r}", mend="use mean, sum or none")
    refuse_outside(targets, vocab_size, "target", ignore_index)
    losses: torch.Tensor = _CrossEntropy.apply(
        logits.flatten(0, -2) if logits.ndim > 1 else logits[None],
        targets.flatten(),
        axis,
        vocab_size,
        label_smoothing,
        z_loss,
        ignore_index,
        kernels,
    )
    if reduction == "none":
        return losses.view(targets.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (targets != ignore_index).sum()


class VocabParallelCrossEntropy(nn.Module):
    """`vocab_parallel_cross_entropy` as a module, in place of nn.CrossEntropyLoss."""

    def __init__(
        self,
        group: Group = None,
        *,
        vocab_size: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.axis, self.vocab_size = Axis.of(group), vocab_size
        self.label_smoothing, self.z_loss = label_smoothing, z_loss
        self.ignore_index, self.reduction, self.kernels = ignore_index, reduction, kernels

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_cross_entropy(
            logits,
            targets,
            self.axis,
            vocab_size=self.vocab_size,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            kernels=self.kernels,
        )

    def extra_repr(self) -> str:
        return f"vocab_size={self.vocab_size}, rank {self.axis.rank} of {self.axis.degree}"
