"""What ZeRO sends in a step is its closed form: messages and collectives counted on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import VOCAB, gpt, recorded_collectives
from test_tensor_wire import sent

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import ZeroSection
from bigtrain.optim import AdamW
from bigtrain.zero.order import CARRIED

pytestmark = pytest.mark.parity
N, MICROS = 4, 2
FP32, BF16 = torch.float32, torch.bfloat16
INT8 = 1 + 4 / 256
ZEROS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "1": ({"stage": 1}, FP32),
    "1, bf16 wire": ({"stage": 1, "reduce_dtype": "bf16"}, FP32),
    "1, bf16 model": ({"stage": 1}, BF16),
    "2": ({"stage": 2}, FP32),
    "2, int8 wire": ({"stage": 2, "reduce_dtype": "int8"}, FP32),
    "2, hybrid": ({"stage": 2, "shard_degree": 2}, FP32),
    "3": ({"stage": 3}, FP32),
    "3, bf16 model": ({"stage": 3}, BF16),
    "3, kept": ({"stage": 3, "reshard_after_forward": False}, FP32),
    "3, hybrid": ({"stage": 3, "shard_degree": 2}, FP32),
}


def measure(mesh: Mesh) -> dict[str, tuple[float, list[int]]]:
    """Return, for each way, the bytes that this rank sends in the third step, when orders of
    gathers are known, and the sizes of buckets."""
    found = {}
    tokens = torch.randint(0, VOCAB, (2, 8))
    for name, (zero, dtype) in ZEROS.items():
        path = parallelize(
            gpt(tie=False), mesh, zero=ZeroSection(**zero), dtype=dtype, bucket_mb=0.02
        )
        optimizer = AdamW(path)
        for _ in range(3):
            with recorded_collectives() as calls:
                for micro in range(MICROS):
                    path.backward(path.model(tokens, tokens), last=micro == MICROS - 1)
                path.finish()
                optimizer.step(done=path.publish)
                path.publish()
        path.settle()
        found[name] = (sent(calls), [bucket.numel for bucket in path.buckets])
    return found


def promised(name: str, sizes: list[int]) -> float:
    """Return the bytes that a rank sends in a step of MICROS microbatches.

    Gradients: (n-1)/n of them, in every microbatch where they are sharded; between copies of a
    block, of d ranks, 2(d-1)/d of the block. Parameters: (n-1)/n of them after the update; where
    these are sharded, in every forward, and, unless kept, in every backward: but the buckets that
    were used last before, in the same step.
    """
    zero, dtype = ZEROS[name]
    inner = zero.get("shard_degree", N)
    outer, share = N // inner, (inner - 1) / inner
    element = {"bf16": 2.0, "int8": INT8}.get(zero.get("reduce_dtype", ""), 4.0)
    often = MICROS if zero["stage"] > 1 else 1
    total = often * share * element * sum(sizes)
    total += often * 2 * (outer - 1) / outer * 4 * sum(sizes) / inner
    itemsize = dtype.itemsize
    if zero["stage"] < 3:
        return total + share * itemsize * sum(sizes)
    again = sum(sizes) - sum(sizes[:CARRIED])  # forward ends where backward begins
    if not zero.get("reshard_after_forward", True):
        again = 0
    first = sum(sizes) - sum(sizes[-CARRIED:])  # and the next forward where backward ends
    gathers = sum(sizes) + MICROS * again + (MICROS - 1) * first
    return total + share * itemsize * gathers


def test_bytes_of_a_step(tmp_path: Path) -> None:
    for rank in run_ranks(measure, N, tmp_path, layout=Layout(dp=N)):
        for name, (measured, sizes) in rank.items():
            assert len(sizes) > 2 * CARRIED, name
            assert measured == pytest.approx(promised(name, sizes), rel=1e-3), name
