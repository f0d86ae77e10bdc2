"""A checkpoint of a split model is read under any other split, bit for bit.

Models train two steps under one layout, are saved, and loaded under others into models that
started from other weights. What all ranks then hold, put together, is what was saved: parameters
(frozen ones too), moments, and saved buffers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from parity_models import EPS, TENSOR_LENGTH, TENSOR_MODELS, global_batches
from torch import nn

from bigtrain.checkpoint.load import load_blocks
from bigtrain.checkpoint.manifest import State, read_manifest
from bigtrain.checkpoint.save import save
from bigtrain.comm.block import NamedBlock
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.engines.native import NativeState
from bigtrain.models import GPT
from bigtrain.observe.replicas import find_divergence
from bigtrain.optim import AdamW
from bigtrain.tensor import Plan

pytestmark = pytest.mark.parity
BATCHES = global_batches(2, TENSOR_LENGTH)


class PartlyFrozen(nn.Module):
    """Frozen weights that are split, frozen ones that are not, and buffers that are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 13)
        self.down = nn.Linear(13, 16)
        self.head = nn.Linear(16, 61, bias=False)
        self.loss = nn.CrossEntropyLoss()
        self.embed.weight.requires_grad_(False)
        self.up.weight.requires_grad_(False)
        self.norm.bias.requires_grad_(False)
        self.register_buffer("mean", torch.rand(16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        if self.training:
            self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
            self.count += 1
        x = x + self.down(F.relu(self.up(self.norm(x - self.mean))))
        return self.loss(self.head(x).flatten(0, 1), targets.flatten())

    def tensor_plan(self) -> Plan:
        return {"embed": "vocab", "up": "column", "down": "row", "head": "vocab", "loss": "vocab"}


def small_gpt() -> nn.Module:
    """Of a size at which buckets of ranks end at different parameters."""
    return GPT(71, TENSOR_LENGTH, 1, 8, 8, tie_embeddings=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], float]] = {  # and bucket_mb
    "gpt-fused-uneven": (partial(TENSOR_MODELS["gpt-tied"], 61), 0.02),
    "llama-shared-heads": (partial(TENSOR_MODELS["llama-kv1"], 61), 0.02),
    "partly-frozen": (PartlyFrozen, 0.002),
    "uneven-buckets": (small_gpt, 0.00287),
}
LAYOUTS = {
    "dp1-tp1": Layout(),
    "dp1-tp2": Layout(tp=2),
    "dp1-tp4": Layout(tp=4),
    "dp2-tp2": Layout(dp=2, tp=2),
}
WRITTEN = ("dp1-tp2", "dp2-tp2", "dp1-tp4")
Saved = list[NamedBlock]


def build(mesh: Mesh, name: str, seed: int) -> SimpleNamespace:
    """A model and what the trainer has of it: path, optimizer, mesh."""
    make, bucket_mb = MODELS[name]
    model = make()
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.1)
    path = parallelize(model, mesh, bucket_mb=bucket_mb)
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    return SimpleNamespace(model=model, path=path, optimizer=optimizer, mesh=mesh)


def held(run: SimpleNamespace) -> Saved:
    """Everything that a checkpoint holds."""
    return list(NativeState(run.model, run.path, run.optimizer, run.mesh.dp).blocks())


def copies(blocks: Saved) -> Saved:
    return [
        NamedBlock(b.name, b.shape, b.block, b.tensor.detach().clone(), b.replica, b.num_replicas)
        for b in blocks
    ]


def loss_of(run: SimpleNamespace) -> float:
    run.model.eval()
    with torch.no_grad():
        return float(run.model(*BATCHES[0]))


def write(mesh: Mesh, folder: Path) -> dict[str, tuple[Saved, float]]:
    """Train and save each model; return what was held, and a loss."""
    results = {}
    for name in MODELS:
        run = build(mesh, name, seed=1)
        for tokens, targets in BATCHES:
            part = slice(mesh.dp.rank, None, mesh.dp.degree)
            run.path.backward(run.model(tokens[part], targets[part]))
            run.path.finish()
            run.optimizer.step()
            run.path.publish()
        state = State(
            step=2,
            cursor=0,
            seed=1,
            num_updates=2,
            data_fingerprint="",
            layout=mesh.layout.degrees,
            config={},
        )
        save(folder / name, state, held(run), mesh.world)
        results[name] = copies(held(run)), loss_of(run)
    return results


