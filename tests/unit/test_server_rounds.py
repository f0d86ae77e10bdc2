"""Which gradients make up an update, and when: whatever workers, servers and links do."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import pytest

from bigtrain.server.fragments import ANEW, number_of
from bigtrain.server.rounds import Closed, Mode, Part, Report, Rounds, Rules, Turn
from bigtrain.server.shares import Share, Shares

BATCH = 8
BOTH = frozenset({0, 1})


def rounds_of(workers: int, mode: Mode = "sync", version: int = 0, **rules: Any) -> Rounds:
    """Return rounds of which all workers are a quorum, if `rules` do not say otherwise."""
    given = Rules(mode, workers, **{"quorum": workers, "grace_seconds": 1.0, **rules})
    return Rounds(given, Shares(workers, BATCH, version * BATCH), version)


def begun(workers: int, mode: Mode = "sync", now: float = 0.0, **rules: Any) -> Rounds:
    """Return rounds of which all workers have begun the first."""
    rounds = rounds_of(workers, mode, **rules)
    for worker in range(workers):
        rounds.ready(worker, 0, now)
    assert [turn.worker for turn in rounds.turns(now)] == list(range(workers))
    assert rounds.close(now, BOTH) is None
    return rounds


def say(
    rounds: Rounds,
    worker: int,
    clock: int | None = None,
    servers: Collection[int] = BOTH,
    base: int | None = None,
    totals: tuple[float, ...] = (1.0,),
) -> None:
    """Have a worker report: the round that it has begun last, if nothing else is said."""
    clock = rounds.members[worker].clock if clock is None else clock
    base = rounds.version if base is None else base
    rounds.report(worker, Report(clock, base, totals, frozenset(servers)))


def close(rounds: Rounds, now: float = 0.0, servers: Collection[int] = BOTH) -> Closed:
    closed = rounds.close(now, servers)
    assert closed is not None
    return closed


# -- sync --------------------------------------------------------------------------------------


def test_a_round_closes_with_all() -> None:
    rounds = begun(3)
    for worker in (2, 0):
        say(rounds, worker)
        assert rounds.close(100.0, BOTH) is None
    say(rounds, 1)
    closed = close(rounds)
    assert (closed.number, closed.workers, closed.staleness) == (1, (0, 1, 2), 0)
    assert rounds.version == 1
    assert rounds.close(0.0, BOTH) is None
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(0, 2), (1, 2), (2, 2)]
    assert rounds.turns(0.0) == []


def test_totals_are_added_up_in_the_order_of_workers() -> None:
    """So that it does not matter who was first: 1 is lost in 1e16, and 1e16 - 1e16 + 1 is 1."""
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        rounds = begun(3)
        totals = [(1e16, 1.0), (-1e16, 2.0), (1.0, 4.0)]
        for worker in order:
            say(rounds, worker, totals=totals[worker])
        closed = close(rounds)
        assert closed.totals == (1.0, 7.0)
        assert (closed.workers, closed.speaker) == ((0, 1, 2), 0)


def test_totals_may_be_nan() -> None:
    rounds = begun(2)
    say(rounds, 0, totals=(math.nan, 1.0))
    say(rounds, 1, totals=(1.0, math.inf))
    one, two = close(rounds).totals
    assert math.isnan(one)
    assert two == math.inf


def test_a_quorum_gives_the_others_grace() -> None:
    rounds = begun(3, quorum=2, grace_seconds=1.0)
    say(rounds, 0)
    assert rounds.close(5.0, BOTH) is None, "one is no quorum"
    say(rounds, 2)
    assert rounds.close(5.0, BOTH) is None
    assert rounds.close(5.9, BOTH) is None
    assert close(rounds, 6.0).workers == (0, 2)


def test_who_reports_within_the_grace_counts() -> None:
    rounds = begun(3, quorum=2)
    for worker in (0, 2):
        say(rounds, worker)
    assert rounds.close(5.0, BOTH) is None
    say(rounds, 1)
    assert close(rounds, 5.5).workers == (0, 1, 2)


def test_each_round_has_its_own_grace() -> None:
    rounds = begun(3, quorum=2)
    for worker in (0, 2):
        say(rounds, worker)
    assert rounds.close(5.0, BOTH) is None
    say(rounds, 1)
    close(rounds, 5.5)
    rounds.turns(5.5)
    for worker in (0, 1):
        say(rounds, worker)
    assert rounds.close(7.0, BOTH) is None
    assert close(rounds, 8.0).workers == (0, 1)


def test_grace_is_a_tenth_of_the_round_if_nothing_is_said() -> None:
    rounds = begun(3, now=10.0, quorum=2, grace_seconds=None)
    for worker in (0, 2):
        say(rounds, worker)
    assert rounds.close(30.0, BOTH) is None
    assert rounds.close(31.9, BOTH) is None
    assert close(rounds, 32.0).workers == (0, 2)


def test_a_quorum_that_is_lost_again() -> None:
    """A round is of as many as it is to be, if so many are there."""
    rounds = begun(4, quorum=3)
    for worker in (0, 1, 2):
        say(rounds, worker)
    assert rounds.close(5.0, BOTH) is None
    rounds.lost(1)
    rounds.ready(1, 1, 5.5)
    rounds.turns(5.5)
    assert rounds.close(9.0, BOTH) is None
    say(rounds, 1)
    assert rounds.close(9.0, BOTH) is None
    assert close(rounds, 10.0).workers == (0, 1, 2)


def test_who_is_behind_is_not_waited_for() -> None:
    rounds = begun(3, quorum=2)
    for worker in (0, 1):
        say(rounds, worker)
    rounds.close(0.0, BOTH)
    close(rounds, 1.0)
    rounds.turns(1.0)
    for worker in (0, 1):
        say(rounds, worker)
    assert close(rounds, 1.0).workers == (0, 1), "with no grace at all"


def test_who_is_behind_is_waited_for_without_a_quorum() -> None:
    rounds = begun(3, quorum=2)
    for worker in (0, 1):
        say(rounds, worker)
    rounds.close(0.0, BOTH)
    close(rounds, 1.0)
    rounds.turns(1.0)
    rounds.lost(1)
    say(rounds, 0)
    assert rounds.close(1.0, BOTH) is None, "two are there"
    say(rounds, 2, clock=1)
    assert [(turn.worker, turn.clock) for turn in rounds.turns(2.0)] == [(2, 2)]
    say(rounds, 2)
    assert close(rounds, 2.0).workers == (0, 2)


def test_what_comes_too_late_is_given_back() -> None:
    rounds = begun(3, quorum=2)
    for worker in (0, 2):
        say(rounds, worker)
    rounds.close(0.0, BOTH)
    close(rounds, 1.0)
    assert rounds.shares.cursor == 0
    first, second = rounds.turns(1.0)
    assert (first.share, second.share) == (Share(0, 1), Share(BATCH, 2)), "others read that at once"
    say(rounds, 1, clock=1)
    assert rounds.turns(1.0) == [Turn(1, 2, Share(BATCH, 1))], "for the round that is open"
    for worker in (0, 1, 2):
        say(rounds, worker)
    assert close(rounds, 1.0).workers == (0, 1, 2)
    assert (rounds.shares.num_returned, rounds.shares.returned) == (1, [])


def test_what_not_all_servers_have_in_time_is_given_back() -> None:
    """Even if the worker has not been late: it need not push that again."""
    rounds = begun(3, quorum=2)
    for worker in (0, 2):
        say(rounds, worker)
    say(rounds, 1, servers={0})
    rounds.close(0.0, BOTH)
    assert close(rounds, 1.0).workers == (0, 2)
    assert rounds.shares.returned == [Share(0, 1)]
    assert [turn.share for turn in rounds.turns(1.0)][:2] == [Share(0, 1), Share(BATCH, 1)]
    say(rounds, 1, clock=1)
    for worker in (0, 1, 2):
        say(rounds, worker, clock=2)
    assert [(p.worker, p.clock) for p in close(rounds, 1.0).parts] == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_who_is_always_late_holds_up_nothing(mode: Mode) -> None:
    """A run that is resumed begins at the cursor: the others read what one was too slow for."""
    world = World.of(Rules(mode, 3, 2, 0.1, staleness=2))
    for tick in range(400):
        world.now = tick * 0.25
        world.go_on()
        for index, worker in world.workers.items():
            took = world.now - world.rounds.members[index].began
            if worker.turn is not None and took >= (5.0 if index == 2 else 1.0):
                world.push(index, BOTH)
    world.check_shares()
    assert world.rounds.shares.num_ahead <= 20
    assert world.rounds.shares.cursor >= 0.85 * BATCH * sum(world.used.values()) / 3


def test_who_is_lost_is_not_waited_for() -> None:
    rounds = begun(3)
    for worker in (0, 1):
        say(rounds, worker)
    assert rounds.close(0.0, BOTH) is None
    rounds.lost(2)
    assert close(rounds).workers == (0, 1)
    (first, _) = rounds.turns(0.0)
    assert first.share == Share(0, 2), "and what it was to read is read"


def test_who_is_lost_has_not_reported() -> None:
    rounds = begun(3)
    for worker in (0, 2):
        say(rounds, worker)
    rounds.lost(2)
    rounds.report(2, Report(1, 0, (1.0,), BOTH))
    say(rounds, 1)
    assert close(rounds).workers == (0, 1)


def test_nobody_is_there() -> None:
    rounds = begun(2)
    for worker in (0, 1):
        rounds.lost(worker)
    assert rounds.close(1000.0, BOTH) is None
    assert rounds.turns(1000.0) == []
    rounds.ready(1, 1, 1000.0)
    assert [(t.worker, t.clock) for t in rounds.turns(1000.0)] == [(1, 1)]
    say(rounds, 1)
    assert close(rounds, 1000.0).parts == (Part(1, 1, 1, 0),)


def test_who_joins_takes_part_in_the_open_round() -> None:
    rounds = begun(2, quorum=1, grace_seconds=10.0)
    for worker in (0, 1):
        say(rounds, worker)
    close(rounds)
    rounds.lost(1)
    rounds.turns(1.0)
    rounds.ready(1, 1, 2.0)
    (turn,) = rounds.turns(2.0)
    assert (turn.worker, turn.clock) == (1, 2)
    say(rounds, 0)
    assert rounds.close(2.0, BOTH) is None, "it has the same grace as others"
    say(rounds, 1)
    assert close(rounds, 3.0).parts == (Part(0, 0, 2, 1), Part(1, 1, 2, 1))


def test_who_was_started_again_has_not_reported() -> None:
    rounds = begun(2)
    say(rounds, 1)
    rounds.ready(1, 1, 0.0)
    say(rounds, 0)
    assert rounds.shares.returned == [Share(0, 1)]
    (turn,) = rounds.turns(0.0)
    assert turn == Turn(1, 1, Share(0, 1))
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 1)
    assert close(rounds).parts == (Part(0, 0, 1, 0), Part(1, 1, 1, 0))


def test_who_was_cut_off_begins_a_later_round() -> None:
    """Of what it had begun nothing can come any more: its frames may be anywhere."""
    rounds = begun(3)
    rounds.lost(1)
    rounds.ready(1, 0, 0.0, after=1)
    assert rounds.turns(0.0) == []
    for worker in (0, 2):
        say(rounds, worker)
    say(rounds, 1, clock=1)
    assert close(rounds).workers == (0, 2)
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(0, 2), (1, 2), (2, 2)]


def test_the_only_one_that_is_left_goes_on() -> None:
    """Though it was cut off in a round that nobody else will end."""
    rounds = begun(3)
    rounds.lost(1)
    rounds.ready(1, 0, 0.0, after=1)
    for worker in (0, 2):
        rounds.lost(worker)
    (turn,) = rounds.turns(1.0)
    assert (turn.worker, turn.clock) == (1, ANEW + 1), "it begins that round anew"
    say(rounds, 1)
    closed = close(rounds, 1.0)
    assert (closed.number, closed.parts) == (1, (Part(1, 0, ANEW + 1, 0),))
    rounds.ready(0, 1, 1.0)
    for number in (2, 3):
        for turn in rounds.turns(1.0):
            say(rounds, turn.worker)
        assert close(rounds, 1.0).number == number
    assert closed.staleness == 0


def test_nobody_is_waited_for_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    rounds = begun(3, now=10.0, stall_seconds=50.0)
    assert rounds.close(1000.0, BOTH) is None, "but somebody must have reported"
    say(rounds, 1)
    assert rounds.close(1000.0, BOTH) is None
    say(rounds, 1)
    assert rounds.close(1049.9, BOTH) is None, "from the first report on"
    assert close(rounds, 1050.0).workers == (1,)
    assert caplog.text.count("round 1 goes on without worker(s) 0, 2") == 1
    assert [(turn.worker, turn.clock) for turn in rounds.turns(1050.0)] == [(1, 2)]
    say(rounds, 1)
    assert close(rounds, 1050.0).workers == (1,), "who has stalled is not waited for again"
    for worker in (0, 2):
        say(rounds, worker)
    assert len(rounds.turns(1061.0)) == 3
    say(rounds, 1)
    assert rounds.close(1061.0, BOTH) is None, "until it says something"
    assert len(caplog.records) == 1


def test_how_long_a_round_takes_is_nobodys_fault() -> None:
    """In local it may be longer than anybody is waited for."""
    rounds = begun(4, quorum=3, grace_seconds=None, stall_seconds=50.0)
    now = 0.0
    for number in range(1, 4):
        for worker, late in enumerate((0.0, 3.0, 6.0, 10.0)):
            say(rounds, worker)
            assert (rounds.close(now + 300.0 + late, BOTH) is None) == (worker < 3)
        assert rounds.version == number
        now += 310.0
        rounds.turns(now)
    assert rounds.shares.num_returned == 0


def test_the_wait_begins_with_a_report_that_counts() -> None:
    rounds = begun(3, stall_seconds=50.0)
    say(rounds, 0, servers={0})
    assert rounds.close(100.0, BOTH) is None
    assert rounds.again_in(100.0) is None
    say(rounds, 0)
    assert rounds.close(120.0, BOTH) is None
    say(rounds, 0)  # again
    say(rounds, 1, servers={0})
    assert rounds.close(130.0, BOTH) is None
    rounds.lost(0)
    assert rounds.close(169.0, BOTH) is None, "nobody has"
    say(rounds, 1)
    assert rounds.close(175.0, BOTH) is None
    rounds.lost(2)
    rounds.ready(0, 1, 180.0)
    rounds.turns(180.0)
    assert rounds.close(224.0, BOTH) is None
    assert close(rounds, 225.0).workers == (1,)


def test_a_round_that_is_opened_again_is_waited_for_as_long() -> None:
    rounds = begun(2, stall_seconds=50.0)
    say(rounds, 0)
    assert rounds.close(100.0, BOTH) is None
    say(rounds, 1)
    rounds.reopen(close(rounds, 140.0))
    rounds.ready(1, 1, 145.0)
    rounds.turns(145.0)
    assert rounds.close(145.0, BOTH) is None
    assert rounds.close(194.0, BOTH) is None
    assert close(rounds, 195.0).workers == (0,)


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_the_cursor_moves_past_a_worker_that_hangs(mode: Mode) -> None:
    """A run that is resumed reads what is behind it again."""
    world = World.of(Rules(mode, 3, 2, 0.0, stall_seconds=20.0, staleness=2))
    for tick in range(600):
        world.now = float(tick)
        world.go_on()
        world.check_shares()
        for index, worker in world.workers.items():
            if worker.turn is not None and (index < 2 or tick == 500):
                world.push(index, BOTH)
    shares = world.rounds.shares
    assert shares.cursor >= BATCH * (sum(world.used.values()) / 3 - (8 if mode == "ssp" else 4))
    assert sum(part.worker == 2 for part in parts_of(world)) == 0, "what it did came too late"
    assert world.workers[2].turn is not None
    assert world.workers[2].turn.clock > 100, "it may go on"


def parts_of(world: World) -> list[Part]:
    return [part for closed in world.log if isinstance(closed, Closed) for part in closed.parts]


@pytest.mark.parametrize(("mode", "most"), [("sync", 3), ("ssp", 12)])
def test_the_cursor_moves_past_a_worker_that_is_slow(mode: Mode, most: int) -> None:
    """Its rounds are over when it comes; others have read what it did."""
    world = World.of(Rules(mode, 4, 3, 0.0, stall_seconds=1000.0, staleness=2))
    for tick in range(400):
        world.now = float(tick)
        world.go_on()
        world.check_shares()
        for index, worker in world.workers.items():
            if worker.turn is not None and (index < 3 or tick % 40 == 39):
                world.push(index, BOTH)
        assert world.rounds.shares.num_ahead <= most
    assert sum(world.used.values()) > 1000


def test_a_round_that_is_opened_again_may_have_who_was_too_slow_for_it() -> None:
    rounds = begun(3, quorum=2, grace_seconds=0.0)
    for worker in (0, 1):
        say(rounds, worker)
    rounds.reopen(close(rounds))
    rounds.lost(0)
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 2)
    assert close(rounds).workers == (1, 2)
    assert rounds.shares.returned == [Share(0, 0)]


def test_no_round_closes_without_its_holder() -> None:
    rounds = begun(3, quorum=1, grace_seconds=0.0, stall_seconds=50.0)
    for worker in (0, 1, 2):
        say(rounds, worker)
    rounds.hold(close(rounds).speaker)
    rounds.turns(0.0)
    for worker in (1, 2):
        say(rounds, worker)
    assert rounds.close(1000.0, BOTH) is None
    say(rounds, 0)
    assert close(rounds, 1000.0).workers == (0, 1, 2)
    rounds.turns(1000.0)
    say(rounds, 1)
    assert close(rounds, 1000.0).workers == (1,), "it held one round"


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_a_holder_is_not_waited_for_for_ever(mode: Mode, caplog: pytest.LogCaptureFixture) -> None:
    """It hangs in its checkpoint; that of others counts from their first report on."""
    rounds = begun(3, mode, quorum=2, grace_seconds=0.0, stall_seconds=50.0)
    for worker in (0, 1, 2):
        say(rounds, worker)
    closed = close(rounds)
    rounds.hold(closed.speaker)
    assert closed.speaker == 0
    rounds.turns(0.0)
    for worker in (1, 2):
        say(rounds, worker)
    assert rounds.close(1000.0, BOTH) is None
    assert rounds.awaited() == {0: "a checkpoint"}
    assert rounds.status(1000.0)["waits_for"] == {"0": "a checkpoint"}
    assert rounds.again_in(1000.0) == 50.0
    assert rounds.close(1049.0, BOTH) is None
    assert 0 not in close(rounds, 1050.0).workers
    assert caplog.text.count("worker 0 has not come back from its checkpoint after round 1") == 1
    rounds.turns(1050.0)
    for worker in (1, 2):
        say(rounds, worker)
    assert 0 not in close(rounds, 1050.0).workers
    say(rounds, 0, clock=2)
    told = [turn.worker for turn in rounds.turns(1051.0)]
    while rounds.close(1051.0, BOTH):
        told += [turn.worker for turn in rounds.turns(1051.0)]
    assert 0 in told, "it has come back"


def test_whom_a_round_waits_for() -> None:
    rounds = begun(3)
    assert rounds.awaited() == {}
    say(rounds, 0)
    say(rounds, 2, servers={0})
    assert rounds.close(1.0, BOTH) is None
    assert rounds.awaited() == {1: "round 1", 2: "round 1"}
    say(rounds, 2)
    assert rounds.close(1.0, BOTH) is None
    assert rounds.awaited() == {1: "round 1"}
    say(rounds, 1)
    close(rounds, 1.0)
    assert rounds.awaited() == {}


def test_a_holder_that_is_lost_holds_nothing() -> None:
    for gone in (True, False):
        rounds = begun(2, quorum=1, grace_seconds=0.0)
        rounds.hold(0)
        say(rounds, 1)
        assert rounds.close(0.0, BOTH) is None
        if gone:
            rounds.lost(0)
        else:
            rounds.ready(0, 1, 0.0)
        assert close(rounds).workers == (1,)


def test_a_holder_that_is_not_there_holds_nothing_until_it_comes() -> None:
    """A new board learns who holds a round before that worker has told where it is."""
    rounds = begun(2, quorum=1, grace_seconds=0.0)
    rounds.hold(7)
    say(rounds, 1)
    assert close(rounds).workers == (1,)
    taken = rounds_of(2, quorum=1, grace_seconds=0.0)
    taken.hold(0)
    taken.adopt(1, 0, 1, Share(0, 1), 0.0)
    taken.adopt(0, 0, 1, Share(0, 0), 0.0)
    say(taken, 1)
    assert taken.close(0.0, BOTH) is None
    say(taken, 0)
    assert close(taken).workers == (0, 1)


def test_a_holder_that_is_further_holds_nothing() -> None:
    """It has begun a later round, as it has told a new board, and will not report this one."""
    rounds = rounds_of(2, "ssp", staleness=2, quorum=1, grace_seconds=0.0)
    rounds.adopt(0, 0, 2, Share(BATCH, 0), 0.0)
    rounds.adopt(1, 0, 1, Share(0, 1), 0.0)
    rounds.hold(0)
    say(rounds, 1)
    assert close(rounds).workers == (1,)
    rounds.hold(0)
    rounds.turns(0.0)
    say(rounds, 1)
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 0)
    assert close(rounds).workers == (0, 1)


# -- reports -----------------------------------------------------------------------------------


def test_a_report_counts_once_all_servers_have_it() -> None:
    rounds = begun(2)
    say(rounds, 0, servers={0, 1})
    say(rounds, 1, servers={1})
    assert rounds.close(0.0, {0, 1}) is None
    say(rounds, 1, servers={0, 1, 2})
    assert close(rounds, 0.0, {0, 1}).workers == (0, 1)


def test_it_counts_too_if_those_are_gone_that_lack_it() -> None:
    rounds = begun(2)
    say(rounds, 0, servers={0, 1})
    say(rounds, 1, servers={1})
    assert rounds.close(0.0, {0, 1}) is None
    assert close(rounds, 0.0, {1}).workers == (0, 1)


def test_a_server_that_has_come_must_have_it_too() -> None:
    rounds = begun(2)
    for worker in (0, 1):
        say(rounds, worker, servers={0})
    assert rounds.close(0.0, {0, 1}) is None
    for worker in (0, 1):
        say(rounds, worker, servers={0, 1})
    assert close(rounds, 0.0, {0, 1}).workers == (0, 1)


def test_a_report_counts_by_itself() -> None:
    """Not because all servers have another one of that worker."""
    rounds = begun(2, "ssp", staleness=3)
    say(rounds, 0, clock=1, servers={0})
    rounds.members[0].clock = 2
    rounds.shares.take(0, 2, [0, 1])
    say(rounds, 0, clock=2)
    say(rounds, 1)
    closed = rounds.close(0.0, BOTH)
    assert closed is None or closed.workers == (1,)


def test_nobody_goes_on_before_all_servers_have_what_it_did() -> None:
    """A worker keeps what it has pushed until its next turn, and not longer."""
    rounds = begun(2, "ssp", staleness=3)
    say(rounds, 0, servers={0})
    assert rounds.turns(0.0) == []
    say(rounds, 0, clock=1)
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(0, 2)]


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_duplicates_change_nothing(mode: Mode) -> None:
    rounds = begun(2, mode, staleness=1)
    for _ in range(3):
        say(rounds, 0, clock=1, base=0)
    say(rounds, 1, clock=1, base=0)
    turns = []
    while rounds.close(0.0, BOTH):
        turns += rounds.turns(0.0)
    before = json.dumps(rounds.to_message())
    for _ in range(3):
        for worker in (0, 1):
            say(rounds, worker, clock=1, base=0)
    assert json.dumps(rounds.to_message()) == before
    assert rounds.turns(0.0) == []
    assert rounds.close(100.0, BOTH) is None
    assert len(turns) == 2


def test_reports_of_turns_that_it_has_not_are_ignored() -> None:
    rounds = begun(2)
    say(rounds, 0, clock=2)
    say(rounds, 0, clock=10**9)
    say(rounds, 0, clock=0)
    say(rounds, 1)
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 0)
    assert [part.clock for part in close(rounds).parts] == [1, 1]


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_a_round_that_cannot_be_made_is_opened_again(mode: Mode) -> None:
    """Since somebody has reported what servers do not have; it is closed without that."""
    rounds = begun(3, mode, staleness=1)
    for worker in (1, 0, 2) if mode != "async" else (0,):
        say(rounds, worker)
    version, out = rounds.version, dict(rounds.shares.out)
    closed = close(rounds)
    rounds.reopen(closed)
    assert (rounds.version, rounds.shares.out) == (version, out)
    rounds.lost(0)
    if mode == "async":
        assert rounds.close(0.0, BOTH) is None
        say(rounds, 1)
    again = close(rounds)
    assert again.number == closed.number
    assert again.workers == ((1, 2) if mode != "async" else (1,))
    assert rounds.shares.returned == [Share(0, 0)]
    (first, *_) = rounds.turns(0.0)
    assert (first.clock, first.share) == (2, Share(0, 0))


def test_who_has_gone_meanwhile_is_not_in_it_again() -> None:
    for gone in (True, False):
        rounds = begun(3)
        for worker in (0, 1, 2):
            say(rounds, worker)
        closed = close(rounds)
        rounds.lost(0)
        if not gone:
            rounds.ready(0, 1, 0.0)
        rounds.reopen(closed)
        assert rounds.shares.returned == [Share(0, 0)]
        assert close(rounds).parts == (Part(1, 0, 1, 0), Part(2, 0, 1, 0))


# -- the first round ---------------------------------------------------------------------------


def test_the_first_round_waits_for_all() -> None:
    rounds = rounds_of(3, join_seconds=20.0)
    assert rounds.turns(0.0) == []
    rounds.ready(1, 0, 5.0)
    assert rounds.turns(24.9) == []
    rounds.ready(0, 0, 24.9)
    assert rounds.turns(24.9) == []
    rounds.ready(2, 0, 24.9)
    assert [turn.share for turn in rounds.turns(24.9)] == [Share(0, n) for n in range(3)]


def test_but_not_for_ever() -> None:
    rounds = rounds_of(3, join_seconds=20.0)
    rounds.ready(1, 0, 5.0)
    assert [turn.worker for turn in rounds.turns(25.0)] == [1]
    rounds.ready(0, 0, 26.0)
    assert [turn.worker for turn in rounds.turns(26.0)] == [0]


def test_the_first_round_needs_somebody() -> None:
    rounds = rounds_of(3, join_seconds=20.0)
    rounds.ready(1, 0, 5.0)
    rounds.lost(1)
    assert rounds.turns(100.0) == []
    assert not rounds.began
    rounds.ready(2, 0, 100.0)
    assert [turn.worker for turn in rounds.turns(100.0)] == [2]


def test_a_run_goes_on_from_its_checkpoint() -> None:
    rounds = rounds_of(2, version=7)
    for worker in (0, 1):
        rounds.ready(worker, 0, 0.0)
    turns = rounds.turns(0.0)
    assert turns == [Turn(0, 8, Share(56, 0)), Turn(1, 8, Share(56, 1))]
    for worker in (0, 1):
        say(rounds, worker)
    closed = close(rounds)
    assert (closed.number, closed.staleness) == (8, 0)


# -- ssp and async -----------------------------------------------------------------------------


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_a_worker_runs_ahead_so_far_and_no_further(staleness: int) -> None:
    rounds = begun(2, "ssp", staleness=staleness)
    for clock in range(1, staleness + 1):
        say(rounds, 0)
        assert [(t.worker, t.clock) for t in rounds.turns(0.0)] == [(0, clock + 1)]
    say(rounds, 0)
    assert rounds.turns(0.0) == []
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 1)
    assert close(rounds).number == 1
    assert {t.worker: t.clock for t in rounds.turns(0.0)} == {0: staleness + 2, 1: 2}


def test_staleness_is_of_the_oldest_parameters() -> None:
    rounds = begun(2, "ssp", staleness=2)
    for _ in range(3):
        say(rounds, 0, base=0)
        rounds.turns(0.0)
    for number in (1, 2, 3):
        say(rounds, 1, base=rounds.version)
        closed = close(rounds)
        rounds.turns(0.0)
        assert (closed.number, closed.staleness) == (number, number - 1)
    assert rounds.most_stale == 2


def test_async_makes_an_update_of_each_report() -> None:
    rounds = begun(3, "async")
    say(rounds, 2, base=0)
    closed = close(rounds)
    assert (closed.number, closed.workers, closed.staleness) == (1, (2,), 0)
    assert rounds.close(0.0, BOTH) is None
    assert [(turn.worker, turn.clock) for turn in rounds.turns(1.0)] == [(2, 2)]
    say(rounds, 2, base=1)
    say(rounds, 0, base=0)
    first = close(rounds, 1.0)
    assert rounds.close(1.0, BOTH) is None, "its worker has not been told of it"
    assert [turn.worker for turn in rounds.turns(1.0)] == [0], "2 would hear of another's round"
    second = close(rounds, 1.0)
    rounds.turns(1.0)
    assert (first.number, first.workers, first.staleness) == (2, (0,), 1), "it waits longer"
    assert (second.number, second.workers, second.staleness) == (3, (2,), 1)
    say(rounds, 1, base=0)
    assert close(rounds, 1.0).staleness == 3
    assert rounds.most_stale == 3
    assert rounds.shares.num_returned == 0, "nothing is too late"


def test_async_holds_a_round_until_its_worker_goes_on() -> None:
    rounds = begun(2, "async")
    say(rounds, 1)
    rounds.hold(close(rounds).speaker)
    assert [turn.worker for turn in rounds.turns(0.0)] == [1]
    say(rounds, 0)
    assert rounds.close(1000.0, BOTH) is None, "1 saves"
    say(rounds, 1)
    assert close(rounds).workers == (0,)


@pytest.mark.parametrize("held", [False, True])
def test_no_round_of_ssp_closes_before_who_speaks_for_the_last_one_knows(held: bool) -> None:
    """Both are at work on what is two rounds ahead, so that nobody could be told at once."""
    rounds = begun(2, "ssp", staleness=3, quorum=1, grace_seconds=0.0, stall_seconds=50.0)
    for worker in (0, 0, 1, 1):
        say(rounds, worker)
        rounds.turns(0.0)
    speaker = close(rounds).speaker
    if held:
        rounds.hold(speaker)
    assert (speaker, rounds.turns(0.0)) == (0, [])
    assert rounds.close(49.0, BOTH) is None
    say(rounds, 0)
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(0, 4)]
    if held:
        assert rounds.close(1000.0, BOTH) is None, "it saves"
        say(rounds, 0)
    assert close(rounds).number == 2


def test_the_speaker_is_one_that_can_be_told_at_once() -> None:
    rounds = begun(2, "ssp", staleness=1)
    say(rounds, 0)
    rounds.turns(0.0)
    say(rounds, 1)
    assert close(rounds).speaker == 1


@pytest.mark.parametrize("mode", ["sync", "ssp", "async"])
def test_no_round_closes_after_the_last(mode: Mode) -> None:
    rounds = begun(2, mode, staleness=1, quorum=1, grace_seconds=0.0, last=1)
    for worker in (0, 1):
        say(rounds, worker)
    assert close(rounds).number == 1
    assert rounds.close(1000.0, BOTH) is None
    assert [turn.worker for turn in rounds.turns(0.0)] == [0, 1], "all are told that it is over"
    assert rounds.close(1000.0, BOTH) is None


def test_async_too_waits_until_all_servers_have_it() -> None:
    rounds = begun(2, "async")
    say(rounds, 0, servers={0})
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 1)
    assert close(rounds).workers == (1,)
    rounds.turns(0.0)
    say(rounds, 0, clock=1)
    assert close(rounds).workers == (0,)


# -- another board -----------------------------------------------------------------------------


def test_closed_rounds_come_through() -> None:
    closed = Closed(7, (Part(0, 1, 7, 5), Part(2, 0, 7, 6)), (1.5, -2.0), 0, 1)
    assert Closed.from_message(json.loads(json.dumps(closed.to_message()))) == closed


def as_json(rounds: Rounds) -> dict[str, Any]:
    return json.loads(json.dumps(rounds.to_message()))


@pytest.mark.parametrize("mode", ["sync", "ssp"])
def test_another_goes_on_with_the_same_decisions(mode: Mode) -> None:
    rounds = begun(3, mode, staleness=2, quorum=2)
    for number in range(1, 4):
        for worker in (0, 1, 2):
            say(rounds, worker)
        assert close(rounds).number == number
        message = as_json(rounds)
        turns = rounds.turns(0.0)
    other = rounds_of(3, mode, staleness=2, quorum=2)
    assert other.take_up(message) == {0, 1, 2}
    assert (other.version, other.began, other.members) == (3, True, {})
    assert other.turns(0.0) == []
    assert other.close(0.0, BOTH) is None
    for turn in reversed(turns):
        assert other.shares.is_free(turn.share)
        other.adopt(turn.worker, 0, turn.clock, turn.share, 0.0)
    assert as_json(other)["members"] == [[w, 0, 4, 0] for w in (0, 1, 2)]
    for now in range(5):
        assert other.turns(now) == rounds.turns(now)
        for one in (rounds, other):
            for worker in (0, 2) if now < 3 else (0, 1, 2):
                say(one, worker)
            one.close(now, BOTH)
        assert other.close(now + 1.0, BOTH) == rounds.close(now + 1.0, BOTH)
        assert other.version == rounds.version
        assert other.shares.cursor == rounds.shares.cursor


def test_work_that_is_ahead_can_be_adopted() -> None:
    """ssp: the message has it that somebody reads what its reader is about to tell."""
    rounds = begun(2, "ssp", staleness=2)
    say(rounds, 0)
    (ahead,) = rounds.turns(0.0)
    say(rounds, 1)
    close(rounds)
    other = rounds_of(2, "ssp", staleness=2)
    assert other.take_up(as_json(rounds)) == {0, 1}
    assert other.shares.is_free(ahead.share)
    other.adopt(0, 0, ahead.clock, ahead.share, 0.0)
    assert other.shares.cursor == BATCH
    other.ready(1, 1, 0.0)
    assert other.turns(0.0) == [Turn(1, 2, Share(BATCH, 1))]


def test_those_that_are_left_may_be_further_than_the_round() -> None:
    """ssp: what worker 0 did for round 2 is lost with the board, and worker 1 is dead too."""
    rounds = begun(2, "ssp", staleness=2)
    for _ in range(2):
        say(rounds, 0)
        turns = rounds.turns(0.0)
    say(rounds, 1)
    close(rounds)
    other = rounds_of(2, "ssp", staleness=2)
    other.take_up(as_json(rounds))
    other.adopt(0, 0, 3, turns[0].share, 0.0)
    other.ready(1, 1, 0.0)
    assert [(turn.worker, turn.clock) for turn in other.turns(0.0)] == [(1, 3)]
    say(other, 1)
    assert other.close(0.0, BOTH) is None
    say(other, 0, base=0)
    closed = close(other)
    assert (closed.number, closed.staleness) == (2, 1)
    assert [(part.worker, part.clock) for part in closed.parts] == [(0, 3), (1, 3)]


def test_what_others_have_passed_by_is_too_late() -> None:
    """Else they, who went on without it, would be too stale when their round comes."""
    rounds = rounds_of(3, "ssp", version=1, staleness=1)
    late = Share(BATCH, 2)
    for worker in (0, 1):
        rounds.adopt(worker, 0, 3, Share(2 * BATCH, worker), 0.0)
    assert rounds.close(0.0, BOTH) is None
    say(rounds, 0)
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(0, 4)]
    rounds.adopt(2, 0, 2, late, 0.0)
    say(rounds, 2)
    assert late in rounds.shares.returned
    assert [(turn.worker, turn.clock) for turn in rounds.turns(0.0)] == [(2, 3)]
    for worker in (1, 2):
        say(rounds, worker, clock=3)
    assert [part.clock for part in close(rounds).parts] == [3, 3, 3]


def test_who_does_not_come_to_the_new_board_is_lost() -> None:
    rounds = begun(2)
    message = as_json(rounds)
    other = rounds_of(2)
    other.take_up(message)
    other.adopt(0, 0, 1, Share(0, 0), 0.0)
    other.lost(1)
    say(other, 0)
    assert close(other).workers == (0,)
    assert other.turns(0.0) == [Turn(0, 2, Share(0, 1))]


def test_a_board_that_knows_of_no_round() -> None:
    """Since the first is not over: workers tell it that they have begun."""
    rounds = begun(3)
    other = rounds_of(3)
    for worker in (2, 0):
        other.adopt(worker, 0, 1, Share(0, worker), 0.0)
    assert other.began
    assert other.turns(0.0) == []
    other.ready(1, 1, 0.0)
    assert other.turns(0.0) == [Turn(1, 1, Share(0, 1))]
    for worker in (0, 1, 2):
        for one in (rounds, other):
            say(one, worker)
    assert close(other).workers == close(rounds).workers
    assert other.shares.to_message()["next"] == rounds.shares.to_message()["next"]


def test_who_has_begun_a_round_anew_takes_part_in_later_ones() -> None:
    """Though a new board does not know of that."""
    rounds = begun(2)
    for worker in (0, 1):
        say(rounds, worker)
    close(rounds)
    message = as_json(rounds)
    other = rounds_of(2)
    other.take_up(message)
    other.ready(0, 0, 0.0, after=ANEW + 2)
    other.ready(1, 1, 0.0)
    assert [(turn.worker, turn.clock) for turn in other.turns(0.0)] == [(1, ANEW + 2)]
    say(other, 1)
    assert close(other).number == 2
    assert [(t.worker, t.clock) for t in other.turns(0.0)] == [(0, ANEW + 3), (1, ANEW + 3)]
    assert other.status(0.0)["workers"]["0"]["round"] == 3


# -- time --------------------------------------------------------------------------------------


def test_when_to_look_again() -> None:
    rounds = rounds_of(3, quorum=2, grace_seconds=1.0, stall_seconds=50.0, join_seconds=20.0)
    assert rounds.again_in(0.0) is None
    rounds.ready(0, 0, 5.0)
    rounds.ready(1, 0, 6.0)
    assert rounds.again_in(7.0) == 18.0
    assert rounds.again_in(100.0) is None, "that is over: nobody need wake up for it"
    rounds.ready(2, 0, 8.0)
    rounds.turns(8.0)
    assert rounds.again_in(8.0) is None, "there is nothing to wait for but reports"
    say(rounds, 0)
    assert rounds.close(9.0, BOTH) is None
    assert rounds.again_in(9.0) == 50.0
    say(rounds, 1)
    assert rounds.close(10.0, BOTH) is None
    assert rounds.again_in(10.25) == 0.75
    assert rounds.close(10.0 + 0.99, BOTH) is None
    close(rounds, 11.0)
    rounds.turns(11.0)
    assert rounds.again_in(11.0) is None


# -- anything may happen -----------------------------------------------------------------------


@dataclass
class Worker:
    """A process: what it was told last, and what it has told of that."""

    incarnation: int
    turn: Turn | None = None
    base: int = 0
    servers: frozenset[int] = frozenset()  # that have what it did
    sent: dict[int, Report] = field(default_factory=dict)


@dataclass
class World:
    """Workers, and a board that they tell what happens to them; it may die too."""

    rules: Rules
    rounds: Rounds
    servers: frozenset[int] = BOTH
    now: float = 0.0
    workers: dict[int, Worker] = field(default_factory=dict)
    started: Counter[int] = field(default_factory=Counter)
    given: dict[tuple[int, int, int], tuple[Share, int]] = field(default_factory=dict)
    log: list[Any] = field(default_factory=list)
    used: Counter[Share] = field(default_factory=Counter)
    saved: dict[str, Any] | None = None

    @classmethod
    def of(cls, rules: Rules) -> World:
        world = cls(rules, Rounds(rules, Shares(rules.workers, BATCH)))
        for index in range(rules.workers):
            world.start(index)
        return world

    def start(self, index: int) -> None:
        self.workers[index] = Worker(self.started[index])
        self.started[index] += 1
        self.rounds.ready(index, self.workers[index].incarnation, self.now)

    def kill(self, index: int) -> None:
        del self.workers[index]
        self.rounds.lost(index)

    def push(self, index: int, servers: frozenset[int]) -> None:
        """Have a worker do what it was told, and `servers` have that."""
        worker = self.workers[index]
        worker.servers |= servers
        self.tell(index)

    def tell(self, index: int) -> None:
        worker, turn = self.workers[index], self.workers[index].turn
        if turn is not None and worker.servers:
            totals = (1.0, float(index))
            worker.sent[turn.clock] = Report(turn.clock, worker.base, totals, worker.servers)
            self.rounds.report(index, worker.sent[turn.clock])

    def come(self, index: int) -> None:
        """Have a worker tell a board where it is, as `Board.on_ready` hears it."""
        worker, rounds = self.workers[index], self.rounds
        if worker.turn is None:
            rounds.ready(index, worker.incarnation, self.now)
            return
        clock, share = worker.turn.clock, worker.turn.share
        if number_of(clock) > rounds.version and rounds.shares.is_free(share):
            rounds.adopt(index, worker.incarnation, clock, share, self.now)
        else:
            rounds.ready(index, worker.incarnation, self.now, after=clock)
        self.tell(index)

    def take_over(self, order: list[int]) -> None:
        """Have another board go on from what the last one has told with its last round."""
        self.rounds = Rounds(self.rules, Shares(self.rules.workers, BATCH))
        expected = self.rounds.take_up(self.saved) if self.saved is not None else set()
        for index in order:
            self.come(index)
        for index in sorted(expected - set(order)):
            self.rounds.lost(index)

    def go_on(self) -> None:
        """As `Board.go_on`, until nothing follows any more."""
        closed: Closed | None = None
        while True:
            for turn in self.rounds.turns(self.now):
                self.take_turn(turn)
            closed = self.rounds.close(self.now, self.servers)
            if closed is None:
                return
            self.saved = as_json(self.rounds)
            self.check(closed)

    def take_turn(self, turn: Turn) -> None:
        worker = self.workers[turn.worker]
        assert worker.turn is None or turn.clock > worker.turn.clock, "a worker would not listen"
        worker.turn, worker.base, worker.servers = turn, self.rounds.version, frozenset()
        key = (turn.worker, worker.incarnation, turn.clock)
        assert key not in self.given, "servers would take it for what they have"
        self.given[key] = (turn.share, worker.base)
        self.log.append(turn)

    def check(self, closed: Closed) -> None:
        self.log.append(closed)
        assert closed.number == self.rounds.version
        assert closed.workers == tuple(sorted(set(closed.workers)))
        assert closed.totals == (float(len(closed.parts)), float(sum(closed.workers)))
        stale = []
        for part in closed.parts:
            share, base = self.given[part.worker, part.incarnation, part.clock]
            assert part.base == base
            stale.append(closed.number - 1 - base)
            self.used[share] += 1
            if self.rules.mode == "sync":
                assert number_of(part.clock) == closed.number, "another fragment would meet"
            worker = self.workers[part.worker]
            assert worker.incarnation == part.incarnation
            if worker.turn is not None and worker.turn.clock == part.clock:
                assert worker.servers >= self.servers, "servers do not have it"
        assert closed.staleness == max(stale)
        assert min(stale) >= 0
        if self.rules.mode != "async":
            assert closed.staleness <= self.rules.staleness
        if self.rules.mode == "async":
            assert len(closed.parts) == 1

    def check_shares(self) -> None:
        shares = self.rounds.shares
        assert set(self.used.values()) <= {1}, "read twice"
        behind = {Share(c, n) for c in range(0, shares.cursor, BATCH) for n in range(shares.number)}
        assert behind <= self.used.keys(), "not read at all"
        assert shares.num_ahead == len(self.used.keys() - behind)

    def go_to_the_end(self) -> None:
        """Nothing happens any more: all rounds that workers begin are ended by all of them."""
        if not self.workers:
            self.start(0)
        self.now += 1000.0
        version, cursor = self.rounds.version, self.rounds.shares.cursor
        for _ in range(60):
            self.go_on()
            for index in sorted(self.workers):
                if self.workers[index].turn is not None:
                    self.push(index, BOTH)
            self.go_on()
            self.now += 0.01
        assert self.rounds.version >= version + 20, "nobody goes on"
        assert self.rounds.shares.cursor > cursor, "something is never read"
        self.check_shares()


def happen(world: World, rng: random.Random, upsets: bool) -> None:
    """Have something happen; `upsets`: with the board and the servers too."""
    there = sorted(world.workers)
    index = rng.randrange(world.rules.workers)
    what = rng.random()
    if index not in there:
        if what < 0.4:
            world.start(index)
    elif what < 0.65:
        if world.workers[index].turn is not None:
            world.push(index, BOTH if rng.random() < 0.8 else frozenset({rng.randrange(2)}))
    elif what < 0.70:
        world.tell(index)  # again
    elif what < 0.75:
        if sent := world.workers[index].sent:  # a frame that comes twice
            world.rounds.report(index, sent[rng.choice(list(sent))])
    elif what < 0.80:
        world.kill(index)
    elif what < 0.85:
        world.start(index)  # before anybody has noticed that it was gone
    elif what < 0.90:
        world.rounds.lost(index)  # its link was cut for a while
        world.go_on()
        world.come(index)
    elif what < 0.93:
        world.rounds.hold(index)
    elif what < 0.95 and upsets:
        rng.shuffle(there)
        world.take_over(there)
    elif what < 0.96 and upsets:
        world.servers = frozenset({rng.randrange(2)}) if world.servers == BOTH else world.servers
    else:
        world.now += rng.choice([0.1, 1.0, 3.0])


def schedule(mode: Mode, seed: int, staleness: int = 0, upsets: bool = True) -> World:
    rng = random.Random(seed)
    workers = rng.randrange(1, 5)
    quorum = rng.randrange(1, workers + 1)
    world = World.of(
        Rules(mode, workers, quorum, rng.choice([0.0, 1.0, None]), 50.0, 20.0, staleness)
    )
    for _ in range(150):
        happen(world, rng, upsets)
        world.go_on()
        world.check_shares()
    return world


@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_staleness_never_exceeds_its_bound(staleness: int) -> None:
    """`World.check` looks at each round, and `World.check_shares` at each share."""
    most = 0
    for seed in range(100):
        world = schedule("ssp", seed, staleness)
        most = max(most, world.rounds.most_stale)
        world.go_to_the_end()
    assert most == staleness, "the bound is reached"


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_each_share_is_used_once(mode: Mode) -> None:
    for seed in range(100):
        schedule(mode, seed).go_to_the_end()


def test_ssp_with_no_staleness_is_sync() -> None:
    for seed in range(100):
        one, two = schedule("sync", seed), schedule("ssp", seed)
        assert one.log == two.log
        assert one.rounds.to_message() == two.rounds.to_message()


def test_each_round_is_of_its_own_clock() -> None:
    """By which workers and servers know what meets in it, whoever is left alone with one that
    others have done for it (`World.check` looks at it)."""
    anew = 0
    for seed in range(60):
        rng = random.Random(seed)
        world = World.of(Rules("sync", 2, 1, 0.0, 50.0, 20.0))
        for _ in range(60):
            index = rng.randrange(2)
            what = rng.random()
            if index not in world.workers:
                world.start(index)
            elif what < 0.5 and world.workers[index].turn is not None:
                world.push(index, BOTH)
            elif what < 0.7:
                world.kill(index)
            elif what < 0.9:
                cut_off_alone(world, index)
            elif world.workers:
                world.take_over(rng.sample(sorted(world.workers), len(world.workers)))
            world.go_on()
            world.check_shares()
        anew += sum(part.clock > ANEW for part in parts_of(world))
        world.go_to_the_end()
    assert anew > 0, "nobody was"


def cut_off_alone(world: World, index: int) -> None:
    """While a worker's link is cut, another begins what it reads, and dies after the cut."""
    other = 1 - index
    world.kill(other) if other in world.workers else None
    world.rounds.lost(index)
    world.start(other)
    world.go_on()
    world.come(index)
    world.kill(other)
