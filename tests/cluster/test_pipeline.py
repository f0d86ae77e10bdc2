"""Layers dealt out to ranks one after the other, as a user launches them: nothing changes."""

import re
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import torch
from runs import BIN, GONE, PATIENCE, Bench, Run, wait_for
from safetensors.torch import load_file

from bigtrain.checkpoint.manifest import Manifest, read_manifest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]

# Relative. A rank adds the gradients of microbatches in the order of one process, so that only sums
# over ranks (the loss, the gradient norm, a tied embedding) round otherwise: losses were seen to
# differ by 1.2e-7, which is one bit of fp32.
TOLERANCE = 2e-6
STEPS = 6
GPT = ("model.num_layers=4", "train.microbatch=1")  # 8 microbatches
WITH_ALL = (f"train.steps={STEPS}", "eval.every=3", "eval.generate=30", "log.sample_ids=true")
CHECK = "parallel.check_replicas_every=2"

# A model of a user's, who knows nothing of pipelines, with blocks that misbehave on request.
MINE = """
    import os
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch._subclasses import FakeTensor

    class Trouble(nn.Module):
        # A unit of the pipeline, so that only the stage that has it runs this code.

        def __init__(self, what: str, at: int) -> None:
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(32))
            self.what, self.at, self.num_forwards = what, at, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training and not isinstance(x, FakeTensor):  # those only look at costs
                self.num_forwards += 1
            y = x + self.zero
            if self.num_forwards != self.at:
                return y
            if self.what == "raise":
                raise ValueError("this unit has had enough")
            if self.what == "raise backward":
                y.register_hook(refuse)
            if self.what == "nan":
                y = y * float("nan")
            if self.what == "nan gradient":
                y = y + (self.zero - self.zero.detach()).sqrt()  # of infinite slope
            return y

    def refuse(grad: torch.Tensor) -> None:
        raise ValueError("this unit takes no gradient")

    class Block(nn.Module):
        def __init__(self, what: str, at: int) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(32), nn.Linear(32, 32)
            self.trouble = Trouble(what, at)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.trouble(self.linear(self.norm(x))))

    class Mine(nn.Module):
        def __init__(self, what: str, at: int, wrong_at: int) -> None:
            super().__init__()
            self.table = nn.Embedding(256, 32)
            self.blocks = nn.Sequential(*(Block(what, at if i == 2 else -1) for i in range(4)))
            self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 256, bias=False)
            self.head.weight = self.table.weight
            nn.init.normal_(self.table.weight, std=0.1)
            self.wrong_at, self.num_forwards = wrong_at, 0

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            self.num_forwards += 1
            if self.num_forwards == self.wrong_at and os.environ["RANK"] == "1":
                with torch.no_grad():  # as faulty hardware would
                    self.head.weight[7, 3] += 1e-6
            x = self.head(self.norm(self.blocks(self.table(tokens))))
            return F.cross_entropy(x.flatten(0, 1), targets.flatten())

    def build(what: str = "", at: int = -1, wrong_at: int = -1) -> nn.Module:
        return Mine(what, at, wrong_at)
"""
FACTORY = ("model.factory=mine:build", "train.microbatch=2")  # 4 microbatches


def degrees(pp: int = 1, dp: int = 1, tp: int = 1) -> tuple[str, ...]:
    return (f"parallel.pp={pp}", f"parallel.dp={dp}", f"parallel.tp={tp}")


def by(schedule: str, virtual_stages: int = 1) -> tuple[str, ...]:
    return (f"pipeline.schedule={schedule}", f"pipeline.virtual_stages={virtual_stages}")


def sample_of(run: Run) -> str:
    """Return what the screen shows of the text that the trained model made."""
    return run.out[run.out.index("a sample of the model:") : run.out.index("\ncheckpoint ")]


def assert_same_curve(run: Run, alone: Run) -> None:
    assert run.losses() == pytest.approx(alone.losses(), rel=TOLERANCE)
    held_out = alone.validation_losses()
    assert run.validation_losses() == pytest.approx(held_out, rel=TOLERANCE)
    assert run.sample_ids() == alone.sample_ids()  # one rank of each replica tells


