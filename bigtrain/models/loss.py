"""Next-token cross entropy."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.ops.cross_entropy import cross_entropy
from bigtrain.ops.op import Kernels


class NextTokenLoss(nn.CrossEntropyLoss):
    """The mean cross entropy in nats, computed in fp32.

    forward(logits [batch, sequence, vocabulary], targets [batch, sequence] token ids).
    """

    over_last_dim = True  # so that tensor parallelism knows what it computes

    def __init__(self, *, kernels: Kernels = "auto") -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), kernels=self.kernels)
