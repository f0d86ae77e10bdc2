"""What `bigtrain status` tells, and what it says where there is nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bigtrain.config.schema import Config
from bigtrain.errors import BigtrainError
from bigtrain.serve import RunPolicy
from bigtrain.server.rounds import Closed, Part, Report, Rounds, Rules
from bigtrain.server.shares import Shares
from bigtrain.server.status import read_status, status_lines, write_status


def told(path: Path, age: float = 0.0) -> list[str]:
    """Return the lines about a run of three workers, of which one is not there."""
    rounds = Rounds(Rules("sync", 3, 2, join_seconds=0.0), Shares(3, 12))
    rounds.ready(0, 0, 0.0)
    rounds.ready(2, 1, 0.0)
    rounds.turns(1.0)
    rounds.report(0, Report(1, 0, (1.0,), frozenset({0, 1})))
    about = {
        "board": 1,
        "rounds_per_second": 2.0,
        "samples": 4.0,
        "outcome": {"parts": [[0, 0, 1, 0], [2, 1, 1, 0]], "staleness": 0},
        "servers": {"0": False, "1": True},
        "held_bytes": 2_500_000,
    }
    write_status(path, {**about, **rounds.status(3.0)})
    status = read_status(path)
    return list(status_lines(status, status["time"] + age))


def test_all_is_told(tmp_path: Path) -> None:
    lines = told(tmp_path / "status.json")
    assert lines[0] == "round 0 (sync), 2.00 rounds/s, 16 samples/s"
    assert "server 0  is gone" in lines
    assert "server 1  lives, keeps the board" in lines
    assert "worker 0  round 1, waits, began 2.0 s ago" in lines
    assert "worker 1  is not there" in lines
    assert "worker 2  round 1, computes, began 2.0 s ago, started again 1 times" in lines
    assert lines[-1] == "server 1 holds 2.5 MB, beside gradients that wait"


def test_what_is_old_is_called_so(tmp_path: Path) -> None:
    assert "60 s ago: it has ended, or hangs" in told(tmp_path / "status.json", 60.0)[0]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"version"'])
def test_no_status(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BigtrainError, match="there is no status") as caught:
        read_status(path)
    assert caught.value.problem.mend


def test_a_meeting_that_is_skipped_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Though it is decided again when a server is lost before all have done it."""
    server = {"servers": 1, "local_steps": 5}
    policy = RunPolicy(Config.model_validate({"server": server, "parallel": {"dp": 1}}))

    def decide(number: int, squares: float) -> bool:
        parts = tuple(Part(worker, 0, number, number - 1) for worker in (0, 1))
        return policy.update(Closed(number, parts, (1.0, 1.0, 0.0, 0.0), 0, 0), squares).skip

    assert [decide(1, 4.0), decide(2, math.inf), decide(2, math.inf)] == [False, True, True]
    [record] = caplog.records
    assert "steps 6 to 10: what worker(s) 0, 1 have sent" in record.getMessage()
    assert [decide(3, 4.0), decide(4, math.nan)] == [False, True]
    assert len(caplog.records) == 2
