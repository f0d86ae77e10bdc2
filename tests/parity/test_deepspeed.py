"""`engine: deepspeed` against the native engine: curves, checkpoints across both, NaN policy.

With the same order of sums (2 ranks, stages 0 and 1) losses are even equal bit by bit. Stages 2 and
3 reduce after every microbatch, and in bf16 stage 3 rounds the summed gradient.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_trainer import close, make_config, samples_of_steps, train

from bigtrain.comm.mesh import Mesh
from bigtrain.config.check import check
from bigtrain.config.load import load_config
from bigtrain.config.schema import Config
from bigtrain.engines.deepspeed_setup import load_deepspeed
from bigtrain.errors import BigtrainError, ConfigError, NonFiniteError
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity

MODEL = {"vocab_size": 61, "max_seq_len": 16, "num_layers": 1, "hidden_size": 44}
TRAIN = {"steps": 10, "global_batch": 8, "microbatch": 2, "max_grad_norm": 0.5}


@pytest.fixture(scope="module")
def deepspeed() -> None:
    """Import it once, before ranks are forked: two seconds."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: bigtrain[deepspeed]")
    load_deepspeed(torch.device("cpu"))


def two(tmp_path: Path, stage: int | None, name: str = "", **sections: Any) -> Config:
    """Return a config for two ranks; no stage: the native engine."""
    values: dict[str, Any] = {"model": MODEL, "train": TRAIN, **sections}
    config = make_config(tmp_path, run={"dir": str(tmp_path / (name or f"run-{stage}"))}, **values)
    return on(config, stage)


def on(config: Config, stage: int | None, **zero: Any) -> Config:
    values = config.model_dump()
    values["engine"] = {"kind": "native" if stage is None else "deepspeed"}
    values["zero"] = {"stage": stage or 0, **zero}
    return Config.model_validate(values)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_curve(stage: int, tmp_path: Path) -> None:
    """Over 10 steps of 2 microbatches a rank; clipping is at work in most of them."""
    native = run_ranks(train, 2, tmp_path, args=(two(tmp_path, None),))
    ranks = run_ranks(train, 2, tmp_path, args=(two(tmp_path, stage),))
    assert sum(norm > TRAIN["max_grad_norm"] for norm in native[0]["norms"]) >= 5
    for rank in ranks:
        close(rank["losses"], native[0]["losses"])
        close(rank["norms"], native[0]["norms"])
        assert rank["validation"] == pytest.approx(native[0]["validation"], abs=2e-5)
    if stage < 2:
        assert ranks[0]["losses"] == native[0]["losses"]
    assert samples_of_steps(ranks) == samples_of_steps(native)


SORTS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"kind": "sgd", "lr": 0.1, "nesterov": True, "weight_decay": 0.01}},
    "uneven items": {
        "model": {"factory": "parity_factories:masked"},
        "data": {"factory": "parity_factories:padded_rows"},
        "train": {"steps": 4, "global_batch": 16},
    },
    "frozen, unused, buffers": {
        "model": {"factory": "parity_factories:odd"},
        "data": {"factory": "parity_factories:padded_rows"},
    },
    "dropout": {"model": {**MODEL, "dropout": 0.2}},
}


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", SORTS)
def test_same_curve_of(name: str, stage: int, tmp_path: Path) -> None:
    native = run_ranks(train, 2, tmp_path, args=(two(tmp_path, None, **SORTS[name]),))
    ranks = run_ranks(train, 2, tmp_path, args=(two(tmp_path, stage, **SORTS[name]),))
    close(ranks[0]["losses"], native[0]["losses"])
    assert ranks[0]["validation"] == pytest.approx(native[0]["validation"], abs=2e-5)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(("stage", "tolerance"), [(1, 0), (2, 2e-3), (3, 2e-3)])
def test_bf16_has_fp32_main_parameters(stage: int, tolerance: float, tmp_path: Path) -> None:
    train_section = {**TRAIN, "precision": "bf16"}
    native = run_ranks(train, 2, tmp_path, args=(two(tmp_path, None, train=train_section),))
    ranks = run_ranks(train, 2, tmp_path, args=(two(tmp_path, stage, train=train_section),))
    pairs = zip(ranks[0]["losses"], native[0]["losses"], strict=True)
    assert max(abs(a - b) for a, b in pairs) <= tolerance


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [1, 3])
def test_offload_to_cpu_changes_nothing(stage: int, tmp_path: Path) -> None:
    config = two(tmp_path, stage)
    here = run_ranks(train, 2, tmp_path, args=(config,))
    there = run_ranks(train, 2, tmp_path, args=(on(config, stage, offload="cpu"),))
    close(there[0]["losses"], here[0]["losses"])


# (engine, ranks) before and after: None is native, a number DeepSpeed's stage.
HANDOVERS = [
    ((None, 2), (2, 2)),
    ((None, 1), (3, 2)),
    ((1, 2), (None, 1)),
    ((2, 2), (None, 2)),
    ((3, 2), (None, 4)),
    ((3, 2), (1, 1)),
    ((0, 2), (3, 2)),
]


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize(("before", "after"), HANDOVERS)
def test_resume_across_engines(before: Any, after: Any, tmp_path: Path) -> None:
    config = two(tmp_path, None, name="whole")
    whole = run_ranks(train, 2, tmp_path, args=(config,))[0]
    config = two(tmp_path, None, name="parts")
    run_ranks(train, before[1], tmp_path, args=(on(config, before[0]), 5))
    rest = run_ranks(train, after[1], tmp_path, args=(on(config, after[0]), 10**9, True))
    close(rest[0]["losses"], whole["losses"][5:])
    assert rest[0]["validation"] == pytest.approx(whole["validation"], abs=2e-5)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stages", [(None, 3), (3, None), (3, 2)])
