"""1-bit Adam, 1-bit LAMB and 0/1 Adam: every rank holds, and updates, everything.

Sources: https://arxiv.org/abs/2102.02888, https://arxiv.org/abs/2104.06069,
https://arxiv.org/abs/2202.06009. Each rank makes its own momentum from the common one and its
gradient; in two phases it becomes the mean of all ranks: signs to the rank that adds up a part,
signs of the sum to all, both with error feedback. The variance stays as it is, or, in 0/1 Adam,
takes up exact gradients at growing distances. 0/1 Adam adds up what parameters have moved by, times
the root of the variance, and does that in some steps only; in between ranks go their own ways.

Beyond the papers: a warm-up ends by itself, a first moment is held to what it can be beside its
variance (in place of a mask that the user makes), all ranks clip by one norm, and what was lost
goes into the first moment where a run saves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bigtrain.comm.buckets import Bucket, Momentum
from bigtrain.comm.collectives import Pending, all_reduce
from bigtrain.comm.mesh import Axis
from bigtrain.comm.sync import Replicated
from bigtrain.comm.wire import Agree, Averages
from bigtrain.errors import BigtrainError
from bigtrain.onebit.codec import Signs
from bigtrain.onebit.course import Course
from bigtrain.onebit.switch import Switch
from bigtrain.onebit.two_phase import FP32, TwoPhase
from bigtrain.ops.grad_norm import grad_norm

LOOK = 256  # steps of 1-bit Adam and LAMB of which one sends the gradient exactly, too


@dataclass
class Way:
    """What a rank has gone on its own in a bucket, since all ranks met.

    moved: of parameters, times the variance's root: momenta times rates, which add up to `rates`.
    start: main parameters then; None where ranks met in the step before.
    """

    moved: torch.Tensor
    start: torch.Tensor | None = None
    steps: int = 0
    rates: float = 0.0


class MeanMomentum:
    """The ledger of `Published`: momentum of one bit among all ranks, once a divisor is known.

    local_steps: steps from one exchange to the next, at most (0/1 Adam); 1: in each. None: momentum
    itself is what ranks add up (1-bit Adam, 1-bit LAMB).
    """

    keeps = True

    def __init__(
        self, axis: Axis, signs: Signs, switch: Switch, local_steps: int | None = None
    ) -> None:
        self.axis, self.switch, self.local_steps = axis, switch, local_steps
        self.phases = TwoPhase(axis, signs)
        self.course = Course(switch, axis.degree)
        self._ways: dict[int, Way] = {}
        self._rate = 0.0  # of the last step that had any
        self._squares: dict[int, torch.Tensor] = {}  # of all ranks' gradients, added up
        self._exact: dict[int, torch.Tensor] = {}  # and of their sum, where it is known
        self._unused = False
        self._scale = 1.0

    @staticmethod
    def takes(bucket: Bucket) -> bool:
        return bucket.sharing.own_grads

    @property
    def exactly(self) -> bool:
        """Does the gradient of this step go exactly? Now and then it does to tell its length."""
        switch = self.switch
        looks = self.local_steps is None and switch.now.steps % LOOK == LOOK - 1
        return not switch.compressed or switch.refreshes or looks

    @property
    def _interval(self) -> int:
        """Return the steps from one exchange to the next; one while the rate still rises."""
        if not self.local_steps or self.course.averages.rising:
            return 1
        return min(self.local_steps, self.switch.distance)

    def bytes_of_update(self, bucket: Bucket) -> int:
        """Return those of an exact gradient, until the variance has taken it up."""
        takes_up = self.takes(bucket) and self.local_steps is not None
        return FP32 * bucket.numel if takes_up else 0

    def bytes_kept(self, bucket: Bucket) -> int:
        if not self.takes(bucket):
            return 0
        ways = 0 if self.local_steps is None else 1 if self.local_steps == 1 else 2
        return self.phases.bytes_kept(bucket.numel) + ways * FP32 * bucket.numel

    # -- a step --------------------------------------------------------------------------------

    def measure(self, buckets: Sequence[Bucket]) -> None:
        """Note the squares of all ranks' gradients; communicates a number for each bucket."""
        mine = [bucket for bucket in buckets if self.takes(bucket)]
        if not mine:
            return
        squares = torch.stack([grad_norm([b.open_grads()]).squares for b in mine])
        all_reduce(squares, self.axis, "all_reduce of the squares of gradients")
        self._squares = {b.index: s for b, s in zip(mine, squares, strict=True)}
        if self.exactly:
            self._exact = {b.index: grad_norm([b.main_grads]).squares for b in mine}

    def squares(self, bucket: Bucket) -> torch.Tensor | None:
        """Return an estimate, as of `MomentumWire`; None where the gradient itself has come."""
        if not self.takes(bucket) or self.exactly:
            return None
        return self.course.together * self._squares[bucket.index]

    def divided(self, buckets: Sequence[Bucket], divisor: float) -> None:
        """Bring momentum to the optimizer: the mean of all ranks', or, between exchanges, its own.

        Communicates as `TwoPhase`, all buckets at once.
        """
        self._unused = not math.isfinite(divisor)
        if self._unused:
            return
        self.course.expected = divisor
        if not self.switch.compressed:
            return
        self._rate = self.course.averages.rate or self._rate
        mine = [bucket for bucket in buckets if self.takes(bucket)]
        for bucket in mine:
            self._add_gradient(bucket, divisor)
        pending = [(b, self._start(b)) for b in mine if self._meets(b)]
        for _, each in pending:
            each.advance()
        for bucket, each in pending:
            self._meet(bucket, each.wait())

    def _add_gradient(self, bucket: Bucket, divisor: float) -> None:
        """Let `main_grads` be this rank's momentum, with this step's gradient."""
        bucket.momentum = Momentum(alone=True)
        if self.switch.refreshes:
            bucket.momentum.gradient = bucket.main_grads.clone()
            bucket.momentum.decay = self.course.decay
        beta = self.course.beta
        share = (1 - beta) * self.axis.degree / divisor  # gradients are divided by it already
        mean = self.course.averages.first_moment(bucket)
        torch.add(mean.mul_(beta), bucket.open_grads(), alpha=share, out=bucket.main_grads)
        if self.local_steps is None:
            return
        if bucket.index not in self._ways:
            self._ways[bucket.index] = Way(torch.zeros_like(bucket.main_grads))
        way, rate = self._ways[bucket.index], self.course.averages.rate
        way.moved.add_(bucket.main_grads, alpha=rate)
        way.steps, way.rates = way.steps + 1, way.rates + rate
        if way.start is None and self._interval > 1:
            way.start = bucket.main_params.clone()

    def _meets(self, bucket: Bucket) -> bool:
        """Do ranks meet in this step? The same in all buckets, and on all ranks."""
        if self.local_steps is None:
            return True
        way = self._ways[bucket.index]
        return way.rates > 0 and (self.switch.refreshes or way.steps >= self._interval)

    def _start(self, bucket: Bucket) -> Pending[torch.Tensor]:
        flat = bucket.main_grads if self.local_steps is None else self._ways[bucket.index].moved
        return self.phases.start(bucket.index, flat / self.axis.degree)

    def _meet(self, bucket: Bucket, mean: torch.Tensor) -> None:
        """Update from what all ranks have, with the mean of their momenta, at all their rates."""
        assert bucket.momentum is not None
        bucket.momentum.alone = False
        bucket.main_grads.copy_(mean)
        bucket.clear_owned_gaps(bucket.main_grads)  # signs are never zero
        if self.local_steps is None:
            return
        way = self._ways[bucket.index]
        bucket.main_grads.div_(way.rates)
        bucket.momentum.rate = way.rates
        if way.start is not None:
            bucket.main_params.copy_(way.start)
        self._ways[bucket.index] = Way(way.moved.zero_())

    def rescale(self, buckets: Sequence[Bucket], scale: float) -> None:
        """What is kept is divided already."""
        self.course.expected *= scale / self._scale
        self._scale = scale

    # -- what is kept --------------------------------------------------------------------------

    def consolidate(self, bucket: Bucket) -> None:
        """Let ranks meet, exactly, and give what was lost to the first moment, the same on all.

        Communicates all-reduces of fp32: of what was lost; between exchanges of parameters and of
        first moments, too.
        """
        if not self.takes(bucket) or not self.switch.compressed:
            return
        averages, index = self.course.averages, bucket.index
        mean, way = averages.first_moment(bucket), self._ways.pop(index, None)
        if way is not None and way.steps:
            self._average(bucket.main_params, f"all_reduce of parameters of bucket {index}")
            self._average(mean, f"all_reduce of the first moment of bucket {index}")
        lost = self.phases.take_errors(index, bucket.numel, mean.device)
        if owed := self._owed():
            mean.add_(lost, alpha=1 / owed)
        bucket.clear_owned_gaps(mean)
        averages.set_first_moment(bucket, mean)

    def _owed(self) -> float:
        """Return what 1 more in the first moment brings until ranks meet next, as they add it up.

        It fades in each step: that is beta; or, of n steps at a rate, beta + ... + beta^n of it.
        """
        beta = self.course.beta
        if self.local_steps is None:
            return beta
        return self._rate * beta * (1 - beta**self._interval) / (1 - beta)

    def _average(self, tensor: torch.Tensor, what: str) -> None:
        all_reduce(tensor, self.axis, what)
        tensor /= self.axis.degree

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        return None  # optimizers have it, after `consolidate`

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        """Optimizers have it."""
        self.phases.forget(bucket.index)
        self._ways.pop(bucket.index, None)

    def abandon(self, bucket: Bucket) -> None:
        """Nothing of a gradient is kept before its divisor is known."""
        bucket.momentum = None

    # -- as all go on --------------------------------------------------------------------------

    def updated_by(self, averages: Averages) -> None:
        if self.local_steps is not None and not averages.takes_own_momentum:
            raise BigtrainError(
                f"{type(averages).__name__} cannot be updated as 0/1 Adam",
                why="the length of a step would be another on each rank",
                mend="use AdamW, or compression onebit",
            )
        self.course.updated_by(averages)

    def review(
        self, buckets: Sequence[Bucket], everybody: Agree, device: torch.device, *, stepped: bool
    ) -> None:
        exactly = self.exactly
        mine = [bucket for bucket in buckets if self.takes(bucket)]
        if stepped and not self._unused:
            due = self.course.due()
            if due or (exactly and self.switch.compressed):
                self._decide(mine, everybody, device)
        for bucket in mine:
            bucket.momentum = None

    def _decide(self, mine: Sequence[Bucket], everybody: Agree, device: torch.device) -> None:
        """See how alike gradients are; end the warm-up once the variance has settled."""
        here = torch.zeros(3, dtype=torch.float64, device=device)
        for bucket in mine:
            here[0] += self.course.averages.sum_of_variance(bucket)
            here[1] += self._exact[bucket.index]
            here[2] += self._squares[bucket.index]
        seen = everybody(here).tolist()
        self.course.note(seen[1], seen[2])
        if not self.switch.compressed:
            good = self.switch.settled(seen[0])
            if self.course.all_want(good, everybody, device):
                self.switch.begin("compressed")

    @property
    def progress(self) -> dict[str, Any] | None:
        return self.course.saved(self._scale)

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            self.course.restore(saved, self._scale)
            if self.switch.now.phase in ("shadow", "off"):  # in which another kind was
                self.switch.begin("exact")


class Published(Replicated):
    """Every rank updates everything, with a mean of momenta in place of one of gradients.

    reduce: as `Replicated`, of what goes exactly; of the rest nothing, but in steps that the
    variance takes up. The ledger brings the rest after backward, as these algorithms do.
    """

    def __init__(self, axis: Axis, ledger: MeanMomentum) -> None:
        super().__init__(axis)
        self.ledger: MeanMomentum = ledger
        self._reduced: list[Bucket] = []
        self._num_buckets = 0

    def attach(self, model: nn.Module, buckets: Sequence[Bucket]) -> None:
        super().attach(model, buckets)
        self._num_buckets = sum(bucket.trained for bucket in buckets)

    def reduce(self, bucket: Bucket) -> None:
        self._reduced.append(bucket)
        if self.ledger.takes(bucket):
            bucket.main_grads.copy_(bucket.open_grads())
            if not self.ledger.exactly:
                return
        super().reduce(bucket)

    def finish(self) -> None:
        super().finish()
        if len(self._reduced) == self._num_buckets:  # else the step is abandoned
            self.ledger.measure(self._reduced)
        self._reduced.clear()