@pytest.fixture(scope="module")
def alone(shared_bench: Bench) -> Run:
    """The run that all schedules must repeat, in one process."""
    run = shared_bench.launch(*GPT, *WITH_ALL, *degrees(), "run.dir=alone")
    assert len(run.losses()) == STEPS
    assert run.losses()[-1] < run.losses()[0] - 0.2  # it learns: to be equal means something
    assert list(run.validation_losses()) == [3, 6]
    assert len(sample_of(run)) > 40
    return run


# -- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "virtual_stages", "num_stages"),
    [
        ("gpipe", 1, 4),
        ("1f1b", 1, 4),
        ("interleaved", 2, 8),
        ("zb_h1", 1, 4),
        ("zb_v", 1, 8),
        ("dualpipe_v", 2, 8),
        ("mine.csv", 1, 4),
    ],
)
def test_each_schedule_gives_the_curve_of_one_process(
    alone: Run, shared_bench: Bench, schedule: str, virtual_stages: int, num_stages: int
) -> None:
    """Losses, held-out losses, sample ids and the text that is generated at the end."""
    name = schedule.removesuffix(".csv")
    if schedule.endswith(".csv"):
        make = ["schedule", "zb_h1", "--ranks", "4", "--microbatches", "8", "--csv", schedule]
        subprocess.run(
            [BIN / "bigtrain", *make, "--no-picture"],
            cwd=shared_bench.path,
            check=True,
            timeout=PATIENCE,
        )
    run = shared_bench.launch(
        *GPT, *WITH_ALL, *degrees(pp=4), *by(schedule, virtual_stages), CHECK, f"run.dir=of-{name}"
    )
    assert_same_curve(run, alone)
    assert sample_of(run) == sample_of(alone)
    assert f"pipeline  |  {name}: {num_stages} stages on 4 ranks, 8 microbatches" in run.out
    full_size = re.findall(r"([\d,]+) parameters", alone.out)
    assert re.findall(r"([\d,]+) parameters", run.out) == full_size  # not those of one rank
    assert [p.name for p in (run.folder / "samples").iterdir()] == ["rank-0.jsonl"]
    run.assert_clean()


def test_one_microbatch_as_by_default(bench: Bench) -> None:
    """A config that says nothing of microbatches has one: nothing overlaps, but it must run."""
    runs = [
        bench.launch(
            "train.steps=2",
            *degrees(pp=pp),
            f"run.dir=pp-{pp}",
        )
        for pp in (1, 2)
    ]
    assert_same_curve(runs[1], runs[0])


def test_stages_of_split_layers(bench: Bench) -> None:
    """Pipelines of tensor-parallel ranks, which have parts of sequences between the layers."""
    common = (
        *("model.kind=llama", "model.num_layers=3", "model.mlp_size=77", "model.vocab_size=257"),
        *("train.steps=4", "train.microbatch=1", "eval.generate=30", "log.sample_ids=true"),
    )
    whole = bench.launch(*common, *degrees(), "run.dir=whole")
    split = bench.launch(
        *common, *degrees(pp=2, tp=2), *by("zb_v"), "parallel.sequence_parallel=true", CHECK
    )
    assert_same_curve(split, whole)
    assert sample_of(split) == sample_of(whole)
    assert [p.name for p in (split.folder / "samples").iterdir()] == ["rank-0.jsonl"]
    split.assert_clean()


def test_dropout_draws_as_in_one_process(bench: Bench) -> None:
    """Also where a block is cut in the middle."""
    common = (*GPT, "model.dropout=0.1", "train.steps=3", "log.sample_ids=true")
    whole = bench.launch(*common, *degrees(), "run.dir=whole")
    split = bench.launch(*common, *degrees(pp=2), "pipeline.split=[blocks.1.mlp]")
    assert_same_curve(split, whole)


# -- checkpoints ----------------------------------------------------------------------------------


