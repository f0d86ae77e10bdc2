"""Parallel layers in your own model, with nothing but torch around them.

`python examples/tensor_parallel.py` runs alone, and with the same losses on several ranks
`torchrun --nproc-per-node 2 examples/tensor_parallel.py`. Add --sequence-parallel to also split
what lies between the layers, along the sequence.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import bigtrain
from bigtrain.comm.block import shards_of
from bigtrain.comm.mesh import Axis
from bigtrain.tensor import sum_gradients

VOCAB, HIDDEN = 257, 64  # bytes and a mark for the start: sizes need not divide


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions of queries or keys, [batch, heads, sequence, head size]."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[-2]), 1e4 ** -(torch.arange(half) / half))
    a, b, cos, sin = *x.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    def __init__(self, axis: Axis, **common) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.attention = bigtrain.ParallelAttention(HIDDEN, 8, axis, num_kv_heads=2, **common)
        # What bigtrain.ParallelMLP is made of: a column layer gives each rank its channels, a row
        # layer takes them and adds up over ranks.
        self.up = bigtrain.ColumnParallelLinear(HIDDEN, 250, axis, **common)
        self.down = bigtrain.RowParallelLinear(250, HIDDEN, axis, **common)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), rotate)
        return x + self.down(F.silu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, axis: Axis, **common) -> None:
        super().__init__()
        self.axis = axis
        self.embedding = bigtrain.VocabParallelEmbedding(VOCAB, HIDDEN, axis, **common)
        self.blocks = nn.Sequential(*(Block(axis, **common) for _ in range(2)))
        self.norm = nn.RMSNorm(HIDDEN)
        self.head = bigtrain.ColumnParallelLinear(HIDDEN, VOCAB, axis, bias=False, **common)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        own = self.head(self.norm(self.blocks(self.embedding(tokens))))  # this rank's logits
        return bigtrain.vocab_parallel_cross_entropy(own, targets, self.axis, vocab_size=VOCAB)


def clip_gradients(model: Model, most: float) -> float:
    """Clip the norm of the whole gradient. What several ranks hold must count once."""
    shards, square = shards_of(model), torch.zeros(())
    for name, param in model.named_parameters():
        holders = shards[name].num_replicas if name in shards else model.axis.degree
        square += param.grad.square().sum() / holders
    if model.axis.degree > 1:
        dist.all_reduce(square)
    nn.utils.clip_grads_with_norm_(model.parameters(), most, square.sqrt())
    return square.sqrt().item()


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--sequence-parallel", action="store_true")
args = parser.parse_args()
if "RANK" in os.environ:  # torchrun started this
    dist.init_process_group("gloo")
axis = Axis.of(dist.group.WORLD)  # layers take the group as well; None is this rank alone
torch.manual_seed(0)
model = Model(axis, sequence_parallel=args.sequence_parallel)
if args.sequence_parallel:  # then a norm sees a part of the sequence on each rank
    for norm in (module for module in model.modules() if isinstance(module, nn.RMSNorm)):
        sum_gradients(norm, axis)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
text = torch.tensor([256, *torch.__doc__.encode()])  # any bytes will do
for step in range(30):
    starts = (torch.arange(8) + 8 * step) * 61 % (len(text) - 65)
    window = text[starts[:, None] + torch.arange(65)]  # the same on all ranks
    loss = model(window[:, :-1], window[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradients(model, 0.5)
    optimizer.step()
    if axis.rank == 0 and (step + 1) % 10 == 0:
        print(f"step {step + 1}  loss {loss.item():.5f}  gradient norm {norm:.5f}")
bigtrain.leave()
