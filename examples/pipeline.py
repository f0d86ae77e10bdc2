"""A model that knows nothing of pipelines, cut into stages in a loop of your own.

`python examples/pipeline.py` runs alone, and with the same losses on several ranks, which have
its layers one after the other: `torchrun --nproc-per-node 4 examples/pipeline.py`.
--schedule chooses who does what when: gpipe, 1f1b, zb_h1, zb_v, dualpipe_v or a table (.csv).
"""

import argparse
import os

import torch
import torch.nn.functional as F
from torch import nn

import bigtrain

WIDTH, LENGTH = 48, 64


class Block(nn.Module):
    """Looks at the 7 bytes before each, then at all channels."""

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.past = nn.Conv1d(WIDTH, WIDTH, 8, dilation=dilation, groups=WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, sequence, channels]
        reach = 7 * self.past.dilation[0]
        x = x + self.past(F.pad(self.norm1(x).mT, (reach, 0))).mT
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block(1 + i % 3) for i in range(6))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight  # tied: the first and the last stage share it

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    logits = model(window[:, :-1])  # once; a stage but the last stops here
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--schedule", default="1f1b")
args = parser.parse_args()
mesh = bigtrain.init(bigtrain.Layout(pp=int(os.environ.get("WORLD_SIZE", "1"))))
torch.manual_seed(0)  # the same model on all ranks; each then keeps its own stages
text = torch.tensor(list(torch.__doc__.encode()), device=mesh.device)  # any bytes will do
pipeline = bigtrain.build_pipeline(
    Model(), mesh, schedule=args.schedule, loss_of=loss_of, example=text[: 2 * LENGTH].view(2, -1)
)
for stage in pipeline.stages:
    print(f"rank {mesh.rank} has stage {stage.index}: {stage.units[0]} to {stage.units[-1]}")
optimizer = bigtrain.AdamW(pipeline.path, lr=3e-3)
for step in range(30):
    starts = (torch.arange(16, device=mesh.device) + 16 * step) * 61 % (len(text) - LENGTH - 1)
    windows = text[starts[:, None] + torch.arange(LENGTH + 1, device=mesh.device)]
    loss = pipeline.step(windows.split(2), loss_of)  # 8 microbatches, the same on all ranks
    pipeline.path.finish()
    norm = pipeline.path.grad_norm()  # of the whole model
    optimizer.step(grad_divisor=(norm / 0.5).clamp(min=1))  # clips it
    pipeline.path.publish()
    if mesh.rank == 0 and (step + 1) % 10 == 0:
        print(f"step {step + 1}  loss {loss.item():.5f}  gradient norm {norm.item():.5f}")
bigtrain.leave()
