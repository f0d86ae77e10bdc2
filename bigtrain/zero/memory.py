"""How many bytes the training state of a rank takes: predicted, before the first step.

It is what the gradient path and the optimizer hold, item by item. Activations, the memory of the
backend, and what an allocator keeps for later come on top.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.sync import GradientSync
from bigtrain.config.schema import ZeroSection
from bigtrain.pipeline.table import Action
from bigtrain.zero.keeper import WINDOW
from bigtrain.zero.order import CARRIED
from bigtrain.zero.sharded import Sharded

FP32 = 4
Size = Callable[[Bucket], float]


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. All but what is in flight is there all the time.

    parameters: of the model, whole or in blocks. main_parameters: fp32 copies, and results of
    offloaded updates. gradients: fp32. moments: of the optimizer. gradients_in_flight: buckets that
    backward fills, and those on the wire with what is received. errors: fp32, what compression of
    gradients has lost and will send. parameters_in_flight: sharded buckets that are whole for a
    while, compressed updates. `offloaded`: main parameters and moments are elsewhere.
    """

    parameters: int
    main_parameters: int
    gradients: int
    errors: int
    moments: int
    gradients_in_flight: int
    parameters_in_flight: int
    offloaded: bool

    @property
    def in_flight(self) -> int:
        return self.gradients_in_flight + self.parameters_in_flight

    @property
    def steady(self) -> int:
        """Between two steps, wherever it is."""
        held = self.parameters + self.main_parameters + self.gradients
        return held + self.errors + self.moments

    @property
    def peak(self) -> int:
        """At most, wherever it is."""
        return self.steady + self.in_flight

    def __str__(self) -> str:
        shown = {
            "parameters": self.parameters,
            "main parameters": self.main_parameters,
            "gradients": self.gradients,
            "errors of compression": self.errors,
            "optimizer": self.moments,
            "in flight": self.in_flight,
        }
        parts = [f"{name} {_short(value)}" for name, value in shown.items() if value]
        away = self.main_parameters + self.moments
        elsewhere = f", of which offloaded {_short(away)}" if self.offloaded else ""
        return f"{', '.join(parts)}; together {_short(self.peak)}{elsewhere}"


def predict(
    path: GradientPath,
    zero: ZeroSection,
    moments: int,
    *,
    num_microbatches: int = 1,
    row: Sequence[Action] = (),
) -> Memory:
    """Return what training with `path` will take on this rank.

    moments: bytes that the optimizer keeps. row: this rank's actions, if a pipeline has several
    stages on it, or backwards in two halves.
    """
    trained, every = path.buckets, [*path.buckets, *path.frozen]
    away = any(b.main_params.device != b.params.device for b in trained)
    owned, itemsize = sum(map(_block, trained)), every[0].params.element_size()
    ledger = path.sync.ledger
    updates = sum(ledger.bytes_of_update(b) for b in trained) if ledger is not None else 0
    copied = sum(_block(b) for b in trained if b.main_params is not b.shard)
    return Memory(
        parameters=itemsize * sum(_block(b) if _sharded(b) else b.numel for b in every),
        main_parameters=FP32 * copied + itemsize * away * owned,
        gradients=sum(map(_gradients, trained)) + (FP32 * owned if away else 0),
        errors=sum(ledger.bytes_kept(b) for b in trained) if ledger is not None else 0,
        moments=moments,
        gradients_in_flight=_gradients_in_flight(trained, zero, path.sync, num_microbatches, row),
        parameters_in_flight=itemsize * _whole_at_once(path, every, zero, row) + updates,
        offloaded=zero.offload == "file" or away,
    )


def _block(bucket: Bucket) -> int:
    return bucket.numel // bucket.sharing.inner.degree


def _gradients(bucket: Bucket) -> int:
    """Return the bytes of gradients that stay: of the block, of all, or of both apart."""
    block = _block(bucket) if bucket.sharing.sharded_grads or bucket.sharing.own_grads else 0
    return FP32 * (block + (0 if bucket.sharing.sharded_grads else bucket.numel))


def _sharded(bucket: Bucket) -> bool:
    return bucket.sharing.sharded_params


def _filling(bucket: Bucket) -> int:
    return FP32 * bucket.numel if bucket.sharing.sharded_grads else 0


# -- gradients -------------------------------------------------------------------------------------


def _gradients_in_flight(
    trained: Sequence[Bucket],
    zero: ZeroSection,
    sync: GradientSync,
    num_microbatches: int,
    row: Sequence[Action],
) -> int:
    """Return the bytes of one bucket that is filled while those before it are on the wire.

    A cast has both at once. Where `row` has backwards in two halves, all buckets of a stage are
    filled between them.
    """
    shared = [bucket for bucket in trained if bucket.sharing.inner.degree > 1]
    on_wire = _wire_size(zero, sync)
    # The first follow on the last of the microbatch before, or, of several stages, on any.
    again = [b for b in shared if b.sharing.sharded_grads and not b.sharing.compressed]  # or held
    again = again * min(num_microbatches - 1, zero.in_flight + 1)
    if len({bucket.stages for bucket in again}) > 1:
        again = [max(again, key=_filling)] * (zero.in_flight + 1)
    leaving = [*again, *shared]
    most = 0.0
    for index, bucket in enumerate(leaving):
        before = [on_wire(each) for each in leaving[max(0, index - zero.in_flight) : index]]
        # Whole until it is cast; what has been on a node first counts it itself.
        one_hop = bucket.sharing.nodes.node.degree == 1
        cast = _filling(bucket) if one_hop and _is_cast(bucket, zero) else 0
        rest = before[len(before) - zero.in_flight + 1 :] if zero.in_flight > 1 else []
        most = max(most, _filling(bucket) + sum(before), cast + on_wire(bucket) + sum(rest))
    across = [FP32 * _block(b) for b in shared if b.sharing.outer.degree > 1 and _filling(b)]
    most += sum(sorted(across)[-zero.in_flight - 1 :])
    halves = _waiting_for_second_half(shared, row) - max(map(_filling, shared), default=0)
    return round(most) + max(0, halves)


