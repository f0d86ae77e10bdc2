"""A small model with parameters of every kind, and optimizers written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

State = dict[str, torch.Tensor]


class Net(nn.Module):
    """An embedding, matrices that are wide and tall, one of three dims, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 12)
        self.head = nn.Linear(12, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2))
        x = x + self.down(torch.tanh(self.up(x)))
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


MATRICES = ("conv.weight", "up.weight", "down.weight")


def net() -> Net:
    torch.manual_seed(5)
    model = Net()
    with torch.no_grad():
        model.conv.bias.zero_()  # the length of zeros
    return model


def batch(step: int, size: int = 4) -> torch.Tensor:
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, 11, (size, 9), generator=draw)


# -- updates: (name, parameter, gradient, state, number from 1, lr, weight decay of this kind) -----


def lamb(name: str, p: torch.Tensor, g: torch.Tensor, s: State, t: int, lr: float, wd: float):
    u = _adam(g, s, t, (0.9, 0.999), 1e-6) + wd * p
    size, length = p.double().norm(), u.double().norm()
    ratio = size / length if size > 0 and length > 0 else 1.0
    p -= lr * ratio * u


def adamw(name: str, p: torch.Tensor, g: torch.Tensor, s: State, t: int, lr: float, wd: float):
    u = _adam(g, s, t, (0.9, 0.95), 1e-8)
    p.mul_(1 - lr * wd).sub_(lr * u)


def _adam(
    g: torch.Tensor, s: State, t: int, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    m, v = (s.setdefault(key, torch.zeros_like(g)) for key in ("m", "v"))
    m.mul_(betas[0]).add_(g, alpha=1 - betas[0])
    v.mul_(betas[1]).add_(g * g, alpha=1 - betas[1])
    return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


def adagrad(name: str, p: torch.Tensor, g: torch.Tensor, s: State, t: int, lr: float, wd: float):
    g = g + wd * p
    total = s.setdefault("sum", torch.zeros_like(g)).add_(g * g)
    p -= lr * g / (total.sqrt() + 1e-10)


def lion(name: str, p: torch.Tensor, g: torch.Tensor, s: State, t: int, lr: float, wd: float):
    m = s.setdefault("m", torch.zeros_like(g))
    p -= lr * ((0.9 * m + 0.1 * g).sign() + wd * p)
    m.mul_(0.99).add_(g, alpha=0.01)


def muon(
    name: str, p: torch.Tensor, g: torch.Tensor, s: State, t: int, lr: float, wd: float,
    scale: str = "match_rms", nesterov: bool = True,
):  # fmt: skip
    if name not in MATRICES:
        adamw(name, p, g, s, t, 0.5 * lr, wd)
        return
    b = s.setdefault("b", torch.zeros_like(g))
    b.mul_(0.95).add_(g, alpha=0.05)
    x = (0.05 * g + 0.95 * b if nesterov else b).flatten(1)
    rows, cols = x.shape
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    length = max(1, rows / cols) ** 0.5 if scale == "keller" else 0.2 * max(rows, cols) ** 0.5
    p.mul_(1 - lr * wd).sub_(lr * length * x.view_as(p))


def plain_run(
    update: Callable[..., None],
    options: Mapping[str, Any],
    steps: int,
    divisor: Callable[[int], float] = lambda step: 1.0,
) -> dict[str, torch.Tensor]:
    """Train the net in one process; return its parameters."""
    model, states = net(), {}
    for step in range(1, steps + 1):
        model.zero_grad()
        model(batch(step)).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                decay = options["weight_decay"] if p.ndim >= 2 else 0.0
                state = states.setdefault(name, {})
                update(name, p, p.grad / divisor(step), state, step, options["lr"], decay)
    return {name: p.detach().clone() for name, p in model.named_parameters()}
