"""Momentum in one bit to owners, updates in one or four bits back.

Each rank keeps z, to which a step adds its gradient, and of which it sends the signs s, times the
root of the mean square of their block; it keeps z - (1 - beta) s. Were nothing lost, that would be
beta z, so that (1 - beta) z is the running mean of gradients, the first moment of Adam. As it is,
all that is sent and what is kept add up to all gradients. So momentum and the error of its signs
are one buffer, of 4 bytes for each element. Owners add up what comes, and that is their first
moment; the second one, which needs gradients, takes up some that come exactly, now and then.

A warm-up goes exactly, until the variance has settled, and ends with a few steps in which gradients
are compressed beside it, to see whether that follows and whether it pays. Sources: momentum of one
bit beside a variance that stays (1-bit Adam, https://arxiv.org/abs/2102.02888), variance brought up
to date at growing distances (0/1 Adam, https://arxiv.org/abs/2202.06009), momentum as the residual
of what was sent (DeMo, https://arxiv.org/abs/2411.19870).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from bigtrain.comm.buckets import Bucket, Momentum
from bigtrain.comm.collectives import Pending, start_all_gather, start_all_to_all
from bigtrain.comm.mesh import Axis, Nodes
from bigtrain.comm.nodes import leaving
from bigtrain.comm.wire import Agree, Averages, Wire
from bigtrain.onebit.codec import Codec, Signs
from bigtrain.onebit.course import Course
from bigtrain.onebit.feedback import SPIKE, FeedbackWire
from bigtrain.onebit.switch import Clock, Phase, Switch
from bigtrain.ops.grad_norm import grad_norm

R = TypeVar("R")
ALIKE = 0.01  # divisors that differ by less are one


class MomentumWire(FeedbackWire):
    """Sends what it keeps of momentum, and keeps what of it is not sent; see the module.

    Wire, once gradients go compressed: of each element (n-1)/n of 1 bit and its share of a bf16
    scale, and of what `down` packs; in steps that refresh the variance, what `refreshing` sends
    besides. All that is kept is in units of gradients that are not divided yet.

    Needs an optimizer with a first and a second moment. senders: ranks, or nodes, that send.
    """

    once_a_step = True

    def __init__(
        self,
        plain: Wire,
        refreshing: Wire,
        up: Signs,
        down: Codec,
        switch: Switch,
        *,
        resync_every: int = 500,
        senders: int = 1,
    ) -> None:
        super().__init__(plain, up, down, resync_every=resync_every)
        self.refreshing, self.switch = refreshing, switch
        self.course = Course(switch, senders)
        self.clock = Clock()
        self._stale: set[int] = set()  # buckets of which the first moment knows better
        self._squares: dict[int, torch.Tensor] = {}  # of this rank's gradients of a step
        self._wrong: set[int] = set()  # buckets in which these are not finite
        self._unused = False  # the gradient of this step, since its divisor is no number
        self._beside: dict[int, Pending[list[torch.Tensor]]] = {}

    def updated_by(self, averages: Averages) -> None:
        self.course.updated_by(averages)

    @property
    def beta(self) -> float:
        return self.course.beta

    def bytes_per_element(self, bucket: Bucket) -> float:
        return self.plain.bytes_per_element(bucket)  # while they go exactly, and at most

    # -- gradients -----------------------------------------------------------------------------

    def leave(self, bucket: Bucket, rows: torch.Tensor, axis: Axis) -> Pending[list[torch.Tensor]]:
        if not bucket.sharing.compressed:
            return self.plain.leave(bucket, rows, axis)
        if not self.switch.compressed:
            if self.switch.shadow:
                self._try(bucket, rows)
            return self._timed(self.plain.leave(bucket, rows, axis), rows.device)
        assert bucket.index not in self._stale, "all ranks begin together, in `review`"
        if self.switch.refreshes:
            self._beside[bucket.index] = self.refreshing.leave(bucket, rows, axis)
        if self._measure(bucket, rows):
            return self.send("momentum", bucket, rows, axis, gone=1 - self.beta)
        return self._send_nan(bucket, axis)

    def _measure(self, bucket: Bucket, rows: torch.Tensor) -> bool:
        """Take note of the squares of what this rank sends of gradients; are they finite?"""
        squares = grad_norm(list(rows)).squares
        self._squares[bucket.index] = squares
        self._wrong.discard(bucket.index)
        if math.isfinite(float(squares)):
            return True
        self._wrong.add(bucket.index)
        return False

    def _send_nan(self, bucket: Bucket, axis: Axis) -> Pending[list[torch.Tensor]]:
        """Tell all owners that gradients are not finite, and leave what is kept as it is."""
        frame = self._frame("momentum", bucket, bucket.main_grads.numel())
        messages = frame.messages(axis.degree, bucket.params.device)
        for message in messages:
            scales, bits = frame.open(message)
            scales.fill_(math.nan)
            bits.zero_()
        return start_all_to_all(messages, axis, f"all_to_all of {frame}")

    def add_up(
        self, bucket: Bucket, arrived: Sequence[torch.Tensor], out: torch.Tensor, *, first: bool
    ) -> None:
        if not bucket.sharing.compressed or not self.switch.compressed:
            self.plain.add_up(bucket, arrived, out, first=first)
            return
        assert first, "momentum is sent once a step"
        weight = (1 - self.beta) / self.course.expected
        self.receive("momentum", bucket, arrived, out, weight, first=True)
        bucket.clear_owned_gaps(out)  # signs are never zero
        bucket.momentum = Momentum()
        if beside := self._beside.pop(bucket.index, None):
            gradient = torch.empty_like(out)
            self.refreshing.add_up(bucket, beside.wait(), gradient, first=True)
            bucket.momentum.gradient = gradient
            bucket.momentum.decay = self.course.decay

    def squares(self, bucket: Bucket) -> torch.Tensor | None:
        """Return this rank's share: of the gradient itself, where it came, or of an estimate.

        Signs have squares of their own, so they do not tell. The squares of the sum are a part of
        the sum of squares of all ranks', of which the last gradient that came exactly told.
        """
        momentum = bucket.momentum
        if momentum is None:
            return None
        if momentum.gradient is not None:
            squares = grad_norm([momentum.gradient]).squares
        else:
            squares = self.course.together * self._squares[bucket.index]
        bad = grad_norm([bucket.main_grads]).num_not_finite > 0
        return torch.where(bad, torch.nan, squares)

    def divided(self, buckets: Sequence[Bucket], divisor: float) -> None:
        """Weigh this step's gradient in what is kept as its divisor says.

        It was sent as if it were divided as the one before. Where it is divided by far more, what
        was sent is left aside, and owners let their mean fade as it would without a gradient; what
        is kept has the gradient then, as long as it should be.
        """
        with_momentum = [bucket for bucket in buckets if bucket.momentum is not None]
        self._unused = not math.isfinite(divisor)
        if self._unused:  # nothing is updated, so nothing was sent
            for bucket in with_momentum:
                self.abandon(bucket)
            return
        ratio, self._divisor = divisor / self.course.expected, divisor
        spike = self.switch.compressed and ratio > SPIKE  # on all ranks, with buckets or without
        if self.switch.compressed and abs(ratio - 1) <= ALIKE:
            return
        for bucket in with_momentum:
            assert bucket.momentum is not None
            kept, sent = self._kept[bucket.index], self._sent_of(bucket)
            if spike:  # in units of what is expected from now on
                bucket.momentum.fades = self.beta
                before = (kept.values - sent) * self.beta
                kept.set((before + sent / ratio) * SPIKE)
            else:
                rest = self.errors(bucket).view_as(kept.values)
                kept.set(rest * ratio + sent * (1 - ratio))
        self.course.expected = self.course.expected * SPIKE if spike else divisor

    def rescale(self, buckets: Sequence[Bucket], scale: float) -> None:
        self.course.expected *= scale / self._scale
        super().rescale(buckets, scale)

    def _sent_of(self, bucket: Bucket) -> torch.Tensor:
        """Return the rows of this step's gradients that this rank has sent, as they were."""
        return leaving(bucket.open_grads(), bucket.sharing.nodes)

    # -- parameters ----------------------------------------------------------------------------

    def publish(self, bucket: Bucket, nodes: Nodes) -> Pending[torch.Tensor]:
        pending = super().publish(bucket, nodes)
        exactly = bucket.sharing.compressed and self.switch.shadow
        return self._timed(pending, bucket.params.device) if exactly else pending

    def _publishes_exactly(self, bucket: Bucket) -> bool:
        return super()._publishes_exactly(bucket) or not self.switch.compressed

    # -- what is kept --------------------------------------------------------------------------

    def _begin(self, bucket: Bucket) -> None:
        """Begin with the owners' first moment; communicates an all-gather of it, in fp32."""
        if bucket.index not in self._stale:
            return
        self._stale.discard(bucket.index)
        across, mean = bucket.sharing.nodes.across, self.course.averages.first_moment(bucket)
        what = f"all_gather of the first moment of bucket {bucket.index}"
        every = start_all_gather(mean, across, what).wait()
        share = self.beta * self.course.expected / ((1 - self.beta) * across.degree)
        self.kept_of(bucket).set(every * share)

    def consolidate(self, bucket: Bucket) -> None:
        """Bring the mean of gradients to the optimizers; ranks begin anew with that.

        Communicates a reduce-scatter of fp32, and an all-gather once all is published.
        """
        if not bucket.sharing.compressed:
            return
        if self.switch.compressed and bucket.index not in self._stale:
            share = (1 - self.beta) / (self.beta * self.course.expected)
            mean = self.total_errors(bucket) * share
            bucket.clear_owned_gaps(mean)
            self.course.averages.set_first_moment(bucket, mean)
        self.restore(bucket, None)

    def kept(self, bucket: Bucket) -> torch.Tensor | None:
        return None  # optimizers have it, after `consolidate`

    def restore(self, bucket: Bucket, kept: torch.Tensor | None) -> None:
        if bucket.sharing.compressed:
            self._stale.add(bucket.index)
            self._since[bucket.index] = 0

    def abandon(self, bucket: Bucket) -> None:
        """Take this step's gradient off what is kept, and the error of what was sent with it."""
        if bucket.momentum is not None and bucket.index not in self._wrong:
            kept = self._kept[bucket.index]
            kept.set(kept.values - self._sent_of(bucket))
        bucket.momentum = None
        self._beside.pop(bucket.index, None)
        self._since[bucket.index] = 0

    # -- as all go on --------------------------------------------------------------------------

    def _timed(self, pending: Pending[R], device: torch.device) -> Pending[R]:
        return _Timed(pending, self.clock, device) if self.switch.shadow else pending

    def _try(self, bucket: Bucket, rows: torch.Tensor) -> None:
        """Compress a gradient that goes exactly, to see what that would do."""
        began = time.perf_counter()
        self._measure(bucket, rows)
        kept = self.kept_of(bucket)
        frame = self._framed("momentum", bucket.index, 0, rows.shape[1])
        messages = frame.messages(len(rows), rows.device)
        self.up.pack(rows, kept, [frame.open(message) for message in messages], 1 - self.beta)
        # Adding up takes about as long as packing, and so do updates.
        self.clock.coding += 3 * (time.perf_counter() - began)

    def review(
        self, buckets: Sequence[Bucket], everybody: Agree, device: torch.device, *, stepped: bool
    ) -> None:
        mine, switch = [bucket for bucket in buckets if bucket.sharing.compressed], self.switch
        if stepped and not self._unused:
            self.clock.steps += switch.shadow
            if self.course.due():
                self._decide(mine, everybody, device)
        for bucket in mine:
            bucket.momentum = None  # it has been used
        self._begin_all(mine)

    def _decide(self, mine: Sequence[Bucket], everybody: Agree, device: torch.device) -> None:
        switch = self.switch
        seen = everybody(self._look(mine, device))
        if switch.now.phase == "exact":
            good = switch.settled(float(seen[0]))
            agreed = self.course.all_want(good, everybody, device)
            self._go_on("shadow" if agreed else None, mine)
        elif switch.now.phase == "off":
            self._go_on("exact", mine)
        elif switch.shadow:
            self.course.note(float(seen[1]), float(seen[2]))
            follows = self.course.all_want(switch.follows(self._lag(seen)), everybody, device)
            pays = self._pays(everybody, device)
            self._go_on("exact" if not follows else "compressed" if pays else "off", mine)
        else:
            self.course.note(float(seen[1]), float(seen[2]))
            divisor = self._divisor or 1.0
            growth = float(seen[1]) / divisor**2 / max(float(seen[0]), 1e-300)
            good = not switch.drifts(growth, self._lag(seen))
            self._go_on(None if self.course.all_want(good, everybody, device) else "exact", mine)

    def _look(self, mine: Sequence[Bucket], device: torch.device) -> torch.Tensor:
        """Return what this rank adds to sums over owners: the variance; squares of the gradient, of
        the ranks' gradients, of what they keep, and of the first moment."""
        seen = torch.zeros(5, dtype=torch.float64, device=device)
        for bucket in mine:
            gradient = bucket.momentum.gradient if bucket.momentum else bucket.main_grads
            seen[0] += self.course.averages.sum_of_variance(bucket)
            if gradient is not None:
                seen[1] += grad_norm([gradient]).squares
            if bucket.index in self._squares:
                seen[2] += self._squares[bucket.index]
                seen[3] += grad_norm([self.errors(bucket)]).squares
            seen[4] += grad_norm([self.course.averages.first_moment(bucket)]).squares
        return seen

    def _lag(self, seen: torch.Tensor) -> float:
        """Return how long what is kept is, beside what would be kept if nothing were lost."""
        unit = self.beta * self.course.expected / (1 - self.beta)
        wanted = float(seen[4]) * unit**2 / max(self.course.together, 1e-12)  # of each rank alone
        return math.sqrt(float(seen[3]) / max(wanted, 1e-300))

    def _pays(self, everybody: Agree, device: torch.device) -> bool:
        """Ask the clocks of all ranks, of which the mean counts."""
        clock, self.clock = self.clock, Clock()
        mine = torch.tensor([clock.exposed, clock.coding, 1.0], dtype=torch.float64, device=device)
        exposed, coding, ranks = everybody(mine).tolist()
        bits = self.up.num_bits + self.down.num_bits
        return self.switch.pays(Clock(clock.steps, exposed / ranks, coding / ranks), 1 - bits / 64)

    def _go_on(self, phase: Phase | None, mine: Sequence[Bucket]) -> None:
        """Begin a phase, with what optimizers know; None: go on as before."""
        if phase is None:
            return
        for bucket in mine:
            self.consolidate(bucket)
        self.switch.begin(phase)
        self._squares.clear()
        self._begin_all(mine)

    def _begin_all(self, mine: Sequence[Bucket]) -> None:
        if self.switch.compressed or self.switch.shadow:
            for bucket in mine:
                self._begin(bucket)

    @property
    def progress(self) -> dict[str, Any] | None:
        return self.course.saved(self._scale)

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        if saved is not None:
            self._divisor = None
            self.course.restore(saved, self._scale)


class _Timed(Pending[R]):
    """A collective of which it is noted how long it was waited for."""

    def __init__(self, pending: Pending[R], clock: Clock, device: torch.device) -> None:
        self._pending, self._clock, self._device = pending, clock, device

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Note the time; on a GPU that of the device, which does not wait before the host does."""
        self._finish_device()
        began = time.perf_counter()
        yield
        self._finish_device()
        self._clock.exposed += time.perf_counter() - began

    def _finish_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def wait(self) -> R:
        with self._noted():
            return self._pending.wait()

    def advance(self) -> None:
        with self._noted():
            self._pending.advance()

    def then(self, change: Callable[[R], Any]) -> Pending[Any]:
        return _Timed(self._pending.then(change), self._clock, self._device)
