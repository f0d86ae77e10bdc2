"""What is told of ranks that failed: the culprit first, what is the same once."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.config.schema import Config
from bigtrain.errors import LaunchError
from bigtrain.launch.job import Job
from bigtrain.launch.outcome import Ended, Rank, outcome
from bigtrain.launch.seats import seat
from bigtrain.launch.served import ServedRun, _Part
from bigtrain.run_folder import RunFolder
from bigtrain.server.protocol import LOSS

DONE = {"done": True}
TOLD = {"text": "no such file", "exit_code": 1, "time": 2.0}
PEER = {"text": "connection closed", "exit_code": 1, "consequence": True, "time": 1.0}
STOPPED = {"text": "stopped after step 3", "exit_code": 143, "orderly": True, "time": 1.0}


def told(*ranks: Rank, asked: tuple[int, ...] = ()) -> LaunchError:
    job = Job(Path("config.yaml"), Path("logs"), 1, len(ranks), 1, resume=False)
    with pytest.raises(LaunchError) as caught:
        outcome(job, ranks, asked)
    return caught.value


def rank(number: int, code: int = 1, node: str = "", **how: object) -> Rank:
    return Rank(number, node, code, **how)  # type: ignore[arg-type]


def test_all_is_well() -> None:
    job = Job(Path("config.yaml"), Path("logs"), 1, 2, 1, resume=False)
    assert outcome(job, [rank(0, 0, report=DONE), rank(1, 0, report=DONE)], ()) == 0


def test_what_is_the_same_is_told_once() -> None:
    ranks = [rank(0, 0, report=DONE), *(rank(i, report=TOLD) for i in (1, 3, 4, 5, 6, 8))]
    error = told(*ranks)
    assert str(error).startswith("ranks 1, 3-6, 8 failed: no such file")
    assert "then ended too" not in str(error)


def test_who_lost_its_peers_is_not_to_blame() -> None:
    error = told(rank(0, report=PEER), rank(1, report=TOLD), rank(2, report=PEER))
    assert str(error).startswith("rank 1 failed: no such file")
    assert "(ranks 0, 2 then ended too)" in str(error)


def test_a_death_without_a_word_comes_before_all_words() -> None:
    error = told(rank(0, report=TOLD), rank(1, -signal.SIGKILL))
    assert str(error).startswith("rank 1 was ended by SIGKILL")
    assert error.exit_code == 137


def test_a_node_that_is_gone_comes_before_everything() -> None:
    lost = "node n2 is gone: nothing was heard for 30 s"
    error = told(
        rank(0, -signal.SIGKILL, "n1"), rank(1, 1, "n2", lost=lost), rank(2, 1, "n2", lost=lost)
    )
    assert str(error).startswith(f"ranks 1, 2 lost: {lost}")
    assert "(rank 0 on n1 then ended too)" in str(error)


def test_an_orderly_stop_keeps_its_code() -> None:
    error = told(rank(0, 143, report=STOPPED), rank(1, 143, report=STOPPED), asked=(15,))
    assert (str(error), error.exit_code) == ("stopped after step 3", 143)


def test_ranks_that_could_not_finish_in_time() -> None:
    error = told(rank(0, -9, ended_by_us=True), rank(1, -9, ended_by_us=True), asked=(10,))
    assert "SIGUSR1" in str(error)
    assert error.exit_code == 143


def test_leaving_early_with_code_zero_is_a_failure(tmp_path: Path) -> None:
    error = told(rank(0, 0), rank(1, report=PEER))
    assert "rank 0 left with exit code 0" in str(error)
    assert error.exit_code == 1


# -- runs with servers -----------------------------------------------------------------------------

LOST = {"text": f"all gone\n  why:  {LOSS}"}


def served(tmp_path: Path, *ends: Rank | None) -> ServedRun:
    """Return a run of two servers and two workers that ended like this, in order; None: it runs."""
    config = Config.model_validate({"server": {"servers": 2}, "parallel": {"dp": 1}})
    seats = seat(config.server, ["n1"])
    job = Job(Path("config.yaml"), tmp_path, 1, 1, 1, resume=False)
    run = ServedRun(config, job, seats, SimpleNamespace(), RunFolder(tmp_path), print)  # type: ignore[arg-type]
    run.folder.status.touch()
    for number, end in enumerate(ends):
        role: Any = "server" if number < 2 else "worker"
        team: Any = SimpleNamespace(ranks=[end or Rank(0)], close=lambda: None)
        run.parts.append(_Part(role, number % 2, job, team, ("n1",)))
        if end is not None:
            run.parts[-1].is_over = True
            run._on_end(run.parts[-1], float(number))
    return run


def killed() -> Rank:
    return rank(0, -signal.SIGKILL)


def failed(text: str) -> Rank:
    return rank(0, report={**TOLD, "text": text})


@pytest.mark.parametrize(
    ("servers", "lost", "what"),
    [
        ((None, None), False, "worker 1 failed: mine"),
        ((None, killed()), False, "worker 1 failed: mine"),
        ((killed(), killed()), True, "server 1 was ended by SIGKILL"),
        ((rank(0, report={**TOLD, **LOST}), killed()), True, "server 1 was ended by SIGKILL"),
        ((killed(), rank(0, report={**TOLD, **LOST})), True, "server 0 was ended by SIGKILL"),
        ((None, rank(0, report={**TOLD, **LOST})), True, "server 1 failed: all gone"),
        ((rank(0, 0, report=DONE), rank(0, 0, report=DONE)), False, "worker 1 failed: mine"),
    ],
)
def test_servers_are_to_blame_if_what_they_held_is_lost(
    servers: tuple[Rank | None, Rank | None], lost: bool, what: str, tmp_path: Path
) -> None:
    run = served(tmp_path, *servers, failed("its own"), failed("mine"))
    assert run.has_lost_servers == lost
    with pytest.raises(Ended) as caught:
        run._outcome()
    assert str(caught.value).startswith(what)
