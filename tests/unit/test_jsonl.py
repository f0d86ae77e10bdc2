"""Files of one record per step, and how a resume winds them back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bigtrain.observe.jsonl import JsonLines, forget_after, read_lines


def write(path: Path, *steps: int, tail: str = "") -> Path:
    lines = [json.dumps({"step": step, "loss": step / 10}) + "\n" for step in steps]
    path.write_text("".join(lines) + tail)
    return path


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in read_lines(path)]


def test_records_come_back(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "a" / "m.jsonl")
    records = [{"step": 1, "loss": 0.1, "text": "é\n\u2028"}, {"step": 2, "ids": [3, 4]}]
    for record in records:
        lines.add(record)
    lines.close()
    assert read_lines(tmp_path / "a" / "m.jsonl") == records


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_files_are_standard_json(value: float, tmp_path: Path) -> None:
    """Which has no NaN and no infinity."""
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.add({"step": 1, "loss": value})
    lines.close()
    assert (tmp_path / "m.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_each_record_is_handed_over_at_once(tmp_path: Path) -> None:
    """A kill after `add` loses nothing."""
    lines = JsonLines(tmp_path / "m.jsonl")
    lines.add({"step": 1})
    assert steps_in(tmp_path / "m.jsonl") == [1]
    lines.close()


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step": 4', "{", "\0\0\0", "null\n", "3\n"])
def test_cut_last_line_is_left_out(tail: str, tmp_path: Path) -> None:
    assert steps_in(write(tmp_path / "m.jsonl", 1, 2, 3, tail=tail)) == [1, 2, 3]


def test_forget_later_steps(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", 1, 2, 2, 3, 4)
    forget_after(path, 2)
    assert steps_in(path) == [1, 2, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_forget_mends_a_cut_last_line(tmp_path: Path) -> None:
    """What is added next stands on a line of its own."""
    path = write(tmp_path / "m.jsonl", 1, 2, tail='{"step": 3, "lo')
    forget_after(path, 2)
    lines = JsonLines(path)
    lines.add({"step": 3})
    lines.close()
    assert steps_in(path) == [1, 2, 3]
    assert len(path.read_text().splitlines()) == 3


def test_forget_everything(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", 1, 2)
    forget_after(path, 0)
    assert path.read_text() == ""


def test_forget_what_is_not_there(tmp_path: Path) -> None:
    forget_after(tmp_path / "m.jsonl", 3)
    assert list(tmp_path.iterdir()) == []
