"""Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

Sources: https://arxiv.org/abs/2307.09288, rotary https://arxiv.org/abs/2104.09864, grouped-query
attention https://arxiv.org/abs/2305.13245, SwiGLU https://arxiv.org/abs/2002.05202.
Shapes in comments: B batch, T sequence, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.models.loss import NextTokenLoss
from bigtrain.ops.activations import swiglu
from bigtrain.ops.norms import RMSNorm
from bigtrain.ops.op import Kernels
from bigtrain.ops.rotary import rotary
from bigtrain.pipeline.layer import Layer
from bigtrain.tensor.plan import Plan, Style


def rotary_table(max_seq_len: int, head_size: int, theta: float) -> torch.Tensor:
    """Return cosines and sines of the rotary angles, [2, max_seq_len, head_size / 2] fp32."""
    frequencies = theta ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin())).float()


class Attention(nn.Module):
    """Causal self-attention whose keys and values have fewer heads than its queries."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, kernels: Kernels = "auto"
    ) -> None:
        super().__init__()
        self.kernels: Kernels = kernels
        self.head_size = hidden_size // num_heads
        self.q = nn.Linear(hidden_size, num_heads * self.head_size, bias=False)
        self.k = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=False)
        self.v = nn.Linear(hidden_size, num_kv_heads * self.head_size, bias=False)
        self.proj = nn.Linear(num_heads * self.head_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        def split(y: torch.Tensor) -> torch.Tensor:
            return y.unflatten(-1, (-1, self.head_size)).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))  # [B, H or K, T, D]
        q, k = (rotary(t, table, seq_dim=2, kernels=self.kernels) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, mlp_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels: Kernels = kernels
        self.gate = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(swiglu(self.gate(x), self.up(x), kernels=self.kernels))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        mlp_size: int,
        norm_eps: float,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, eps=norm_eps, kernels=kernels)
        self.attention = Attention(hidden_size, num_heads, num_kv_heads, kernels)
        self.norm2 = RMSNorm(hidden_size, eps=norm_eps, kernels=kernels)
        self.mlp = MLP(hidden_size, mlp_size, kernels)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return self.think(self.attend(x, table))

    def attend(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Return the first half of forward."""
        return x + self.attention(self.norm1(x), table)

    def think(self, x: torch.Tensor) -> torch.Tensor:
        """Return the second half of forward."""
        return x + self.mlp(self.norm2(x))

    def layers(self, name: str, table: torch.Tensor) -> list[Layer]:
        """Return this block, called `name`, as two layers of a chain."""
        first, second = (f"{name}.norm1", f"{name}.attention"), (f"{name}.norm2", f"{name}.mlp")
        return [
            Layer(f"{name}.attention", partial(self.attend, table=table), first),
            Layer(f"{name}.mlp", self.think, second),
        ]


class Llama(nn.Module):
    """A decoder-only language model.

    forward(tokens [B, T] int64) gives logits [B, T, vocabulary];
    forward(tokens, targets [B, T] int64) gives the mean next-token loss in nats, fp32.
    """

    table: torch.Tensor

    def __init__(
        self,
        vocab_size: int = 256,
        max_seq_len: int = 256,
        num_layers: int = 4,
        hidden_size: int = 128,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_size: int | None = None,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        mlp_size = mlp_size or -(-hidden_size * 8 // 3 // 32) * 32
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, self.num_kv_heads, mlp_size, norm_eps, kernels)
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size, eps=norm_eps, kernels=kernels)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.logits = nn.Identity()  # tensor parallelism puts them together here
        self.loss = NextTokenLoss(kernels=kernels)
        for name, param in self.named_parameters():
            if param.ndim >= 2:
                branch_end = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(param, std=0.02 / (2 * num_layers) ** 0.5 if branch_end else 0.02)
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight
        table = rotary_table(max_seq_len, hidden_size // num_heads, rope_theta)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.token_embedding(tokens)
        for block in self.blocks:
            x = block(x, self.table)
        return self.read_out(x, targets)

    def read_out(self, x: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """Return logits or the loss, of what the last block gives."""
        x = self.head(self.norm(x))
        return self.logits(x) if targets is None else self.loss(x, targets)

    def pipeline_layers(self) -> list[Layer]:
        """Return this model as a chain, which pipeline parallelism cuts into stages."""
        head = ("norm", "head", "logits", "loss")
        layers = [Layer("embedding", self.token_embedding, ("token_embedding",), ("tokens",))]
        for index, block in enumerate(self.blocks):
            if isinstance(block, Block):
                layers += block.layers(f"blocks.{index}", self.table)
            else:  # something around a block, that checkpoints its activations say
                call = partial(block, table=self.table)
                layers.append(Layer(f"blocks.{index}", call, (f"blocks.{index}",)))
        return [*layers, Layer("head", self.read_out, head, ("targets",))]

    def tensor_plan(self) -> Plan:
        """Return how tensor parallelism splits this model."""
        heads, kv = Style("column", units=(self.num_heads,)), (self.num_kv_heads,)
        return {
            "token_embedding": "vocab",
            "blocks.*.norm1": "sequence",
            "blocks.*.attention.q": heads,
            "blocks.*.attention.k": Style("column", units=kv, share=True),
            "blocks.*.attention.v": Style("column", units=kv, share=True),
            "blocks.*.attention.proj": Style("row", units=(self.num_heads,)),
            "blocks.*.norm2": "sequence",
            "blocks.*.mlp.gate": "column",
            "blocks.*.mlp.up": "column",
            "blocks.*.mlp.down": "row",
            "norm": "sequence",
            "head": "vocab",
            "logits": "gather",
            "loss": "vocab",
        }
