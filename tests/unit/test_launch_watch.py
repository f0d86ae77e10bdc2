"""Watching over ranks that a test plays: signals, time, and ranks that do not end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bigtrain.errors import LaunchError
from bigtrain.launch import watch
from bigtrain.launch.job import Job
from bigtrain.launch.local import LocalTeam
from bigtrain.launch.outcome import Ended, Rank
from bigtrain.launch.watch import run_team

STOPPED = {"text": "stopped after step 3", "exit_code": 143, "orderly": True}


class Played:
    """Two ranks; `acts` says what each look at them finds."""

    def __init__(self, *acts: Callable[[Played], None]) -> None:
        self.ranks = [Rank(0), Rank(1)]
        self.acts = list(acts)
        self.did: list[Any] = []

    def start(self, asked: Sequence[int] = ()) -> None:
        self.did.append("start")

    def update(self) -> None:
        if self.acts:
            self.acts.pop(0)(self)

    def ask(self, number: int) -> None:
        self.did.append(number)

    def end(self) -> None:
        self.did.append("end")

    def close(self) -> None:
        self.did.append("close")


def all_end(code: int, report: dict[str, Any]) -> Callable[[Played], None]:
    def act(team: Played) -> None:
        for rank in team.ranks:
            rank.code, rank.report = code, report

    return act


def nothing(team: Played) -> None:
    pass


def job(patient: bool = False) -> Job:
    return Job(Path("c.yaml"), Path("logs"), 1, 2, 1, resume=False, patient=patient)


def test_time_that_is_up_is_as_the_signal_of_slurm() -> None:
    team = Played(nothing, nothing, all_end(143, STOPPED))
    looks = iter([False, True])
    told: list[str] = []
    with pytest.raises(Ended) as caught:
        run_team(job(), team, 0.0, told.append, lambda: next(looks))
    assert team.did == ["start", signal.SIGTERM, "close"], "saving takes the time that it takes"
    assert caught.value.asked == signal.SIGUSR1
    assert "nearly up" in told[0]


def test_a_rank_that_cannot_be_killed_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_END_SECONDS", 0.05)
    monkeypatch.setattr(watch, "_KILLED_SECONDS", 0.1)

    def one_fails(team: Played) -> None:
        team.ranks[1].code, team.ranks[1].report = 1, {"text": "no more", "exit_code": 1}

    team, told = Played(one_fails), []
    with pytest.raises(Ended) as caught:
        run_team(job(), team, 60, told.append)
    assert "end" in team.did
    assert told == ["rank 0 does not end, though it was killed: see dmesg there"]
    assert str(caught.value).startswith("rank 1 failed: no more"), "that is what began it"
    assert not caught.value.lost_nodes


def test_a_rank_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is of the screen of rank 0 is put away, and the error is the one to tell."""

    def refuse(*words: object, **options: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("bigtrain.launch.local.subprocess.Popen", refuse)
    one = Job(tmp_path / "c.yaml", tmp_path, 1, 2, 1, resume=False)
    with pytest.raises(LaunchError, match="could not start rank 0 of 2"):
        run_team(one, LocalTeam(one), 60, lambda _: None)
