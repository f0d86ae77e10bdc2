"""Drills, as they are written on the command line, and when each is due."""

from __future__ import annotations

import json
import os
import random

import pytest
from unit_helpers import assert_explained

from bigtrain.errors import BigtrainError
from bigtrain.server.chaos import Chaos, Event, left_over, parse


@pytest.mark.parametrize(
    ("text", "event"),
    [
        ("kill:worker=1,step=20", Event("kill", "worker", 1, 20)),
        ("kill:step=20,server=0", Event("kill", "server", 0, 20)),
        ("stop:server=0,step=20,seconds=5", Event("stop", "server", 0, 20, 5.0)),
        ("stop:server=0,step=0", Event("stop", "server", 0, 0)),
        ("cut:worker=1,step=20,seconds=0.25", Event("cut", "worker", 1, 20, 0.25)),
        ("cut:server=3,step=1,seconds=0", Event("cut", "server", 3, 1, 0.0)),
        ("delay:worker=1,step=20,seconds=2,ms=50", Event("delay", "worker", 1, 20, 2.0, 50.0)),
        ("delay:worker=1,step=20,ms=1e3", Event("delay", "worker", 1, 20, 5.0, 1000.0)),
    ],
)
def test_good_ones(text: str, event: Event) -> None:
    assert parse(text) == event
    assert parse(str(event)) == event


def test_texts_are_as_they_were_given() -> None:
    for text in (
        "kill:worker=1,step=20",
        "stop:server=0,step=20,seconds=5",
        "delay:worker=1,step=20,seconds=2,ms=50",
    ):
        assert str(parse(text)) == text


def test_any_event_comes_through() -> None:
    rng = random.Random(4)
    for trial in range(500):
        what, role = rng.choice(["stop", "cut", "delay"]), rng.choice(["worker", "server"])
        seconds, ms = rng.choice([0.0, 1e-9, 1 / 3, 86400.125, 999999.5]), trial * 0.1
        event = parse(f"{what}:{role}={trial},step={trial**2},seconds={seconds!r},ms={ms!r}")
        again = parse(str(event))
        assert (again.what, again.role, again.index, again.step) == (what, role, trial, trial**2)
        assert again.seconds == pytest.approx(seconds)
        assert str(again) == str(event)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "one of kill, stop, cut, delay"),
        ("worker=1,step=20", "one of kill, stop, cut, delay"),
        ("burn:worker=1,step=20", "one of kill, stop, cut, delay"),
        ("KILL:worker=1,step=20", "one of kill, stop, cut, delay"),
        ("kill", "one worker or one server"),
        ("kill:", "one worker or one server"),
        ("kill:step=20", "one worker or one server"),
        ("kill:board=1,step=20", "one worker or one server"),
        ("kill:worker=1,server=1,step=20", "one worker or one server"),
        ("kill:worker=1,worker=2,step=20", "worker is there twice"),
        ("kill:worker=1,step=20,step=30", "step is there twice"),
        ("kill:worker=1,step=20,when=now", "when is not known"),
        ("stop:worker=1,step=20,second=5", "second is not known"),
        ("kill:worker,step=20", "numbers"),
        ("kill:worker=,step=20", "numbers"),
        ("kill:worker=one,step=20", "numbers"),
        ("kill:worker=1,step=20;kill:server=0", "numbers"),
        ("kill:worker=1", "whole numbers"),
        ("kill:worker=1,step=2.5", "whole numbers"),
        ("kill:worker=-1,step=20", "whole numbers"),
        ("kill:worker=1,step=-20", "whole numbers"),
        ("kill:worker=inf,step=20", "whole numbers"),
        ("kill:worker=1,step=inf", "whole numbers"),
        ("kill:worker=1,step=-inf", "whole numbers"),
        ("kill:worker=nan,step=20", "whole numbers"),
        ("kill:worker=1,step=nan", "whole numbers"),
        ("kill:worker=1,step=1e400", "whole numbers"),
        ("kill:worker=1,step=2000000", "less than a million"),
        ("stop:worker=1,step=20,seconds=-1", "less than a million"),
        ("stop:worker=1,step=20,seconds=nan", "less than a million"),
        ("stop:worker=1,step=20,seconds=inf", "less than a million"),
        ("delay:worker=1,step=20,ms=-50", "less than a million"),
    ],
)
def test_bad_ones(text: str, why: str) -> None:
    with pytest.raises(BigtrainError) as caught:
        parse(text)
    assert_explained(caught.value, f"--chaos {text} is no event", why, "write it like")
    assert why in caught.value.problem.why


EVENTS = [
    parse(text)
    for text in (
        "cut:worker=1,step=9,seconds=1",
        "kill:worker=1,step=20",
        "stop:worker=1,step=3",
        "stop:worker=1,step=9",
        "kill:worker=0,step=5",
        "kill:server=1,step=6",
    )
]


def test_each_is_due_once() -> None:
    chaos = Chaos(EVENTS, "worker", 1, 0)
    due = {step: [str(event.what) for event in chaos.due(step)] for step in range(25)}
    assert {step: what for step, what in due.items() if what} == {
        3: ["stop"],
        9: ["cut", "stop"],
        20: ["kill"],
    }
    assert chaos.due(10**6) == []


def test_steps_that_are_passed_over_are_not_forgotten() -> None:
    chaos = Chaos(EVENTS, "worker", 1, 0)
    assert [event.step for event in chaos.due(10)] == [3, 9, 9]
    assert chaos.due(10) == []
    assert [event.step for event in chaos.due(100)] == [20]


def test_each_suffers_its_own() -> None:
    for role, index, steps in (("worker", 0, [5]), ("server", 1, [6]), ("server", 0, [])):
        due = Chaos(EVENTS, role, index, 0).due(100)
        assert [event.step for event in due] == steps
        assert all((event.role, event.index) == (role, index) for event in due)


def test_who_was_started_again_suffers_what_is_still_to_come() -> None:
    assert Chaos(EVENTS, "worker", 1, 1).due(100) == []
    again = Chaos(EVENTS, "worker", 1, 1)
    assert again.due(9) == []
    assert [event.step for event in again.due(30)] == [20]


def test_what_a_process_has_been_through_is_over() -> None:
    """Of others' events, and of its own later ones, all are left."""
    left = left_over(EVENTS, parse("stop:worker=1,step=9"))
    assert [str(event).partition(",seconds")[0] for event in left] == [
        "kill:worker=1,step=20",
        "kill:worker=0,step=5",
        "kill:server=1,step=6",
    ]


def test_the_launcher_is_told_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each, so that what is told at the end may follow."""
    read, write = os.pipe()
    monkeypatch.setenv("BIGTRAIN_REPORT_FD", str(write))
    Chaos(EVENTS, "worker", 1, 0).due(20)
    told = [json.loads(line) for line in os.read(read, 1 << 16).splitlines()]
    os.close(read)
    assert [line["drill"].partition(",seconds")[0] for line in told] == [
        "stop:worker=1,step=3",
        "cut:worker=1,step=9",
        "stop:worker=1,step=9",
        "kill:worker=1,step=20",
    ]
    os.close(write)
