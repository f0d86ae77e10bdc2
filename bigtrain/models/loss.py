"""Next-token cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class NextTokenLoss(nn.CrossEntropyLoss):
    """The mean cross entropy in nats, computed in fp32.

    forward(logits [batch, sequence, vocabulary], targets [batch, sequence] token ids).
    """

    over_last_dim = True  # so that tensor parallelism knows what it computes

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
