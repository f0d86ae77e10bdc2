"""The logs of ranks as one."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit_helpers import assert_explained

from bigtrain.errors import LaunchError
from bigtrain.launch.logs import find_logs, merged, show_logs


def test_what_is_the_same_is_shown_once() -> None:
    lines = {0: ["a", "b", "c"], 1: ["a", "b"], 2: ["a", "x", "b"], 3: ["a", "b"]}
    assert list(merged(lines)) == [
        "ranks 0-3 | a",
        "rank 2 | x",
        "ranks 0-3 | b",
        "rank 0 | c",
    ]


def test_the_speed_of_a_rank_is_no_difference() -> None:
    line = "step 1/8  loss 5.5048  lr 9.66e-04  {} tokens/s  {} left"
    lines = {0: [line.format("3,514", "0:04")], 1: [line.format("9", "1:10:04")], 2: ["loss 5.5"]}
    assert list(merged(lines)) == [
        "ranks 0, 1 | step 1/8  loss 5.5048  lr 9.66e-04  3,514 tokens/s  0:04 left",
        "rank 2 | loss 5.5",
    ]


def test_nothing_is_lost_and_order_is_kept() -> None:
    lines = {0: ["a", "b", "a"], 1: ["b", "a", "c"], 5: []}
    shown = list(merged(lines))
    for rank, own in lines.items():
        mine = [line for line in shown if str(rank) in line.partition(" | ")[0]]
        assert [line.partition(" | ")[2] for line in mine] == own


def test_following(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank-0.log").write_text("one\ntw")
    (logs / "rank-10.log").write_bytes(b"one\n\xff\n")
    (logs / "agents.log").write_text("no rank\n")
    shown: list[str] = []
    turns = iter([("rank-0.log", "o\n"), ("rank-2.log", "late\n")])

    def sleep(_: float) -> None:
        name, text = next(turns, ("", ""))
        if not name:
            raise KeyboardInterrupt
        with open(logs / name, "a") as file:
            file.write(text)

    with pytest.raises(KeyboardInterrupt):
        show_logs(str(tmp_path), shown.append, True, sleep)
    assert shown == ["ranks 0, 10 | one", "rank 10 | \ufffd", "rank 0 | two", "rank 2 | late"]


def test_no_logs(tmp_path: Path) -> None:
    with pytest.raises(LaunchError) as caught:
        find_logs(str(tmp_path))
    assert_explained(caught.value, "logs", "run.dir")
