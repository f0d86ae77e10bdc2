"""Momentum in one bit: what is sent and kept is all there was; curves stay beside exact ones.

`at_once` begins to compress at a step of our choice; where warm-ups end by themselves says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_codecs import Lossless
from parity_models import VOCAB, gpt, recorded_collectives
from test_compressed_training import UNTIED, config_of
from test_tensor_wire import sent

from bigtrain.comm.collectives import all_reduce
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline, parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import CompressionSection, Config, ParallelSection, ZeroSection
from bigtrain.models import GPT
from bigtrain.onebit.codec import Signs
from bigtrain.onebit.momentum import MomentumWire
from bigtrain.optim import AdamW
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity
DEFAULT = {"kind": "default", "block": 64, "least_numel": 100, "when": "always"}
SECTION = CompressionSection.model_validate(DEFAULT)
BETAS = [0.9, 0.8]  # so that the variance has seen enough after a few steps
RELATIVE = 0.06  # of a loss that falls by half in 30 steps, of which signs are a rough account


def wire_of(path: Any) -> MomentumWire:
    assert isinstance(path, GradientPath)
    wire = path.sync.ledger
    assert isinstance(wire, MomentumWire)
    return wire


def at_once(path: Any) -> None:
    """Compress from the next step on."""
    wire = wire_of(path)
    wire._go_on("compressed", [b for b in path.buckets if b.sharing.compressed])


# -- what goes and what stays ------------------------------------------------------------------


def accounts(mesh: Mesh, stage: int) -> list[str]:
    """Return where what was sent and what is kept are not all gradients."""
    path = parallelize(gpt(), mesh, zero=stage, compression=SECTION, bucket_mb=0.02)
    wire, optimizer, wrong = wire_of(path), AdamW(path), []
    total: dict[int, torch.Tensor] = {}
    beta = optimizer.betas[0]
    for step in range(7):
        draws = torch.Generator().manual_seed(step * 7 + mesh.dp.rank)
        tokens = torch.randint(0, VOCAB, (2, 8), generator=draws)
        divisor = (1.0, 1.3, 0.9)[step % 3]
        if step == 3:
            at_once(path)
        path.backward(path.model(tokens, tokens), last=False)
        path.backward(path.model(tokens, tokens))
        path.finish()
        for bucket in path.buckets:
            if step < 3 or not bucket.sharing.compressed:
                continue
            start, stop = bucket.owned
            grads = bucket.open_grads().clone()
            all_reduce(grads, mesh.dp)
            if step == 3:
                mean = optimizer.first_moment(bucket) * beta / (1 - beta)
                total[bucket.index] = mean  # what it began with
            total[bucket.index] += grads[start:stop] / divisor - bucket.main_grads
        optimizer.step(None, torch.tensor(divisor), path.publish)
        for bucket in path.buckets if step >= 3 else ():
            if bucket.sharing.compressed:
                kept = wire.errors(bucket) / divisor
                all_reduce(kept, mesh.dp)
                start, stop = bucket.owned
                gap = total[bucket.index] - kept[start:stop]
                bucket.clear_owned_gaps(gap)  # where signs are of nothing
                gap = gap.norm()
                if gap > 1e-5 * kept.norm():
                    wrong.append(f"bucket {bucket.index}, step {step}: {gap} of {kept.norm()}")
        path.publish()
    path.settle()
    return wrong


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_sent_and_what_is_kept_is_all_there_was(stage: int, tmp_path: Path) -> None:
    for wrong in run_ranks(accounts, 3, tmp_path, args=(stage,), delay_seed=stage):
        assert not wrong


def lossless(mesh: Mesh, kind: str) -> list[torch.Tensor]:
    """Gradients of one size everywhere, so that signs tell all; return main parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64, bias=False)
    signs = torch.randn(64, 64).sign()
    section = CompressionSection(
        kind=kind,  # type: ignore[arg-type]
        **({} if kind == "none" else {"refresh_every": 1, "least_numel": 0, "when": "always"}),
    )
    path = parallelize(model, mesh, zero=1, compression=section)
    optimizer, found = AdamW(path, lr=0.01, weight_decay=0.0), []
    for step in range(12):
        if step == 4 and kind != "none":
            at_once(path)
        path.backward((model.weight * signs).sum() * (1.0 + step % 3))
        path.finish()
        path.grad_norm()
        optimizer.step(done=path.publish)
        path.publish()
        path.settle()
        found.append(torch.cat([bucket.main_params for bucket in path.buckets]).clone())
    return found