def read(mesh: Mesh, folders: dict[str, Path]) -> dict[str, tuple[Saved | str, float]]:
    """Load each checkpoint; return what is held then, and a loss, or what was wrong."""
    results: dict[str, tuple[Saved | str, float]] = {}
    for written, folder in folders.items():
        for name in MODELS:
            run = build(mesh, name, seed=2)
            where = folder / name / "step-00000002"
            try:
                load_blocks(where, read_manifest(where), held(run))
            except Exception as error:
                results[f"{written}/{name}"] = repr(error), 0.0
                continue
            run.path.publish()
            assert find_divergence(held(run), mesh.world) == []
            results[f"{written}/{name}"] = copies(held(run)), loss_of(run)
    return results


def assemble(ranks: Iterable[Saved]) -> dict[str, torch.Tensor]:
    """Put full tensors together; every element is there as often as its blocks say."""
    full: dict[str, torch.Tensor] = {}
    cover: dict[str, torch.Tensor] = {}
    for block in (block for blocks in ranks for block in blocks):
        whole = full.setdefault(block.name, torch.zeros(block.shape, dtype=block.tensor.dtype))
        counts = cover.setdefault(block.name, torch.zeros(block.shape))
        if counts[block.block.slices].any():
            assert torch.equal(whole[block.block.slices], block.tensor), block.name
        whole[block.block.slices] = block.tensor
        counts[block.block.slices] += 1 / block.num_replicas
    for name, counts in cover.items():
        torch.testing.assert_close(counts, torch.ones_like(counts), msg=name)
    return full


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {written: tmp_path_factory.mktemp(written) for written in WRITTEN}


@pytest.fixture(scope="module")
def saved(folders: dict[str, Path]) -> dict[str, list[dict[str, tuple[Saved, float]]]]:
    """What every rank held when it saved, by the layout that was saved under."""
    return {
        written: run_ranks(
            write,
            LAYOUTS[written].world_size,
            folder,
            args=(folder,),
            layout=LAYOUTS[written],
            delay_seed=1 if written == "dp2-tp2" else None,
        )
        for written, folder in folders.items()
    }


@pytest.fixture(scope="module")
def loaded(saved: Any, folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """What every rank holds after loading, by the layout that was loaded under."""
    folder = next(iter(folders.values()))
    return {
        wanted: run_ranks(read, layout.world_size, folder, args=(folders,), layout=layout)
        for wanted, layout in LAYOUTS.items()
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wanted", LAYOUTS)
@pytest.mark.parametrize("written", WRITTEN)
def test_any_layout_reads_any_other(
    written: str, wanted: str, name: str, saved: Any, loaded: Any
) -> None:
    before = [rank[name] for rank in saved[written]]
    after = [rank[f"{written}/{name}"] for rank in loaded[wanted]]
    for found, _ in after:
        assert not isinstance(found, str), found
    exact = assemble(blocks for blocks, _ in before)
    got = assemble(blocks for blocks, _ in after)
    assert got.keys() == exact.keys()
    for key, tensor in exact.items():
        assert torch.equal(got[key], tensor), key
    for _, loss in after:
        assert math.isclose(loss, before[0][1], rel_tol=1e-5)


@pytest.mark.parametrize("written", WRITTEN)
def test_what_is_in_it(written: str, saved: Any) -> None:
    """Names and shapes are those of the whole model, so the comparison above misses nothing."""
    for name, (make, _) in MODELS.items():
        model = make()
        full = assemble(rank[name][0] for rank in saved[written])
        shapes = {
            f"model.{key}": tuple(tensor.shape)
            for key, tensor in (*model.named_parameters(), *model.named_buffers())
            if key != "table"  # of Llama, not saved
        }
        for key, param in model.named_parameters():
            if param.requires_grad:
                shapes[f"optimizer.exp_avg.{key}"] = tuple(param.shape)
                shapes[f"optimizer.exp_avg_sq.{key}"] = tuple(param.shape)
        assert {key: tuple(tensor.shape) for key, tensor in full.items()} == shapes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("written", WRITTEN)
def test_every_element_is_written_once(
    written: str, name: str, saved: Any, folders: dict[str, Path]
) -> None:
    manifest = read_manifest(folders[written] / name / "step-00000002")
    for key, tensor in manifest.tensors.items():
        counts = torch.zeros(tensor.shape)
        for block in tensor.blocks:
            spans = zip(block.offsets, block.sizes, strict=True)
            counts[tuple(slice(start, start + size) for start, size in spans)] += 1
        assert torch.equal(counts, torch.ones(tensor.shape)), key
