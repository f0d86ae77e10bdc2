"""Compression between nodes only: ranks of a node are one sender, exact among themselves.

Where a node adds up in the order in which one rank would, four ranks on two nodes train to the bits
of two ranks with twice the batch. Elsewhere a curve stays within 1 % of the exact one (safe), or of
the one of two ranks (momentum, whose variance stands still meanwhile): both lose what signs and
codes of the same node sums lose, in blocks that begin elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from parity_models import assemble
from test_compressed_training import config_of, copies

from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.check import check
from bigtrain.config.layout import Layout
from bigtrain.config.schema import CompressionSection, Config, ZeroSection
from bigtrain.errors import BigtrainError
from bigtrain.onebit.feedback import FeedbackWire
from bigtrain.onebit.momentum import MomentumWire
from bigtrain.optim import AdamW
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity
NODE = 2  # ranks
SMALL = {"block": 64, "least_numel": 100}
KINDS: dict[str, dict[str, Any]] = {
    "safe": {"kind": "safe", **SMALL},
    "default": {"kind": "default", "when": "always", **SMALL},
    "max": {"kind": "max", "when": "always", "refresh_every": 2, **SMALL},
}
RELATIVE = 0.01


def section_of(kind: str, node_degree: int = NODE) -> CompressionSection:
    return CompressionSection.model_validate({**KINDS[kind], "node_degree": node_degree})


def at_once(path: Any) -> None:
    """Compress from the next step on, where that would come after a warm-up."""
    wire = path.sync.ledger
    if isinstance(wire, MomentumWire) and not wire.switch.compressed:
        wire._go_on("compressed", [b for b in path.buckets if b.sharing.compressed])


def wire_of(path: GradientPath) -> FeedbackWire:
    assert isinstance(path.sync.ledger, FeedbackWire)
    return path.sync.ledger


# -- a node is one sender ----------------------------------------------------------------------


def squares() -> torch.nn.Sequential:
    """Blocks of 2 and of 4 owners begin where scales do."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(64, 64, bias=False) for _ in range(3))
    return torch.nn.Sequential(*layers)


def take_step(path: GradientPath, step: int) -> float:
    """Compute gradients of four batches: one of each of four ranks, or two of each of two; return
    their norm."""
    draws, dp = torch.Generator().manual_seed(step), path.sync.axis
    micros = 4 // dp.degree
    mine = torch.randn(4, 3, 64, generator=draws)[dp.rank * micros :][:micros]
    for number, x in enumerate(mine):
        loss = (path.model(x) - x).square().mean() / micros
        path.backward(loss, last=number == micros - 1)
    path.finish()
    return float(path.grad_norm())


def small_run(mesh: Mesh, kind: str, stage: int, node_degree: int) -> Any:
    """Return what the model is, and how many bytes are kept."""
    section = section_of(kind, node_degree)
    path = parallelize(squares(), mesh, zero=stage, compression=section, bucket_mb=0.016)
    assert len(path.buckets) > 1
    optimizer = AdamW(path, lr=0.01)
    for step in range(7):
        if step == 2:
            at_once(path)
        take_step(path, step)
        optimizer.step(None, torch.tensor(1.0 + 0.25 * (step % 3)), path.publish)
        path.publish()
    path.settle()
    kept = sum(wire_of(path).bytes_kept(bucket) for bucket in path.buckets)
    with path.unsharded():
        return [p.detach().clone() for p in path.model.parameters()], kept


@functools.cache
def of_two_ranks(kind: str, folder: Path) -> tuple[list[torch.Tensor], int]:
    return run_ranks(small_run, 2, folder, args=(kind, 1, 1))[0]


