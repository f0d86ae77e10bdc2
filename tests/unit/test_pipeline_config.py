"""What a config says of a pipeline, and everything that is refused of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit_helpers import load_text

from bigtrain import cli
from bigtrain.config.check import schedule_of, table_of
from bigtrain.config.layout import Layout
from bigtrain.config.load import load_config
from bigtrain.errors import ConfigError, Problem
from bigtrain.pipeline.schedule import SCHEDULES, make_table
from bigtrain.pipeline.table_file import to_csv

# Four stages, eight microbatches of one sample; ten units to cut at.
GOOD = """\
run: {dir: here}
model:
  num_layers: 4
parallel:
  pp: 4
pipeline:
  schedule: 1f1b
train:
  global_batch: 8
  microbatch: 1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which paths of tables are relative to."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(folder: Path, *overrides: str, world_size: int | None = 4) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, GOOD, *overrides, world_size=world_size)
    return caught.value.problems


def the_problem(folder: Path, *overrides: str, world_size: int | None = 4) -> Problem:
    """Return the only problem; it must say why or how to mend it, and where."""
    (problem,) = problems(folder, *overrides, world_size=world_size)
    assert problem.mend
    assert problem.where
    return problem


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_good(folder: Path, schedule: str) -> None:
    virtual = 2 if schedule == "interleaved" else 1
    config = load_text(
        folder,
        GOOD,
        f"pipeline.schedule={schedule}",
        f"pipeline.virtual_stages={virtual}",
        world_size=4,
    )
    table = table_of(config, Layout(pp=4))
    assert (table.name, table.num_ranks, table.num_microbatches) == (schedule, 4, 8)


def test_dp_is_what_the_pipeline_leaves(folder: Path) -> None:
    """8 ranks of pp=4 are two replicas, so each has half of the microbatches."""
    config = load_text(folder, GOOD, "parallel.dp=auto", world_size=8)
    assert table_of(config, Layout(pp=4, dp=2)).num_microbatches == 4


def test_a_table_from_a_file(folder: Path) -> None:
    table = make_table("zb_h1", 4, 8)
    (folder / "mine.csv").write_text(to_csv(table))
    config = load_text(folder, GOOD, "pipeline.schedule=mine.csv", world_size=4)
    found = schedule_of(config)
    assert not isinstance(found, str)
    assert found.rows == table.rows
    assert found.name == "mine"


# -- schedules that cannot be ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1fb1", "1f1b"), ("zbv", "zb_v"), ("GPipe", "gpipe"), ("dualpipe", "dualpipe_v")],
)
def test_unknown_schedule(folder: Path, written: str, meant: str) -> None:
    problem = the_problem(folder, f"pipeline.schedule={written}")
    assert problem.what == f"'{written}' is not a schedule"
    assert problem.mend.startswith(f"did you mean {meant}? legal: gpipe, 1f1b, interleaved")
    assert problem.where == f"command line: pipeline.schedule={written}"


