"""Small models and a plain single-process loop: what every parallel run is compared with."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import COLLECTIVES, run_ranks
from torch import nn

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
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


Batch = tuple[torch.Tensor, torch.Tensor]


def global_batches(steps: int, length: int = LENGTH) -> list[Batch]:
    """Return `steps` batches of BATCH samples, the same in every process."""
    draw = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (BATCH, length + 1), generator=draw)
        batches.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return batches


def plain_run(
    model: nn.Module,
    steps: int,
    lr: float = 1e-2,
    max_norm: float | None = None,
    batches: Sequence[Batch] | None = None,
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
    for tokens, targets in batches or global_batches(steps):
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


# -- tensor parallelism -----------------------------------------------------------------------

TENSOR_LENGTH = 16  # a multiple of 8, so that sequences can be shared out to 8 ranks


def _wide_gpt(vocab: int, tie: bool) -> nn.Module:
    torch.manual_seed(7)
    return GPT(vocab, TENSOR_LENGTH, 2, 32, 8, tie_embeddings=tie)


def _wide_llama(vocab: int, kv_heads: int, tie: bool = False, mlp_size: int = 64) -> nn.Module:
    torch.manual_seed(7)
    return Llama(
        vocab,
        TENSOR_LENGTH,
        2,
        32,
        8,
        num_kv_heads=kv_heads,
        mlp_size=mlp_size,
        tie_embeddings=tie,
    )


# Eight heads, so that 8 ranks can share them; each takes the size of the vocabulary.
TENSOR_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "gpt-tied": partial(_wide_gpt, tie=True),
    "gpt-untied": partial(_wide_gpt, tie=False),
    "llama": partial(_wide_llama, kv_heads=8),
    "llama-kv2": partial(_wide_llama, kv_heads=2),
    "llama-kv1": partial(_wide_llama, kv_heads=1, mlp_size=50),  # 50: uneven on 4 and 8 ranks
    "llama-tied": partial(_wide_llama, kv_heads=8, tie=True),
}


class PlainAttention(nn.Module):
    """What ParallelAttention is in one process, of plain torch; draws its weights alike."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        bias: bool = True,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        narrow = (num_kv_heads or num_heads) * self.head_size
        self.q = nn.Linear(hidden_size, hidden_size, bias)
        self.k = nn.Linear(hidden_size, narrow, bias)
        self.v = nn.Linear(hidden_size, narrow, bias)
        self.proj = nn.Linear(hidden_size, hidden_size, bias)
        self.dropout = dropout or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) / self.head_size**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = self.dropout(scores.masked_fill(future, -torch.inf).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """What ParallelMLP is in one process, of plain torch; draws its weights alike."""

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int,
        activation: Callable[[torch.Tensor], torch.Tensor] = F.gelu,
        gated: bool = False,
        bias: bool = True,
        dropout: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, mlp_size, bias) if gated else None
        self.up = nn.Linear(hidden_size, mlp_size, bias)
        self.down = nn.Linear(mlp_size, hidden_size, bias)
        self.activation, self.dropout = activation, dropout or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.up(x) if self.gate is None else self.gate(x))
        return self.down(self.dropout(inner if self.gate is None else inner * self.up(x)))


# -- what is compared -------------------------------------------------------------------------


def own_blocks(path: GradientPath) -> list[NamedBlock]:
    """Return copies of this rank's blocks of the parameters."""
    blocks = path.blocks("", [segment.main_params for segment in path.segments()])
    return [replace(block, tensor=block.tensor.clone()) for block in blocks]


def assemble(ranks: Iterable[list[NamedBlock]]) -> dict[str, torch.Tensor]:
    """Put full tensors together, and see that every element is there as often as blocks say."""
    full: dict[str, torch.Tensor] = {}
    cover: dict[str, torch.Tensor] = {}
    for block in (block for blocks in ranks for block in blocks):
        whole = full.setdefault(block.name, torch.full(block.shape, math.nan))
        counts = cover.setdefault(block.name, torch.zeros(block.shape))
        before = counts[block.block.slices]
        if before.any():
            assert torch.equal(whole[block.block.slices], block.tensor), block.name
        whole[block.block.slices] = block.tensor
        before += 1 / block.num_replicas
    for name, counts in cover.items():
        torch.testing.assert_close(counts, torch.ones_like(counts), msg=name)
    return full


def relative_error(got: torch.Tensor, wanted: torch.Tensor, floor: float) -> float:
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm().clamp(min=floor))


# -- many cases in one world ------------------------------------------------------------------


def survey(
    cases: Mapping[str, Callable[[Mesh], Any]], world_size: int, folder: Path, **options: Any
) -> dict[str, list[Any] | str]:
    """Run all cases, one after the other, on the same ranks; return what each rank returned.

    Starting ranks costs more than most cases. A case that fails ends its ranks; its result is the
    error, and the cases after it run on new ranks.
    """
    results: dict[str, list[Any] | str] = {}
    left = dict(cases)
    while left:
        error = ""
        try:
            run_ranks(_survey_rank, world_size, folder, args=(left, folder), **options)
        except AssertionError as failure:
            error = str(failure)
        for name in list(left):
            files = [folder / f"{name}.{rank}" for rank in range(world_size)]
            if not all(file.exists() for file in files):
                break
            results[name] = [pickle.loads(file.read_bytes()) for file in files]
            del left[name]
        if left:
            name = next(iter(left))
            results[name] = error or "it left no result"
            del left[name]
    return results


def _survey_rank(mesh: Mesh, cases: Mapping[str, Callable[[Mesh], Any]], folder: Path) -> None:
    for name, case in cases.items():
        content = pickle.dumps(case(mesh))
        unready = folder / f"{name}.{mesh.rank}.unready"
        unready.write_bytes(content)
        unready.rename(folder / f"{name}.{mesh.rank}")


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int, int]]]:
    """Collect (operation, bytes that this rank puts in, group size) of every collective.

    Messages count where they are sent: on CPU some collectives are messages between each two ranks.
    """
    calls: list[tuple[str, int, int]] = []
    plain = {name: getattr(dist, name) for name in (*COLLECTIVES, "isend") if hasattr(dist, name)}

    def recorder(name: str) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            own = args[1] if name.startswith("all_gather") or name.startswith("all_to") else args[0]
            size = own.numel() * own.element_size() if isinstance(own, torch.Tensor) else 0
            calls.append((name, size, dist.get_world_size(kwargs.get("group"))))
            return plain[name](*args, **kwargs)

        return record

    for name in plain:
        setattr(dist, name, recorder(name))
    try:
        yield calls
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