def test_resume_with_frozen_parameters_and_buffers(stages: Any, tmp_path: Path) -> None:
    sections = SORTS["frozen, unused, buffers"]
    whole = run_ranks(train, 2, tmp_path, args=(two(tmp_path, None, name="a", **sections),))[0]
    config = two(tmp_path, None, name="b", **sections)
    run_ranks(train, 2, tmp_path, args=(on(config, stages[0]), 5))
    rest = run_ranks(train, 2, tmp_path, args=(on(config, stages[1]), 10**9, True))[0]
    close(rest["losses"], whole["losses"][5:])
    assert rest["validation"] == pytest.approx(whole["validation"], abs=2e-5)


def skip_a_nan(mesh: Mesh, config: Config) -> tuple[list[bool], list[float]]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    records = [trainer.train_step() for _ in range(config.train.steps)]
    return [r.skipped for r in records], [r.loss for r in records if not r.skipped]


def stop_at_a_nan(mesh: Mesh, config: Config) -> str:
    with pytest.raises(NonFiniteError) as caught:
        skip_a_nan(mesh, config)
    return str(caught.value)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_nan_is_skipped_or_told(stage: int, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"factory": "parity_factories:nan_on_sample", "args": {"bad": 8}},
        "data": {"factory": "parity_factories:padded_rows"},
        "train": {"steps": 20, "global_batch": 4, "microbatch": 1, "on_nonfinite": "skip"},
    }
    native = run_ranks(skip_a_nan, 2, tmp_path, args=(two(tmp_path, None, **sections),))[0]
    ours = run_ranks(skip_a_nan, 2, tmp_path, args=(two(tmp_path, stage, **sections),))[0]
    assert any(native[0])
    assert not all(native[0])
    assert ours[0] == native[0]
    close(ours[1], native[1])
    if stage in (1, 2):  # the way to the error is the same
        return
    sections["train"]["on_nonfinite"] = "stop"
    native = run_ranks(stop_at_a_nan, 2, tmp_path, args=(two(tmp_path, None, **sections),))
    ours = run_ranks(stop_at_a_nan, 2, tmp_path, args=(two(tmp_path, stage, **sections),))
    assert ours == native


def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every rank, before anything is built: the data are not even looked for."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = two(tmp_path, 1, data={"kind": "tokens", "train": "none", "validation": "none"})

    def build(mesh: Mesh) -> str:
        with pytest.raises(BigtrainError) as caught:
            Trainer(config, mesh, tmp_path)
        return str(caught.value)

    for told in run_ranks(build, 2, tmp_path):
        assert "pip install 'bigtrain[deepspeed]'" in told


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"parallel": {"tp": 2}}, "parallel.tp = 2 with engine.kind = deepspeed"),
        ({"parallel": {"pp": 2}}, "parallel.pp = 2 with engine.kind = deepspeed"),
        ({"pipeline": {"schedule": "gpipe"}}, "a pipeline section with"),
        ({"train": {"precision": "bf16"}}, "zero.stage = 0"),
        ({"zero": {"offload": "cpu"}}, "zero.offload = cpu"),
        ({"zero": {"stage": 3, "offload": "file"}}, "zero.offload = file"),
        ({"engine": {"kind": "deepspeed", "config": {"optimizer": {}}}}, "engine.config.optimizer"),
        (
            {"engine": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 3}}}},
            "engine.config.zero_optimization.stage",
        ),
        ({"engine": {"config": {"a": 1}}}, "engine.config is for engine.kind = deepspeed"),
    ],
)
def test_what_does_not_go_together(sections: dict[str, Any], told: str) -> None:
    config = Config.model_validate({"engine": {"kind": "deepspeed"}, **sections})
    problems = check(config)
    assert any(told in problem.what and problem.mend for problem in problems), problems


def test_engine_by_name(tmp_path: Path) -> None:
    assert Config.model_validate({"engine": "deepspeed"}).engine.kind == "deepspeed"
    path = tmp_path / "config.yaml"
    path.write_text("engine: deepspeed\n")
    assert load_config(str(path)).engine.kind == "deepspeed"
    more = load_config(str(path), ["engine.config={aio: {block_size: 1}}"]).engine
    assert more.kind == "deepspeed"
    assert more.config == {"aio": {"block_size": 1}}
    assert load_config(str(path), ["engine.kind=native"]).engine.kind == "native"
    path.write_text("engine: deepsped\n")
    with pytest.raises(ConfigError, match="did you mean deepspeed"):
        load_config(str(path))


def refused(mesh: Mesh, config: Config) -> str:
    with pytest.raises(BigtrainError) as caught:
        Trainer(config, mesh, Path(config.run.dir))
    return str(caught.value)


@pytest.mark.usefixtures("deepspeed")
def test_what_deepspeed_refuses_is_told(tmp_path: Path) -> None:
    values = two(tmp_path, 1).model_dump()
    values["engine"]["config"] = {"zero_optimization": {"reduce_scater": True, "stage3": 1}}
    for told in run_ranks(refused, 2, tmp_path, args=(Config.model_validate(values),)):
        assert "does not take this configuration" in told
