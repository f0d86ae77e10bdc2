"""The clock: closed forms exactly, memory curves, text and pictures."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from unit_helpers import assert_explained

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.closed_form import bubble_share, bubble_time
from bigtrain.pipeline.draw import draw, table_text
from bigtrain.pipeline.schedule import SCHEDULES, forward_only, make_table
from bigtrain.pipeline.simulate import Costs, simulate
from bigtrain.pipeline.validate import validate

THIRD = Fraction(1, 3)
TIMES = [  # F, B, W
    (1, 2, 1),
    (THIRD, 2, 1),
    (2, 3, 1),
    (Fraction(5, 7), Fraction(9, 4), Fraction(8, 9)),
    (1, 3, 2),
    (1, 7, 3),
    (5, 6, 1),
]
SIZES = [(p, m) for p in range(1, 9) for m in (1, 2, 3, 5, 8, 12, 16, 17, 24)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_bubble_of_plain_schedules(name: str) -> None:
    for p, m in SIZES:
        for forward, backward, weight in TIMES:
            timeline = simulate(make_table(name, p, m), Costs(forward, backward, weight))
            assert timeline.bubble == Fraction(p - 1, m + p - 1)
            assert set(timeline.bubbles) == {timeline.bubble}


def test_bubble_of_interleaved() -> None:
    for p, m in SIZES:
        for v in (2, 3, 4):
            if m % p == 0:
                table = make_table("interleaved", p, m, v)
                for forward, backward, weight in TIMES:
                    timeline = simulate(table, Costs(forward, backward, weight))
                    assert timeline.bubble == Fraction(p - 1, v * m + p - 1)


def test_bubble_of_zb_h1() -> None:
    """The paper's (p - 1)(F + I - W), as long as W is no more than F and I; else what is left."""
    for p, m in SIZES:
        if m < p:
            continue
        for forward, backward, weight in TIMES:
            timeline = simulate(make_table("zb_h1", p, m), Costs(forward, backward, weight))
            inner = backward - weight
            paper = (p - 1) * (forward + inner - weight)
            idle = (p - 1) * max(forward, inner, forward + inner - weight)
            assert {timeline.step_time - busy for busy in timeline.busy} == {idle}
            assert idle == paper or weight > min(forward, inner)


@pytest.mark.parametrize("time", [1, THIRD])
def test_zb_v_never_idles_once_started(time: Fraction) -> None:
    for p in range(1, 11):
        for m in (2 * p, 2 * p + 1, 3 * p + 2):
            timeline = simulate(make_table("zb_v", p, m), Costs(time, 2 * time, time))
            for rank, (row, busy) in enumerate(zip(timeline.spans, timeline.busy, strict=True)):
                assert row[0].start == rank * time
                assert row[-1].stop - row[0].start == busy
            assert timeline.step_time == (6 * m + p - 1) * time


def test_bubble_of_dualpipe_v() -> None:
    """For F = I = W the step is as short as that of zb_v; within it, rank r waits p - 1 - r."""
    for p in range(1, 11):
        for m in (2 * p, 2 * p + 1, 3 * p + 2):
            timeline = simulate(make_table("dualpipe_v", p, m), Costs())
            for rank, (row, busy) in enumerate(zip(timeline.spans, timeline.busy, strict=True)):
                assert row[-1].stop - row[0].start - busy == p - 1 - rank
            assert timeline.step_time == 6 * m + p - 1


def test_closed_forms_agree_with_the_clock() -> None:
    known = 0
    for name in SCHEDULES:
        for p, m in SIZES:
            v = 2 if name == "interleaved" else 1
            if name == "interleaved" and m % p:
                continue
            for forward, backward, weight in TIMES[:4]:
                costs = Costs(forward, backward, weight)
                share = bubble_share(name, p, m, v, costs)
                if share is not None:
                    known += 1
                    assert simulate(make_table(name, p, m, v), costs).bubble == share
    assert known > 700
    assert bubble_time("1f1b", 4, 8, 1, Costs(transfer=1)) is None


def test_transfer_delays_and_does_not_occupy() -> None:
    timeline = simulate(make_table("1f1b", 2, 1), Costs(1, 2, 1, transfer=Fraction(1, 2)))
    first, second = timeline.spans
    assert [(span.start, span.stop) for span in first] == [(0, 1), (5, 7)]
    assert [(span.start, span.stop) for span in second] == [(1.5, 2.5), (2.5, 4.5)]
    assert timeline.step_time == 7
    assert timeline.bubbles == (Fraction(4, 7), Fraction(4, 7))
    near = simulate(make_table("zb_v", 1, 2), Costs(transfer=100))
    assert near.step_time == 12  # neighbours on one rank have no wire


