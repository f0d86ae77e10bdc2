"""Next-token cross entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def next_token_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy in nats, computed in fp32.

    logits: [batch, sequence, vocabulary]; targets: [batch, sequence] token ids.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
