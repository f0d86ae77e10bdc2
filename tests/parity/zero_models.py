"""What the tests of ZeRO share: how to train with it, and the same with one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from parity_models import EPS, own_blocks
from pipeline_models import (
    MODELS,
    Batch,
    Way,
    batches_of,
    language_loss,
    scramble,
    shares,
)
from torch import nn

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.config.schema import ZeroSection
from bigtrain.observe.replicas import find_divergence
from bigtrain.optim import AdamW
from bigtrain.zero.sharded import Sharded

STEPS, BATCH = 3, 16
BATCHES = batches_of(STEPS, BATCH)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 1024.0  # of fp16 losses; a power of two, so it changes no bit but keeps small ones
FROZEN = ("blocks.0.norm1.weight", "blocks.1.mlp.down.weight")


@dataclass(frozen=True)
class Case:
    """A training: `sizes` are those of a replica's microbatches, `zero` the keys of the section."""

    model: str
    sizes: tuple[int, ...]
    zero: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    frozen: bool = False
    schedule: str = "1f1b"
    sequence: bool = False
    bucket_mb: float = 0.02
    layers: int = 2

    @property
    def way(self) -> Way:
        return Way(self.model, self.layers, self.schedule, self.sizes, sequence=self.sequence)


def make(case: Case) -> nn.Module:
    model = MODELS[case.model](case.layers)
    for name, param in model.named_parameters():
        param.requires_grad_(not (case.frozen and name in FROZEN))
    return model


def train(mesh: Mesh, case: Case, batches: Sequence[Batch] = BATCHES) -> dict[str, Any]:
    """Train on this rank's share of the batches; return what a test compares."""
    way, dtype = case.way, DTYPES[case.precision]
    scale = SCALE if dtype is torch.float16 else 1.0
    pipeline = build_pipeline(
        scramble(make(case), mesh),
        mesh,
        **way.options,
        split=way.split(way.table(mesh.pp.degree).num_stages),
        sequence_parallel=case.sequence,
        dtype=dtype,
        bucket_mb=case.bucket_mb,
        zero=ZeroSection(**case.zero),
    )
    path = pipeline.path
    optimizer = AdamW(path, lr=1e-2, eps=EPS)
    start = own_blocks(path)
    before = pipeline.forward(batches[0][0][:3])
    losses, grads, norms = [], [], []
    parts, weights = shares(case.sizes, mesh), [size / sum(case.sizes) for size in case.sizes]

    def scaled(model: Any, batch: Batch) -> torch.Tensor:
        return language_loss(model, batch).float() * scale

    for tokens, targets in batches:
        micros = [(tokens[part], targets[part]) for part in parts]
        losses.append(float(pipeline.step(micros, scaled, weights)) / scale)
        path.finish()
        flats = [segment.main_grads / scale for segment in path.segments()]
        grads.append(list(path.blocks("", flats)))
        norms.append(float(path.grad_norm()) / scale)
        optimizer.step(None, None if scale == 1.0 else torch.tensor(scale), path.publish)
        path.publish()
    after = pipeline.forward(batches[0][0][:3])
    path.settle()
    leftover, peak = sharded_bytes(path), peak_whole(path)
    return {
        "start": start,
        "losses": losses,
        "grads": grads,
        "norms": norms,
        "params": own_blocks(path),
        "model": whole_parameters(path),
        "logits": (before, after),
        "shards": path.shards,
        "divergence": find_divergence(own_blocks(path), mesh.world),
        "leftover": leftover,
        "peak": peak,
        "buckets": [bucket.numel for bucket in (*path.buckets, *path.frozen)],
    }


def whole_parameters(path: GradientPath) -> dict[str, torch.Tensor]:
    """Return what this rank's model computes with, by names in the full model."""
    with path.unsharded():
        return {path.names[p]: p.detach().clone() for p in path.model.parameters()}


def sharded_bytes(path: GradientPath) -> int:
    """Return how many bytes of parameters that are sharded, and of their gradients, are whole."""
    found = 0
    for bucket in (*path.buckets, *path.frozen):
        if bucket.sharing.sharded_params:
            found += bucket.params.untyped_storage().nbytes()
        if bucket.sharing.sharded_grads and bucket.grads is not None:
            found += bucket.grads.untyped_storage().nbytes()
    return found


def peak_whole(path: GradientPath) -> int:
    """Return how many elements of sharded parameters were whole at once, at most."""
    return path.sync.keeper.peak_whole if isinstance(path.sync, Sharded) else 0


def one_process(case: Case) -> dict[str, Any]:
    """Train the same in this process, with all replicas' microbatches one after the other."""
    mesh = Mesh.build(Layout(), World(), torch.device("cpu"))
    return train(mesh, case)


def plain(case: Case, batches: Sequence[Batch] = BATCHES) -> dict[str, Any]:
    """Train in fp32 with nothing but torch; each global batch at once."""
    model = make(case)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": 0.1},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=EPS,
        fused=True,
    )
    with torch.no_grad():
        logits = [model(batches[0][0][:3])]
    losses, grads, norms = [], [], []
    start = {name: p.detach().clone() for name, p in trained.items()}
    for tokens, targets in batches:
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in trained.items()})
        norms.append(float(nn.utils.get_total_norm(grads[-1].values())))
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits.append(model(batches[0][0][:3]))
    return {
        "start": start,
        "losses": losses,
        "grads": grads,
        "norms": norms,
        "params": {name: p.detach().clone() for name, p in trained.items()},
        "logits": tuple(logits),
    }
