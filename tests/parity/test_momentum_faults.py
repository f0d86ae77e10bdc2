"""Compressed momentum where something goes wrong: infinities, spikes, other orders, odd models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import VOCAB, gpt
from test_compressed_momentum import SECTION, at_once, wire_of

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline, parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import CompressionSection, ZeroSection
from bigtrain.errors import BigtrainError
from bigtrain.optim import LAMB, SGD, AdamW, Muon

pytestmark = pytest.mark.parity


def with_infinity(mesh: Mesh, stage: int) -> tuple[list[bool], list[float]]:
    """One rank's gradient is infinite in step 5; return which norms were finite, and how much of
    what was kept is left after it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(19, 11, bias=False)
    path = parallelize(model, mesh, compression=SECTION, zero=stage)
    optimizer, wire, found, left = AdamW(path), wire_of(path), [], []
    [bucket] = path.buckets
    x = torch.randn(4, 19, generator=torch.Generator().manual_seed(mesh.rank))
    for step in range(9):
        if step == 2:
            at_once(path)
        loss = model(x).square().mean()
        if step == 5 and mesh.rank == 1:
            loss = loss + model.weight.flatten()[-1] * float("inf")
        before = wire.errors(bucket).clone()
        path.backward(loss)
        path.finish()
        norm = path.grad_norm()
        found.append(bool(norm.isfinite()))
        if found[-1]:
            assert norm < 1e3
            optimizer.step(done=path.publish)
            path.publish()
        else:
            path.abandon()
            left = [float((wire.errors(bucket) - before).norm()), float(before.norm())]
    path.settle()
    assert all(bucket.params.isfinite().all() for bucket in path.buckets)
    return found, left


@pytest.mark.parametrize("stage", [1, 2])
def test_an_infinity_on_one_worker_costs_one_step(stage: int, tmp_path: Path) -> None:
    for found, (gap, kept) in run_ranks(with_infinity, 2, tmp_path, args=(stage,)):
        assert found == [True] * 5 + [False] + [True] * 3
        assert gap < 1e-6 * kept, "momentum was lost with the step"


def after_a_spike(mesh: Mesh, size: float) -> list[float]:
    """Gradients are so many times as long in step 6; return how far parameters move in steps."""
    torch.manual_seed(3)
    model = torch.nn.Linear(64, 64, bias=False)
    path = parallelize(model, mesh, compression=SECTION)
    optimizer, moves = AdamW(path, lr=1e-3, weight_decay=0.0), []
    draws = torch.Generator().manual_seed(5 + mesh.rank)
    [bucket] = path.buckets
    for step in range(12):
        if step == 3:
            at_once(path)
        x = torch.randn(4, 64, generator=draws)
        aim = torch.randn(4, 64, generator=draws)
        path.backward((path.model(x) * aim).mean() * (size if step == 6 else 1))
        path.finish()
        clip = max(1.0, float(path.grad_norm()) / 0.05)
        before = bucket.main_params.clone()
        optimizer.step(None, torch.tensor(clip))
        moves.append(float((bucket.main_params - before).norm()))
        path.publish()
    path.settle()
    return moves


def test_a_spike_that_is_clipped_moves_nothing_far(tmp_path: Path) -> None:
    plain, spiked = (run_ranks(after_a_spike, 2, tmp_path, args=(size,))[0] for size in (1, 1000))
    assert max(spiked) < 2 * max(plain)
    assert spiked[-1] > 0.5 * plain[-1]


def abandoned(mesh: Mesh, how: str) -> float:
    """Return which part of what was kept is lost by a step that is abandoned."""
    torch.manual_seed(0)
    path = parallelize(torch.nn.Linear(64, 64, bias=False), mesh, compression=SECTION)
    optimizer, wire = AdamW(path), wire_of(path)
    [bucket] = path.buckets
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(mesh.rank))
    for step in range(6):
        if step == 2:
            at_once(path)
        before = wire.errors(bucket).clone()
        if step == 5 and how == "before backward":
            path.abandon()
            break
        path.backward(path.model(x).square().mean())
        path.finish()
        if step == 5:
            path.abandon()
            if how == "twice":
                path.abandon()
            break
        optimizer.step()
        path.publish()
    return float((wire.errors(bucket) - before).norm() / before.norm())


@pytest.mark.parametrize("how", ["once", "twice", "before backward"])
def test_a_step_that_is_abandoned_leaves_what_was_kept(how: str, tmp_path: Path) -> None:
    for lost in run_ranks(abandoned, 2, tmp_path, args=(how,)):
        assert lost < 1e-6


