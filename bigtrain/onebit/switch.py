"""When to compress: after a warm-up, while it is safe, and where it pays. Numbers in, a phase out.

All ranks give it the same numbers, so they agree. It communicates nothing.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

log = logging.getLogger(__name__)

Phase = Literal["exact", "shadow", "compressed", "off"]
SAID = {
    "shadow": "the variance has settled: for 20 steps, compression is tried beside exact gradients",
    "compressed": "gradients go compressed from now on",
}
STABLE = 0.1  # the variance may change by that, in the time over which it is a mean
SHADOW_STEPS = 20
LAG = 10.0  # what is kept may be so many times as long as it should be, at most
GROWTH = 4.0  # of the gradient's squares over the variance, at most
RETRY = 1000  # steps after which it is seen again whether compression pays
REFRESHES = 16  # before the distance between them doubles
FARTHEST = 256  # steps between two of them, at most, or what they begin with


@dataclass
class Clock:
    """Seconds of some exact steps of this rank, and what compressing beside them took."""

    steps: int = 0
    exposed: float = 0.0  # waiting for what is on the wire
    coding: float = 0.0


@dataclass
class Progress:
    """Where a run is. steps: since the phase has begun; next_refresh: of these, the next one."""

    phase: Phase = "exact"
    steps: int = 0
    variance: float = 0.0
    next_refresh: int = 0
    num_refreshes: int = 0


class Switch:
    """Decides whether gradients go exactly or compressed.

    first: steps that go exactly at least. refresh_every: compressed steps between two in which the
    variance is brought up to date, at first; the distance doubles after each 16 of them (0/1 Adam,
    https://arxiv.org/abs/2202.06009), up to 256. always: also where it does not pay.
    """

    def __init__(self, *, first: int = 0, refresh_every: int = 16, always: bool = False) -> None:
        self.first, self.refresh_every, self.always = first, refresh_every, always
        self.now = Progress()

    # -- what a step is ------------------------------------------------------------------------

    @property
    def compressed(self) -> bool:
        return self.now.phase == "compressed"

    @property
    def shadow(self) -> bool:
        """Is it tried what compression would do, while gradients go exactly?"""
        return self.now.phase == "shadow"

    @property
    def refreshes(self) -> bool:
        """Does the variance take up the gradient of this step?"""
        return (
            self.compressed and self.refresh_every > 0 and self.now.steps >= self.now.next_refresh
        )

    @property
    def distance(self) -> int:
        """Steps from one refresh to the next."""
        grown = self.refresh_every * 2 ** min(20, self.now.num_refreshes // REFRESHES)
        return min(grown, max(FARTHEST, self.refresh_every))

    # -- the end of a step ---------------------------------------------------------------------

    def due(self, horizon: int, rising: bool, updates: int) -> bool:
        """Count a step; is there something to decide? `horizon`: steps of which the variance is a
        mean; `rising`: does the learning rate still rise? `updates`: of the whole run."""
        refreshed = self.refreshes
        now = self.now
        now.steps += 1
        if now.phase == "exact":
            if rising:
                now.steps, now.variance = 0, 0.0
                return False
            enough = updates >= self.first and now.steps >= 2 * horizon
            return enough and now.steps % horizon == 0
        if now.phase == "shadow":
            return now.steps >= SHADOW_STEPS
        if now.phase == "off":
            return now.steps >= RETRY
        if refreshed:
            now.num_refreshes += 1
            now.next_refresh = now.steps - 1 + self.distance
        return refreshed

    def settled(self, variance: float) -> bool:
        """Is the sum of the second moments about what it was a horizon ago?"""
        before, self.now.variance = self.now.variance, variance
        return before > 0 < variance and abs(math.log(variance / before)) < STABLE

    def follows(self, lag: float) -> bool:
        """Would what is sent follow? lag: of what is kept, beside what should be."""
        log.debug("compression would keep %.2g times the momentum", lag)
        return lag < LAG

    def pays(self, clock: Clock, saved: float) -> bool:
        """Does it save more time than it takes? saved: share of the bytes that are not sent."""
        if self.always or not clock.steps:
            return True
        exposed, coding = clock.exposed / clock.steps, clock.coding / clock.steps
        worth = exposed * saved > coding
        log.info(
            "compression %s: a step waits %.1f ms for exact gradients and updates, of which %.0f%% "
            "would be saved; compressing takes about %.1f ms",
            "pays" if worth else "does not pay and stays off",
            1e3 * exposed,
            100 * saved,
            1e3 * coding,
        )
        return worth

    def drifts(self, growth: float, lag: float) -> bool:
        """Must gradients go exactly for a while? growth: of their squares over the variance."""
        bad = not (growth < GROWTH and lag < LAG)
        if bad:
            log.warning(
                "gradients go exactly again for a while: their squares are %.2g times the variance "
                "(at most %g), what is not sent yet %.2g times the momentum (at most %g)",
                growth,
                GROWTH,
                lag,
                LAG,
            )
        return bad

    def begin(self, phase: Phase) -> None:
        """Go on in another phase."""
        if phase in SAID:
            log.info(SAID[phase])
        refresh = self.refresh_every - 1 if phase == "compressed" else 0
        self.now = Progress(phase, variance=0.0, next_refresh=refresh)

    # -- checkpoints ---------------------------------------------------------------------------

    def saved(self) -> dict[str, Any]:
        return asdict(self.now)

    def restore(self, saved: dict[str, Any]) -> None:
        self.now = Progress(**saved)
