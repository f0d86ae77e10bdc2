"""What training state takes on a rank: the prediction against the memory that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import VOCAB, gpt
from pipeline_models import gpt as deep_gpt

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.config.optimizers import AdamwOptimizer, MuonOptimizer, SgdOptimizer
from bigtrain.config.schema import ZeroSection
from bigtrain.engines.native import predict_memory
from bigtrain.optim import build_optimizer, kinds_for
from bigtrain.optim.optimizer import Optimizer
from bigtrain.zero.memory import Memory
from bigtrain.zero.sharded import Sharded

pytestmark = pytest.mark.parity
FP32, BF16 = torch.float32, torch.bfloat16
OPTIMIZERS: dict[str, Any] = {"adamw": AdamwOptimizer, "muon": MuonOptimizer, "sgd": SgdOptimizer}


def held(path: GradientPath, optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes that are there between two steps; each memory counts once."""
    found: dict[str, int] = {}
    known: set[int] = set()

    def add(item: str, *tensors: torch.Tensor | None) -> None:
        for storage in (t.untyped_storage() for t in tensors if t is not None):
            if storage.nbytes() and storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                found[item] = found.get(item, 0) + storage.nbytes()

    for bucket in (*path.buckets, *path.frozen):
        add("parameters", bucket.params, bucket.shard)
        add("main_parameters", bucket.main_params, bucket.low_params)
        add("gradients", bucket.grads, bucket.main_grads)
    for flats in optimizer.moments.values():
        add("moments", *flats)
    return found


def count_gradients(path: GradientPath) -> list[int]:
    """Let the list that is returned have the bytes of gradients in flight, at each departure."""
    sync, counts = path.sync, [0]
    if not isinstance(sync, Sharded):
        return counts
    depart, element = sync.reduce, sync.ledger.bytes_per_element(path.buckets[0])

    def count(*, cast: float) -> None:
        filled = sum(
            4 * b.numel for b in path.buckets if b.sharing.sharded_grads and b.grads is not None
        )
        flying = 0.0
        for bucket, _ in sync._leaving:
            copied = element < 4 or bucket.sharing.sharded_grads
            flying += element * bucket.numel * (copied + 1 - 1 / bucket.sharing.inner.degree)
        counts.append(round(filled + flying + cast))

    def reduce(bucket: Bucket) -> None:
        count(cast=0)
        depart(bucket)
        count(cast=4 * bucket.numel if element < 4 and bucket.sharing.sharded_grads else 0)

    sync.reduce = reduce  # type: ignore[method-assign]
    return counts


def train(
    mesh: Mesh,
    zero: ZeroSection,
    dtype: torch.dtype = FP32,
    optimizer: str = "adamw",
    micros: int = 1,
    **options: Any,
) -> tuple[Memory, dict[str, int], int, int]:
    """Return what was predicted, what is there, and what was in flight at most."""
    tokens = torch.randint(0, VOCAB, (2, 8))
    model = deep_gpt(8, tie=True) if mesh.pp.degree > 1 else gpt()
    section = OPTIMIZERS[optimizer](kind=optimizer)
    pipeline = build_pipeline(
        model,
        mesh,
        example=(tokens, tokens),
        loss_of=lambda model, batch: model(*batch),
        zero=zero,
        dtype=dtype,
        kind_of=kinds_for(section, model),
        **options,
    )
    path, updates = pipeline.path, build_optimizer(pipeline.path, section)
    before = predict_memory(pipeline, updates, zero, micros)
    counts = count_gradients(path)
    for _ in range(3):
        pipeline.step([(tokens, tokens)] * micros, lambda model, batch: model(*batch))
        path.finish()
        updates.step(done=path.publish)
        path.publish()
    path.settle()
    whole = path.sync.keeper.peak_whole if isinstance(path.sync, Sharded) else 0
    return before, held(path, updates), max(counts), whole * dtype.itemsize


