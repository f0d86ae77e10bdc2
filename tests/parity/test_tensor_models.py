"""Whole models under tensor and sequence parallelism train as one process does.

Tolerances as for data parallelism, and for the same reasons: sums that are split over ranks add the
same fp32 numbers in another order. Errors are relative, in the 2-norm of a tensor: gradients of the
first step below 5e-6; later gradients, and the way that parameters have gone, below 1e-3, since
AdamW magnifies the rounding of small gradients. A wrong part, a lost or a doubled contribution
shows as 1e-1 and more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import (
    BATCH,
    EPS,
    TENSOR_LENGTH,
    TENSOR_MODELS,
    PlainAttention,
    PlainMLP,
    assemble,
    global_batches,
    own_blocks,
    plain_run,
    relative_error,
    survey,
)
from torch import nn

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Group, Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.models import GPT
from bigtrain.observe.replicas import find_divergence
from bigtrain.ops.dropout import seed_dropout
from bigtrain.optim import AdamW
from bigtrain.tensor import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    VocabParallelEmbedding,
    sum_gradients,
    vocab_parallel_cross_entropy,
)

STEPS = 5
BATCHES = global_batches(STEPS, TENSOR_LENGTH)
pytestmark = pytest.mark.parity


# -- what a rank does -------------------------------------------------------------------------


def train(
    mesh: Mesh,
    make: Callable[[Mesh], nn.Module],
    sequence: bool = False,
    num_micro: int = 1,
    sample_seeds: bool = False,
) -> dict[str, Any]:
    """Train on this rank's share of the batches; return what a test compares."""
    model = make(mesh)
    path = parallelize(model, mesh, sequence_parallel=sequence, bucket_mb=0.02)
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    start = own_blocks(path)
    with torch.no_grad():
        model.eval()
        logits = model(BATCHES[0][0])
        model.train()
    losses, grads, norms = [], [], []
    size = BATCH // mesh.dp.degree // num_micro
    for step, (tokens, targets) in enumerate(BATCHES):
        total = 0.0
        for micro in range(num_micro):
            begin = (micro * mesh.dp.degree + mesh.dp.rank) * size
            part = slice(begin, begin + size)
            if sample_seeds:
                seed_dropout(model, seeds_of(step)[part])
            loss = model(tokens[part], targets[part]) / num_micro
            path.backward(loss, last=micro == num_micro - 1)
            total += loss.item()
        path.finish()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        norms.append(float(path.grad_norm()))
        optimizer.step()
        path.publish()
        losses.append(total)
    return {
        "start": start,
        "logits": logits,
        "losses": losses,
        "grads": grads,
        "norms": norms,
        "params": own_blocks(path),
        "shards": path.shards,
        "dp": mesh.dp.rank,
        "divergence": divergence(path, model, mesh),
    }


def seeds_of(step: int) -> list[int]:
    return [1000 * step + sample for sample in range(BATCH)]


def divergence(path: GradientPath, model: nn.Module, mesh: Mesh) -> tuple[list[str], list[str]]:
    """What find_divergence says of good replicas, and after the last rank has changed one."""
    good = find_divergence(own_blocks(path), mesh.world)
    if mesh.rank == mesh.world.degree - 1:
        with torch.no_grad():
            model.get_parameter("norm.weight")[3] += 1e-6
    return good, find_divergence(own_blocks(path), mesh.world)


# -- what is compared -------------------------------------------------------------------------


def assert_same_training(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    start = assemble(rank["start"] for rank in ranks)
    assert start.keys() == plain["start"].keys()
    for name, tensor in plain["start"].items():
        assert torch.equal(start[name], tensor), f"{name} does not start as in one process"
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(plain["losses"]), rtol=0, atol=1e-5)
    assert len({(rank["dp"], *rank["losses"]) for rank in ranks}) == len({r["dp"] for r in ranks})
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(rank["logits"], ranks[0]["logits"])
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["norms"][0] == pytest.approx(plain["norms"][0], rel=1e-5)
        assert rank["norms"] == pytest.approx(plain["norms"], rel=1e-3)
        for step, wanted in enumerate(plain["grads"]):
            for name, grad in wanted.items():
                own = rank["shards"][name].take(grad)
                error = relative_error(rank["grads"][step][name], own, floor=1e-4)
                assert error < (1e-3 if step else 5e-6), f"gradient of {name}, step {step}: {error}"
    params = assemble(rank["params"] for rank in ranks)  # replicas equal bit for bit
    for name, param in plain["params"].items():
        begin = plain["start"][name]
        error = relative_error(params[name] - begin, param - begin, floor=1e-6)
        assert error < 1e-3, f"parameter {name}: {error}"
    last = len(ranks) - 1
    for rank in ranks:
        good, changed = rank["divergence"]
        assert good == []
        assert changed == ([f"norm.weight on rank {last} and rank 0"] if last else [])