def test_unknown_schedule_is_shown_where_it_is_written(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_text(folder, GOOD.replace("1f1b", "1f2b"), world_size=4)
    (problem,) = caught.value.problems
    assert problem.where == f"{folder}/config.yaml:7:3"


@pytest.mark.parametrize(
    ("schedule", "virtual", "words"),
    [
        (
            "interleaved",
            1,
            ("interleaved cannot have 1 virtual stages", "with one each it is 1f1b"),
        ),
        ("1f1b", 2, ("1f1b cannot have 2 virtual stages", "one stage on every rank")),
        ("gpipe", 3, ("gpipe cannot have 3 virtual stages", "take interleaved")),
        ("zb_h1", 2, ("zb_h1 cannot have 2 virtual stages", "set virtual stages to 1")),
        ("zb_v", 3, ("zb_v cannot have 3 virtual stages", "two stages on every rank")),
        ("dualpipe_v", 4, ("dualpipe_v cannot have 4 virtual stages", "to 2")),
    ],
)
def test_virtual_stages_that_cannot_be(
    folder: Path, schedule: str, virtual: int, words: tuple[str, ...]
) -> None:
    problem = the_problem(
        folder, f"pipeline.schedule={schedule}", f"pipeline.virtual_stages={virtual}"
    )
    for word in words:
        assert word in str(problem)


@pytest.mark.parametrize(
    ("global_batch", "legal"), [(6, "4 or 8"), (9, "8 or 12"), (3, "4"), (13, "12 or 16")]
)
def test_interleaved_takes_multiples(folder: Path, global_batch: int, legal: str) -> None:
    """Of the ranks; the legal numbers are shown, and what takes any."""
    problem = the_problem(
        folder,
        "pipeline.schedule=interleaved",
        "pipeline.virtual_stages=2",
        f"train.global_batch={global_batch}",
    )
    assert str(global_batch) in problem.what
    assert f"give {legal} microbatches" in problem.mend
    assert "gpipe, 1f1b, zb_h1, zb_v, dualpipe_v" in problem.mend


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (None, ("mine.csv", "cannot read the schedule: No such file")),
        ("", ("mine.csv", "the schedule is empty")),
        ("0F0,0B0,hello\n", ("cell 3: 'hello' is not an action",)),
        ("0F0,0B0\n0F1,0B1\n", ("stage 0 is on rank 0 and on rank 1")),
        ("0F0,0B0\n1B0,1F0\n", ("1B0 comes before 1F0",)),
        ("0F0\n1F0,1B0\n", ("0B0", "is missing")),
        ("0F1,0B1\n1F1,1B1\n", ("there is microbatch 1, but no microbatch 0",)),
    ],
    ids=["missing", "empty", "garbage", "stage twice", "backward first", "unfinished", "gap"],
)
def test_tables_that_cannot_run(folder: Path, cells: str | None, words: tuple[str, ...]) -> None:
    if cells is not None:
        (folder / "mine.csv").write_text(cells)
    problem = the_problem(folder, "pipeline.schedule=mine.csv")
    for word in words:
        assert word in str(problem)


def test_the_line_of_a_table_is_shown(folder: Path) -> None:
    (folder / "mine.csv").write_text("0F0,0B0\n1F0,hello\n")
    assert "mine.csv:2" in str(the_problem(folder, "pipeline.schedule=mine.csv"))


def test_a_table_that_is_no_text(folder: Path) -> None:
    (folder / "mine.csv").write_bytes(b"\xff\xfe0F0")
    assert "not UTF-8" in str(the_problem(folder, "pipeline.schedule=mine.csv"))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 6), (2, 6)])
def test_a_table_of_other_numbers(folder: Path, ranks: int, microbatches: int) -> None:
    (folder / "mine.csv").write_text(to_csv(make_table("1f1b", ranks, microbatches)))
    problem = the_problem(folder, "pipeline.schedule=mine.csv")
    assert problem.what == (
        f"mine is a table for {ranks} ranks and {microbatches} microbatches, not for 4 and 8"
    )
    assert "parallel.pp and train.microbatch" in problem.mend


# -- models that cannot be cut so -----------------------------------------------------------------


def test_too_few_layers(folder: Path) -> None:
    overrides = ("pipeline.schedule=interleaved", "pipeline.virtual_stages=2")
    problem = the_problem(folder, *overrides, "model.num_layers=2")
    assert problem.what.startswith("model.num_layers = 2: 6 units (embedding, ")
    assert problem.what.endswith("cannot be cut into 8 stages")
    assert "use at most 6 stages" in problem.mend
    assert "set model.num_layers to at least 3" in problem.mend
    load_text(folder, GOOD, *overrides, "model.num_layers=3", world_size=4)  # as it says


@pytest.mark.parametrize(
    "split",
    [
        "[blocks.1, blocks.2]",  # too few
        "[blocks.0, blocks.1, blocks.2, blocks.3]",  # too many
        "[blocks.1, blocks.2, blocks.4]",  # there is none
        "[blocks.1, blocks.3, blocks.2]",  # not in order
        "[blocks.1, blocks.1, head]",  # twice
        "[embedding, blocks.1, blocks.2]",  # where the first stage begins anyway
    ],
)
def test_wrong_split(folder: Path, split: str) -> None:
    problem = the_problem(folder, f"pipeline.split={split}")
    assert problem.what == f"pipeline.split = {split} does not cut the model into 4 stages"
    assert "give 3 of blocks.0 to blocks.3" in problem.mend
    assert problem.where == f"command line: pipeline.split={split}"


