"""Which blocks meet the servers in which round. No torch.

All in every round, or, so that less is on the wire at a time and workers wait for less, a part of
them in each: streaming DiLoCo (https://arxiv.org/abs/2501.18512).
"""

from __future__ import annotations

from dataclasses import dataclass

ANEW = 1 << 32  # from a clock to the next one of the same round


def number_of(clock: int) -> int:
    """Return the round that a worker's clock is of: workers that are left alone with one that they
    have begun, and of which nothing can come any more, begin it anew, with a clock of its own."""
    return clock % ANEW


@dataclass(frozen=True)
class Fragments:
    """Blocks are in `count` fragments, which take turns.

    whole: in rounds that are multiples of one of these, such as those before a checkpoint, all of
    them meet; 0 is no round.
    """

    count: int = 1
    whole: tuple[int, ...] = ()

    def meets(self, fragment: int, number: int) -> bool:
        """Does that fragment meet in round `number`, from 1 on? Or in that of such a clock."""
        number = number_of(number)
        return (
            self.count == 1
            or (number - 1) % self.count == fragment
            or any(every and number % every == 0 for every in self.whole)
        )

    def meetings(self, fragment: int, after: int, until: int) -> int:
        """Return how often it meets in the rounds after `after` until `until`."""
        if self.count == 1:
            return until - after
        return sum(self.meets(fragment, number) for number in range(after + 1, until + 1))
