"""bigtrain schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from unit_helpers import assert_explained

from bigtrain import cli
from bigtrain.errors import BigtrainError

GOLDEN = """\
       | 0                   10                  20                  30
rank 0 | F0F1F2F3............B0--F4B1--F5B2--F6B3--F7B4--..B5--..B6--..B7--
rank 1 | ..F0F1F2........B0--F3B1--F4B2--F5B3--F6B4--F7B5--..B6--..B7--....
rank 2 | ....F0F1....B0--F2B1--F3B2--F4B3--F5B4--F6B5--F7B6--..B7--........
rank 3 | ......F0B0--F1B1--F2B2--F3B3--F4B4--F5B5--F6B6--F7B7--............

schedule  stages  step time  bubble  by formula  peak in flight, per rank
1f1b      4       33         27.3 %  27.3 %      4 3 2 1
picture  schedule-1f1b.svg
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where pictures go."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def schedule(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["schedule", *map(str, arguments)])


def printed(*arguments: object) -> str:
    done = schedule(*arguments)
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_golden(folder: Path) -> None:
    assert printed("1f1b", "--ranks", 4, "--microbatches", 8) == GOLDEN
    assert (folder / "schedule-1f1b.svg").read_text().startswith("<?xml")


def test_compare_and_table(folder: Path) -> None:
    text = printed(
        "zb_v",
        "--compare",
        "1f1b,zb_h1, zb_v,interleaved,dualpipe_v",
        "--no-picture",
        "--csv",
        "a.csv",
    )
    table = [line.split() for line in text.split("\n\n")[1].splitlines()[1:6]]
    assert [row[:4] for row in table] == [
        ["zb_v", "8", "25.5", "5.9"],
        ["1f1b", "4", "33", "27.3"],
        ["zb_h1", "4", "27", "11.1"],
        ["interleaved", "8", "28.5", "15.8"],
        ["dualpipe_v", "8", "25.5", "5.9"],
    ]
    assert [path.name for path in folder.iterdir()] == ["a.csv"]
    again = printed("a.csv", "--compare", "zb_v", "--no-picture")
    first, second = again.split("\n\n")[1].splitlines()[1:3]
    assert first.split()[:4] == ["a", "8", "25.5", "5.9"]
    assert second.split()[1:4] == first.split()[1:4]


def test_picture_elsewhere(folder: Path) -> None:
    assert "picture  mine.png" in printed("gpipe", "--ranks", 2, "--picture", "mine.png")
    assert (folder / "mine.png").read_bytes().startswith(b"\x89PNG")


def test_times_are_of_a_whole_rank() -> None:
    """So the work of a step does not depend on how many stages it is cut into."""
    text = printed(
        *("interleaved", "--virtual-stages", 4, "--forward", 0.3, "--backward", 0.5),
        *("--weight", 0.2, "--ranks", 2, "--microbatches", 4, "--no-picture"),
    )
    assert f"{4 * 0.8 + 0.8 / 4:g}" in text
    assert "5.9 %   5.9 %" in text  # 1 / 17


def test_too_much_to_see_is_not_drawn(folder: Path) -> None:
    assert "picture  none: 24,000" in printed("gpipe", "--ranks", 2, "--microbatches", 6000)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["1fb"], ["did you mean 1f1b"]),
        (["1f1b", "--ranks", 0], ["0 ranks"]),
        (["1f1b", "--microbatches", -3], ["-3 microbatches"]),
        (["1f1b", "--microbatches", 1000000], ["too many", "1000000 microbatches"]),
        (["1f1b", "--ranks", 10**30], ["too many"]),
        (["zb_v", "--ranks", 200, "--microbatches", 200], ["actions"]),
        (["interleaved", "--microbatches", 9], ["8 or 12"]),
        (["interleaved", "--virtual-stages", 1], ["at least 2"]),
        (["1f1b", "--virtual-stages", 2], ["interleaved"]),
        (["1f1b", "--forward", -1], ["--forward is -1"]),
        (["1f1b", "--transfer", "nan"], ["--transfer is nan"]),
        (["1f1b", "--backward", "inf"], ["--backward is inf"]),
        (["1f1b", "--weight", 3], ["--weight 3 is more than --backward 2"]),
        (["1f1b", "--compare", "zb_h1,zbv"], ["'zbv'", "did you mean zb_v"]),
        (["1f1b", "--picture", "a.gif"], [".svg or .png"]),
        (["1f1b", "--picture", "no/a.svg"], ["no/a.svg", "No such file"]),
        (["1f1b", "--no-picture", "--picture", "a.svg"], ["exclude each other"]),
        (["1f1b", "--csv", "no/a.csv"], ["no/a.csv", "No such file"]),
        (["mine.csv"], ["mine.csv", "No such file"]),
        (["mine.csv", "--ranks", 2], ["leave out --ranks"]),
    ],
)
def test_bad_input(folder: Path, arguments: list[object], words: list[str]) -> None:
    done = schedule(*arguments)
    assert isinstance(done.exception, BigtrainError), done.output
    assert_explained(done.exception, *words)
    assert list(folder.iterdir()) == []


def test_it_needs_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys; from bigtrain.cli import main; sys.argv[1:] = "
        "['schedule', 'zb_v', '--no-picture']\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "zb_v" in done.stdout