CASES: dict[str, tuple[ZeroSection, torch.dtype, str, int]] = {
    "copied": (ZeroSection(stage=0), FP32, "adamw", 1),
    "copied, bf16": (ZeroSection(stage=0), BF16, "adamw", 1),
    "stage 1": (ZeroSection(stage=1), FP32, "adamw", 2),
    "stage 1, cast": (ZeroSection(stage=1, reduce_dtype="bf16"), FP32, "adamw", 1),
    "stage 2": (ZeroSection(stage=2), FP32, "adamw", 2),
    "stage 2, bf16": (ZeroSection(stage=2, reduce_dtype="bf16"), BF16, "adamw", 1),
    "stage 2, one at once": (ZeroSection(stage=2, in_flight=1), FP32, "adamw", 1),
    "stage 2, int8": (ZeroSection(stage=2, reduce_dtype="int8"), FP32, "adamw", 1),
    "stage 2, hybrid": (ZeroSection(stage=2, shard_degree=2), FP32, "adamw", 1),
    "stage 2, muon": (ZeroSection(stage=2), FP32, "muon", 1),
    "stage 3": (ZeroSection(stage=3), FP32, "adamw", 1),
    "stage 3, sgd, bf16": (ZeroSection(stage=3, prefetch=0), BF16, "sgd", 2),
    "stage 3, ahead": (ZeroSection(stage=3, prefetch=2), FP32, "adamw", 1),
    "stage 3, kept": (ZeroSection(stage=3, reshard_after_forward=False), FP32, "adamw", 1),
    "stage 3, agreed": (ZeroSection(stage=3, order="agreed"), FP32, "adamw", 1),
    "stage 3, files": (ZeroSection(stage=3, offload="file"), BF16, "adamw", 1),
}
BUCKETS = {"one bucket": 25.0, "many": 0.02}


def steady(memory: Memory) -> dict[str, int]:
    items = ("parameters", "main_parameters", "gradients", "moments")
    return {item: getattr(memory, item) for item in items if getattr(memory, item)}


def all_cases(mesh: Mesh, bucket_mb: float) -> dict[str, Any]:
    return {name: train(mesh, *case, bucket_mb=bucket_mb) for name, case in CASES.items()}


@pytest.mark.parametrize("buckets", BUCKETS)
def test_prediction(buckets: str, tmp_path: Path) -> None:
    """What stays is exact; what is in flight is never more, and little less."""
    for rank in run_ranks(all_cases, 4, tmp_path, args=(BUCKETS[buckets],)):
        for name, (before, there, gradients, whole) in rank.items():
            assert steady(before) == there, name
            assert gradients <= before.gradients_in_flight, name
            assert whole <= before.parameters_in_flight, name
            if "hybrid" not in name:  # sums across groups are not counted here
                assert before.gradients_in_flight <= 1.1 * gradients, name
            if buckets == "one bucket":
                assert before.parameters_in_flight <= 1.1 * whole, name


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("zb_h1", 1), ("interleaved", 2)])
def test_pipeline(schedule: str, virtual: int, tmp_path: Path) -> None:
    """Gradients of what stages share are whole; halves of backward keep all buckets of a stage."""
    zero = ZeroSection(stage=3)
    options = {"schedule": schedule, "virtual_stages": virtual, "bucket_mb": 0.012}
    ranks = run_ranks(pipelined, 4, tmp_path, args=(zero, options), layout=Layout(dp=2, pp=2))
    for before, there, gradients, whole in ranks:
        assert steady(before) == there
        assert 0 < gradients <= before.gradients_in_flight
        assert 0 < whole <= before.parameters_in_flight


def pipelined(mesh: Mesh, zero: ZeroSection, options: dict[str, Any]) -> Any:
    return train(mesh, zero, micros=4, **options)


def test_bytes_of_a_parameter(tmp_path: Path) -> None:
    """The table of docs/zero.md, but for padding."""
    n = sum(p.numel() for p in gpt().parameters())
    (found, *_) = run_ranks(all_cases, 4, tmp_path, args=(25.0,))
    for name, bytes_each in {
        "copied": 16,
        "copied, bf16": 18,
        "stage 1": 8 + 8 / 4,
        "stage 2": 4 + 12 / 4,
        "stage 2, bf16": 2 + 16 / 4,
        "stage 3": 16 / 4,
        "stage 3, files": 18 / 4,
    }.items():
        assert found[name][0].steady == pytest.approx(bytes_each * n, rel=0.02), name
    assert "offloaded" in str(found["stage 3, files"][0])