def test_where_signs_tell_all_it_is_adamw(tmp_path: Path) -> None:
    """Scales are bf16 numbers, 2^-9 apart; what that loses is sent with the next."""
    wanted, found = (run_ranks(lossless, 2, tmp_path, args=(k,)) for k in ("none", "default"))
    for exact, ours in zip(wanted, found, strict=True):
        assert torch.equal(exact[3], ours[3])
        moved = (exact[-1] - exact[3]).abs().max()
        assert not torch.equal(exact[-1], ours[-1])
        assert (exact[-1] - ours[-1]).abs().max() < 0.005 * moved


def untouched(mesh: Mesh) -> tuple[float, float, float]:
    """Return how far rows have moved at most that have gradients now and then, never, and always.

    All share their scales. In step 12 gradients go exactly again.
    """
    torch.manual_seed(0)
    table = torch.nn.Embedding(64, 16)
    section = SECTION.model_copy(update={"block": 1024, "refresh_every": 0})
    path = parallelize(table, mesh, compression=section)
    optimizer = AdamW(path, lr=0.01, weight_decay=0.0)
    before = table.weight.detach().clone()
    for step in range(16):
        if step == 3:
            at_once(path)
        if step == 12:
            wire_of(path)._go_on("exact", path.buckets)
        rows = torch.arange(mesh.rank, 64, 4)
        if step == 6:
            rows = torch.arange(64)[3::4]  # for the first time
        path.backward((table(rows) + 1).square().mean())
        path.finish()
        optimizer.step()
        path.publish()
    path.settle()
    moved = (table.weight - before).abs().amax(1)
    return float(moved[3::4].max()), float(moved[2::4].max()), float(moved[:2].max())


def test_rows_without_gradients_stay_and_new_ones_learn(tmp_path: Path) -> None:
    for seldom, never, always in run_ranks(untouched, 2, tmp_path):
        assert never < 0.02, "about two steps: signs go forth and back"
        assert 0.02 < seldom < 0.12
        assert 0.08 < always < 0.3


# -- beside exact runs, composed ---------------------------------------------------------------


def curve(
    mesh: Mesh, config: Config, lossless: bool, steps: int = 40, exact: int = 10
) -> dict[str, Any]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if lossless:
        wire_of(trainer.path).up = wire_of(trainer.path).down = Lossless()
    losses = [trainer.train_step().loss for _ in range(exact)]
    at_once(trainer.path)
    losses += [trainer.train_step().loss for _ in range(steps - exact)]
    trainer.check_replicas()
    assert trainer.evaluate() is not None
    return {"losses": losses, "replicas": [b.tensor.clone() for b in trainer.state.replicas()]}


LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "dp4": (Layout(dp=4), {}),
    "dp2, max": (Layout(dp=2), {"compression": {**DEFAULT, "kind": "max"}}),
    "dp4, stage 3": (Layout(dp=4), {"zero": {"stage": 3}}),
    "dp2 x tp2": (Layout(dp=2, tp=2), {"zero": {"stage": 1}}),
    "pp2 x dp2, max": (
        Layout(pp=2, dp=2),
        {"zero": {"stage": 2}, "compression": {**DEFAULT, "kind": "max"}, "model": UNTIED},
    ),
    "pp2 x dp2 x tp2": (Layout(pp=2, dp=2, tp=2), {"zero": {"stage": 3}, "model": UNTIED}),
    "dp2, bf16": (Layout(dp=2), {"train": {"precision": "bf16"}, "zero": {"stage": 2}}),
    "dp2, LAMB": (Layout(dp=2), {"optimizer": {"kind": "lamb", "lr": 0.03, "betas": BETAS}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_curve_beside_the_exact_one(name: str, tmp_path: Path) -> None:
    layout, sections = LAYOUTS[name]
    sections = {"compression": DEFAULT, "optimizer": {"lr": 0.004, "betas": BETAS}, **sections}
    config = config_of(tmp_path, **sections)
    ranks = run_ranks(curve, layout.world_size, tmp_path, args=(config, False), layout=layout)
    parallel = ParallelSection(bucket_mb=0.01)
    plain = config.model_copy(update={"zero": ZeroSection(), "parallel": parallel})
    wanted = run_ranks(curve, 2, tmp_path, args=(plain, True))[0]
    tolerance = 0.1 if "LAMB" in name else RELATIVE  # its steps are longer
    assert ranks[0]["losses"][:10] == pytest.approx(wanted["losses"][:10], rel=1e-3)
    for rank in ranks:
        assert rank["losses"] == ranks[0]["losses"]
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
        assert rank["losses"][13:] != wanted["losses"][13:], "nothing was compressed"


def test_the_same_bits_twice_and_at_stages_1_and_2(tmp_path: Path) -> None:
    train = {"steps": 40, "global_batch": 8, "microbatch": 4}  # one: stage 2 adds up as stage 1
    configs = [
        config_of(tmp_path, compression=DEFAULT, zero={"stage": stage}, train=train)
        for stage in (0, 1, 2)
    ]
    curves = [
        run_ranks(curve, 2, tmp_path, args=(config, False, 18), delay_seed=number)[0]
        for number, config in enumerate(configs)
    ]
    for other in curves[1:]:
        assert curves[0]["losses"] == other["losses"]
        for a, b in zip(curves[0]["replicas"], other["replicas"], strict=True):
            assert torch.equal(a, b)


# -- checkpoints -------------------------------------------------------------------------------


def trained(mesh: Mesh, config: Config, steps: Sequence[int], resume: bool) -> list[float]:
    """Take so many steps, saving after each of these numbers of them."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    losses: list[float] = []
    if resume:
        assert trainer.resume() is not None
        assert wire_of(trainer.path).switch.compressed == (config.compression.kind != "none")
    for number, count in enumerate(steps):
        for step in range(count):
            if not resume and number == 0 and step == 3 and config.compression.kind != "none":
                at_once(trainer.path)
            losses.append(trainer.train_step().loss)
        trainer.save()
    return losses


def run_of(folder: Path, **sections: Any) -> Config:
    run = {"dir": str(folder / "run")}
    optimizer = {"lr": 0.004, "betas": BETAS}
    values = {"run": run, "compression": DEFAULT, "optimizer": optimizer}
    return config_of(folder, **{**values, **sections})


RESUMED: dict[str, tuple[Layout, dict[str, Any]]] = {
    "dp2, max": (Layout(dp=2), {"compression": {**DEFAULT, "kind": "max", "refresh_every": 2}}),
    "dp2 x tp2, stage 3": (Layout(dp=2, tp=2), {"zero": {"stage": 3}}),
    "pp2 x dp2, bf16": (Layout(pp=2, dp=2), {"train": {"precision": "bf16"}}),
    "pp2 x dp2, LAMB": (
        Layout(pp=2, dp=2),
        {"optimizer": {"kind": "lamb", "lr": 0.03, "betas": BETAS}, "model": UNTIED},
    ),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_goes_on_to_the_bit(name: str, tmp_path: Path) -> None:
    layout, sections = RESUMED[name]
    size, options = layout.world_size, {"layout": layout}
    whole = run_of(tmp_path, **{**sections, "run": {"dir": str(tmp_path / "whole")}})
    wanted = run_ranks(trained, size, tmp_path, args=(whole, (8, 6), False), **options)
    config = run_of(tmp_path, **sections)
    first = run_ranks(trained, size, tmp_path, args=(config, (8,), False), **options)
    second = run_ranks(trained, size, tmp_path, args=(config, (6,), True), **options)
    for a, b, c in zip(first, second, wanted, strict=True):
        assert a + b == c


def test_other_numbers_of_workers_go_on_with_the_same_momentum(tmp_path: Path) -> None:
    train = {"steps": 40, "global_batch": 12}
    whole = run_of(tmp_path, train=train, run={"dir": str(tmp_path / "whole")})
    wanted = run_ranks(trained, 4, tmp_path, args=(whole, (10, 10, 10), False))[0]
    config, losses = run_of(tmp_path, train=train), []
    for workers in (4, 3, 4):
        args = (config, (10,), bool(losses))
        losses += run_ranks(trained, workers, tmp_path, args=args)[0]
    assert losses[:10] == wanted[:10]
    # Other workers see other samples, so signs differ; a momentum that is lost costs 0.1.
    assert losses == pytest.approx(wanted, rel=0.025)


def test_a_run_goes_on_without_compression_and_with_it_again(tmp_path: Path) -> None:
    config = run_of(tmp_path)
    exact = config.model_copy(update={"compression": CompressionSection()})
    losses = run_ranks(trained, 2, tmp_path, args=(config, (10,), False))[0]
    losses += run_ranks(resumed_exactly, 2, tmp_path, args=(exact, 5))[0]
    losses += run_ranks(resumed_exactly, 2, tmp_path, args=(config, 5))[0]
    whole = exact.model_copy(
        update={"run": config.run.model_copy(update={"dir": str(tmp_path / "whole")})}
    )
    wanted = run_ranks(trained, 2, tmp_path, args=(whole, (20,), False))[0]
    assert losses[-1] < 1.1 * wanted[-1]
    assert max(b - a for a, b in itertools.pairwise(losses)) < 0.2, "a jump"


def resumed_exactly(mesh: Mesh, config: Config, steps: int) -> list[float]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    assert trainer.resume() is not None
    losses = [trainer.train_step().loss for _ in range(steps)]
    trainer.save()
    return losses


# -- bytes and memory --------------------------------------------------------------------------

PROMISED = {"default": (5 + 2 * 16 / 1024) / 64, "max": (2 + 16 / 1024 + 16 / 512) / 64}


def bytes_of(mesh: Mesh, kind: str, stage: int) -> tuple[float, float]:
    """Return the bytes that a rank sends in a step, and what an all-reduce of fp32 would."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(4)))
    zero, section = ZeroSection(stage=stage), CompressionSection(kind=kind)  # type: ignore[arg-type]
    path = parallelize(model, mesh, zero=zero, compression=section, bucket_mb=1.0)
    optimizer, x = AdamW(path), torch.randn(2, 512)
    for step in range(4):
        if step == 1:
            at_once(path)
        with recorded_collectives() as calls:
            path.backward(model(x).square().mean(), last=False)
            path.backward(model(x).square().mean())
            path.finish()
            optimizer.step(done=path.publish)
            path.publish()
    path.settle()
    n = mesh.dp.degree
    numel = sum(bucket.numel for bucket in path.buckets)
    return sent(calls), 2 * (n - 1) / n * 4 * numel


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("kind", ["default", "max"])
def test_bytes_on_the_wire(kind: str, stage: int, tmp_path: Path) -> None:
    for measured, exact in run_ranks(bytes_of, 4, tmp_path, args=(kind, stage)):
        assert (
            PROMISED[kind] < measured / exact < PROMISED[kind] + 0.0035
        )  # biases go exactly, in stage 2 twice


def bytes_between_replicas(mesh: Mesh, kind: str) -> tuple[float, float]:
    """Return what a rank of a split model sends to its likes on other replicas, and should."""
    torch.manual_seed(0)
    model = GPT(64, 16, 2, 256, 4, tie_embeddings=False)
    section = CompressionSection.model_validate({"kind": kind, "least_numel": 10000})

    def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch, batch)
        return loss

    batch = torch.zeros(2, 8, dtype=torch.int64)
    pipeline = build_pipeline(model, mesh, compression=section, example=batch, loss_of=loss_of)
    path, n = pipeline.path, mesh.dp.degree
    optimizer = AdamW(path)
    for step in range(4):
        if step == 1:
            at_once(path)
        with recorded_collectives() as calls:
            pipeline.step([batch, batch], loss_of)
            path.finish()
            optimizer.step(done=path.publish)
            path.publish()
            path.settle()
    between = [call for call in calls if call[0] == "isend" and call[2] == n]
    packed, exact = (
        sum(b.numel for b in path.buckets if b.sharing.compressed is compressed)
        for compressed in (True, False)
    )
    assert packed > 10 * exact
    return sent(between), 2 * (n - 1) / n * 4 * (PROMISED[kind] * packed + exact)


@pytest.mark.parametrize("kind", PROMISED)
@pytest.mark.parametrize("layout", [Layout(dp=3, tp=2), Layout(pp=2, dp=3)], ids=["tp2", "pp2"])
def test_bytes_of_a_split_model(layout: Layout, kind: str, tmp_path: Path) -> None:
    for measured, promised in run_ranks(
        bytes_between_replicas, 6, tmp_path, args=(kind,), layout=layout
    ):
        assert measured == pytest.approx(promised, rel=0.02)


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
    assert held == pytest.approx(4 * sum(b.numel for b in compressed), rel=0.02)
    return abs(held - trainer.memory.errors)


def test_memory_is_what_was_predicted(tmp_path: Path) -> None:
    config = config_of(tmp_path, compression=DEFAULT)
    assert run_ranks(memory_gap, 2, tmp_path, args=(config,)) == [0, 0]


def test_signs_need_room_for_scales_of_each_row() -> None:
    kept = Signs(64).keep(3, 100, torch.device("cpu"))
    assert kept.scales is not None
    assert kept.scales.shape == (3, 2)
