"""Who reads which samples: none is lost with a worker, and none is read twice. No torch.

A step takes `batch` samples of the stream from a cursor on, cut into as many shares as workers are
meant to be. A worker reads its own share, step after step. What a worker had that is gone, or whose
gradient came too late to count, is read by whoever is next; so are the shares of workers that are
not there, or far behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_FAR_BEHIND = 4  # steps
_MOST_AHEAD = 1 << 16  # steps that a worker may say that it is ahead of what is known


@dataclass(frozen=True, order=True)
class Share:
    """Share `number` of the step that begins at `cursor`, in samples."""

    cursor: int
    number: int


class Shares:
    """The shares of all steps, and what has become of them.

    number: of shares in a step. batch: samples of a step.
    """

    def __init__(self, number: int, batch: int, cursor: int = 0) -> None:
        self.number, self.batch = number, batch
        self.next = [cursor] * number  # of each share: the step that nobody has read yet
        self.returned: list[Share] = []
        self.out: dict[tuple[int, int], Share] = {}  # (worker, round): what it reads for it
        self.num_returned = 0

    def take(self, worker: int, clock: int, workers: Collection[int], late: bool = False) -> Share:
        """Give `worker` what it reads for round `clock`: of what is first in the stream, its own
        share if it can be. `workers` are those that are there. late: its last came too late to
        count; then others read that, who are faster, or all would wait for it for ever."""
        own = Share(self.next[worker], worker)
        far = own.cursor - _FAR_BEHIND * self.batch
        others = [
            Share(cursor, n)
            for n, cursor in enumerate(self.next)
            if n not in workers or cursor <= far
        ]
        returned = [] if late else self.returned
        best = min((own, *others, *returned), key=lambda s: (s.cursor, s.number != worker))
        self._remove(best)
        self.out[worker, clock] = best
        return best

    def is_free(self, share: Share) -> bool:
        """Tell whether nobody has read this, or reads it now."""
        known = 0 <= share.number < self.number
        ahead = share.cursor - self.next[share.number] if known else -1
        near = 0 <= ahead < _MOST_AHEAD * self.batch
        return share in self.returned or (near and ahead % self.batch == 0)

    def adopt(self, worker: int, clock: int, share: Share) -> None:
        """Note that `worker` reads this, as it was told by somebody who is gone."""
        assert self.is_free(share)
        self._remove(share)
        self.out[worker, clock] = share

    def _remove(self, share: Share) -> None:
        if share in self.returned:
            self.returned.remove(share)
            return
        for cursor in range(self.next[share.number], share.cursor, self.batch):
            self.returned.append(Share(cursor, share.number))  # of others, who are gone or come
        self.next[share.number] = share.cursor + self.batch

    def used(self, worker: int, clock: int) -> None:
        """Note that what `worker` has read for a round counts."""
        self.out.pop((worker, clock), None)

    def give_back(self, worker: int, clock: int | None = None) -> None:
        """Let others read what `worker` has, or had begun to read: for one round, or for all."""
        for key in [k for k in self.out if k[0] == worker and clock in (None, k[1])]:
            self.returned.append(self.out.pop(key))
            self.num_returned += 1

    @property
    def cursor(self) -> int:
        """The first step of which not all is used."""
        open_shares = [*self.next, *(s.cursor for s in (*self.returned, *self.out.values()))]
        return min(open_shares)

    @property
    def num_ahead(self) -> int:
        """Shares behind the cursor that are used already: a run that begins at the cursor reads
        them again."""
        ahead = sum((n - self.cursor) // self.batch for n in self.next)
        return ahead - len(self.returned) - len(self.out)

    def to_message(self) -> dict[str, Any]:
        """Return all of it as what JSON can carry."""
        return {
            "next": list(self.next),
            "returned": [[s.cursor, s.number] for s in self.returned],
            "out": [[*key, s.cursor, s.number] for key, s in self.out.items()],
            "num_returned": self.num_returned,
        }

    def take_up(self, message: Mapping[str, Any]) -> None:
        """Let it be what another has told by `to_message`."""
        self.next = list(message["next"])
        self.returned = [Share(*pair) for pair in message["returned"]]
        self.out = {(w, clock): Share(*share) for w, clock, *share in message["out"]}
        self.num_returned = message["num_returned"]