@pytest.mark.parametrize(("kind", "stage"), [("safe", 0), ("safe", 2), ("default", 1), ("max", 2)])
def test_a_node_of_two_is_one_rank_with_both_batches(
    kind: str, stage: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wanted, kept_by_two = of_two_ranks(kind, tmp_path_factory.getbasetemp())
    found = run_ranks(small_run, 4, tmp_path, args=(kind, stage, NODE), delay_seed=stage)
    for params, kept in found:
        for a, b in zip(params, wanted, strict=True):
            assert torch.equal(a, b)
        assert kept == kept_by_two / NODE


def by_itself(mesh: Mesh, node_degree: int) -> tuple[list[str], list[float], list[torch.Tensor]]:
    """Return the phase of each step, the norm of its gradient, and what the model is after all."""
    section = section_of("default", node_degree)
    path = parallelize(squares(), mesh, compression=section)
    optimizer, phases, norms = AdamW(path, lr=3e-4, betas=(0.9, 0.8)), [], []
    for step in range(85):
        phases.append(path.sync.ledger.switch.now.phase)  # type: ignore[union-attr]
        norms.append(take_step(path, step))
        optimizer.step(done=path.publish)
        path.publish()
    path.settle()
    return phases, norms, [p.detach().clone() for p in path.model.parameters()]


def test_a_warm_up_ends_as_that_of_two_ranks(tmp_path: Path) -> None:
    phases, lengths, wanted = run_ranks(by_itself, 2, tmp_path, args=(1,))[0]
    assert phases[-24:] == ["shadow"] * 20 + ["compressed"] * 4
    for found, norms, params in run_ranks(by_itself, 4, tmp_path, args=(NODE,)):
        assert found == phases
        assert norms == pytest.approx(lengths, rel=1e-5), "what is estimated is of nodes"
        assert all(torch.equal(a, b) for a, b in zip(params, wanted, strict=True))


# -- beside exact runs, composed ---------------------------------------------------------------


def curve(mesh: Mesh, config: Config, steps: int, exact: int) -> list[float]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    losses = [trainer.train_step().loss for _ in range(exact)]
    at_once(trainer.path)
    losses += [trainer.train_step().loss for _ in range(steps - exact)]
    trainer.check_replicas()
    return losses


def config_with(folder: Path, kind: str, node_degree: int = NODE, **sections: Any) -> Config:
    compression = {**KINDS[kind], "node_degree": node_degree}
    return config_of(folder, **{"compression": compression, **sections})


CURVES: dict[str, tuple[str, Layout, dict[str, Any]]] = {
    "safe, dp4": ("safe", Layout(dp=4), {}),
    "safe, dp4 x tp2, stage 3": ("safe", Layout(dp=4, tp=2), {"zero": {"stage": 3}}),
    "default, dp4, stage 2": ("default", Layout(dp=4), {"zero": {"stage": 2}}),
    "default, pp2 x dp4, tied": ("default", Layout(pp=2, dp=4), {"zero": {"stage": 1}}),
    "max, dp4, bf16": ("max", Layout(dp=4), {"train": {"precision": "bf16"}}),
}


def wanted_of(folder: Path, kind: str, layout: Layout, sections: Any, steps: int) -> list[float]:
    """Return the losses of the exact run, or, of momentum, of one rank instead of a node."""
    if kind == "safe":
        exact = config_of(folder, compression={"kind": "none"})
        return run_ranks(curve, 1, folder, args=(exact, steps, 5))[0]
    half = dataclasses.replace(layout, dp=layout.dp // NODE)
    config = config_with(folder, kind, 1, **sections)
    return run_ranks(curve, half.world_size, folder, args=(config, steps, 5), layout=half)[0]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_beside_the_one_without_nodes(name: str, tmp_path: Path) -> None:
    kind, layout, sections = CURVES[name]
    steps = 18 if layout.world_size == 4 else 12
    config = config_with(tmp_path, kind, **sections)
    ranks = run_ranks(curve, layout.world_size, tmp_path, args=(config, steps, 5), layout=layout)
    wanted = wanted_of(tmp_path, kind, layout, sections, steps)
    assert ranks[0][-1] < 0.95 * ranks[0][0]
    for losses in ranks:
        assert losses == ranks[0]
        assert losses == pytest.approx(wanted, rel=RELATIVE)
        assert losses[9:] != pytest.approx(wanted[9:], rel=1e-6), "nothing was compressed"


class Ways(torch.nn.Module):
    """Layers that each rank goes through in an order of its own."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.rank = rank

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        order = torch.randperm(4, generator=torch.Generator().manual_seed(step * 4 + self.rank))
        outputs = {int(index): self.layers[int(index)](x) for index in order}
        return torch.stack([outputs[index] for index in range(4)]).tanh().sum(0)


def in_other_orders(mesh: Mesh, kind: str, stage: int) -> list[torch.Tensor]:
    order = "agreed" if stage == 3 else "learned"
    zero, model = ZeroSection.model_validate({"stage": stage, "order": order}), Ways(mesh.rank)
    path = parallelize(model, mesh, zero=zero, compression=section_of(kind), bucket_mb=0.001)
    optimizer = AdamW(path, lr=0.01)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(mesh.rank))
    for step in range(4):
        if step == 2:
            at_once(path)
        path.backward(path.model(x, step).square().mean())
        path.finish()
        optimizer.step(done=path.publish)
        path.publish()
    path.settle()
    with path.unsharded():
        return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("kind", "stage"), [("default", 1), ("safe", 3)])
def test_ranks_that_use_parameters_in_other_orders_do_not_wait_for_ever(
    kind: str, stage: int, tmp_path: Path
) -> None:
    runs = [
        run_ranks(in_other_orders, 4, tmp_path, args=(kind, stage), delay_seed=seed, timeout=60)
        for seed in range(4 - stage)
    ]
    for rank in (rank for run in runs for rank in run):
        for a, b in zip(rank, runs[0][0], strict=True):
            assert torch.equal(a, b)


# -- checkpoints -------------------------------------------------------------------------------


def trained(mesh: Mesh, config: Config, steps: tuple[int, ...], resume: bool) -> dict[str, Any]:
    """Take so many steps, saving after each of these numbers of them."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if resume:
        assert trainer.resume() is not None
    kept, losses = copies(trainer.state.errors()), []
    for count in steps:
        for _ in range(count):
            losses.append(trainer.train_step().loss)
            if trainer.step > 3:
                at_once(trainer.path)
        trainer.save()
    return {"losses": losses, "kept": kept, "saved": copies(trainer.state.errors())}


def run_of(folder: Path, name: str, kind: str, node_degree: int = NODE) -> Config:
    train = {"steps": 40, "global_batch": 12}
    run = {"dir": str(folder / name)}
    return config_with(folder, kind, node_degree, train=train, run=run)


@pytest.mark.parametrize("kind", ["safe", "default"])
def test_a_resumed_run_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    whole, config = run_of(tmp_path, "whole", kind), run_of(tmp_path, "run", kind)
    wanted = run_ranks(trained, 4, tmp_path, args=(whole, (5, 4), False))[0]["losses"]
    found = run_ranks(trained, 4, tmp_path, args=(config, (5,), False))[0]["losses"]
    found += run_ranks(trained, 4, tmp_path, args=(config, (4,), True))[0]["losses"]
    assert found == wanted


@pytest.mark.parametrize("kind", ["safe", "default"])
def test_other_nodes_take_up_what_all_have_kept(kind: str, tmp_path: Path) -> None:
    whole = run_of(tmp_path, "whole", kind, 1)
    wanted = run_ranks(trained, 2, tmp_path, args=(whole, (6, 3, 3), False))[0]["losses"]
    losses: list[float] = []
    before: Mapping[str, torch.Tensor] = {}
    for workers, node_degree in ((4, 2), (6, 3), (4, 1)):
        config = run_of(tmp_path, "run", kind, node_degree)
        steps = 3 if losses else 6
        ranks = run_ranks(trained, workers, tmp_path, args=(config, (steps,), bool(losses)))
        kept = assemble(rank["kept"] for rank in ranks)
        for name, value in before.items():
            assert torch.equal(kept[name], value), name
        before = assemble(rank["saved"] for rank in ranks)
        assert any(value.any() for value in before.values()) == (kind == "safe")
        losses += ranks[0]["losses"]
    assert losses == pytest.approx(wanted, rel=2 * RELATIVE)


# -- what may go wrong -------------------------------------------------------------------------


def with_infinity(mesh: Mesh, kind: str, stage: int) -> list[bool]:
    """One rank's gradient is infinite in step 4; return which norms were finite."""
    torch.manual_seed(0)
    model = torch.nn.Linear(19, 11, bias=False)  # 209 elements: padding shares the last scale
    path = parallelize(model, mesh, compression=section_of(kind), zero=stage)
    optimizer, wire, found = AdamW(path), wire_of(path), []
    [bucket] = path.buckets
    x = torch.randn(4, 19, generator=torch.Generator().manual_seed(mesh.rank))
    for step in range(7):
        if step == 2:
            at_once(path)
        loss = model(x).square().mean()
        if step == 4 and mesh.rank == 2:
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
            left = wire.errors(bucket)
            momentum = kind == "default"
            assert not left.any() or momentum
            gap = (left - before).norm()
            assert gap <= 1e-6 * before.norm() or not momentum, "momentum was lost with the step"
    path.settle()
    assert all(bucket.params.isfinite().all() for bucket in path.buckets)
    return found


@pytest.mark.parametrize(("kind", "stage"), [("safe", 1), ("default", 2)])
def test_an_infinity_on_one_worker_is_seen_by_all(kind: str, stage: int, tmp_path: Path) -> None:
    for found in run_ranks(with_infinity, 4, tmp_path, args=(kind, stage)):
        assert found == [True] * 4 + [False] + [True] * 2


def found_in(config: Config, world_size: int) -> str:
    return "\n".join(f"{one.what} {one.why} {one.mend}" for one in check(config, world_size))


def test_what_does_not_fit_is_refused_before_a_run(tmp_path: Path) -> None:
    config = config_with(tmp_path, "safe", 3, train={"global_batch": 12})
    told = found_in(config, 4)
    assert "compression.node_degree = 3 does not divide dp = 4" in told
    assert "one of 1, 2, 4" in told
    assert "node_degree" not in found_in(config, 6)
    for kind in ("none", "powersgd"):
        other = config_of(tmp_path, compression={"kind": kind, "node_degree": 2})
        assert f"compression.node_degree has no meaning for compression.kind = {kind}" in found_in(
            other, 4
        )


def refused(mesh: Mesh) -> list[str]:
    said = []
    for kind, degree in (("safe", 3), ("powersgd", 2), ("safe", 4)):
        section = CompressionSection(kind=kind, node_degree=degree)  # type: ignore[arg-type]
        try:
            path = parallelize(squares(), mesh, compression=section)
            assert path.sync.ledger is None, "all are on one node: there is nothing to compress"
            said.append("")
        except BigtrainError as error:
            said.append(str(error))
    return said


def test_loops_of_ones_own_are_told_as_well(tmp_path: Path) -> None:
    for divides, whole, alone in run_ranks(refused, 4, tmp_path):
        assert "node_degree=3 does not divide dp=4" in divides
        assert "whole parameters" in whole
        assert not alone


def told(mesh: Mesh, machine: int) -> list[str]:
    """Return what is logged on machines of so many ranks."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("bigtrain").addHandler(handler)
    local = mesh.rank % machine
    mesh = dataclasses.replace(mesh, local_rank=local, local_world_size=machine)
    parallelize(squares(), mesh, compression=section_of("safe"))
    return [text for text in texts if "node_degree" in text]


def test_nodes_that_are_on_several_machines_are_told_of_once(tmp_path: Path) -> None:
    assert run_ranks(told, 4, tmp_path, args=(2,)) == [[], [], [], []]
    first, *others = run_ranks(told, 4, tmp_path, args=(3,))
    assert len(first) == 1
    assert "compression.node_degree = 2" in first[0]
    assert "those of rank 2" in first[0]
    assert others == [[], [], []]


# -- bytes and memory --------------------------------------------------------------------------


@contextmanager
def counted(rank: int) -> Iterator[dict[bool, int]]:
    """Count the bytes of messages of this rank, by whether they leave its node."""
    found, plain = {True: 0, False: 0}, dist.isend

    def isend(tensor: torch.Tensor, *, group: Any, group_dst: int) -> Any:
        leaves = dist.get_global_rank(group, group_dst) // NODE != rank // NODE
        found[leaves] += tensor.numel() * tensor.element_size()
        return plain(tensor, group=group, group_dst=group_dst)

    dist.isend = isend  # type: ignore[assignment]
    try:
        yield found
    finally:
        dist.isend = plain


def bytes_of(mesh: Mesh, kind: str) -> list[tuple[dict[bool, int], dict[bool, int]]]:
    """Return the bytes of an exact step and of a compressed one, and what is promised of each."""
    path = parallelize(squares(), mesh, compression=section_of(kind), bucket_mb=0.016)
    optimizer, wire, found = AdamW(path), wire_of(path), []
    nodes = mesh.dp.degree // NODE
    for step in range(3):
        with counted(mesh.rank) as sent:
            if step == 1:
                at_once(path)
            path.backward(path.model(torch.ones(2, 64)).square().mean())
            path.finish()
            optimizer.step(done=path.publish)
            path.publish()
            path.settle()
        promised = {True: 0, False: 0}
        for bucket in path.buckets:
            n = bucket.numel // mesh.dp.degree
            up = wire._framed("gradient", 0, 0, n).size if step or kind == "safe" else 4 * n
            up += 2 * n if step == 2 and kind == "max" else 0  # for the variance, in bf16
            # The first publish is exact, and so is that of the first compressed step of momentum.
            down = wire._framed("delta", 0, 0, n).size
            down = 4 * n if step == 0 or (step == 1 and kind != "safe") else down
            promised[True] += (nodes - 1) * (up + down)
            promised[False] += (NODE - 1) * nodes * (4 * n + down)
        if step == 1 and kind != "safe":  # what ranks begin with
            promised[True] += sum((nodes - 1) * 4 * b.numel // mesh.dp.degree for b in path.buckets)
        found.append((dict(sent), promised))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_that_leave_a_node(kind: str, tmp_path: Path) -> None:
    for steps in run_ranks(bytes_of, 6, tmp_path, args=(kind,)):
        for sent, promised in steps:
            assert sent == promised


def memory_gap(mesh: Mesh, config: Config) -> int:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    trainer.train_step()
    at_once(trainer.path)
    trainer.train_step()
    trainer.path.settle()
    assert trainer.memory is not None
    assert isinstance(trainer.path, GradientPath)
    wire = wire_of(trainer.path)
    compressed = [b for b in trainer.path.buckets if b.sharing.compressed]
    held = sum(wire.kept_of(b).num_bytes for b in compressed)
    assert held == pytest.approx(4 * sum(b.numel for b in compressed) / NODE, rel=0.02)
    return abs(held - trainer.memory.errors)


@pytest.mark.parametrize("kind", ["safe", "default"])
def test_memory_is_what_was_predicted(kind: str, tmp_path: Path) -> None:
    assert run_ranks(memory_gap, 4, tmp_path, args=(config_with(tmp_path, kind),)) == [0] * 4
