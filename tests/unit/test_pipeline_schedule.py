"""Schedules as tables: every generator in every size, wires, files."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from unit_helpers import assert_explained
from unit_pipeline import combinations, runs

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.schedule import (
    SCHEDULES,
    Action,
    forward_only,
    make_table,
    placement_of,
    with_communication,
)
from bigtrain.pipeline.table_file import MAX_BYTES, read_csv, to_csv
from bigtrain.pipeline.validate import validate


def text(table: object) -> list[str]:
    return to_csv(table).splitlines()  # type: ignore[arg-type]


def test_known_tables() -> None:
    assert text(make_table("1f1b", 1, 2)) == ["0F0,0B0,0F1,0B1"]
    assert text(make_table("gpipe", 2, 2)) == ["0F0,0F1,0B0,0B1", "1F0,1F1,1B0,1B1"]
    assert text(make_table("1f1b", 2, 3)) == ["0F0,0F1,0B0,0F2,0B1,0B2", "1F0,1B0,1F1,1B1,1F2,1B2"]
    assert text(make_table("interleaved", 1, 1, 2)) == ["0F0,1F0,1B0,0B0"]
    assert text(make_table("zb_h1", 2, 2)) == ["0F0,0F1,0I0,0W0,0I1,0W1", "1F0,1I0,1F1,1I1,1W0,1W1"]
    assert text(make_table("zb_v", 1, 1)) == ["0F0,1F0,1I0,1W0,0I0,0W0"]


def test_wires_of_a_small_table() -> None:
    rows = with_communication(make_table("1f1b", 2, 2)).rows
    assert " ".join(map(str, rows[0])) == ("0F0 0SEND_F0 0RECV_B0 0F1 0SEND_F1 0RECV_B1 0B0 0B1")
    assert " ".join(map(str, rows[1])) == ("1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1")
    assert with_communication(with_communication(make_table("zb_v", 3, 4))).rows == (
        with_communication(make_table("zb_v", 3, 4)).rows
    )


def test_every_combination_is_proven_and_holds_what_is_known() -> None:
    for table in combinations(sizes=(*range(1, 14), 16, 18, 24)):
        report = validate(table)
        peaks, m = report.peak_in_flight, table.num_microbatches
        p, v = table.num_ranks, table.num_stages // table.num_ranks
        ranks = range(p)
        match table.name:
            case "gpipe":
                assert peaks == (m,) * p
            case "1f1b":
                assert peaks == tuple(min(m, p - rank) for rank in ranks)
            case "interleaved":
                ahead = [(v - 1) * p + 2 * (p - 1 - rank) + 1 for rank in ranks]
                assert peaks == tuple(min(v * m, number) for number in ahead)
            case "zb_h1":
                assert peaks == tuple(min(m, p) for _ in ranks)
            case "zb_v":
                assert max(peaks) <= min(2 * p, 2 * m)
                assert m < 2 * p or peaks == (2 * p,) * p
            case "dualpipe_v":
                assert max(peaks) <= min(2 * p + 1, 2 * m)
                assert m < 2 * p or peaks == (2 * p + 1,) * p


def test_an_independent_executor_runs_every_table_with_wires() -> None:
    random = Random(0)
    for table in combinations(max_ranks=6, sizes=range(1, 14)):
        wired = with_communication(table)
        assert runs(wired, blocking=False, random=random), table.name
        assert runs(wired, blocking=True, random=random), table.name


def test_messages_are_awaited_one_action_ahead() -> None:
    """So that they travel behind that action; never later than right before their use."""
    for name in ("gpipe", "1f1b", "interleaved", "zb_h1"):
        wired = with_communication(make_table(name, 4, 8, 2 if name == "interleaved" else 1))
        for row in wired.rows:
            compute = [action for action in row if action.is_compute]
            for place, action in enumerate(row):
                if action.kind not in ("RECV_F", "RECV_B"):
                    continue
                before = sum(other.is_compute for other in row[:place])
                kinds = "F" if action.kind == "RECV_F" else "BI"
                (use,) = (
                    index
                    for index, other in enumerate(compute)
                    if (other.stage, other.microbatch) == (action.stage, action.microbatch)
                    and other.kind in kinds
                )
                assert before == max(0, use - 1)


def test_forward_only_takes_any_placement_and_overlaps() -> None:
    for name in SCHEDULES:
        for ranks in range(1, 7):
            stages = 2 if name == "interleaved" else 1
            placement = placement_of(name, ranks, stages)
            for microbatches in range(1, 12):
                table = forward_only(placement, microbatches)
                report = validate(table)
                assert report.forward_only
                assert report.peak_in_flight == (0,) * ranks
                assert runs(report.table, blocking=True)
    assert validate(forward_only((1, 0, 0, 1, 2), 3)).forward_only
    assert text(forward_only((0, 1), 3)) == ["0F0,0F1,0F2", "1F0,1F1,1F2"]
    with pytest.raises(BigtrainError, match="without a stage"):
        forward_only((0, 2), 3)
    with pytest.raises(BigtrainError, match="0 microbatches"):
        forward_only((0, 1), 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1fb", 4, 8), ["did you mean 1f1b", "dualpipe_v"]),
        (("ZB_V1", 4, 8), ["did you mean zb_v"]),
        (("?", 4, 8), ["legal: gpipe"]),
        (("gpipe", 0, 8), ["0 ranks"]),
        (("gpipe", -1, 8), ["-1 ranks"]),
        (("gpipe", 4, 0), ["0 microbatches"]),
        (("gpipe", 4, 2.5), ["2.5 microbatches"]),
        (("gpipe", True, 1), ["True ranks"]),
        (("gpipe", 4, 10**9), ["actions"]),
        (("gpipe", 10**9, 1), ["stages in all"]),
        (("gpipe", 4, 8, 2), ["2 virtual stages", "interleaved"]),
        (("zb_h1", 4, 8, 3), ["3 virtual stages"]),
        (("zb_v", 4, 8, 3), ["set virtual stages to 2"]),
        (("interleaved", 4, 8), ["1 virtual stages", "at least 2"]),
        (("interleaved", 4, 8, 0), ["0 virtual stages"]),
        (("interleaved", 4, 10, 2), ["8 or 12", "zb_v"]),
        (("interleaved", 4, 3, 2), ["give 4 microbatches"]),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: tuple, words: list[str]) -> None:
    with pytest.raises(BigtrainError) as caught:
        make_table(*arguments)
    assert_explained(caught.value, *words)


def test_v_schedules_take_both_ways_to_say_two() -> None:
    assert make_table("zb_v", 2, 3, 2) == make_table("zb_v", 2, 3)


def test_actions_are_read_back() -> None:
    for kind in ("F", "B", "I", "W", "SEND_F", "RECV_F", "SEND_B", "RECV_B"):
        action = Action(kind, 12, 345)
        assert Action.parse(str(action)) == action
    for wrong in ("", "F0", "0F", "0X0", "0f0", "-1F0", "0F0 ", "0SENDF0", "\u0660F0", "9" * 5000):
        with pytest.raises(BigtrainError, match="is not an action"):
            Action.parse(wrong)


def test_tables_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    for table in combinations(max_ranks=4, sizes=range(1, 6)):
        for kind in (table, with_communication(table)):
            path.write_text(to_csv(kind))
            read = read_csv(path)
            assert (read.placement, read.num_microbatches) == (
                table.placement,
                table.num_microbatches,
            )
            assert read.rows == kind.rows
            assert read.name == "mine"


def test_empty_cells_and_endings_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(b"\xef\xbb\xbf 0F0 ,,0B0,\r\n,1F0,1B0\r\n\r\n")
    assert text(read_csv(path)) == ["0F0,0B0", "1F0,1B0"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["empty"]),
        (b" ,,\n,\n", ["empty"]),
        (b"\xff\xfe\x00", ["not text"]),
        (b"0F0,\x000B0", ["not text"]),
        (b"0F0,0B0\n1F0,1X0", ["mine.csv:2", "cell 2", ">1X0<"]),
        (b"0F0,0B0\n1F0;1B0", ["mine.csv:2", "cell 1"]),
        (b"0F0,0B0," + b"x" * 500, ["cell 3", "xxx..."]),
        (b"0F0,0B0\n\n1F0,1B0", ["mine.csv:2", "rank 1 has nothing to do"]),
        (b"0F0,0B0,0F1\n0B1", ["mine.csv:2", "stage 0 is on rank 0 and on rank 1", ">0B1<"]),
        (b"0F0,0B0\n2F0,2B0", ["mine.csv:2", "no stage 1", ">2F0<"]),
        (b"0F0,0B0,0F2,0B2", ["mine.csv:1", "no microbatch 1", ">0F2<"]),
        (b"0F0,0B0\n1F0", ["mine.csv:2", "1B0 (or 1I0 and 1W0) is missing"]),
        (b"0F0,0B0\n1B0,1F0", ["mine.csv:2", ">1B0<", "put 1F0 before 1B0"]),
        (b"9999999F9999999", ["no stage 0"]),
        (b"," * (MAX_BYTES + 1), ["larger than 20 MB"]),
    ],
)
def test_malformed_files(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(BigtrainError) as caught:
        read_csv(path)
    assert_explained(caught.value, "mine.csv", *words)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("path", ["missing.csv", ".", "a\0b.csv"])
def test_files_that_cannot_be_read(path: str) -> None:
    with pytest.raises(BigtrainError) as caught:
        read_csv(path)
    assert_explained(caught.value, "cannot read the schedule")