def plain_training(model: nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        logits = model.eval()(BATCHES[0][0])
    plain = plain_run(model.train(), STEPS, batches=BATCHES)
    norms = [float(nn.utils.get_total_norm(grads.values())) for grads in plain["grads"]]
    return {**plain, "logits": logits, "norms": norms}


# -- a model of a user, made of parallel layers -----------------------------------------------


class Made(nn.Module):
    """Parallel layers used directly, or in one process plain ones of the same names."""

    def __init__(self, group: Group, sequence: bool, plain: bool = False) -> None:
        super().__init__()
        hidden, vocab, options = 32, 61, {"sequence_parallel": sequence}
        self.sequence, self.plain = sequence, plain
        if plain:
            self.embed = nn.Embedding(vocab, hidden)
            self.attention: nn.Module = PlainAttention(hidden, 8, 2, bias=False)
            self.mlp: nn.Module = PlainMLP(hidden, 50, gated=True)
            self.head: nn.Module = nn.Linear(hidden, vocab, bias=False)
        else:
            self.embed = VocabParallelEmbedding(vocab, hidden, group, **options)
            self.attention = ParallelAttention(
                hidden, 8, group, num_kv_heads=2, bias=False, **options
            )
            self.mlp = ParallelMLP(hidden, 50, group, gated=True, **options)
            self.head = ColumnParallelLinear(hidden, vocab, group, bias=False, **options)
        self.norm = nn.LayerNorm(hidden)
        self.group = self.head.axis if isinstance(self.head, ColumnParallelLinear) else None
        if sequence and self.group:
            sum_gradients(self.norm, self.group)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm(x))
        x = self.head(self.norm(x + self.mlp(self.norm(x))))
        if targets is None:  # what all ranks have alike
            return x.sum() * 0
        if self.plain:
            return nn.functional.cross_entropy(x.flatten(0, 1), targets.flatten())
        return vocab_parallel_cross_entropy(x, targets, self.group, vocab_size=61)


def made(mesh: Mesh, sequence: bool) -> nn.Module:
    torch.manual_seed(7 + mesh.rank)  # every rank draws other weights
    return Made(mesh.tp, sequence)


def made_plain() -> nn.Module:
    torch.manual_seed(7)
    return Made(None, False, plain=True)


# -- the matrix -------------------------------------------------------------------------------


def seeded(mesh: Mesh, name: str, vocab: int) -> nn.Module:
    return TENSOR_MODELS[name](vocab)


def unseeded(mesh: Mesh, name: str, vocab: int) -> nn.Module:
    model = TENSOR_MODELS[name](vocab)
    torch.manual_seed(100 + mesh.rank)
    for param in model.parameters():
        if mesh.rank:
            nn.init.normal_(param)
    return model


def dropping(mesh: Mesh | None = None) -> nn.Module:
    torch.manual_seed(7)
    return GPT(61, TENSOR_LENGTH, 2, 32, 8, dropout=0.3)


def on_off(name: str, flag: bool) -> str:
    return f"{name}-sequence" if flag else name


PLAIN: dict[str, Callable[[], nn.Module]] = {
    f"{name}-{vocab}": partial(make, vocab)
    for name, make in TENSOR_MODELS.items()
    for vocab in (64, 61)
}
MATRIX = {
    on_off(f"{name}-{vocab}", sequence): (
        f"{name}-{vocab}",
        partial(train, make=partial(seeded, name=name, vocab=vocab), sequence=sequence),
    )
    for name in TENSOR_MODELS
    for vocab in (64, 61)
    for sequence in (False, True)
}
for sequence in (False, True):
    MATRIX[on_off("made", sequence)] = (
        "made",
        partial(train, make=partial(made, sequence=sequence)),
    )
    MATRIX[on_off("unseeded-gpt-tied-61", sequence)] = (
        "gpt-tied-61",
        partial(train, make=partial(unseeded, name="gpt-tied", vocab=61), sequence=sequence),
    )
    MATRIX[on_off("dropout", sequence)] = (
        "dropout",
        partial(train, make=dropping, sequence=sequence, sample_seeds=True),
    )


def chosen(*keys: str) -> dict[str, Any]:
    return {key: MATRIX[key] for key in keys}


def micro(*keys: str) -> dict[str, Any]:
    return {
        key: (plain, partial(case, num_micro=2)) for key, (plain, case) in chosen(*keys).items()
    }