def _is_cast(bucket: Bucket, zero: ZeroSection) -> bool:
    return zero.reduce_dtype != "fp32" or bucket.sharing.compressed


def _wire_size(zero: ZeroSection, sync: GradientSync) -> Size:
    """Return the bytes held from leaving to arriving, beside a gradient that stays anyway."""

    def size(bucket: Bucket) -> float:
        assert isinstance(sync, Sharded), "wherever a bucket is shared out"
        per_element, cast = sync.wire.bytes_per_element(bucket), _is_cast(bucket, zero)
        nodes, on_cpu = bucket.sharing.nodes, bucket.params.device.type == "cpu"
        degree, several = nodes.across.degree, nodes.node.degree > 1
        copied = cast or (bucket.sharing.sharded_grads and not several)
        rows = degree - 1 if on_cpu else degree if cast else 1
        across = per_element * _block(bucket) * (rows + (degree if copied else 0))
        return max(across + _filling(bucket), _on_node(bucket, on_cpu)) if several else across

    return size


def _on_node(bucket: Bucket, on_cpu: bool) -> int:
    """Return the bytes held while ranks of a node add up: what leaves, in order, what arrives, and
    the sum."""
    node = bucket.sharing.nodes.node.degree
    part = bucket.numel // node
    arriving = (node - 1) * part if on_cpu else 0
    return _filling(bucket) + FP32 * (bucket.numel + arriving + part)


def _waiting_for_second_half(buckets: Sequence[Bucket], row: Sequence[Action]) -> int:
    """Return the bytes of gradients of stages between the two halves of a backward, at most."""
    waiting: set[int] = set()
    most = 0
    for action in row:
        if action.kind == "I":
            waiting.add(action.stage)
            most = max(most, sum(_filling(b) for b in buckets if waiting.intersection(b.stages)))
        elif action.kind in ("W", "B"):
            waiting.discard(action.stage)
    return most


# -- parameters ------------------------------------------------------------------------------------


def _whole_at_once(
    path: GradientPath, every: Sequence[Bucket], zero: ZeroSection, row: Sequence[Action]
) -> int:
    """Return the elements of sharded buckets that are whole at once, at most.

    Those used last and those gathered ahead are neighbours, of one stage. What a stage uses at both
    ends of the model stays in between; other stages have left what they used last, and so has the
    forward before a forward, the backward before a backward. In an order that is agreed anew each
    time nothing is known ahead, so nothing stays.
    """
    sharded = [bucket for bucket in every if _sharded(bucket)]
    if not zero.reshard_after_forward:
        return sum(bucket.numel for bucket in sharded)
    learned = zero.order == "learned"
    used_again = _used_in_several_places(path)
    stages = list(dict.fromkeys(stage for bucket in sharded for stage in bucket.stages))
    most = 0
    for stage in stages:
        own = [bucket for bucket in sharded if stage in bucket.stages]
        others = [s for s in stages if s != stage or _in_a_row(row, s)] if learned else []
        left = sum(
            max(map(_numel, _neighbours([b for b in sharded if s in b.stages], CARRIED)))
            for s in others
        )
        for window in _neighbours(own, WINDOW + (zero.prefetch if learned else 0)):
            again = [b for b in own if learned and b in used_again and b not in window]
            most = max(most, left + _numel([*window, *again]))
    return min(most, _numel(sharded))


def _numel(buckets: Sequence[Bucket]) -> int:
    return sum(bucket.numel for bucket in buckets)


def _used_in_several_places(path: GradientPath) -> set[Bucket]:
    """Return the buckets of parameters that several modules hold."""
    places = [param for _, param in path.model.named_parameters(remove_duplicate=False)]
    return {
        bucket
        for bucket in (*path.buckets, *path.frozen)
        if any(sum(p is slot.param for p in places) > 1 for slot in bucket.slots)
    }


def _neighbours(buckets: Sequence[Bucket], count: int) -> Iterator[Sequence[Bucket]]:
    """Yield all `count` that follow each other; the first comes after the last."""
    around = [*buckets, *buckets]
    for first in range(len(buckets)):
        yield around[first : first + min(count, len(buckets))]


def _in_a_row(row: Sequence[Action], stage: int) -> bool:
    """Is there a forward of `stage` after another, or a backward, with none between?"""
    kinds = [act.kind == "F" for act in row if act.stage == stage and act.kind in ("F", "B", "I")]
    return any(a == b for a, b in itertools.pairwise(kinds))


def _short(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
