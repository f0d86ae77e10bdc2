"""What users do wrong under ZeRO, and what the cluster does to them: refused, or as in one process.

Frozen and shared parameters, and modules that some ranks do not use, are in test_zero_modules.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import nn
from zero_models import whole_parameters

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.compose import build_pipeline, parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import ZeroSection
from bigtrain.errors import BigtrainError, CommError
from bigtrain.observe.replicas import find_divergence
from bigtrain.optim import SGD

pytestmark = pytest.mark.parity
WIDTH, LR = 16, 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Net(nn.Module):
    """Three layers, one of a single row, and a vector of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.row = nn.Linear(WIDTH, 1, bias=False)
        self.three = nn.Parameter(torch.rand(3))
        self.broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        if self.broken:
            raise ValueError("broken on purpose")
        return (self.row(self.b(x)) * self.three).square().mean()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))


def of_stage(mesh: Mesh, stage: int, dtype: str = "fp32", bucket_mb: float = 0.0005) -> Any:
    model = Net()
    path = parallelize(model, mesh, zero=stage, dtype=DTYPES[dtype], bucket_mb=bucket_mb)
    return model, path, SGD(path, lr=LR, momentum=0.9, weight_decay=0.0)


def step(model: nn.Module, path: GradientPath, optimizer: SGD, number: int) -> None:
    x = batch(path.sync.axis.rank, number)
    path.backward(model(x.to(next(model.parameters()).dtype)))
    path.finish()
    optimizer.step(done=path.publish)
    path.publish()


def refused(action: Callable[[], Any], kind: type[Exception] = BigtrainError) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    return "nothing was refused"


def plain(ranks: int, change: Callable[[nn.Module, int], None]) -> dict[str, torch.Tensor]:
    """Take three steps with nothing but torch, and `change` the model before each."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    for number in range(3):
        change(model, number)
        optimizer.zero_grad()
        (sum(model(batch(rank, number)) for rank in range(ranks)) / ranks).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name].float(), tensor, rtol=tolerance, atol=tolerance)


# -- parameters that are not here --------------------------------------------------------------


def look_outside(mesh: Mesh) -> dict[str, str]:
    model, path, optimizer = of_stage(mesh, 3)
    step(model, path, optimizer, 0)
    weight = model.a.weight

    def change() -> None:
        with torch.no_grad():
            weight.mul_(2.0)

    def replace() -> None:
        weight.data = torch.zeros(WIDTH, WIDTH)

    assert (weight.shape, weight.numel(), weight.requires_grad) == ((WIDTH, WIDTH), 256, True)
    assert "KeptParameter" in repr(weight)
    return {
        "read": refused(lambda: weight.sum()),
        "copied": refused(lambda: {k: v.clone() for k, v in model.state_dict().items()}),
        "changed": refused(change),
        "replaced": refused(replace),
    }


def test_sharded_parameters_are_not_there_outside(tmp_path: Path) -> None:
    for rank in run_ranks(look_outside, 2, tmp_path):
        for what, text in rank.items():
            assert "a.weight are not here" in text or what == "copied", (what, text)
            assert "path.unsharded()" in text, (what, text)


# -- changed by others than the optimizer ------------------------------------------------------


def halve(model: Any, number: int) -> None:
    if number == 1:
        with torch.no_grad():
            model.a.weight.mul_(0.5)
            model.three.fill_(0.25)


def change_inside(mesh: Mesh) -> dict[str, Any]:
    found = {}
    for stage in (0, 1, 2, 3):
        for dtype in DTYPES:
            model, path, optimizer = of_stage(mesh, stage, dtype)
            for number in range(3):
                with path.unsharded():
                    halve(model, number)
                step(model, path, optimizer, number)
            path.settle()
            blocks = list(path.blocks("", [s.main_params for s in path.segments()]))
            assert not find_divergence(blocks, mesh.world)
            found[stage, dtype] = whole_parameters(path)
    return found


def test_changes_inside_unsharded_are_kept(tmp_path: Path) -> None:
    wanted = plain(4, halve)
    for rank in run_ranks(change_inside, 4, tmp_path):
        for (_, dtype), got in rank.items():
            same(got, wanted, 1e-5 if dtype == "fp32" else 2e-2)


def change_outside(mesh: Mesh) -> dict[int, Any]:
    found = {}
    for stage in (1, 2):
        model, path, optimizer = of_stage(mesh, stage)
        for number in range(3):
            path.settle()
            halve(model, number)
            step(model, path, optimizer, number)
        found[stage] = whole_parameters(path)
    return found


def test_changes_of_whole_parameters_are_taken_up(tmp_path: Path) -> None:
    wanted = plain(2, halve)
    for rank in run_ranks(change_outside, 2, tmp_path):
        for got in rank.values():
            same(got, wanted, 1e-5)


def replace_memory(mesh: Mesh) -> list[str]:
    found = []
    for stage in (1, 2):
        model, path, optimizer = of_stage(mesh, stage)
        step(model, path, optimizer, 0)
        path.settle()
        model.a.weight.data = torch.zeros(WIDTH, WIDTH)
        found.append(refused(partial(step, model, path, optimizer, 1)))
    return found


def test_other_memory_is_refused(tmp_path: Path) -> None:
    for rank in run_ranks(replace_memory, 2, tmp_path):
        for text in rank:
            assert "a.weight is not in its bucket any more" in text


# -- small, frozen, broken ---------------------------------------------------------------------


def train(mesh: Mesh, stage: int) -> dict[str, torch.Tensor]:
    model, path, optimizer = of_stage(mesh, stage)
    for number in range(3):
        step(model, path, optimizer, number)
    return whole_parameters(path)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_than_rows(stage: int, tmp_path: Path) -> None:
    """A matrix of one row, and a vector of three, on eight ranks."""
    wanted = plain(8, lambda model, number: None)
    for got in run_ranks(train, 8, tmp_path, args=(stage,)):
        same(got, wanted, 1e-5)


def fail_once(mesh: Mesh) -> dict[str, torch.Tensor]:
    """The second step's first try ends in an error, and is forgotten."""
    model, path, optimizer = of_stage(mesh, 3)
    for number in range(3):
        if number == 1:
            model.broken = True
            assert "broken" in refused(partial(step, model, path, optimizer, number), ValueError)
            path.abandon()
            model.broken = False
        step(model, path, optimizer, number)
    return whole_parameters(path)