# All of the matrix on 1 and 2 ranks. On more, where collectives take longer, each model with one
# size of the vocabulary and one way of treating sequences.
ON_FOUR = (
    "gpt-tied-61",
    "gpt-untied-64-sequence",
    "llama-kv2-61-sequence",
    "llama-kv1-64",
    "llama-tied-61-sequence",
    "made-sequence",
    "unseeded-gpt-tied-61",
    "dropout-sequence",
)
ON_EIGHT = ("gpt-tied-61-sequence", "gpt-untied-64", "llama-kv2-61-sequence", "llama-kv1-61")
WORLDS: dict[str, tuple[Layout, dict[str, Any], int | None]] = {
    "tp1": (Layout(tp=1), MATRIX, None),
    "tp2": (Layout(tp=2), MATRIX, None),
    "tp4": (Layout(tp=4), chosen(*ON_FOUR), None),
    "tp8": (Layout(tp=8), chosen(*ON_EIGHT), None),
    "tp2-late": (Layout(tp=2), chosen("gpt-tied-61-sequence", "llama-kv1-64"), 1),
    "dp2-tp2-micro2": (Layout(dp=2, tp=2), micro("gpt-tied-61-sequence", "dropout"), 2),
    "dp4-tp2-micro2": (Layout(dp=4, tp=2), micro("gpt-tied-61", "made-sequence"), None),
    "dp2-tp4-micro2": (
        Layout(dp=2, tp=4),
        micro("llama-kv2-61-sequence", "unseeded-gpt-tied-61"),
        None,
    ),
    "tp8-micro2": (Layout(tp=8), micro("llama-kv1-61"), None),
}
_plain: dict[str, dict[str, Any]] = {}
_outcomes: dict[str, dict[str, Any]] = {}


def plain_of(name: str) -> dict[str, Any]:
    if name not in _plain:
        if name == "dropout":
            _plain[name] = plain_dropout()
        else:
            _plain[name] = plain_training(made_plain() if name == "made" else PLAIN[name]())
    return _plain[name]


def plain_dropout() -> dict[str, Any]:
    """One process, with a seed for every sample."""
    model = dropping()
    steps = iter(range(STEPS))
    model.register_forward_pre_hook(
        lambda module, args: (
            seed_dropout(module, seeds_of(next(steps))) if module.training else None
        )
    )
    return plain_training(model)


@pytest.fixture
def outcomes(world: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all models in one world, whose ranks are started once."""
    if world not in _outcomes:
        layout, matrix, delays = WORLDS[world]
        _outcomes[world] = survey(
            {key: case for key, (_, case) in matrix.items()},
            layout.world_size,
            tmp_path_factory.mktemp(world),
            layout=layout,
            delay_seed=delays,
        )
    return _outcomes[world]


@pytest.mark.parametrize(
    ("world", "key"), [(world, key) for world, (_, matrix, _) in WORLDS.items() for key in matrix]
)
def test_equals_one_process(world: str, key: str, outcomes: dict[str, Any]) -> None:
    ranks = outcomes[key]
    if isinstance(ranks, str):
        pytest.fail(ranks, pytrace=False)
    assert_same_training(ranks, plain_of(WORLDS[world][1][key][0]))


# -- beside the matrix ------------------------------------------------------------------------


def bf16_losses(mesh: Mesh, name: str, sequence: bool) -> list[float]:
    model = TENSOR_MODELS[name](61)
    path = parallelize(model, mesh, sequence_parallel=sequence, dtype=torch.bfloat16)
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    tokens, targets = BATCHES[0]
    losses = []
    for _ in range(10):
        loss = model(tokens, targets)
        path.backward(loss)
        path.finish()
        optimizer.step()
        path.publish()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert find_divergence(own_blocks(path), mesh.world) == []
    return losses


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    """bf16 has 8 bits of mantissa, so losses of about 4 agree within a few hundredths."""
    for name, sequence in (("gpt-tied", True), ("llama-kv2", False)):
        model, exact = TENSOR_MODELS[name](61), []
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
        )
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(*BATCHES[0])
            loss.backward()
            optimizer.step()
            exact.append(loss.item())
        ranks = run_ranks(bf16_losses, 2, tmp_path, args=(name, sequence), layout=Layout(tp=2))
        assert ranks[0] == ranks[1]
        assert exact[-1] < 0.85 * exact[0]
        torch.testing.assert_close(
            torch.tensor(ranks[0]), torch.tensor(exact), rtol=0.05, atol=0.06
        )


def test_twice_the_same_bits(tmp_path: Path) -> None:
    case = partial(train, make=partial(seeded, name="gpt-tied", vocab=61), sequence=True)
    runs = [
        run_ranks(case, 2, tmp_path, layout=Layout(tp=2), delay_seed=seed)[0]["params"]
        for seed in (1, 2)
    ]
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one.tensor, other.tensor), one.name
