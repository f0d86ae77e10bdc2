"""Small models and a plain single-process loop: what every parallel run is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.models import GPT, Llama

BATCH, LENGTH, VOCAB = 8, 12, 61
# Some gradients are zero but for rounding (the bias of the keys, say), and AdamW turns any gradient
# well above eps into a full step. This eps is above rounding, and below every real gradient here.
EPS = 1e-6


def gpt(tie: bool = True, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return GPT(VOCAB, 16, 2, 32, 4, dropout=dropout, tie_embeddings=tie)


def llama(tie: bool = False) -> nn.Module:
    torch.manual_seed(7)
    return Llama(VOCAB, 16, 2, 32, 4, num_kv_heads=2, tie_embeddings=tie)


class Branchy(nn.Module):
    """Only the branches that a sample chooses take part: which, differs from rank to rank."""

    def __init__(self, num_branches: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.branches = nn.ModuleList(nn.Linear(16, 16) for _ in range(num_branches))
        self.never = nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for row, wanted in zip(tokens, targets, strict=True):
            x = self.embed(row)
            chosen = int(row[0]) % (len(self.branches) + 1)
            if chosen < len(self.branches):
                x = x + torch.tanh(self.branches[chosen](x))
            total = total + F.cross_entropy(self.head(x), wanted)
        return total / len(tokens)


def branchy() -> nn.Module:
    torch.manual_seed(7)
    return Branchy()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt-tied": gpt,
    "gpt-untied": lambda: gpt(tie=False),
    "llama": llama,
    "llama-tied": lambda: llama(tie=True),
    "branchy": branchy,
}


def global_batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return `steps` batches of BATCH samples, the same in every process."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=draw)
        batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return batches


def plain_run(
    model: nn.Module, steps: int, lr: float = 1e-2, max_norm: float | None = None
) -> dict[str, Any]:
    """Train in one process with nothing but torch; return losses, gradients, parameters."""
    decay = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=EPS,
        fused=True,
    )
    losses, grads = [], []
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for tokens, targets in global_batches(steps):
        # A parameter without a part in a step has a zero gradient, not none.
        optimizer.zero_grad(set_to_none=False)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        loss = model(tokens, targets)
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        losses.append(loss.item())
    params = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"losses": losses, "grads": grads, "params": params, "start": start}
