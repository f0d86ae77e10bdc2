"""Attention and MLP made of parallel linear layers: one all-reduce forward, one backward, each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.comm.mesh import Axis, Group
from bigtrain.config.layout import legal_head_degrees
from bigtrain.errors import BigtrainError
from bigtrain.ops.dropout import Dropout
from bigtrain.tensor.linear import ColumnParallelLinear, RowParallelLinear, SharedInput

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
Rotate = Callable[[torch.Tensor], torch.Tensor]


class ParallelAttention(nn.Module):
    """Self-attention whose heads are shared out over the ranks of an axis.

    Y = sum_i concat(softmax(Q_h K_h^T / sqrt(d)) V_h for own heads h) O_i^T. x and Y are
    [B, T, hidden_size]; each rank has num_heads / n query heads, and their key-value heads:
    num_kv_heads / n of them, or where there are fewer than ranks one that several ranks hold
    (grouped-query attention, https://arxiv.org/abs/2305.13245).

    forward(x, rotate, mask): `rotate` turns queries and keys [B, heads, T, d] by their positions
    (rotary embeddings); `mask` is what scaled_dot_product_attention takes, the same for all heads
    ([T, T], or [B, 1, T, T]; True may be seen, or numbers to add), on top of `causal`. Dropout acts
    on the attention weights, head by head as in one process.

    Communicates, for x of b bytes: forward an all-reduce, backward an all-reduce, 2(n-1)/n b each;
    with sequence_parallel as ColumnParallelLinear (q, k, v take x in together) and
    RowParallelLinear say. Shared key-value heads also all-gather their gradients.

    Raises:
        BigtrainError: heads that cannot be shared out; the legal degrees are named.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        group: Group = None,
        *,
        num_kv_heads: int | None = None,
        head_size: int | None = None,
        bias: bool = True,
        causal: bool = True,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        num_chunks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axis, num_kv_heads = Axis.of(group), num_kv_heads or num_heads
        if num_heads % num_kv_heads or (head_size is None and hidden_size % num_heads):
            raise BigtrainError(
                f"ParallelAttention: {num_heads} heads of hidden size {hidden_size} with "
                f"{num_kv_heads} key-value heads",
                why="heads divide the hidden size, and key-value heads divide the heads",
                mend="choose num_heads and num_kv_heads so, or give head_size",
            )
        legal = legal_head_degrees(num_heads, num_kv_heads)
        if axis.degree not in legal:
            raise BigtrainError(
                f"ParallelAttention: {num_heads} heads and {num_kv_heads} key-value heads cannot "
                f"be shared out to {axis.degree} ranks",
                why="every rank takes as many whole heads as the others; of key-value heads too, "
                "or equally many ranks share each",
                mend=f"use a tensor-parallel degree of {', '.join(map(str, legal))}",
            )
        self.head_size = head_size or hidden_size // num_heads
        self.causal, inner = causal, num_heads * self.head_size
        narrow = num_kv_heads * self.head_size

        def column(size: int, heads: int, share: bool) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                hidden_size,
                size,
                axis,
                bias=bias,
                units=(heads,),
                share=share,
                sequence_parallel=sequence_parallel,
                shared_input=entrance,
                device=device,
                dtype=dtype,
            )

        entrance = SharedInput(self)
        self.q = column(inner, num_heads, share=False)
        self.k = column(narrow, num_kv_heads, share=True)
        self.v = column(narrow, num_kv_heads, share=True)
        self.proj = RowParallelLinear(
            inner,
            hidden_size,
            axis,
            bias=bias,
            units=(num_heads,),
            sequence_parallel=sequence_parallel,
            num_chunks=num_chunks,
            device=device,
            dtype=dtype,
        )
        self.dropout = Dropout(dropout)
        self.dropout.split(1, axis.rank, axis.degree)

    def forward(
        self, x: torch.Tensor, rotate: Rotate | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(-3, -2)
            for layer in (self.q, self.k, self.v)
        )
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        if mask is not None and mask.ndim > 3 and mask.shape[-3] != 1:
            raise BigtrainError(
                f"ParallelAttention was given a mask of shape {tuple(mask.shape)}",
                why="each rank has some of the heads, so a mask must be the same for all of them",
                mend="give one of shape [T, T] or [B, 1, T, T]",
            )
        if mask is not None and self.causal:
            mask = _also_causal(mask, q.shape[-2])
        if self.training and self.dropout.p:
            y = self._attend_with_dropout(q, k, v, mask)
        else:
            causal = self.causal and mask is None
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        out: torch.Tensor = self.proj(y.transpose(-3, -2).flatten(-2))
        return out

    def _attend_with_dropout(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention written out, so that its weights are dropped by seeds of ours."""
        groups = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        scores = q @ k.transpose(-2, -1) / self.head_size**0.5
        if mask is None and self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        result: torch.Tensor = self.dropout(scores.softmax(-1)) @ v
        return result


def _also_causal(mask: torch.Tensor, length: int) -> torch.Tensor:
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -torch.inf)


class ParallelMLP(nn.Module):
    """Y = sum_i drop(act(X U_i^T)) D_i^T; gated: act(X G_i^T) * (X U_i^T) in place of act(...).

    x and Y are [..., hidden_size]; each rank has its part of the mlp_size channels inside.
    activation: gelu, gelu_tanh, relu or silu. Dropout acts inside, on the same channels as in one
    process (sizes must divide then).

    Communicates as ParallelAttention: one all-reduce forward, one backward.

    Raises:
        BigtrainError: an unknown activation; dropout with channels that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int,
        group: Group = None,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        sequence_parallel: bool = False,
        num_chunks: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        axis = Axis.of(group)
        if activation not in ACTIVATIONS:
            raise BigtrainError(
                f"ParallelMLP has no activation {activation!r}",
                mend=f"use one of {', '.join(ACTIVATIONS)}",
            )
        if dropout and mlp_size % axis.degree:
            raise BigtrainError(
                f"ParallelMLP: {mlp_size} channels with dropout on {axis.degree} ranks",
                why="dropout inside needs equal parts",
                mend=f"make mlp_size a multiple of {axis.degree}, or leave dropout to the outside",
            )
        self.activation = ACTIVATIONS[activation]
        entrance = SharedInput(self)
        columns = [
            ColumnParallelLinear(
                hidden_size,
                mlp_size,
                axis,
                bias=bias,
                sequence_parallel=sequence_parallel,
                shared_input=entrance,
                device=device,
                dtype=dtype,
            )
            for _ in range(1 + gated)
        ]
        self.gate = columns[0] if gated else None
        self.up = columns[-1]
        self.down = RowParallelLinear(
            mlp_size,
            hidden_size,
            axis,
            bias=bias,
            sequence_parallel=sequence_parallel,
            num_chunks=num_chunks,
            device=device,
            dtype=dtype,
        )
        self.dropout = Dropout(dropout)
        self.dropout.split(-1, axis.rank, axis.degree)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            inner = self.activation(self.up(x))
        else:
            inner = self.activation(self.gate(x)) * self.up(x)
        out: torch.Tensor = self.down(self.dropout(inner))
        return out
