"""A run saved at any stage of ZeRO and layout goes on at any other.

Each of a covering set trains two steps and saves; each then loads what all of them have saved: the
state put together is the same bits, and the next steps give the losses of one undisturbed process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import assemble
from test_trainer import make_config

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.mesh import Mesh
from bigtrain.config.layout import Layout
from bigtrain.config.schema import Config
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity
BEFORE, AFTER = 2, 2  # steps until the checkpoint, and after it


@dataclass(frozen=True)
class Point:
    """A stage of ZeRO with its other keys, and a layout."""

    layout: Layout
    zero: dict[str, Any] = field(default_factory=dict)
    bucket_mb: float = 0.02
    schedule: str = "1f1b"

    @property
    def ranks(self) -> int:
        return self.layout.dp * self.layout.tp * self.layout.pp


POINTS = {
    "alone": Point(Layout()),
    "1-dp4": Point(Layout(dp=4), {"stage": 1}, bucket_mb=0.005),
    "2-dp2-tp2": Point(Layout(dp=2, tp=2), {"stage": 2}),
    "2-hybrid": Point(Layout(dp=4), {"stage": 2, "shard_degree": 2}, bucket_mb=1.0),
    "3-dp2": Point(Layout(dp=2), {"stage": 3, "persistent_numel": 100}),
    "3-file": Point(Layout(dp=2), {"stage": 3, "offload": "file"}, bucket_mb=0.004),
    "3-dp2-tp2-pp2": Point(Layout(dp=2, tp=2, pp=2), {"stage": 3}),
    "3-hybrid": Point(Layout(dp=4, tp=2), {"stage": 3, "shard_degree": 2}),
    "3-dp2-pp2": Point(Layout(dp=2, pp=2), {"stage": 3}, schedule="zb_h1"),
}
OF_PRECISION = {
    "fp32": tuple(POINTS)[:-1],
    "bf16": ("alone", "1-dp4", "2-hybrid", "3-file", "3-dp2-pp2"),  # Muon refuses split layers
}
# Muon makes full steps of what is small, and one that falls to the other side of a rounding to bf16
# is one of 0.4 %.
TOLERANCE = {"fp32": 2e-5, "bf16": 1e-3}
OPTIMIZER = {"fp32": {"kind": "adamw"}, "bf16": {"kind": "muon", "lr": 0.01}}


def config_of(folder: Path, name: str, precision: str, writer: str) -> Config:
    """What `name` trains with, in the run that `writer` has begun."""
    point = POINTS[name]
    zero = dict(point.zero)
    if zero.get("offload") == "file":
        zero["offload_dir"] = str(folder)
    return make_config(
        folder,
        run={"dir": str(folder / precision / writer)},
        model={
            **{"vocab_size": 61, "max_seq_len": 16, "num_layers": 2, "hidden_size": 24},
            "num_heads": 2,
        },
        parallel={"bucket_mb": point.bucket_mb, **point.layout.degrees},
        pipeline={"schedule": point.schedule},
        train={"steps": 8, "global_batch": 8, "microbatch": 1, "precision": precision},
        zero=zero,
        optimizer=OPTIMIZER[precision],
    )


def trained(mesh: Mesh, config: Config, steps: int, resume: bool) -> dict[str, Any]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if resume:
        assert trainer.resume() is not None
    start = state_of(trainer) if resume else []
    losses = [trainer.train_step().loss for _ in range(steps)]
    if not resume:
        trainer.save()
    return {"start": start, "losses": losses, "end": [] if resume else state_of(trainer)}


def state_of(trainer: Trainer) -> list[NamedBlock]:
    return [
        NamedBlock(b.name, b.shape, b.block, b.tensor.detach().clone(), b.replica, b.num_replicas)
        for b in trainer.state.blocks()
    ]


def resumed(mesh: Mesh, configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    return {name: trained(mesh, config, AFTER, True) for name, config in configs.items()}


@pytest.mark.parametrize("precision", OF_PRECISION)
def test_any_goes_on_at_any_other(precision: str, tmp_path: Path) -> None:
    names, tolerance = OF_PRECISION[precision], TOLERANCE[precision]
    config = config_of(tmp_path, "alone", precision, "whole")
    (whole,) = run_ranks(trained, 1, tmp_path, args=(config, BEFORE + AFTER, False))
    saved = {}
    for name in names:
        point, config = POINTS[name], config_of(tmp_path, name, precision, name)
        ranks = run_ranks(
            trained, point.ranks, tmp_path, args=(config, BEFORE, False), layout=point.layout
        )
        saved[name] = assemble(rank["end"] for rank in ranks)
        assert ranks[0]["losses"] == pytest.approx(whole["losses"][:BEFORE], rel=tolerance)
    for name in names:
        point = POINTS[name]
        configs = {w: config_of(tmp_path, name, precision, w) for w in names}
        ranks = run_ranks(
            resumed, point.ranks, tmp_path, args=(configs,), layout=point.layout, timeout=120
        )
        for writer in names:
            got = assemble(rank[writer]["start"] for rank in ranks)
            assert got.keys() == saved[writer].keys()
            for tensor, value in saved[writer].items():
                assert torch.equal(got[tensor], value), (writer, name, tensor)
            for rank in ranks:
                wanted = whole["losses"][BEFORE:]
                assert rank[writer]["losses"] == pytest.approx(wanted, rel=tolerance), writer