def test_a_step_after_one_that_failed(tmp_path: Path) -> None:
    wanted = plain(2, lambda model, number: None)
    for got in run_ranks(fail_once, 2, tmp_path):
        same(got, wanted, 1e-5)


def half_frozen(mesh: Mesh) -> tuple[list[float], int]:
    """Losses of this replica, where the first stage has frozen parameters only; how many."""
    torch.manual_seed(3)
    layers = [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    model = nn.Sequential(*layers)
    layers[0].requires_grad_(False)
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    own = x[mesh.dp.rank :: mesh.dp.degree]
    pipeline = build_pipeline(
        model,
        mesh,
        split=["1"] if mesh.pp.degree > 1 else None,
        example=own,
        loss_of=lambda model, batch: model(batch).square().mean(),
        zero=3 if mesh.dp.degree > 1 else 0,
    )
    optimizer = SGD(pipeline.path, lr=LR, momentum=0.9, weight_decay=0.0)
    losses = []
    for _ in range(3):
        parts = own.chunk(2)
        loss = pipeline.step(parts, lambda model, batch: model(batch).square().mean())
        losses.append(float(loss))
        pipeline.path.finish()
        optimizer.step(done=pipeline.path.publish)
        pipeline.path.publish()
    frozen = sum(bucket.numel for bucket in pipeline.path.frozen)
    return losses, frozen


def test_a_stage_with_frozen_parameters_only(tmp_path: Path) -> None:
    ((wanted, _),) = run_ranks(half_frozen, 1, tmp_path)
    ranks = run_ranks(half_frozen, 4, tmp_path, layout=Layout(dp=2, pp=2))
    assert sum(frozen > 0 for _, frozen in ranks) == 2
    by_replica = torch.tensor([losses for losses, _ in ranks])
    torch.testing.assert_close(by_replica.mean(0), torch.tensor(wanted))


# -- ranks that die ----------------------------------------------------------------------------


def leaves(mesh: Mesh) -> str:
    model, path, optimizer = of_stage(mesh, 3)
    step(model, path, optimizer, 0)
    if mesh.rank == 1:
        dist.destroy_process_group()
        return "left"
    return refused(partial(step, model, path, optimizer, 1), CommError)


def test_a_rank_that_dies_in_a_gather(tmp_path: Path) -> None:
    text = run_ranks(leaves, 2, tmp_path, timeout=20)[0]
    assert "all_gather of bucket" in text
    assert "(ranks 0, 1) failed on rank 0" in text


# -- settings ----------------------------------------------------------------------------------


def wrong_degree(mesh: Mesh) -> str:
    zero = ZeroSection(stage=3, shard_degree=3)
    return refused(lambda: parallelize(Net(), mesh, zero=zero))


def test_groups_of_a_wrong_size_are_refused(tmp_path: Path) -> None:
    for text in run_ranks(wrong_degree, 4, tmp_path):
        assert "dp=4 ranks cannot share in groups of 3" in text


def test_stages_and_kinds_are_known_ones() -> None:
    mesh = Mesh.build(Layout(), World(), torch.device("cpu"))
    text = refused(lambda: parallelize(Net(), mesh, zero=7))
    assert "zero=7 is no stage" in text
    text = refused(lambda: parallelize(Net(), mesh, kind_of=lambda name, param: "odd"))
    assert "of kind 'odd', which no optimizer knows" in text


def test_a_folder_for_state_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mesh = Mesh.build(Layout(), World(), torch.device("cpu"))
    zero = ZeroSection(stage=1, offload="file", offload_dir=str(tmp_path / "file" / "state"))
    text = refused(lambda: parallelize(Net(), mesh, zero=zero))
    assert "cannot keep optimizer state in" in text
    assert "zero.offload_dir" in text
