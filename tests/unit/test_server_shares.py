"""Who reads which samples: each is used once, whoever dies, comes late, or joins."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from bigtrain.server.shares import Share, Shares

BATCH = 8


def shares_of(number: int, cursor: int = 0) -> Shares:
    return Shares(number, BATCH, cursor)


def test_each_worker_reads_its_own_share() -> None:
    """And the cursor moves as without servers: when a step is over, by a batch."""
    shares = shares_of(3, cursor=40)
    for clock in range(1, 6):
        begin = 40 + BATCH * (clock - 1)
        for worker in range(3):
            assert shares.take(worker, clock, [0, 1, 2]) == Share(begin, worker)
        for worker in (2, 0, 1):
            assert shares.cursor == begin
            shares.used(worker, clock)
        assert (shares.cursor, shares.num_ahead) == (begin + BATCH, 0)
    assert shares.num_returned == 0


def test_who_is_ahead_reads_on() -> None:
    shares = shares_of(2)
    for clock in (1, 2, 3):
        assert shares.take(0, clock, [0, 1]) == Share(BATCH * (clock - 1), 0)
        shares.used(0, clock)
    assert (shares.cursor, shares.num_ahead) == (0, 3)
    assert shares.take(1, 1, [0, 1]) == Share(0, 1)
    assert (shares.cursor, shares.num_ahead) == (0, 3)
    shares.used(1, 1)
    assert (shares.cursor, shares.num_ahead) == (BATCH, 2)


def test_what_was_returned_is_read_by_who_is_next() -> None:
    shares = shares_of(2)
    for worker in (0, 1):
        shares.take(worker, 1, [0, 1])
    shares.used(0, 1)
    shares.give_back(1)
    assert shares.returned == [Share(0, 1)]
    assert shares.take(0, 2, [0]) == Share(0, 1)
    assert shares.returned == []
    assert shares.take(0, 3, [0]) == Share(BATCH, 0), "of the same step, its own goes first"
    assert shares.take(0, 4, [0]) == Share(BATCH, 1)


def test_one_round_is_given_back_or_all() -> None:
    shares = shares_of(2)
    for clock in (1, 2, 3):
        shares.take(0, clock, [0, 1])
    shares.take(1, 1, [0, 1])
    shares.give_back(0, 2)
    assert shares.returned == [Share(BATCH, 0)]
    assert shares.out == {
        (0, 1): Share(0, 0),
        (0, 3): Share(2 * BATCH, 0),
        (1, 1): Share(0, 1),
    }
    shares.give_back(0, 2)
    assert shares.num_returned == 1, "there is nothing of that round any more"
    shares.give_back(0)
    assert sorted(shares.returned) == [Share(0, 0), Share(BATCH, 0), Share(2 * BATCH, 0)]
    assert shares.out == {(1, 1): Share(0, 1)}
    assert shares.num_returned == 3


def test_shares_of_who_is_not_there_are_read_by_others() -> None:
    shares = shares_of(4)
    read = []
    for clock in range(1, 9):
        read.append(shares.take(2, clock, [2]))
        shares.used(2, clock)
    assert [share.number for share in read[:4]] == [2, 0, 1, 3]
    assert sorted(read) == [Share(step * BATCH, n) for step in (0, 1) for n in range(4)]
    assert (shares.cursor, shares.num_ahead) == (2 * BATCH, 0)


def test_shares_of_who_is_there_are_left_to_it() -> None:
    shares = shares_of(2)
    assert [shares.take(0, clock, [0, 1]).number for clock in range(1, 5)] == [0] * 4
    assert shares.take(1, 5, [0, 1]) == Share(0, 1)


def test_used_twice_is_used() -> None:
    shares = shares_of(1)
    shares.take(0, 1, [0])
    for _ in range(2):
        shares.used(0, 1)
        shares.give_back(0, 1)
    assert (shares.cursor, shares.num_returned) == (BATCH, 0)


def test_another_goes_on_from_a_message() -> None:
    shares = shares_of(3)
    for clock in (1, 2):
        for worker in range(3):
            shares.take(worker, clock, range(3))
    shares.used(0, 1)
    shares.give_back(1)
    message = json.loads(json.dumps(shares.to_message()))
    other = shares_of(3)
    other.take_up(message)
    for one in (shares, other):
        one.used(2, 1)
    assert other.to_message() == shares.to_message()
    assert (other.cursor, other.num_ahead) == (shares.cursor, shares.num_ahead)
    for clock in range(3, 9):
        assert other.take(0, clock, [0, 2]) == shares.take(0, clock, [0, 2])


def test_messages_stay_as_they_are() -> None:
    """They are kept, while shares go on."""
    shares = shares_of(2)
    shares.take(0, 1, [0, 1])
    message = shares.to_message()
    before = json.dumps(message)
    shares.take(1, 1, [0, 1])
    shares.give_back(0)
    assert json.dumps(message) == before
    other = shares_of(2)
    other.take_up(message)
    other.take(1, 1, [0, 1])
    assert json.dumps(message) == before


def test_what_is_free() -> None:
    shares = shares_of(2)
    shares.take(0, 1, [0, 1])
    assert not shares.is_free(Share(0, 0)), "somebody reads it"
    assert shares.is_free(Share(0, 1))
    assert shares.is_free(Share(BATCH, 0))
    shares.used(0, 1)
    assert not shares.is_free(Share(0, 0)), "it was read"
    shares.take(1, 1, [0, 1])
    shares.give_back(1)
    assert shares.is_free(Share(0, 1)), "it was given back"
    for share in (
        Share(BATCH, 2),
        Share(BATCH, -1),
        Share(-BATCH, 0),
        Share(BATCH + 1, 0),
        Share(BATCH << 50, 0),
    ):
        assert not shares.is_free(share), "there is none such"


def test_what_somebody_reads_is_noted() -> None:
    shares = shares_of(2)
    shares.adopt(1, 7, Share(0, 1))
    assert shares.out == {(1, 7): Share(0, 1)}
    assert not shares.is_free(Share(0, 1))
    assert shares.take(0, 7, [0, 1]) == Share(0, 0)
    shares.give_back(1)
    shares.adopt(0, 8, Share(0, 1))
    assert shares.returned == []
    with pytest.raises(AssertionError):
        shares.adopt(1, 8, Share(0, 1))


def test_adopted_shares_leave_none_behind() -> None:
    """Two may have read of one share that nobody reads now; the later one comes first, or alone."""
    shares = shares_of(2)
    shares.adopt(0, 3, Share(2 * BATCH, 1))
    assert shares.cursor == 0
    shares.adopt(1, 3, Share(BATCH, 1))
    for worker in (0, 1):
        shares.used(worker, 3)
    read = [shares.take(0, clock, [0, 1]) for clock in (4, 5)]
    assert sorted(read) == [Share(0, 0), Share(0, 1)]


def random_schedule(seed: int) -> tuple[Shares, Counter[Share]]:
    """Return what has become of shares in the hands of workers that come, go, are late or ahead,
    and how often each was used."""
    rng = random.Random(seed)
    number = rng.randrange(1, 6)
    shares, used = shares_of(number), Counter[Share]()
    clocks = dict.fromkeys(range(number), 0)  # of who is there
    reading: dict[tuple[int, int], Share] = {}
    for _ in range(200):
        worker = rng.randrange(number)
        mine = [clock for w, clock in reading if w == worker]
        what = rng.random()
        if worker not in clocks:
            if what < 0.2:
                clocks[worker] = max(clocks.values(), default=0)
        elif what < 0.45 and len(mine) < 3:
            clocks[worker] += 1
            share = shares.take(worker, clocks[worker], clocks)
            assert share not in reading.values()
            reading[worker, clocks[worker]] = share
        elif what < 0.85 and mine:
            shares.used(worker, min(mine))
            used[reading.pop((worker, min(mine)))] += 1
        elif what < 0.95 and mine:
            shares.give_back(worker, min(mine))
            del reading[worker, min(mine)]
        elif what >= 0.95:
            shares.give_back(worker)
            reading = {key: share for key, share in reading.items() if key[0] != worker}
            del clocks[worker]
        if what < 0.05:
            message = json.loads(json.dumps(shares.to_message()))
            shares = shares_of(number)
            shares.take_up(message)
    assert shares.out == reading
    return shares, used


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_each_share_is_used_once(first: int) -> None:
    for seed in range(first, first + 50):
        shares, used = random_schedule(seed)
        assert set(used.values()) <= {1}
        behind = {Share(c, n) for c in range(0, shares.cursor, BATCH) for n in range(shares.number)}
        assert behind <= used.keys()
        assert shares.num_ahead == len(used.keys() - behind)
        ends = [share.cursor for share in (*used, *shares.out.values(), *shares.returned)]
        for worker in list(dict.fromkeys(w for w, _ in shares.out)):
            shares.give_back(worker)
        clock = 10**6  # and one worker can read all that is left, up to where the furthest was
        while shares.cursor <= max(ends, default=0):
            clock += 1
            used[shares.take(0, clock, [0])] += 1
            shares.used(0, clock)
        assert set(used.values()) == {1}
        assert {share for share in used if share.cursor < shares.cursor} == {
            Share(c, n) for c in range(0, shares.cursor, BATCH) for n in range(shares.number)
        }
