"""Whatever a user gets wrong: a clear word, an exit code, and nothing broken by it."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import SLOW, Bench, Run

from bigtrain.data.permutation import shuffled

pytestmark = pytest.mark.cluster

TROUBLE = "model.factory=parts:model"


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return what may not change when a run is refused: config, metrics, checkpoints."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"logs", ".lock"} & set(path.relative_to(folder).parts)
    }


# -- the run folder ------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["text/0.txt/run", "/proc/bigtrain/run"])
def test_run_folder_that_cannot_be_made(bench: Bench, place: str) -> None:
    run = bench.launch(f"run.dir={place}", code=1)
    run.assert_told("cannot write to", place.rpartition("/")[0], "run.dir")


def test_run_folder_that_holds_a_run(bench: Bench) -> None:
    first = bench.launch()
    before = snapshot(first.folder)
    refused = bench.launch(code=1)
    refused.assert_told("run holds a run already", "--resume continues it", "--restart moves it")
    assert snapshot(first.folder) == before

    both = bench.launch(resume=True, restart=True, code=1)
    both.assert_told("--resume and --restart exclude each other")

    again = bench.launch("train.steps=4", "parallel.dp=1", restart=True)
    assert len(again.losses()) == 4
    assert snapshot(bench.path / "run.old-1") == before


def test_two_runs_in_one_folder(bench: Bench) -> None:
    first = bench.start(*SLOW, "train.steps=2000")
    first.wait_step(1)
    for options in ({}, {"resume": True}, {"restart": True}):
        second = bench.start(**options)
        assert second.wait() == 1
        second.assert_told("another run is using run", f"process {first.process.pid}")
    assert not first.ended()
    assert not (bench.path / "run.old-1").exists()
    step = len(first.losses())
    first.wait_step(step + 2)  # it was not disturbed


def test_resume_without_a_run(bench: Bench) -> None:
    """Nothing to go on from is said; a requeued job may have died before its first checkpoint."""
    run = bench.launch("parallel.dp=1", resume=True)
    assert "no checkpoint in run/checkpoints yet" in run.out
    assert len(run.losses()) == 8


# -- damaged checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def six_steps(shared_bench: Bench) -> Run:
    """A run with checkpoints of steps 2, 4 and 6, to be copied."""
    every = ("checkpoint.every=2", "checkpoint.keep_last=5", "log.sample_ids=true")
    return shared_bench.launch("train.steps=6", *every, "run.dir=six")


def flip_a_byte(checkpoint: Path) -> Path:
    path = checkpoint / "rank-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def truncate(checkpoint: Path) -> Path:
    path = checkpoint / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return path


def remove_a_file(checkpoint: Path) -> Path:
    path = checkpoint / "rank-00001.safetensors"
    path.unlink()
    return path


def cut_the_manifest(checkpoint: Path) -> Path:
    path = checkpoint / "manifest.json"
    path.write_bytes(path.read_bytes()[:500])
    return path


def zero_the_manifest(checkpoint: Path) -> Path:
    path = checkpoint / "manifest.json"
    path.write_bytes(bytes(path.stat().st_size))
    return path


DAMAGES = [flip_a_byte, truncate, remove_a_file, cut_the_manifest, zero_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda x: x.__name__)
def test_damaged_newest_checkpoint(six_steps: Run, shared_bench: Bench, damage) -> None:
    name = f"hurt-{damage.__name__}"
    folder = shared_bench.path / name
    shutil.copytree(six_steps.folder, folder)
    hurt = damage(folder / "checkpoints" / "step-00000006")
    overrides = ("train.steps=6", f"run.dir={name}", "parallel.dp=1")
    run = shared_bench.launch(*overrides, resume=True)
    (warning,) = [x for x in run.out.splitlines() if "damaged" in x and "using the one" in x]
    assert str(hurt.relative_to(shared_bench.path)) in warning
    assert f"resumed from {name}/checkpoints/step-00000004, after step 4" in run.out
    assert run.losses() == pytest.approx(six_steps.losses(), abs=1e-4)
    run.assert_clean()  # the damaged one is not listed any more


def test_all_checkpoints_damaged(six_steps: Run, shared_bench: Bench) -> None:
    """Starting over without a word would throw away what `ckpt` might still save."""
    shutil.copytree(six_steps.folder, shared_bench.path / "all-hurt")
    for path in (shared_bench.path / "all-hurt" / "checkpoints").iterdir():
        flip_a_byte(path)
    before = snapshot(shared_bench.path / "all-hurt")
    run = shared_bench.launch("train.steps=6", "run.dir=all-hurt", resume=True, code=None)
    run.assert_told("damaged", "step-00000006", "--restart")
    assert snapshot(run.folder) == before


def test_pruning_does_not_count_damaged_checkpoints(six_steps: Run, shared_bench: Bench) -> None:
    """The newest good one is never removed in favour of later ones that cannot be read."""
    folder = shared_bench.path / "prune"
    shutil.copytree(six_steps.folder, folder)
    for step in (4, 6):
        flip_a_byte(folder / "checkpoints" / f"step-{step:08d}")
    overrides = ("run.dir=prune", "checkpoint.keep_last=1")
    run = shared_bench.launch("train.steps=3", *overrides, resume=True)
    assert "resumed from prune/checkpoints/step-00000002" in run.out
    assert "step-00000003" in run.checkpoints(), run.shown
    run = shared_bench.launch("train.steps=5", *overrides, resume=True)
    assert "resumed from prune/checkpoints/step-00000003" in run.out, run.shown


# -- resuming what cannot be resumed -------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.seed=5", ("another seed: 1234, now 5", "set run.seed=1234")),
        ("data.files=[text/0.txt, text/1.txt]", ("another data", "put the data")),
        ("data.seq_len=16", ("another data", "data.seq_len")),
        ("model.hidden_size=64", ("another model: hidden_size=32, now hidden_size=64",)),
        ("optimizer.kind=sgd", ("tensors", "another optimizer")),
    ],
)
def test_resume_with_another(six_steps: Run, shared_bench: Bench, override, words) -> None:
    overrides = ("run.dir=six", "train.steps=12", "parallel.dp=1", override)
    run = shared_bench.launch(*overrides, resume=True, code=1)
    run.assert_told("six/checkpoints/step-00000006", *words)


def test_a_refused_resume_changes_nothing(six_steps: Run, shared_bench: Bench) -> None:
    """Above all not config.yaml, with which the printed command would go on."""
    shutil.copytree(six_steps.folder, shared_bench.path / "kept")
    before = snapshot(shared_bench.path / "kept")
    run = shared_bench.launch("run.dir=kept", "run.seed=5", resume=True, code=1)
    after = snapshot(run.folder)
    after.pop("config.next.yaml", None)  # what was refused may stay for a look, beside
    assert {name for name in {*before, *after} if before.get(name) != after.get(name)} == set()


# -- data ----------------------------------------------------------------------------------------


def tokens(folder: Path, name: str, largest: int = 255) -> np.ndarray:
    array = np.random.default_rng(1).integers(0, 256, 20_000).astype(np.uint16)
    array[::97] = largest
    np.save(folder / name, array)
    return array


def token_config(bench: Bench) -> str:
    config = yaml.safe_load((bench.path / "config.yaml").read_text())
    config["data"] = {
        "kind": "tokens",
        "train": "train.npy",
        "validation": "held-out.npy",
        "seq_len": 32,
    }
    (bench.path / "tokens.yaml").write_text(yaml.safe_dump(config))
    return "tokens.yaml"


def test_token_files(bench: Bench) -> None:
    config, one = token_config(bench), ("parallel.dp=1",)
    tokens(bench.path, "held-out.npy")
    run = bench.launch(*one, config=config, code=1)
    run.assert_told("data.train", "there is no file train.npy")

    tokens(bench.path, "train.npy")
    whole = (bench.path / "train.npy").read_bytes()
    (bench.path / "train.npy").write_bytes(whole[:-1000])
    run = bench.launch(*one, config=config, code=1)
    run.assert_told("data.train", "train.npy is no readable .npy")

    tokens(bench.path, "train.npy", largest=300)
    run = bench.launch(config=config, code=1)
    run.assert_told("token 300", "data.train", "model.vocab_size is 256", "tokenizer")

    tokens(bench.path, "train.npy")
    run = bench.launch(*one, config=config, resume=True)  # what was refused left nothing in the way
    assert len(run.losses()) == 8


def test_no_text_at_all(bench: Bench) -> None:
    run = bench.launch("data.files=[nothing/*.txt]", code=1)
    run.assert_told("data.files: no file matches nothing/*.txt", "looked from")


# -- the user's model ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("no_such_module:model", ("model.factory: cannot import no_such_module", "run from")),
        ("parts:no_such", ("parts has no function no_such", "it has:")),
        ("parts:data", ("parts:data cannot be called with", "split")),
    ],
    ids=["module", "function", "arguments"],
)
def test_factory_that_is_wrong(bench: Bench, factory: str, words: tuple[str, ...]) -> None:
    bench.launch(f"model.factory={factory}", code=1).assert_told(*words)


def test_factory_module_with_a_mistake_in_it(bench: Bench) -> None:
    """The user's own traceback is what helps; it is shown, once, down to the user's line."""
    (bench.path / "mine.py").write_text("import torch\n\nWIDTH = 3 / 0\n")
    run = bench.launch("model.factory=mine:model", code=1)
    assert run.err.count("ZeroDivisionError") == 1, run.shown
    assert 'mine.py", line 3' in run.err
    assert "rank" in run.err


def test_nan_stops_and_names_rank_samples_and_step(bench: Bench) -> None:
    run = bench.launch(
        TROUBLE,
        "model.args={nan_at: [1, 5]}",
        "checkpoint.every=2",
        code=1,
    )
    (cached,) = (bench.path / "cache").glob("*-train.npy")
    num_samples = (len(np.load(cached)) - 1) // 32
    due = shuffled(np.arange(4 * 8 + 4, 5 * 8), num_samples, 1234).tolist()  # rank 1's half
    run.assert_told(f"step 5: the loss on rank 1 (samples {due}) is NaN", "on_nonfinite=skip")
    assert len(run.losses()) == 4
    assert run.checkpoints() == ["step-00000002", "step-00000004"]
    run.assert_clean()
    assert len(bench.launch(TROUBLE, "parallel.dp=1", resume=True).losses()) == 8


def test_nan_is_skipped_on_request(bench: Bench) -> None:
    run = bench.launch(TROUBLE, "model.args={nan_at: [1, 3]}", "train.on_nonfinite=skip")
    assert "warning: step 3: the loss on rank 1" in run.out, run.shown
    assert run.out.count("is skipped") == 1
    records = [r for r in run.metrics() if "skipped" in r]
    assert [r["step"] for r in records if r["skipped"]] == [3]
    assert len(records) == 8
    assert records[-1]["loss"] < records[0]["loss"]
    run.assert_clean()


def test_metrics_of_a_skipped_step_are_json(bench: Bench) -> None:
    """Other programs read this file, and NaN is no JSON."""
    one = ("parallel.dp=1", "train.steps=3")
    run = bench.launch(TROUBLE, "model.args={nan_at: [0, 2]}", "train.on_nonfinite=skip", *one)
    text = (run.folder / "metrics.jsonl").read_text()
    assert "NaN" not in text, text


def test_nan_without_end_is_given_up(bench: Bench) -> None:
    args = "model.args={nan_from: 3}"
    run = bench.launch(TROUBLE, args, "train.on_nonfinite=skip", "train.steps=50", code=1)
    run.assert_told("step 12:", "number 10 in a row", "rank 0", "rank 1")
    assert run.out.count("is skipped") == 9
