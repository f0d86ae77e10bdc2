"""bigtrain ckpt list | inspect | verify."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from unit_checkpoints import save_alone
from unit_helpers import assert_explained

from bigtrain import cli
from bigtrain.checkpoint.report import find
from bigtrain.errors import CheckpointError

FILE = "rank-00000.safetensors"


def ckpt(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["ckpt", *map(str, arguments)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with three checkpoints, the middle one damaged."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 2, 10):
        save_alone(folder, step)
    (folder / "step-00000002" / FILE).write_bytes(b"")
    return folder.parent


def test_find_takes_a_run_its_checkpoints_or_one(run: Path) -> None:
    folder = run / "checkpoints"
    three = [folder / f"step-{step:08d}" for step in (1, 2, 10)]
    assert find(str(run)) == find(str(folder)) == three
    assert find(str(three[1])) == [three[1]]


def test_list(run: Path) -> None:
    """One line each, oldest first."""
    result = ckpt("list", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split("/")[-1].split()[0] for line in lines] == [
        "step-00000001",
        "step-00000002",
        "step-00000010",
    ]
    assert "step 10, 160 samples, 7 tensors, 0.0 MiB in 1 file(s)" in lines[2]


def test_list_goes_on_after_a_damaged_manifest(run: Path) -> None:
    (run / "checkpoints" / "step-00000001" / "manifest.json").write_text("{")
    lines = ckpt("list", run).stdout.splitlines()
    assert len(lines) == 3
    assert "damaged" in lines[0]


def test_inspect_shows_the_newest(run: Path) -> None:
    out = ckpt("inspect", run).stdout
    assert "step 10, 160 samples consumed, 10 updates" in out
    assert "pp=1 x dp=1 x cp=1 x tp=1" in out
    assert FILE in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "  " in line}
    assert rows["matrix"] == ["float32", "6", "x", "4"]
    assert rows["scalar"] == ["float32", "scalar"]
    assert rows["half"] == ["bfloat16", "5"]


def test_inspect_one(run: Path) -> None:
    assert "step 1, " in ckpt("inspect", run / "checkpoints" / "step-00000001").stdout


def test_verify_names_the_damage(run: Path) -> None:
    result = ckpt("verify", run)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["good", "DAMAGED:", "good"]
    assert f"{FILE} has 0 bytes" in lines[1]


def test_verify_good_ones(run: Path) -> None:
    result = ckpt("verify", run / "checkpoints" / "step-00000010")
    assert result.exit_code == 0
    assert result.stdout.endswith("good\n")


@pytest.mark.parametrize("verb", ["list", "inspect", "verify"])
@pytest.mark.parametrize("name", ["empty", "missing", "file"])
def test_folder_without_checkpoints(verb: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    result = ckpt(verb, tmp_path / name)
    assert result.exit_code != 0
    assert isinstance(result.exception, CheckpointError)
    assert_explained(result.exception, "there is no checkpoint in", str(tmp_path / name))


def test_errors_have_no_traceback(tmp_path: Path) -> None:
    """The command itself prints them, on standard error."""
    script = "from bigtrain.cli import main; main()"
    command = [sys.executable, "-c", script, "ckpt", "list", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no checkpoint in ")
    assert "Traceback" not in done.stderr
