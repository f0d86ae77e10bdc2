"""Every optimizer through the Trainer: the same curve under any layout, resumed bit for bit.

Two layouts differ by the order of fp32 sums only: parameters by 1e-6 after some steps. But a
gradient that is zero but for rounding (the bias of the keys) becomes a full step in Lion, Adagrad,
LAMB and AdamW, so that one is not compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import assemble, own_blocks, relative_error
from test_trainer import close, make_config, train

from bigtrain.comm.block import NamedBlock
from bigtrain.comm.mesh import Mesh
from bigtrain.config.layout import Layout
from bigtrain.config.schema import Config
from bigtrain.errors import CheckpointError
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lamb": {"kind": "lamb", "lr": 0.01},
    "adagrad": {"kind": "adagrad", "lr": 0.01},
    "lion": {"kind": "lion", "lr": 1e-3},
    "muon": {"kind": "muon", "lr": 0.01},
    "muon-keller": {
        "kind": "muon",
        "lr": 0.02,
        "scale": "keller",
        "adamw_lr_ratio": 0.1,
        "precision": "bf16",
        "exclude": ["*.mlp.*"],
    },
}
LAYOUTS = {
    "dp2": ({"dp": 2}, ["lamb", "adagrad", "lion", "muon"]),
    "tp2": ({"tp": 2, "dp": 1}, ["lamb", "adagrad"]),
    "pp2": ({"pp": 2, "dp": 1}, ["lamb", "muon"]),
}


def config_of(tmp_path: Path, name: str, **sections: Any) -> Config:
    parallel = {"bucket_mb": 0.02, **sections.pop("parallel", {})}
    return make_config(tmp_path, optimizer=OPTIMIZERS[name], parallel=parallel, **sections)


def trained(mesh: Mesh, config: Config) -> tuple[list[float], list[NamedBlock]]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    return [trainer.train_step().loss for _ in range(6)], own_blocks(trainer.path)


@pytest.mark.parametrize(
    ("layout", "name"), [(layout, name) for layout in LAYOUTS for name in LAYOUTS[layout][1]]
)
def test_same_curve_under_any_layout(layout: str, name: str, tmp_path: Path) -> None:
    degrees = LAYOUTS[layout][0]
    ((losses, blocks),) = run_ranks(trained, 1, tmp_path, args=(config_of(tmp_path, name),))
    wanted = assemble([blocks])
    config = config_of(tmp_path, name, parallel=degrees)
    ranks = run_ranks(trained, 2, tmp_path, args=(config,), layout=Layout(**degrees))
    for theirs, _ in ranks:
        close(theirs, losses)
    got = assemble(blocks for _, blocks in ranks)
    assert got.keys() == wanted.keys()
    for parameter, tensor in wanted.items():
        if "qkv.bias" not in parameter:
            assert relative_error(got[parameter], tensor, 0.01) < 1e-4, parameter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_goes_on_bit_for_bit(name: str, precision: str, tmp_path: Path) -> None:
    section = {"steps": 6, "global_batch": 8, "microbatch": 2, "precision": precision}
    config = config_of(tmp_path, name, train=section)
    undisturbed = config_of(tmp_path, name, train=section, run=elsewhere(tmp_path))
    whole = run_ranks(train, 2, tmp_path, args=(undisturbed,))[0]
    first = run_ranks(train, 2, tmp_path, args=(config, 3))[0]
    second = run_ranks(train, 2, tmp_path, args=(config, 10**9, True))[0]
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["state"].keys() == whole["state"].keys()
    assert any(key.startswith("optimizer.") for key in whole["state"])
    for key, tensor in whole["state"].items():
        assert torch.equal(second["state"][key], tensor), key


@pytest.mark.parametrize("name", ["lamb", "muon"])
def test_state_goes_on_under_another_layout(name: str, tmp_path: Path) -> None:
    """Saved by one process, taken up by the two stages of a pipeline, and by one process again."""
    whole = run_ranks(
        train, 1, tmp_path, args=(config_of(tmp_path, name, run=elsewhere(tmp_path)),)
    )
    config = config_of(tmp_path, name)
    split = config_of(tmp_path, name, parallel={"pp": 2, "dp": 1})
    losses = run_ranks(train, 1, tmp_path, args=(config, 3))[0]["losses"]
    two = run_ranks(train, 2, tmp_path, args=(split, 6, True), layout=Layout(pp=2))
    losses += two[0]["losses"]
    losses += run_ranks(train, 1, tmp_path, args=(config, 10**9, True))[0]["losses"]
    close(losses, whole[0]["losses"])


def elsewhere(tmp_path: Path) -> dict[str, str]:
    return {"dir": str(tmp_path / "whole")}


def refused(mesh: Mesh, config: Config) -> str:
    with pytest.raises(CheckpointError) as caught:
        Trainer(config, mesh, Path(config.run.dir)).resume()
    return str(caught.value)


def test_a_checkpoint_of_other_matrices_is_refused(tmp_path: Path) -> None:
    run_ranks(train, 1, tmp_path, args=(config_of(tmp_path, "muon"), 1))
    (text,) = run_ranks(refused, 1, tmp_path, args=(config_of(tmp_path, "muon-keller"),))
    assert "another optimizer" in text