def way_gone(mesh: Mesh, kind: str) -> float:
    """Gradients of one direction and of very different lengths, each clipped to the same."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    signs = torch.randn(64, 64).sign()
    section = CompressionSection() if kind == "none" else SECTION
    path = parallelize(model, mesh, zero=1, compression=section)
    optimizer = AdamW(path, weight_decay=0.0, betas=(0.9, 0.8))
    draws = torch.Generator().manual_seed(1)
    for step in range(50):
        if step == 20:
            begin = path.buckets[0].main_params.clone()
            if kind != "none":
                at_once(path)
        length = float(torch.exp(0.6 * torch.randn((), generator=draws)))
        path.backward((model.weight * signs).sum() * length)
        path.finish()
        optimizer.step(1e-2, torch.tensor(length))
        path.publish()
        path.settle()
    return float((path.buckets[0].main_params - begin).norm())


def test_gradients_that_are_clipped_anew_in_each_step(tmp_path: Path) -> None:
    exact, ours = (run_ranks(way_gone, 2, tmp_path, args=(k,))[0] for k in ("none", "default"))
    assert ours == pytest.approx(exact, rel=0.1)


class Branches(torch.nn.Module):
    """Data decides which branch is used, so ranks use parameters in orders of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, 16)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(5))
        self.head = torch.nn.Linear(16, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(())
        for row in tokens:
            hidden = self.embed(row)
            hidden = hidden + torch.tanh(self.branches[int(row[0]) % 5](hidden))
            total = total + torch.nn.functional.cross_entropy(self.head(hidden), row)
        return total / len(tokens)


def in_any_order(mesh: Mesh, stage: int, order: str) -> bool:
    torch.manual_seed(7)
    zero = ZeroSection(stage=stage, order=order)  # type: ignore[arg-type]
    path = parallelize(Branches(), mesh, zero=zero, compression=SECTION, bucket_mb=0.001)
    optimizer = AdamW(path)
    for step in range(7):
        if step == 3:
            at_once(path)
        draws = torch.Generator().manual_seed(step * 7 + mesh.rank)
        path.backward(path.model(torch.randint(0, VOCAB, (3, 8), generator=draws)))
        path.finish()
        assert path.grad_norm().isfinite()
        optimizer.step(done=path.publish)
        path.publish()
    path.settle()
    return True


@pytest.mark.parametrize(("stage", "order"), [(2, "learned"), (3, "agreed")])
def test_ranks_that_use_parameters_in_other_orders(stage: int, order: str, tmp_path: Path) -> None:
    args = (stage, order)
    assert all(run_ranks(in_any_order, 2, tmp_path, args=args, delay_seed=1, timeout=40))


def stage_without(mesh: Mesh) -> tuple[int, list[int]]:
    """The second stage has nothing to compress; return when refreshes are due on this rank."""
    torch.manual_seed(0)
    model = gpt(tie=False)
    for name, param in model.named_parameters():
        if name.startswith(("blocks.1", "head")) and param.ndim > 1:
            param.requires_grad_(False)
    section = SECTION.model_copy(update={"refresh_every": 2})

    def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch, batch)
        return loss

    example = torch.zeros(2, 8, dtype=torch.int64)
    pipeline = build_pipeline(
        model, mesh, compression=section, split=["blocks.1"], example=example, loss_of=loss_of
    )
    path, found = pipeline.path, []
    optimizer = AdamW(path, betas=(0.9, 0.8))
    for step in range(18):
        if step == 8:
            at_once(path)
        draws = torch.Generator().manual_seed(step * 8 + mesh.dp.rank)
        pipeline.step([torch.randint(0, VOCAB, (2, 8), generator=draws)] * 2, loss_of)
        path.finish()
        path.grad_norm()
        optimizer.step(done=path.publish)
        path.publish()
        found.append(wire_of(path).switch.now.next_refresh)
    path.settle()
    return sum(bucket.sharing.compressed for bucket in path.buckets), found


def test_a_stage_that_compresses_nothing_keeps_step(tmp_path: Path) -> None:
    layout = Layout(pp=2, dp=2)
    ranks = run_ranks(stage_without, 4, tmp_path, layout=layout, timeout=60)
    assert [bool(count) for count, _ in ranks] == [True, True, False, False]
    assert all(found == ranks[0][1] for _, found in ranks)
    assert ranks[0][1][-1] > 8


def refused(mesh: Mesh) -> list[str]:
    said = []
    for make in (SGD, Muon, LAMB, AdamW, lambda path: AdamW(path.segments())):
        path = parallelize(gpt(), mesh, compression=SECTION)
        tokens = torch.arange(16).view(2, 8) % VOCAB
        try:
            optimizer = make(path)  # type: ignore[operator]
            path.backward(path.model(tokens, tokens))
            path.finish()
            optimizer.step()
            path.publish()
            path.settle()
            said.append("")
        except BigtrainError as error:
            said.append(str(error))
    return said


def test_optimizers_that_need_gradients_are_refused(tmp_path: Path) -> None:
    for said in run_ranks(refused, 2, tmp_path):
        assert ["cannot be updated" in said[0], "cannot be updated" in said[1]] == [True, True]
        assert said[2:4] == ["", ""]
        assert "make the optimizer of the path" in said[4]


def odd_models(mesh: Mesh, kind: str) -> None:
    """Blocks larger than parameters, frozen parameters, and one that is unused."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model.unused = torch.nn.Parameter(torch.ones(3, 5))
    model[0].weight.requires_grad_(False)
    section = CompressionSection(kind=kind, least_numel=0)  # type: ignore[arg-type]
    path = parallelize(model, mesh, compression=section)
    optimizer = AdamW(path, lr=0.01)
    x = torch.randn(4, 7)
    for step in range(6):
        if step == 2 and mesh.dp.degree > 1:
            at_once(path)
        path.backward(model(x)[:, :2].square().mean())  # the last output takes no part
        path.finish()
        optimizer.step()
        path.publish()
    path.settle()
    assert torch.isfinite(model[2].weight).all()
    assert model.unused.max() <= 1.0, "weight decay alone moves it"
    assert model.unused.min() > 0.9


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["default", "max"])
def test_odd_models(world: int, kind: str, tmp_path: Path) -> None:
    run_ranks(odd_models, world, tmp_path, args=(kind,))
