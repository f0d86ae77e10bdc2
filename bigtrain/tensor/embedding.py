"""An embedding whose rows (the vocabulary) are split over the ranks of an axis."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.mesh import Axis, Group
from bigtrain.errors import BigtrainError
from bigtrain.tensor.regions import reduce_sum, reduce_to_sequence
from bigtrain.tensor.split import even_split, shard_dim, take_part


class VocabParallelEmbedding(nn.Module):
    """Y = E[tokens]: each rank holds rows of E and looks up the tokens that are its own.

    The full E is [num_embeddings, embedding_dim]; the first num_embeddings % n ranks hold one row
    more than the others. tokens: integers of any shape, the same on all ranks. Y is
    [*tokens.shape, embedding_dim], the same on all ranks. Starts from the weights of the group's
    first rank, drawn as nn.Embedding does.

    embedding: the full one whose weights to start from, in place of new ones.
    sequence_parallel: Y is this rank's part of the sequence, [..., T/n, embedding_dim].

    Communicates, for Y of b bytes and degree n: forward an all-reduce, 2(n-1)/n b; backward
    nothing. With sequence_parallel forward a reduce-scatter, backward an all-gather, (n-1)/n b
    each.

    Raises:
        BigtrainError: a token that the vocabulary does not have; an embedding with max_norm,
            scale_grad_by_freq or sparse gradients.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        group: Group = None,
        *,
        padding_idx: int | None = None,
        sequence_parallel: bool = False,
        embedding: nn.Embedding | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        full = embedding or nn.Embedding(
            num_embeddings, embedding_dim, padding_idx=padding_idx, device=device, dtype=dtype
        )
        if full.max_norm is not None or full.scale_grad_by_freq or full.sparse:
            raise BigtrainError(
                "VocabParallelEmbedding has no max_norm, scale_grad_by_freq or sparse gradients",
                why="they look at rows of the whole vocabulary",
                mend="use a plain embedding, or leave this one out of the plan",
            )
        self.axis = Axis.of(group)
        self.num_embeddings, self.embedding_dim = full.num_embeddings, full.embedding_dim
        self.padding_idx = full.padding_idx
        self.sequence_parallel = sequence_parallel and self.axis.degree > 1
        degree, rank = self.axis.degree, self.axis.rank
        self.start, self.stop = even_split(self.num_embeddings, degree, rank)
        own = shard_dim((self.num_embeddings, self.embedding_dim), 0, degree, rank)
        self.weight = take_part(full.weight, own, self.axis)
        self.shards: dict[str, Shard] = {"weight": own}
        self.train(full.training)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        refuse_outside(tokens, self.num_embeddings, "token")
        y = self._own_rows(tokens)
        return (reduce_to_sequence if self.sequence_parallel else reduce_sum)(y, self.axis)

    def _own_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the rows of the tokens that are this rank's, and zero for the others."""
        padding = self.padding_idx
        if self.axis.degree == 1:
            return F.embedding(tokens, self.weight, padding)
        if padding is not None:
            padding = padding - self.start if self.start <= padding < self.stop else None
        foreign = (tokens < self.start) | (tokens >= self.stop)
        if not len(self.weight):  # more ranks than rows: a zero that backward can pass through
            return self.weight.new_zeros(*tokens.shape, self.embedding_dim) + self.weight.sum()
        own = (tokens - self.start).masked_fill(foreign, 0)
        return F.embedding(own, self.weight, padding).masked_fill(foreign[..., None], 0.0)

    def extra_repr(self) -> str:
        axis = self.axis
        flags = ", sequence_parallel" * self.sequence_parallel
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rank {axis.rank} of {axis.degree}, "
            f"own rows {self.start}:{self.stop}{flags}"
        )


def refuse_outside(ids: torch.Tensor, size: int, what: str, ignored: int | None = None) -> None:
    """Refuse ids outside of [0, size), which no rank would know.

    On a GPU the refusal is asynchronous, so that nobody waits for it.

    Raises:
        BigtrainError: there is one, and it is not `ignored`.
    """
    if not ids.numel():
        return
    bad = (ids < 0) | (ids >= size)
    if ignored is not None:
        bad &= ids != ignored
    if ids.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bad.any():
        raise BigtrainError(
            f"{what} {int(ids[bad][0])} is outside of the vocabulary of {size}",
            why=f"{what}s are numbers from 0 to {size - 1}",
            mend="check the tokenizer against the vocabulary size of the model",
        )
