"""Where a run is between exact gradients and compressed momentum, and what decides about it.

The same numbers on all ranks, so that all agree.
"""

from __future__ import annotations

from typing import Any

import torch

from bigtrain.comm.wire import Agree, Averages
from bigtrain.errors import BigtrainError
from bigtrain.onebit.switch import Switch

SLOWEST = 0.95  # what the second moment keeps of itself where it sees few gradients


class Course:
    """A switch, the optimizer whose means go on in few bits, and how alike ranks' gradients are.

    senders: ranks, or nodes, that send. together: the squares of the sum of their gradients, over
    the sum of their squares, where that was last known. expected: what gradients were divided by
    last, and will be, it is thought, next.
    """

    def __init__(self, switch: Switch, senders: int) -> None:
        self.switch, self.senders = switch, senders
        self.together = self.expected = 1.0
        self._averages: Averages | None = None

    @property
    def averages(self) -> Averages:
        if self._averages is None:
            raise BigtrainError(
                "momentum is to be compressed, but there is no optimizer for it",
                why="it begins with the first moment that an optimizer keeps",
                mend="make the optimizer of the path: AdamW(path)",
            )
        return self._averages

    def updated_by(self, averages: Averages) -> None:
        """Take note of the optimizer.

        Raises:
            BigtrainError: it cannot be updated with a mean of gradients.
        """
        if not averages.takes_momentum:
            raise BigtrainError(
                f"{type(averages).__name__} cannot be updated with compressed momentum",
                why="it needs each step's gradient, or keeps no second moment",
                mend="use AdamW or LAMB, or compression safe, which suits all",
            )
        self._averages = averages

    @property
    def beta(self) -> float:
        """Of the first moment."""
        beta = self.averages.decays[0]
        if not beta:
            raise BigtrainError(
                "momentum is to be compressed, but the optimizer's first beta is 0",
                why="without a mean over steps, signs of gradients are what is left",
                mend="set optimizer.betas=[0.9, 0.95], or compression.kind=safe",
            )
        return beta

    @property
    def decay(self) -> float:
        """Return what the second moment keeps of itself at a refresh: it is a mean of some."""
        beta2 = self.averages.decays[1]
        return max(beta2**self.switch.distance, min(beta2, SLOWEST))

    def due(self) -> bool:
        """Count a step; is there something to decide?"""
        averages, beta = self.averages, self.beta
        assert beta
        horizon = max(20, round(1 / max(1e-6, 1 - averages.decays[1])))  # of the second moment
        return self.switch.due(horizon, averages.rising, averages.num_updates)

    def note(self, squares: float, apart: float) -> None:
        """Note the squares of a gradient, and the sum of those of the ranks'."""
        if apart > 0:
            self.together = squares / apart

    def all_want(self, vote: bool, everybody: Agree, device: torch.device) -> bool:
        here = torch.tensor([float(vote), 1.0], dtype=torch.float64, device=device)
        votes, ranks = everybody(here).tolist()
        return votes > ranks - 0.5

    def saved(self, scale: float) -> dict[str, Any]:
        """Return what a run must know to go on; scale: of its losses."""
        rest = {
            "expected": self.expected / scale,
            "together": self.together,
            "senders": self.senders,
            "rate": self._averages.rate if self._averages is not None else 0.0,
        }
        return {**self.switch.saved(), **rest}

    def restore(self, saved: dict[str, Any], scale: float) -> None:
        saved = dict(saved)
        self.expected = saved.pop("expected") * scale
        self.averages.rate = saved.pop("rate")  # so that the next one does not seem to rise
        found, before = saved.pop("together"), saved.pop("senders")
        self.together = coherence_of(found, before, self.senders)
        self.switch.restore(saved)


def coherence_of(found: float, before: int, after: int) -> float:
    """Return the squares of the mean gradient over the sum of those of its shares, of which there
    were `before` and are `after`: the same batch, shared by others.

    It is (a + b) / (a / n + b), where a are the squares of the gradient and b those of its noise.
    """
    if found <= 1 or before == 1:
        return min(found, 1.0)
    if found >= before:
        return float(after)
    signal = (found - 1) / (1 - found / before)
    return (signal + 1) / (signal / after + 1)
