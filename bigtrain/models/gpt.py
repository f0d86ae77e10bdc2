"""GPT: learned positions, pre-LayerNorm blocks, GELU (https://arxiv.org/abs/2005.14165).

Shapes in comments: B batch, T sequence, C hidden size, H heads, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.models.loss import NextTokenLoss
from bigtrain.ops.activations import bias_gelu
from bigtrain.ops.dropout import Dropout
from bigtrain.ops.norms import LayerNorm
from bigtrain.ops.op import Kernels
from bigtrain.pipeline.layer import Layer
from bigtrain.tensor.plan import Plan, Style


class Attention(nn.Module):
    """Causal self-attention with one fused projection for queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (3, -1, self.head_size))  # [B, T, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers, four times as wide inside, GELU between."""

    def __init__(self, hidden_size: int, kernels: Kernels) -> None:
        super().__init__()
        self.kernels: Kernels = kernels
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(bias_gelu(self.up(x), approximate="tanh", kernels=self.kernels))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on both branches."""

    def __init__(
        self, hidden_size: int, num_heads: int, dropout: float, kernels: Kernels = "auto"
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(hidden_size, kernels=kernels)
        self.attention = Attention(hidden_size, num_heads)
        self.norm2 = LayerNorm(hidden_size, kernels=kernels)
        self.mlp = MLP(hidden_size, kernels)
        self.dropout1 = Dropout(dropout, kernels=kernels)
        self.dropout2 = Dropout(dropout, kernels=kernels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.think(self.attend(x))

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Return the first half of forward."""
        return self.dropout1(self.attention(self.norm1(x)), x)

    def think(self, x: torch.Tensor) -> torch.Tensor:
        """Return the second half of forward."""
        return self.dropout2(self.mlp(self.norm2(x)), x)

    def layers(self, name: str) -> list[Layer]:
        """Return this block, called `name`, as two layers of a chain."""
        first = (f"{name}.norm1", f"{name}.attention", f"{name}.dropout1")
        second = (f"{name}.norm2", f"{name}.mlp", f"{name}.dropout2")
        return [
            Layer(f"{name}.attention", self.attend, first),
            Layer(f"{name}.mlp", self.think, second),
        ]


class GPT(nn.Module):
    """A decoder-only language model.

    forward(tokens [B, T] int64) gives logits [B, T, vocabulary];
    forward(tokens, targets [B, T] int64) gives the mean next-token loss in nats, fp32.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        max_seq_len: int = 256,
        num_layers: int = 4,
        hidden_size: int = 128,
        num_heads: int = 4,
        dropout: float = 0.0,
        tie_embeddings: bool = True,
        kernels: Kernels = "auto",
    ) -> None:
        super().__init__()
        self.max_seq_len, self.num_heads = max_seq_len, num_heads
        self.token_embedding = nn.Embedding(vocab_size, hidden_size)
        self.position_embedding = nn.Embedding(max_seq_len, hidden_size)
        self.dropout = Dropout(dropout, kernels=kernels)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, dropout, kernels) for _ in range(num_layers)
        )
        self.norm = LayerNorm(hidden_size, kernels=kernels)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.logits = nn.Identity()  # tensor parallelism puts them together here
        self.loss = NextTokenLoss(kernels=kernels)
        self.apply(self._init)
        for name, param in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(param, std=0.02 / (2 * num_layers) ** 0.5)
        if tie_embeddings:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.read_out(x, targets)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return what the first block is given, [B, T, C]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))

    def read_out(self, x: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        """Return logits or the loss, of what the last block gives."""
        x = self.head(self.norm(x))
        return self.logits(x) if targets is None else self.loss(x, targets)

    def pipeline_layers(self) -> list[Layer]:
        """Return this model as a chain, which pipeline parallelism cuts into stages."""
        embedding = ("token_embedding", "position_embedding", "dropout")
        head = ("norm", "head", "logits", "loss")
        layers = [Layer("embedding", self.embed, embedding, ("tokens",))]
        for index, block in enumerate(self.blocks):
            if isinstance(block, Block):
                layers += block.layers(f"blocks.{index}")
            else:  # something around a block, that checkpoints its activations say
                layers.append(Layer(f"blocks.{index}", block, (f"blocks.{index}",)))
        return [*layers, Layer("head", self.read_out, head, ("targets",))]

    def tensor_plan(self) -> Plan:
        """Return how tensor parallelism splits this model."""
        heads = self.num_heads
        return {
            "token_embedding": "vocab",
            "position_embedding": "sequence",
            "dropout": "sequence",
            "blocks.*.norm1": "sequence",
            "blocks.*.attention.qkv": Style("column", units=(heads, heads, heads)),
            "blocks.*.attention.proj": Style("row", units=(heads,)),
            "blocks.*.norm2": "sequence",
            "blocks.*.mlp.up": "column",
            "blocks.*.mlp.down": "row",
            "blocks.*.dropout1": "sequence",
            "blocks.*.dropout2": "sequence",
            "norm": "sequence",
            "head": "vocab",
            "logits": "gather",
            "loss": "vocab",
        }
