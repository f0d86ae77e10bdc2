"""The whole Trainer: curves under 1, 2, 4 ranks, resume under other numbers of ranks, NaN policy.

Losses of two layouts differ by the order of fp32 sums only: 1e-5 after a few steps of lr 1e-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import run_ranks

from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import Config
from bigtrain.errors import BigtrainError, CheckpointError, NonFiniteError
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity


def make_config(tmp_path: Path, **sections: dict[str, Any]) -> Config:
    for part, length in (("train", 6000), ("validation", 900)):
        target = tmp_path / f"{part}.npy"
        if not target.exists():
            text = np.random.default_rng(length).integers(0, 50, length).cumsum() % 61
            np.save(target, text.astype(np.uint8))
    values: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"vocab_size": 61, "max_seq_len": 16, "num_layers": 1, "hidden_size": 32},
        "data": {
            "kind": "tokens",
            "train": str(tmp_path / "train.npy"),
            "validation": str(tmp_path / "validation.npy"),
            "seq_len": 16,
        },
        "train": {"steps": 8, "global_batch": 8, "microbatch": 2},
        "schedule": {"warmup_steps": 2},
        "eval": {"samples": 7},
        "checkpoint": {"keep_last": 5},
    }
    return Config.model_validate({**values, **sections})


def train(mesh: Mesh, config: Config, stop_after: int = 10**9, resume: bool = False) -> dict:
    """Run the trainer to its end, or to `stop_after` and save there."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if resume:
        assert trainer.resume() is not None
    records = []
    while trainer.step < min(config.train.steps, stop_after):
        records.append(trainer.train_step())
    trainer.save()
    state = {b.name: b.tensor.clone() for b in trainer.state.blocks()}
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "ids": {r.step: r.sample_ids for r in records},
        "items": [r.items for r in records],
        "validation": trainer.evaluate(),
        "state": state,
    }


def close(a: list[float], b: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-5, atol=2e-5)