def last_checkpoint(run: Run) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Return the manifest of the newest checkpoint, and all its blocks put together."""
    folder = run.folder / "checkpoints" / run.checkpoints()[-1]
    manifest = read_manifest(folder)  # blocks tile each tensor, and do not overlap
    files = {name: load_file(folder / name) for name in manifest.files}
    tensors = {}
    for name, entry in manifest.tensors.items():
        full = torch.full(entry.shape, torch.nan)
        for block in entry.blocks:
            at = tuple(slice(o, o + s) for o, s in zip(block.offsets, block.sizes, strict=True))
            full[at] = files[block.file][block.key].float()
        tensors[name] = full
    return manifest, tensors


def assert_same_state(run: Run, calm: Run) -> None:
    """What `run` saved last is what one process saved, the optimizer's state and cursor as well."""
    (manifest, tensors), (wanted_manifest, wanted) = last_checkpoint(run), last_checkpoint(calm)
    step = wanted_manifest.state.step
    assert manifest.state.cursor == wanted_manifest.state.cursor == 8 * step
    assert manifest.state.num_updates == wanted_manifest.state.num_updates == step
    assert tensors.keys() == wanted.keys()
    tied = [name for name in tensors if name.endswith(("token_embedding.weight", "head.weight"))]
    assert sorted(tied) == [  # two stages have it, one name is saved, with one moment of each kind
        "model.token_embedding.weight",
        "optimizer.exp_avg.token_embedding.weight",
        "optimizer.exp_avg_sq.token_embedding.weight",
    ]
    for name, tensor in tensors.items():
        assert tensor.shape == wanted[name].shape, name
        gap = (tensor - wanted[name]).norm() / wanted[name].norm()
        assert gap < 1e-3, f"{name} is off by {gap:.1e}"  # Adam magnifies, see test_layouts.py


CONSTANT = (*GPT, "schedule.kind=constant", "log.sample_ids=true", "eval.samples=0")


def test_kill_9_then_other_degrees_and_back(bench: Bench) -> None:
    """pp=4, all killed; then pp=2 x dp=2, one process, and pp=4 again."""
    run = bench.start(*CONSTANT, *degrees(pp=4), "train.steps=100000", "checkpoint.every=3")
    run.wait_step(4)
    run.kill_all()
    run.verify()
    written = read_manifest(run.folder / "checkpoints" / run.checkpoints()[-1])
    assert len(written.files) == 4  # each stage wrote its own
    step = written.state.step
    for where in (
        (*degrees(pp=2, dp=2), *by("zb_v")),
        degrees(),
        (*degrees(pp=4), *by("interleaved", 2)),
    ):
        before, step = step, step + 2
        run = bench.launch(*CONSTANT, *where, f"train.steps={step}", CHECK, resume=True)
        assert f"resumed from run/checkpoints/step-{before:08d}" in run.out, run.shown
        assert len(run.losses()) == step
        run.assert_clean()
    files = sorted(p.name for p in (run.folder / "samples").iterdir())
    assert files == ["rank-0.jsonl", "rank-1.jsonl"]  # one for each replica, on the first stage
    calm = bench.launch(*CONSTANT, *degrees(), f"train.steps={step}", "run.dir=calm")
    assert_same_curve(run, calm)
    assert_same_state(run, calm)


def test_tied_and_split_then_one_process_and_back(bench: Bench) -> None:
    """pp=2 x tp=2, where a tied embedding is on all four ranks, each part of it on two."""
    for step, where in ((2, degrees(pp=2, tp=2)), (4, degrees()), (6, degrees(pp=2, tp=2))):
        run = bench.launch(*CONSTANT, *where, f"train.steps={step}", CHECK, resume=step > 2)
        run.assert_clean()
    calm = bench.launch(*CONSTANT, *degrees(), "train.steps=6", "run.dir=calm")
    assert_same_curve(run, calm)
    assert_same_state(run, calm)


def test_ctrl_c_stops_in_order(bench: Bench) -> None:
    common = (*FACTORY, *degrees(pp=4))
    (bench.path / "mine.py").write_text(textwrap.dedent(MINE))
    run = bench.start(*common, "train.steps=100000")
    run.wait_step(3)
    asked = time.monotonic()
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.shown
    assert time.monotonic() - asked < GONE
    said = re.search(r"error: stopped after step (\d+) of 100000; the checkpoint is in", run.err)
    assert said, run.shown
    assert len(run.losses()) == int(said[1])
    assert run.checkpoints() == [f"step-{int(said[1]):08d}"]
    run.assert_told("go on with: bigtrain launch run/config.yaml --resume")
    run.assert_clean()


# -- stages that fail -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mine(shared_bench: Bench) -> Bench:
    """A bench whose folder has the user's module in it."""
    (shared_bench.path / "mine.py").write_text(textwrap.dedent(MINE))
    return shared_bench


