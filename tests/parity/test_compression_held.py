"""Gradients that wait for the last microbatch in what error feedback keeps: none lost, none twice.

Nothing is lost by rounding here, so all stages of ZeRO must learn the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_codecs import Lossless

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.schema import CompressionSection, ZeroSection
from bigtrain.onebit.feedback import FeedbackWire
from bigtrain.optim import SGD

pytestmark = pytest.mark.parity
SECTION = CompressionSection(kind="safe", block=64, least_numel=100)
MICROBATCHES = 3


class Parts(torch.nn.Module):
    """Matrices of which a batch uses some; the first and the last are never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(16, 16, bias=False) for _ in range(7))

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        total = x.sum() * 0.0
        for index in used:
            total = total + self.parts[index](x).square().mean()
        return total


def uses(step: int, microbatch: int, rank: int) -> list[int]:
    """Return the parts that a batch uses: alike on all ranks, by rank, or one of two by rank."""
    draws = torch.Generator().manual_seed(100 * step + 10 * microbatch + (rank if step % 3 else 0))
    some = [index for index in range(1, 6) if torch.rand((), generator=draws) < 0.5]
    return some or [1] if step % 3 < 2 else [1 + rank % 2]


def learned(mesh: Mesh, stage: int, fault: str = "") -> tuple[list[torch.Tensor], list[bool]]:
    zero = ZeroSection.model_validate({"stage": stage, "order": "agreed"})
    path = parallelize(Parts(), mesh, zero=zero, compression=SECTION, bucket_mb=0.002)
    wire = path.sync.ledger
    assert isinstance(wire, FeedbackWire)
    wire.up = wire.down = Lossless()
    optimizer, finite = SGD(path, lr=0.05), []
    for step in range(9):
        for microbatch in range(MICROBATCHES):
            draws = torch.Generator().manual_seed(1000 * step + 10 * microbatch + mesh.rank)
            x = torch.randn(4, 16, generator=draws)
            if step == 4 and microbatch == 0 and mesh.rank == 1 and fault:
                x = x * torch.nan
            loss = path.model(x, uses(step, microbatch, mesh.rank))
            path.backward(loss, last=microbatch == MICROBATCHES - 1)
        path.finish()
        norm = path.grad_norm()
        finite.append(bool(norm.isfinite()))
        if fault == "abandoned" and not finite[-1]:
            path.abandon()
            continue
        optimizer.step(None, torch.maximum(norm, torch.ones(())), path.publish)
        path.publish()
    path.settle()
    with path.unsharded():
        return [p.detach().clone() for p in path.model.parameters()], finite


@pytest.mark.parametrize("stage", [2, 3])
def test_no_gradient_is_lost_or_counted_twice(stage: int, tmp_path: Path) -> None:
    wanted = run_ranks(learned, 3, tmp_path, args=(1,))
    found = run_ranks(learned, 3, tmp_path, args=(stage,), delay_seed=stage, timeout=60)
    start = list(Parts().parameters())
    for (parts, _), (others, _) in zip(wanted, found, strict=True):
        for index, (a, b) in enumerate(zip(parts, others, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert torch.equal(a, start[index]) == (index in (0, 6))


@pytest.mark.parametrize("fault", ["abandoned", "divided by it"])
def test_a_nan_in_the_first_microbatch_costs_one_step(fault: str, tmp_path: Path) -> None:
    for parts, finite in run_ranks(learned, 2, tmp_path, args=(2, fault)):
        assert finite == [True] * 4 + [False] + [True] * 4
        assert all(part.isfinite().all() for part in parts)


def left(mesh: Mesh) -> list[Any]:
    """Return what is kept in the middle of a step, and after it was abandoned."""
    path = parallelize(Parts(), mesh, zero=2, compression=SECTION)
    SGD(path)
    path.backward(path.model(torch.ones(2, 16), [1, 2, 3, 4, 5]), last=False)
    wire = path.sync.ledger
    assert isinstance(wire, FeedbackWire)
    before = sum(float(wire.errors(bucket).norm()) for bucket in path.buckets)
    path.abandon()
    return [before, sum(float(wire.errors(bucket).norm()) for bucket in path.buckets)]


def test_what_was_held_is_dropped_with_its_step(tmp_path: Path) -> None:
    for before, after in run_ranks(left, 2, tmp_path):
        assert before > 0
        assert after == 0
