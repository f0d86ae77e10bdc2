"""fp16 with a loss scale: layouts, overflows on one rank and on all, resume, real NaNs.

Tolerances are relative. A number in fp16 is off by 5e-4 of itself at most, a mean over the 128
tokens of a step by far less. Data- and pipeline-parallel ranks compute the same fp16 numbers as one
rank, and fp32 sums of them in another order (two stages sum the gradients of a tied embedding in
fp32, one rank in fp16), so that now and then an updated parameter rounds to its other neighbour:
2e-5 of a loss, 5e-4 of a norm (seen: 3e-6, 2e-4). Tensor-parallel ranks round
parts of products, so activations differ in their last bits: 5e-5 and 1e-3 (seen: 4e-6, 2e-4).
Against fp32 every activation is rounded: 1e-4 and 4e-3 (seen: 8e-6, 5e-4).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from test_trainer import make_config, train

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import Config
from bigtrain.errors import NonFiniteError
from bigtrain.optim import AdamW
from bigtrain.optim.loss_scale import LossScale
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity

FP16 = {"steps": 8, "global_batch": 8, "microbatch": 2, "precision": "fp16"}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"vocab_size": 61, "max_seq_len": 16, "num_layers": 2, "hidden_size": 32},
    "llama": {
        **{"kind": "llama", "vocab_size": 61, "max_seq_len": 16, "num_layers": 2},
        **{"hidden_size": 32, "num_kv_heads": 2},
    },
}
LAYOUTS = {"dp": Layout(dp=2), "pp": Layout(pp=2), "tp": Layout(tp=2)}
REORDERED, ROUNDED, WIDE = (2e-5, 5e-4), (5e-5, 1e-3), (1e-4, 4e-3)  # of losses, of norms


def fp16_config(tmp_path: Path, model: str = "gpt", **sections: Any) -> Config:
    sections["train"] = {**FP16, **sections.get("train", {})}
    return make_config(tmp_path, model=MODELS[model], **sections)


def steep_config(
    tmp_path: Path, bad: int | None, steepness: float, stage: int = 0, **train: Any
) -> Config:
    return make_config(
        tmp_path,
        zero={"stage": stage},
        model={
            "factory": "parity_factories:steep_on_sample",
            "args": {"bad": bad, "steepness": steepness},
        },
        data={"factory": "parity_factories:padded_rows"},
        train={"steps": 12, "global_batch": 4, "microbatch": 1, "precision": "fp16", **train},
    )


def follow(mesh: Mesh, config: Config, first_scale: float | None = None) -> dict[str, Any]:
    """Train to the end; what each step showed, and whether it changed a parameter here."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if first_scale is not None:
        trainer.loss_scale.scale = first_scale
    records, changed, error = [], [], ""
    try:
        while trainer.step < config.train.steps:
            before = held(trainer)
            records.append(trainer.train_step())
            after = held(trainer)
            changed.append(not all(map(torch.equal, before, after)))
    except NonFiniteError as failure:
        error = str(failure)
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "scales": [r.loss_scale for r in records],
        "skipped": [r.skipped for r in records],
        "changed": changed,
        "updates": trainer.optimizer.num_updates,
        "error": error,
        "last": trainer.loss_scale.scale,
    }


def held(trainer: Trainer) -> list[torch.Tensor]:
    """Return what this rank holds: what the model computes with, and state."""
    found = [block.tensor.clone() for block in trainer.state.blocks()]
    with trainer.path.unsharded():
        return [*found, *(p.detach().clone() for p in trainer.model.parameters())]


def near(a: list[float], b: list[float], tolerance: float) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("kernels", ["on", "off"])
@pytest.mark.parametrize("model", MODELS)
def test_near_fp32_whoever_computes(model: str, kernels: str, tmp_path: Path) -> None:
    """Every operation of both models; the loss and the norm are shown without the scale."""
    run = {"dir": str(tmp_path / "run"), "kernels": kernels}
    wide = fp16_config(tmp_path, model, run=run, train={"precision": "fp32"})
    half = fp16_config(tmp_path, model, run=run)
    (expected,), (got,) = (run_ranks(follow, 1, tmp_path, args=(c,)) for c in (wide, half))
    assert got["scales"] == [2.0**16] * 8
    assert expected["scales"] == [None] * 8
    near(got["losses"], expected["losses"], WIDE[0])
    near(got["norms"], expected["norms"], WIDE[1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*LAYOUTS, "sequence"])
def test_layouts_agree(name: str, model: str, tmp_path: Path) -> None:
    sequence = name == "sequence"
    config = fp16_config(tmp_path, model, parallel={"sequence_parallel": sequence})
    layout = Layout(tp=2) if sequence else LAYOUTS[name]
    (alone,) = run_ranks(train, 1, tmp_path, args=(config,))
    ranks = run_ranks(train, 2, tmp_path, args=(config,), layout=layout, delay_seed=1)
    of_losses, of_norms = ROUNDED if layout.tp > 1 else REORDERED
    for rank in ranks:
        near(rank["losses"], alone["losses"], of_losses)
        near(rank["norms"], alone["norms"], of_norms)
        assert rank["validation"] == pytest.approx(alone["validation"], rel=of_losses)