@pytest.mark.parametrize(
    "split", ["[]", "[blocks.0, blocks.2, head]", "[blocks.0.mlp, blocks.1.attention, blocks.3]"]
)
def test_right_split(folder: Path, split: str) -> None:
    load_text(folder, GOOD, f"pipeline.split={split}", world_size=4)


def test_a_factory_model_is_cut_by_the_ranks(folder: Path) -> None:
    """What units it has is not known without torch."""
    text = GOOD.replace("num_layers: 4", "factory: mine:build")
    load_text(folder, text, "pipeline.split=[a, b, c]", world_size=4)


# -- worlds that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "world", "words"),
    [
        (("parallel.dp=auto",), 6, ("pp=4 x cp=1 x tp=1 = 4 does not divide 6", "multiple of 4")),
        (("parallel.dp=2",), 4, ("the world has 4 ranks, but pp=4 x dp=2 x cp=1 x tp=1 = 8",)),
        (("launch.processes=6", "parallel.dp=auto"), None, ("launch.processes = 6 does not fit",)),
    ],
)
def test_pp_that_does_not_divide_the_world(
    folder: Path, overrides: tuple[str, ...], world: int | None, words: tuple[str, ...]
) -> None:
    problem = the_problem(folder, *overrides, world_size=world)
    for word in words:
        assert word in str(problem)


@pytest.mark.parametrize(
    "override",
    [
        "parallel.pp=0",
        "pipeline.virtual_stages=0",
        "pipeline.cost=guessed",
        "pipeline.schedule=",
        "pipeline.split=blocks.1",
        "pipeline.microbatches=8",
    ],
)
def test_values_and_keys_that_are_none(folder: Path, override: str) -> None:
    assert override.partition("=")[0] in str(the_problem(folder, override))


def test_a_wrong_pipeline_is_told_of_at_pp_1_too(folder: Path) -> None:
    """So that a config is not good by chance, until it gets more ranks."""
    problem = the_problem(folder, "parallel.pp=1", "pipeline.schedule=zbv", world_size=1)
    assert "did you mean zb_v" in problem.mend


def test_all_problems_at_once(folder: Path) -> None:
    found = problems(folder, "pipeline.schedule=zbv", "model.num_heads=3", "parallel.cp=2")
    text = "\n".join(map(str, found))
    for word in ("model.num_heads = 3", "parallel.cp = 2"):
        assert word in text


# -- bigtrain check -------------------------------------------------------------------------------


def test_check_prints_what_the_pipeline_amounts_to(folder: Path) -> None:
    (folder / "config.yaml").write_text(GOOD)
    done = CliRunner().invoke(cli.app, ["check", "config.yaml", "parallel.dp=2"])
    assert done.exit_code == 0, done.output
    assert "ranks   8 = pp=4 x dp=2 x cp=1 x tp=1; this machine: 8 ranks here" in done.stdout
    assert "step    8 samples = 2 replica(s) x 4 microbatch(es) x 1" in done.stdout
    assert "1f1b: 4 stages on 4 ranks, 4 microbatches, bubble 43%" in done.stdout
    assert "at most 4 in flight" in done.stdout
    alone = CliRunner().invoke(cli.app, ["check", "config.yaml", "parallel.pp=1", "parallel.dp=1"])
    assert "bubble" not in alone.stdout


def test_check_of_a_pipeline_needs_no_torch(folder: Path) -> None:
    (folder / "config.yaml").write_text(GOOD)
    (folder / "mine.csv").write_text(to_csv(make_table("zb_v", 4, 8)))
    script = (
        "import sys; from bigtrain.cli import main; sys.argv[1:] = "
        "['check', 'config.yaml', 'pipeline.schedule=mine.csv', 'parallel.dp=1']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine: 8 stages on 4 ranks, 8 microbatches" in done.stdout


def test_overrides_go_on_from_a_file(folder: Path) -> None:
    (folder / "base.yaml").write_text(GOOD)
    (folder / "more.yaml").write_text("extends: base.yaml\npipeline:\n  schedule: zb_v\n")
    assert load_config("more.yaml", (), 4).pipeline.schedule == "zb_v"