def trouble(what: str, forward: int) -> str:
    """Return what makes the third block do `what` in its forward of this number."""
    return f"model.args={{what: {what}, at: {forward}}}"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raise", "ValueError: this unit has had enough"),
        ("raise backward", "ValueError: this unit takes no gradient"),
    ],
)
def test_a_stage_that_raises_is_what_is_shown(mine: Bench, what: str, words: str) -> None:
    """In step 2, in the middle of the pipeline, while others wait for its messages."""
    name = what.replace(" ", "-")
    run = mine.start(*FACTORY, *degrees(pp=4), trouble(what, 6), f"run.dir={name}")
    wait_for("step 1", lambda: run.metrics() or run.ended())
    failed = time.monotonic()
    assert run.wait() == 1, run.shown
    run.wait_gone()
    assert time.monotonic() - failed < GONE
    message = run.err[run.err.index("error:") :]
    assert re.match(r"error: rank [12] failed: Traceback", message), run.shown
    assert words in message, run.shown
    assert "mine.py" in message  # the user's own line
    for wrong in ("went away", "in time", "timeout", "imed out"):
        assert wrong not in run.err + run.out, run.shown
    assert len(run.losses()) == 1


def test_nan_on_one_stage_is_skipped_as_in_one_process(mine: Bench) -> None:
    common = (*FACTORY, trouble("nan", 6), "train.on_nonfinite=skip", "log.sample_ids=true")
    whole = mine.launch(*common, *degrees(), "run.dir=nan-whole")
    split = mine.launch(*common, *degrees(pp=4), CHECK, "run.dir=nan-split")
    (without_loss,) = (i for i, loss in enumerate(whole.losses()) if loss is None)
    assert without_loss == 1
    assert [loss for loss in split.losses() if loss] == pytest.approx(
        [loss for loss in whole.losses() if loss], rel=TOLERANCE
    )
    assert split.losses()[1] is None
    assert split.sample_ids() == whole.sample_ids()
    warnings = [re.findall(r"warning: (.*)", run.out) for run in (whole, split)]
    assert len(warnings[0]) == 1
    # The loss is where the last stage is.
    assert warnings[1] == [w.replace("rank 0", "rank 3") for w in warnings[0]]
    split.assert_clean()


def test_nan_gradient_of_one_stage_stops_all(mine: Bench) -> None:
    run = mine.launch(
        *FACTORY, *degrees(pp=2), trouble("nan gradient", 6), "run.dir=nan-gradient", code=1
    )
    run.assert_told(
        "step 2: the gradient of blocks.2.trouble.zero is NaN or infinite", "on_nonfinite=skip"
    )
    assert len(run.losses()) == 1
    run.assert_clean()


def test_tied_parameters_that_went_apart_are_found(mine: Bench) -> None:
    """Of two stages: their gradients are summed, so that they stay equal unless they break."""
    run = mine.launch(
        *FACTORY, *degrees(pp=2), CHECK, "model.args={wrong_at: 20}", "run.dir=wrong", code=1
    )
    run.assert_told("replicas are not equal: model.table.weight on rank 1 and rank 0")
    assert run.losses()
    run.assert_clean()


# -- the digits of examples/digits.py --------------------------------------------------------------


def test_own_cnn_by_equal_costs_and_by_split_points(bench: Bench) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is an extra: bigtrain[examples]")
    shutil.copytree(ROOT / "examples", bench.path / "examples")
    shutil.copytree(ROOT / "configs", bench.path / "configs")
    common = ("train.steps=24", "train.microbatch=16", "eval.every=6", "log.sample_ids=true")
    runs = {
        name: bench.launch(*common, *more, f"run.dir={name}", config=config)
        for name, config, more in (
            ("alone", "configs/digits_cnn.yaml", degrees()),
            ("balanced", "configs/digits_pp.yaml", ()),
            ("split", "configs/digits_pp.yaml", ('pipeline.split=["3"]',)),
        )
    }
    assert runs["alone"].losses()[-1] < runs["alone"].losses()[0] - 0.2
    for name in ("balanced", "split"):
        assert_same_curve(runs[name], runs["alone"])
        assert "2 stages on 2 ranks, 4 microbatches" in runs[name].out, runs[name].shown
        runs[name].assert_clean()