def samples_of_steps(ranks: list[dict]) -> dict[int, list[int]]:
    steps = ranks[0]["ids"]
    return {step: sorted(i for rank in ranks for i in rank["ids"][step]) for step in steps}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout, another microbatch size on each layout": {
        "model": {"vocab_size": 61, "max_seq_len": 16, "num_layers": 2, "dropout": 0.2},
        "train": {"steps": 8, "global_batch": 8},
    },
    "uneven-items": {
        "model": {"factory": "parity_factories:masked"},
        "data": {"factory": "parity_factories:padded_rows"},
    },
    "loss-function": {
        "model": {"factory": "parity_factories:masked", "loss": "parity_factories:masked_loss"},
        "data": {"factory": "parity_factories:padded_rows", "num_workers": 1},
    },
    "sgd-bf16": {
        "train": {"steps": 8, "global_batch": 8, "microbatch": 2, "precision": "bf16"},
        "optimizer": {"kind": "sgd", "lr": 0.1},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_same_curve_on_any_number_of_ranks(name: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, **VARIANTS[name])
    runs = {n: run_ranks(train, n, tmp_path, args=(config,), delay_seed=n) for n in (1, 2, 4)}
    alone = runs[1][0]
    assert alone["losses"][-1] != alone["losses"][0]
    for ranks in runs.values():
        for rank in ranks:
            close(rank["losses"], alone["losses"])
            close(rank["norms"], alone["norms"])
            assert rank["items"] == alone["items"]
            assert rank["validation"] == pytest.approx(alone["validation"], abs=2e-5)
        assert samples_of_steps(ranks) == samples_of_steps(runs[1])


def test_the_mean_is_over_items_not_over_microbatches(tmp_path: Path) -> None:
    """With an uneven number of items, microbatches of 1 and of 8 give the same gradient."""
    runs = []
    for microbatch in (1, 8):
        config = make_config(
            tmp_path,
            **{
                **VARIANTS["uneven-items"],
                "train": {"steps": 4, "global_batch": 8, "microbatch": microbatch},
            },
        )
        runs.append(run_ranks(train, 1, tmp_path, args=(config,))[0])
    close(runs[0]["losses"], runs[1]["losses"])
    close(runs[0]["norms"], runs[1]["norms"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (4, 2), (2, 2)])
def test_resume_continues_the_curve_and_the_samples(
    before: int, after: int, precision: str, tmp_path: Path
) -> None:
    section = {"steps": 8, "global_batch": 8, "microbatch": 2, "precision": precision}
    config = make_config(tmp_path, train=section)
    undisturbed = make_config(tmp_path, train=section, run={"dir": str(tmp_path / "whole")})
    whole = run_ranks(train, 2, tmp_path, args=(undisturbed,))
    first = run_ranks(train, before, tmp_path, args=(config, 4))
    second = run_ranks(train, after, tmp_path, args=(config, 10**9, True))
    close(first[0]["losses"] + second[0]["losses"], whole[0]["losses"])
    samples = {**samples_of_steps(first), **samples_of_steps(second)}
    assert samples == samples_of_steps(whole)
    if before == after == 2:
        for name, tensor in whole[0]["state"].items():
            assert torch.equal(second[0]["state"][name], tensor), f"{name} is not the same bits"


def state_after_resume(mesh: Mesh, config: Config) -> dict[str, torch.Tensor]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    trainer.resume()
    return {block.name: block.tensor.clone() for block in trainer.state.blocks()}


def test_a_checkpoint_loads_bit_for_bit_under_any_layout(tmp_path: Path) -> None:
    config = make_config(tmp_path, parallel={"bucket_mb": 0.01})
    saved = run_ranks(train, 2, tmp_path, args=(config, 2))[0]["state"]
    other_buckets = make_config(tmp_path, parallel={"bucket_mb": 5.0})
    for ranks in (1, 4):
        for state in run_ranks(state_after_resume, ranks, tmp_path, args=(other_buckets,)):
            assert state.keys() == saved.keys()
            for name, tensor in saved.items():
                assert torch.equal(state[name], tensor), name


def refused(mesh: Mesh, config: Config) -> str:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    try:
        trainer.resume()
    except CheckpointError as error:
        return str(error)
    return ""


def test_resume_refuses_what_is_another_run(tmp_path: Path) -> None:
    run_ranks(train, 1, tmp_path, args=(make_config(tmp_path), 2))
    where = {"dir": str(tmp_path / "run")}
    for sections, words in (
        ({"run": {**where, "seed": 5}}, "set run.seed=1234"),
        (
            {"model": {"vocab_size": 61, "hidden_size": 64, "num_layers": 1}},
            "another model",
        ),
        ({"optimizer": {"kind": "sgd"}}, "of another optimizer"),
    ):
        for text in run_ranks(refused, 2, tmp_path, args=(make_config(tmp_path, **sections),)):
            assert words in text


def nan_run(mesh: Mesh, config: Config) -> tuple[str, list[bool]]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    skipped = []
    try:
        while trainer.step < config.train.steps:
            skipped.append(trainer.train_step().skipped)
    except NonFiniteError as error:
        return str(error), skipped
    for block in trainer.state.blocks():
        assert block.tensor.isfinite().all()
    return "", skipped


def nan_config(tmp_path: Path, policy: str, bad: int) -> Config:
    return make_config(
        tmp_path,
        model={"factory": "parity_factories:nan_on_sample", "args": {"bad": bad}},
        data={"factory": "parity_factories:padded_rows"},
        train={"steps": 20, "global_batch": 4, "microbatch": 1, "on_nonfinite": policy},
    )


def test_a_nan_stops_all_ranks_and_names_the_culprit(tmp_path: Path) -> None:
    ranks = run_ranks(nan_run, 2, tmp_path, args=(nan_config(tmp_path, "stop", 8),))
    assert ranks[0] == ranks[1]
    text, skipped = ranks[0]
    assert "rank" in text
    assert "samples [" in text
    assert "the update was not done" in text
    assert not any(skipped)


def test_a_nan_can_be_skipped(tmp_path: Path) -> None:
    ranks = run_ranks(nan_run, 2, tmp_path, args=(nan_config(tmp_path, "skip", 8),))
    text, skipped = ranks[0]
    assert text == ""
    assert 0 < sum(skipped) < len(skipped) == 20


def test_only_so_many_updates_are_skipped_in_a_row(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        model={"factory": "parity_factories:nan_on_sample", "args": {"bad": 8}},
        data={"factory": "parity_factories:padded_rows"},
        train={"steps": 20, "global_batch": 50, "on_nonfinite": "skip"},
    )
    text, skipped = run_ranks(nan_run, 1, tmp_path, args=(config,))[0]
    assert "number 10 in a row" in text
    assert len(skipped) == 9


def test_a_larger_checkpoint_is_refused(tmp_path: Path) -> None:
    """A run that needs a part of the tensors only would otherwise go on without a word."""
    run_ranks(train, 1, tmp_path, args=(make_config(tmp_path), 1))
    smaller = make_config(tmp_path, optimizer={"kind": "sgd", "momentum": 0.0})
    (text,) = run_ranks(refused, 1, tmp_path, args=(smaller,))
    assert "tensors that this run has not, like optimizer.exp_avg" in text


def test_a_damaged_checkpoint_is_set_aside_and_the_new_one_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path, checkpoint={"keep_last": 2})
    folder = Path(config.run.dir)
    for step in (1, 2, 3):
        run_ranks(train, 1, tmp_path, args=(config, step, step > 1))
    with open(folder / "step-00000003" / "rank-00000.safetensors", "r+b") as file:
        file.seek(500)
        file.write(b"\x00\x01\x02")
    run_ranks(train, 2, tmp_path, args=(config, 4, True))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["damaged-step-00000003", "step-00000002", "step-00000004"]
    for path in folder.glob("step-*"):
        for file in path.iterdir():
            file.write_bytes(file.read_bytes()[:-1])
    for text in run_ranks(refused, 2, tmp_path, args=(config,)):
        assert "all checkpoints" in text


def broken_on_one_rank(mesh: Mesh, config: Config) -> str:
    if mesh.rank == 1:
        model = config.model.model_copy(update={"factory": "no_such:f"})
        config = config.model_copy(update={"model": model})
    try:
        Trainer(config, mesh, Path(config.run.dir))
    except BigtrainError as error:
        return str(error)
    return ""


def test_what_fails_on_one_rank_fails_on_all(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        model={"factory": "parity_factories:masked"},
        data={"factory": "parity_factories:padded_rows"},
    )
    for text in run_ranks(broken_on_one_rank, 3, tmp_path, args=(config,)):
        assert "no module named no_such" in text


def test_stop_is_agreed_by_all(tmp_path: Path) -> None:
    def run(mesh: Mesh) -> tuple[int, int | None]:
        config = make_config(tmp_path)
        asked = {"signal": None}
        trainer = Trainer(
            config, mesh, Path(config.run.dir), stop_requested=lambda: asked["signal"]
        )
        for record in trainer.steps():
            if record.step == 3 and mesh.rank == 1:
                asked["signal"] = 15
        return trainer.step, trainer.stop_signal

    make_config(tmp_path)
    assert run_ranks(run, 2, tmp_path) == [(4, 15), (4, 15)]
