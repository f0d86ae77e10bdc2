"""Which blocks meet in which round."""

from __future__ import annotations

import pytest

from bigtrain.server.fragments import ANEW, Fragments, number_of


def meeting(fragments: Fragments, number: int) -> list[int]:
    return [f for f in range(fragments.count) if fragments.meets(f, number)]


def test_one_fragment_meets_always() -> None:
    assert all(meeting(Fragments(), number) == [0] for number in range(1, 20))
    assert Fragments().meetings(0, 5, 9) == 4


@pytest.mark.parametrize("count", [2, 3, 7])
def test_fragments_take_turns(count: int) -> None:
    """Each meets once in as many rounds."""
    fragments = Fragments(count)
    for first in range(1, 2 * count):
        numbers = [meeting(fragments, number) for number in range(first, first + count)]
        assert sorted(f for some in numbers for f in some) == list(range(count))
    assert [fragments.meetings(f, 0, 3 * count) for f in range(count)] == [3] * count


def test_all_meet_where_they_are_to() -> None:
    fragments = Fragments(3, (10, 0, 4))
    everybody = [n for n in range(1, 25) if meeting(fragments, n) == [0, 1, 2]]
    assert everybody == [4, 8, 10, 12, 16, 20, 24]
    assert fragments.meetings(1, 3, 6) == 2  # in 4, with all, and in 5


@pytest.mark.parametrize("fragments", [Fragments(), Fragments(3), Fragments(4, (10, 0, 6))])
def test_a_round_that_is_begun_anew_has_the_same(fragments: Fragments) -> None:
    """Workers and servers know it by the clock; what was updated, by the number of the round."""
    for number in range(1, 40):
        for clock in (number, ANEW + number, 5 * ANEW + number):
            assert number_of(clock) == number
            assert meeting(fragments, clock) == meeting(fragments, number)
            for fragment in range(fragments.count):
                meetings = fragments.meetings(fragment, clock - 1, clock)
                assert meetings == fragments.meets(fragment, number)