@pytest.mark.parametrize("scale", [1.0, 128.0])
def test_the_scale_does_not_change_what_is_learned(scale: float, tmp_path: Path) -> None:
    """Two powers of two differ by what falls below the smallest numbers of fp16."""
    (dynamic,) = run_ranks(follow, 1, tmp_path, args=(fp16_config(tmp_path),))
    fixed = fp16_config(tmp_path, train={"loss_scale": scale})
    (got,) = run_ranks(follow, 1, tmp_path, args=(fixed,))
    assert got["scales"] == [scale] * 8
    near(got["losses"], dynamic["losses"], ROUNDED[0])
    near(got["norms"], dynamic["norms"], ROUNDED[1])


def scaled_losses(mesh: Mesh, config: Config) -> list[torch.Tensor]:
    """Return what backward of one step begins with."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    plain, losses = trainer.pipeline.run, []

    def run(batches: Any, loss_of: Any, **rest: Any) -> None:
        def seen(*args: Any) -> torch.Tensor:
            losses.append(loss_of(*args))
            return losses[-1]

        plain(batches, seen, **rest)

    trainer.pipeline.run = run
    trainer.train_step()
    return [loss.detach() for loss in losses]


def test_a_loss_in_fp16_is_scaled_in_fp32(tmp_path: Path) -> None:
    """A loss of 3.6 times 65536 is infinite in fp16."""
    config = steep_config(tmp_path, None, 0.0)
    for losses in run_ranks(scaled_losses, 2, tmp_path, args=(config,)):
        assert len(losses) == 2
        assert all(65504 < loss < torch.inf for loss in losses)


def test_a_model_whose_loss_is_fp16_trains(tmp_path: Path) -> None:
    ranks = run_ranks(follow, 2, tmp_path, args=(steep_config(tmp_path, None, 0.0),))
    for rank in ranks:
        assert rank["skipped"] == [False] * 12
        assert rank["changed"] == [True] * 12


# -- overflows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_scale_that_is_too_large_comes_down(name: str, tmp_path: Path) -> None:
    config = fp16_config(tmp_path, train={"steps": 12})
    ranks = run_ranks(follow, 2, tmp_path, args=(config, 2.0**26), layout=LAYOUTS[name])
    for rank in ranks:
        skips = sum(rank["skipped"])
        assert 0 < skips < 10
        assert rank["skipped"] == [True] * skips + [False] * (12 - skips)
        assert rank["changed"] == [not each for each in rank["skipped"]]
        assert rank["scales"] == [2.0 ** (26 - min(i, skips)) for i in range(12)]
        assert rank["updates"] == 12 - skips
        for key in ("losses", "scales", "skipped"):
            assert rank[key] == ranks[0][key]
        assert torch.tensor(rank["losses"]).isfinite().all()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_is_one_of_all(stage: int, tmp_path: Path) -> None:
    """One sample of the run is too steep: the rank that has it does not skip alone."""
    ranks = run_ranks(follow, 2, tmp_path, args=(steep_config(tmp_path, 24, 1000.0, stage),))
    (step,) = [i for i, skipped in enumerate(ranks[0]["skipped"]) if skipped]
    for rank in ranks:
        assert rank["skipped"] == [i == step for i in range(12)]
        assert rank["changed"] == [i != step for i in range(12)]
        assert rank["scales"] == [2.0**16 if i <= step else 2.0**15 for i in range(12)]
        assert rank["losses"] == ranks[0]["losses"]
        assert torch.tensor(rank["losses"]).isfinite().all()
        assert not torch.tensor(rank["norms"][step]).isfinite()


def test_overflows_without_end_end_the_run(tmp_path: Path) -> None:
    for first, last, words in (
        (2.0**16, 2.0**6, "number 10 in a row"),
        (4.0, 0.5, "with loss scale 1, the gradient of table.weight is NaN or infinite"),
    ):
        config = steep_config(tmp_path, None, 1e38)  # infinite in fp16, however it is scaled
        ranks = run_ranks(follow, 2, tmp_path, args=(config, first))
        assert ranks[0]["error"] == ranks[1]["error"]
        assert not any(ranks[0]["changed"])
        assert words in ranks[0]["error"]
        assert ranks[0]["last"] == last


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_fixed_scale_leaves_overflows_to_the_policy(policy: str, tmp_path: Path) -> None:
    config = steep_config(tmp_path, 24, 1000.0, loss_scale=65536, on_nonfinite=policy)
    ranks = run_ranks(follow, 2, tmp_path, args=(config,))
    for rank in ranks:
        if policy == "stop":
            assert "train.loss_scale=dynamic" in rank["error"]
        else:
            assert sum(rank["skipped"]) == 1
        assert set(rank["scales"]) <= {65536.0}


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_nan_loss_is_no_overflow(policy: str, tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        model={"factory": "parity_factories:nan_on_sample", "args": {"bad": 8}},
        data={"factory": "parity_factories:padded_rows"},
        train={**FP16, "steps": 20, "global_batch": 4, "microbatch": 1, "on_nonfinite": policy},
    )
    ranks = run_ranks(follow, 2, tmp_path, args=(config,))
    for rank in ranks:
        assert set(rank["scales"]) <= {2.0**16}
        assert rank["last"] == 2.0**16
        assert ("samples [" in rank["error"]) == (policy == "stop")
        assert any(rank["skipped"]) == (policy == "skip")


# -- resume ----------------------------------------------------------------------------------------


def scale_after(
    mesh: Mesh, config: Config, stop_after: int = 10**9, resume: bool = False
) -> dict[str, Any]:
    """As `train`, with the scale of each step, from where they were saved."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if resume:
        assert trainer.resume() is not None
    records = []
    while trainer.step < min(config.train.steps, stop_after):
        records.append(trainer.train_step())
    trainer.save()
    return {
        "losses": [r.loss for r in records],
        "scales": [r.loss_scale for r in records],
        "state": {block.name: block.tensor.clone() for block in trainer.state.blocks()},
    }


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_goes_on_with_the_scale(stop: int, tmp_path: Path) -> None:
    """Bit for bit, in the middle of a window and at its end, with an overflow on the way."""
    growing = {"loss_scale_window": 2}
    config = steep_config(tmp_path, 24, 30.0, **growing)
    folder = {"run": config.run.model_copy(update={"dir": str(tmp_path / "whole")})}
    whole = run_ranks(scale_after, 2, tmp_path, args=(config.model_copy(update=folder),))
    first = run_ranks(scale_after, 2, tmp_path, args=(config, stop))
    second = run_ranks(scale_after, 2, tmp_path, args=(config, 10**9, True))
    for a, b, both in zip(first, second, whole, strict=True):
        assert a["scales"] + b["scales"] == both["scales"]
        assert a["losses"] + b["losses"] == both["losses"]
        for name, tensor in both["state"].items():
            assert torch.equal(b["state"][name], tensor), name
    assert len(set(whole[0]["scales"])) > 2