def test_costs_per_stage() -> None:
    timeline = simulate(make_table("1f1b", 2, 1), Costs([1, 2.5], [3, 4], 0))
    assert timeline.step_time == 10.5
    assert [span.start for span in timeline.spans[1]] == [1, 3.5]


def test_memory_peaks_agree_with_the_proof() -> None:
    for name in SCHEDULES:
        table = make_table(name, 4, 8, 2 if name == "interleaved" else 1)
        curves = simulate(table, Costs(), weight_memory=1).memory
        assert tuple(max(held for _, held in c) for c in curves) == validate(table).peak_in_flight
        assert all(curve[-1][1] == 0 for curve in curves)


def test_memory_between_input_and_weight_backward() -> None:
    (curve,) = simulate(make_table("zb_h1", 1, 1), Costs(), Fraction(1, 4)).memory
    assert curve == ((0, 0), (1, 1), (2, Fraction(1, 4)), (3, 0))


def test_forward_only_holds_nothing() -> None:
    timeline = simulate(forward_only((0, 1, 1, 0), 6), Costs())
    assert timeline.memory == (((0, 0),), ((0, 0),))
    assert timeline.step_time <= 12 + 3


@pytest.mark.parametrize(
    "costs",
    [
        Costs(forward=-1),
        Costs(backward=float("nan")),
        Costs(backward=float("inf")),
        Costs(weight=3),
        Costs(transfer=-1),
        Costs(forward=[1, 2, 3]),
    ],
)
def test_costs_that_are_none(costs: Costs) -> None:
    with pytest.raises(BigtrainError) as caught:
        simulate(make_table("1f1b", 2, 2), costs)
    assert_explained(caught.value)


def test_all_free_takes_no_time() -> None:
    timeline = simulate(make_table("1f1b", 2, 2), Costs(0, 0, 0))
    assert (timeline.step_time, timeline.bubble, timeline.bubbles) == (0, 0, (0, 0))
    assert "no time" in table_text(timeline)


def test_text_is_cut_politely() -> None:
    timeline = simulate(make_table("1f1b", 2, 12), Costs())
    full, cut = table_text(timeline), table_text(timeline, 60)
    assert max(map(len, full.splitlines())) > 100
    lines = cut.splitlines()
    assert max(len(line) for line in lines[:-1]) == 60
    assert lines[-1].startswith("(shown up to time ")
    assert all(whole.startswith(part) for part, whole in zip(lines[1:3], full.splitlines()[1:]))  # noqa: B905


def test_text_of_very_uneven_times_stays_short() -> None:
    timeline = simulate(make_table("zb_h1", 2, 4), Costs(1, 2, 1e-6))
    assert max(map(len, table_text(timeline).splitlines())) < 500


@pytest.mark.parametrize("suffix", [".svg", ".PNG"])
def test_pictures(tmp_path: Path, suffix: str) -> None:
    timelines = {
        name: simulate(make_table(name, 2, 4), Costs()) for name in ("1f1b", "zb_v", "dualpipe_v")
    }
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    draw(timelines, first)
    draw(timelines, second)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG" if suffix == ".PNG" else b"<?xml")


def test_pictures_of_odd_timelines(tmp_path: Path) -> None:
    """Nothing but forwards, no time at all, and cells too small for numbers."""
    odd = {
        "forwards": simulate(forward_only((0, 1, 1, 0), 3), Costs()),
        "free": simulate(make_table("1f1b", 2, 2), Costs(0, 0, 0)),
        "many": simulate(make_table("gpipe", 2, 200), Costs()),
    }
    draw(odd, tmp_path / "a.png")
    draw({"free": odd["free"]}, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_pictures_that_cannot_be_drawn(tmp_path: Path) -> None:
    timelines = {"1f1b": simulate(make_table("1f1b", 2, 2), Costs())}
    for path in ("a.pdf", "a", str(tmp_path / "none" / "a.svg")):
        with pytest.raises(BigtrainError) as caught:
            draw(timelines, path)
        assert_explained(caught.value)
    with pytest.raises(BigtrainError, match="too many to draw"):
        draw({"1f1b": simulate(make_table("1f1b", 8, 2000), Costs())}, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
