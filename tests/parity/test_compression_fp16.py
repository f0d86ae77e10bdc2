"""Compression beside a loss scale: what is kept is as long as gradients are, whatever the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_codecs import Lossless
from parity_models import VOCAB, gpt
from test_compressed_momentum import BETAS, DEFAULT, at_once, wire_of
from test_compressed_training import config_of
from test_compression_kinds import SECTIONS
from test_fp16 import near
from test_published import ONEBIT, ZERO_ONE, ledger_of

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.schema import CompressionSection, Config
from bigtrain.optim import AdamW
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity
SAFE = {"kind": "safe", "block": 64, "least_numel": 100}
ALL: dict[str, dict[str, Any]] = {
    **{kind: section for kind, section in SECTIONS.items() if kind != "fp16"},
    **{"safe": SAFE, "default": DEFAULT, "max": {**DEFAULT, "kind": "max"}},
    **{"onebit": ONEBIT, "zero_one": {**ZERO_ONE, "local_steps": 3}},
}
SCALES = [64.0, 64.0, 128.0, 128.0, 32.0, 32.0, 32.0, 1.0, 2.0, 4.0]


def scaled(mesh: Mesh, section: dict[str, Any], scales: list[float]) -> list[torch.Tensor]:
    """Train with losses that are multiplied by these, in fp32; return main parameters."""
    compression, found = CompressionSection.model_validate(section), []
    stage = 0 if section["kind"] in ("onebit", "zero_one") else 1
    path = parallelize(gpt(), mesh, zero=stage, compression=compression, bucket_mb=0.04)
    optimizer = AdamW(path)
    for step, scale in enumerate(scales):
        if step == 3 and section["kind"] in ("default", "max"):
            at_once(path)
        if step == 3 and section["kind"] == "onebit":
            ledger_of(path).switch.begin("compressed")
        draws = torch.Generator().manual_seed(step * 7 + mesh.dp.rank)
        tokens = torch.randint(0, VOCAB, (2, 8), generator=draws)
        path.rescale(scale)
        path.backward(path.model(tokens, tokens) * scale)
        path.finish()
        norm = float(path.grad_norm()) / scale
        optimizer.step(None, torch.tensor(scale * max(1.0, norm)), path.publish)
        path.publish()
        path.settle()
        found.append(torch.cat([bucket.main_params for bucket in path.buckets]).clone())
    return found


@pytest.mark.parametrize("kind", ALL)
def test_powers_of_two_change_no_bit(kind: str, tmp_path: Path) -> None:
    plain = run_ranks(scaled, 2, tmp_path, args=(ALL[kind], [1.0] * len(SCALES)))
    other = run_ranks(scaled, 2, tmp_path, args=(ALL[kind], SCALES))
    for wanted, found in zip(plain, other, strict=True):
        for step, (a, b) in enumerate(zip(wanted, found, strict=True)):
            assert torch.equal(a, b), f"step {step}"


def half_of(folder: Path, section: dict[str, Any], **sections: Any) -> Config:
    train = {"steps": 40, "precision": "fp16", "loss_scale_window": 4}
    optimizer = {"lr": 0.004, "betas": BETAS}
    values = {"train": train, "optimizer": optimizer, "compression": section}
    return config_of(folder, run={"dir": str(folder / "run")}, **{**values, **sections})


def trained(
    mesh: Mesh,
    config: Config,
    steps: int,
    saves: bool = False,
    resume: bool = False,
    lossless: bool = False,
) -> dict[str, list[Any]]:
    """Begin with a scale that overflows, and compress from the thirteenth step on."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    trainer.loss_scale.scale = 2.0**24
    if lossless:
        wire_of(trainer.path).up = wire_of(trainer.path).down = Lossless()
    if resume:
        assert trainer.resume() is not None
    records = []
    while trainer.step < steps:
        if trainer.step == 12 and config.compression.kind in ("default", "max"):
            at_once(trainer.path)
        records.append(trainer.train_step())
        if saves and trainer.step == 15:
            trainer.save()
    trainer.check_replicas()
    return {
        "losses": [r.loss for r in records],
        "scales": [r.loss_scale for r in records],
        "skipped": [r.skipped for r in records],
    }


def without_loss(mesh: Mesh, config: Config, steps: int) -> dict[str, list[Any]]:
    return trained(mesh, config, steps, lossless=True)


@pytest.mark.parametrize("kind", ["safe", "default", "max"])
def test_half_precision_learns_as_without_compression(kind: str, tmp_path: Path) -> None:
    """Scales double every four steps, and halve where they overflow."""
    config = half_of(tmp_path, ALL[kind])
    [first, second] = run_ranks(trained, 2, tmp_path, args=(config, 40))
    assert first == second
    assert any(first["skipped"])
    assert not all(first["skipped"][-5:])
    assert len(set(first["scales"][-20:])) > 1
    exact = half_of(tmp_path, {"kind": "none"} if kind == "safe" else DEFAULT)
    how = trained if kind == "safe" else without_loss
    wanted = run_ranks(how, 2, tmp_path, args=(exact, 40))[0]
    near(first["losses"][:12], wanted["losses"][:12], 0.02)
    near(first["losses"], wanted["losses"], 0.05 if kind == "safe" else 0.15)


@pytest.mark.parametrize("kind", ["safe", "default"])
def test_a_resumed_run_in_half_precision_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    config = half_of(tmp_path, ALL[kind])
    whole = run_ranks(trained, 2, tmp_path, args=(config, 25, True))
    again = half_of(tmp_path, ALL[kind])
    rest = run_ranks(resumed, 2, tmp_path, args=(again, 25))
    for a, b in zip(whole, rest, strict=True):
        assert a["losses"][15:] == b["losses"]
        assert a["scales"][15:] == b["scales"]


def resumed(mesh: Mesh, config: Config, steps: int) -> dict[str, list[Any]]:
    return trained(mesh, config, steps, resume=True)


def test_what_is_saved_does_not_depend_on_the_scale(tmp_path: Path) -> None:
    """A run in fp16 goes on in bf16, with the errors as they are without a scale."""
    config = half_of(tmp_path, SAFE)
    run_ranks(trained, 2, tmp_path, args=(config, 15, True))
    wide = half_of(tmp_path, SAFE, train={"steps": 40, "precision": "bf16"})
    errors, norms = zip(*run_ranks(lengths, 2, tmp_path, args=(wide,)), strict=True)
    assert 0 < max(errors) < 3 * max(norms)


def lengths(mesh: Mesh, config: Config) -> tuple[float, float]:
    """Return how long what is kept is, and the gradient of the next step."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    assert trainer.resume() is not None
    wire = trainer.path.sync.ledger
    assert wire is not None
    kept = [wire.kept(b) for b in trainer.path.buckets if b.sharing.compressed]
    length = torch.stack([k.norm() for k in kept if k is not None]).norm()
    return float(length), trainer.train_step().grad_norm


def test_expected_divisors_are_without_a_scale(tmp_path: Path) -> None:
    for first, second in run_ranks(expected, 2, tmp_path):
        assert first == pytest.approx(second, rel=1e-6)


def expected(mesh: Mesh) -> tuple[float, float]:
    compression = CompressionSection.model_validate(DEFAULT)
    path = parallelize(gpt(), mesh, zero=1, compression=compression)
    AdamW(path)
    path.rescale(4096.0)
    wire = wire_of(path)
    wire.divided(path.buckets, 3 * 4096.0)
    assert path.progress is not None
    before = path.progress["expected"]
    path.progress = path.progress
    return before, path.progress["expected"]