@pytest.mark.parametrize(("before", "after"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_resume_in_another_precision(before: str, after: str, tmp_path: Path) -> None:
    """The main parameters are fp32 in both, so the curve goes on."""
    one, other = (fp16_config(tmp_path, train={"precision": p}) for p in (before, after))
    run = {"dir": str(tmp_path / "whole")}
    whole = fp16_config(tmp_path, train={"precision": before}, run=run)
    (expected,) = run_ranks(scale_after, 1, tmp_path, args=(whole,))
    run_ranks(scale_after, 1, tmp_path, args=(one, 4))
    (got,) = run_ranks(scale_after, 1, tmp_path, args=(other, 10**9, True))
    near(got["losses"], expected["losses"][4:], WIDE[0])
    assert got["scales"] == ([2.0**16] * 4 if after == "fp16" else [None] * 4)


def test_a_fixed_scale_of_the_config_wins(tmp_path: Path) -> None:
    run_ranks(scale_after, 1, tmp_path, args=(fp16_config(tmp_path), 2))
    fixed = fp16_config(tmp_path, train={"loss_scale": 32})
    (got,) = run_ranks(scale_after, 1, tmp_path, args=(fixed, 4, True))
    assert got["scales"] == [32.0, 32.0]


# -- a loop of one's own ---------------------------------------------------------------------------


def own_loop(mesh: Mesh) -> tuple[list[bool], float]:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    path = parallelize(model, mesh, dtype=torch.float16)
    optimizer = AdamW(path.segments(), lr=1e-2)
    scale = LossScale(2.0**20, window=1000)
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(mesh.rank)).half()
    skipped, losses = [], []
    for _ in range(12):
        loss = model(data).square().mean()
        path.backward(loss.float() * scale.scale)
        path.finish()
        overflow = not path.grad_norm().isfinite()
        if overflow:
            path.abandon()
        else:
            optimizer.step(grad_divisor=torch.tensor(scale.scale))
            path.publish()
        scale.found(overflow)
        skipped.append(overflow)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    return skipped, scale.scale


def test_in_a_loop_of_ones_own(tmp_path: Path) -> None:
    (skipped, scale), other = run_ranks(own_loop, 2, tmp_path)
    assert other == (skipped, scale)
    assert skipped[0]
    assert not skipped[-1]
    assert scale == 2.0 ** (20 - sum(skipped))
