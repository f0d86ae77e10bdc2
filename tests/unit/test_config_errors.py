"""A gallery of wrong configs. What a user reads is compared letter by letter.

tests/golden/config_errors/NAME.yaml, with the overrides in NAME.args (one a line), must give the
report in NAME.txt. `BIGTRAIN_UPDATE_GOLDEN=1 pytest tests/unit/test_config_errors.py` rewrites the
reports: read the difference as a user would.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from unit_helpers import ROOT, load_text

from bigtrain.config.load import load_config
from bigtrain.errors import ConfigError

GALLERY = ROOT / "tests" / "golden" / "config_errors"


@pytest.mark.parametrize("name", sorted(path.stem for path in GALLERY.glob("*.yaml")))
def test_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report is the golden one."""
    monkeypatch.chdir(GALLERY)  # reports name files as they were given
    golden, extra = Path(f"{name}.txt"), Path(f"{name}.args")
    overrides = extra.read_text().splitlines() if extra.exists() else []
    with pytest.raises(ConfigError) as caught:
        load_config(f"{name}.yaml", overrides)
    report = f"{caught.value}\n"
    if os.environ.get("BIGTRAIN_UPDATE_GOLDEN") == "1":
        golden.write_text(report, encoding="utf-8")
    assert golden.exists(), f"no {golden}: write it with BIGTRAIN_UPDATE_GOLDEN=1"
    assert report == golden.read_text(encoding="utf-8")


def test_gallery_has_no_leftovers() -> None:
    """Every golden report and list of overrides belongs to a config."""
    configs = {path.stem for path in GALLERY.glob("*.yaml")}
    others = {path.stem for path in GALLERY.iterdir() if path.suffix in (".txt", ".args")}
    assert others <= configs


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_unreadable_file(name: str, tmp_path: Path) -> None:
    """No file, or a folder: the path is named, and what is wrong with it."""
    path = str(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot read the config") as caught:
        load_config(path)
    assert path in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00t", b"train:\n  steps: 3\x01\n"])
def test_binary_file(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\nmodel:\n", "\ufefftrain: {}\n"])
def test_empty_is_all_defaults(text: str, tmp_path: Path) -> None:
    """An empty file, one of comments, and sections whose keys are all commented out."""
    assert load_text(tmp_path, text) == load_text(tmp_path, "train: {}")


def test_world_size_is_checked(tmp_path: Path) -> None:
    """The number of ranks that were started, with the arithmetic."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "parallel:\n  dp: 2\n", world_size=3)
    (problem,) = caught.value.problems
    assert problem.what == "the world has 3 ranks, but pp=1 x dp=2 x cp=1 x tp=1 = 2"
    assert problem.where.endswith("config.yaml:2:3")


def test_right_world_size_passes(tmp_path: Path) -> None:
    assert load_text(tmp_path, "parallel: {dp: 2}", world_size=2).parallel.dp == 2
    assert load_text(tmp_path, "parallel: {dp: auto}", world_size=4).parallel.dp == "auto"


def test_problems_are_in_reading_order(tmp_path: Path) -> None:
    """By line, and the command line last, whatever the order of sections in the schema."""
    text = "train:\n  steps: 0\nrun:\n  seed: -1\n"
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text, "data.seq_len=0", "eval.every=-1")
    places = [problem.where.removeprefix(str(tmp_path)) for problem in caught.value.problems]
    assert places == [
        "/config.yaml:2:3",
        "/config.yaml:4:3",
        "command line: data.seq_len=0",
        "command line: eval.every=-1",
    ]


def test_legal_values_are_a_few(tmp_path: Path) -> None:
    """Those near the one that was given, not hundreds."""
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "train: {global_batch: 720720, microbatch: 7919}\nparallel: {dp: 1}")
    assert len(str(caught.value)) < 800


def test_no_code_runs_from_a_config(tmp_path: Path) -> None:
    """Python tags of YAML are never obeyed."""
    mark = tmp_path / "owned"
    text = f'run:\n  dir: !!python/object/apply:os.system ["touch {mark}"]\n'
    with pytest.raises(ConfigError):
        load_text(tmp_path, text)
    assert not mark.exists()
