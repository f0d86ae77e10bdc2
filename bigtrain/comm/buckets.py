"""Flat buckets: contiguous buffers for parameters, main parameters and main gradients.

A bucket is what one collective carries and what the optimizer updates in one pass. The ranks that
hold the same parameters may share it out: each then owns one block of it, and all blocks are of one
size. Inside a bucket, parameters of one kind (decayed, not decayed) lie side by side, so that a
kind is one flat segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.collectives import broadcast
from bigtrain.comm.mesh import Axis, Nodes
from bigtrain.errors import BigtrainError

ALIGNMENT = 16  # elements: 64 bytes of fp32, a cache line and a vector register
NewState = Callable[[int], torch.Tensor]


@dataclass(eq=False)
class Slot:
    """The place of one parameter in its bucket: elements [start, start + numel).

    `shard` is what the parameter is of its full tensor.
    """

    name: str
    param: nn.Parameter
    kind: str
    shard: Shard
    shape: torch.Size
    start: int = 0
    # Of the gradients under way: has one arrived, and is it the last that will?
    touched: bool = False
    ready: bool = False
    version: int = 0  # of the parameter, when what it holds was last taken note of

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel()

    @property
    def sort(self) -> tuple[str, int]:
        """What all parameters of a segment have in common: kind, and number of replicas."""
        return self.kind, self.shard.num_replicas

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this parameter's part of a flat buffer of the bucket, in its own shape."""
        return flat[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class Sharing:
    """How the ranks of `axis`, which hold the same parameters, share them.

    Each rank of `inner`, which is on `nodes`, owns a block; the ranks of `outer` own the same one.
    Gradients and parameters that are `sharded` are there as blocks only, but for the moments of
    their use. Of what is `compressed`, main parameters and what ranks compute with differ by a
    little that is still to be sent. With `own_grads` a rank's gradients outlast their sum, until
    the update; where nothing is shared out, too, momentum may come in place of it.
    """

    axis: Axis
    inner: Axis
    outer: Axis
    nodes: Nodes
    sharded_grads: bool = False
    sharded_params: bool = False
    compressed: bool = False
    own_grads: bool = False

    @classmethod
    def none(cls, axis: Axis, *, own_grads: bool = False) -> Sharing:
        """Return that every rank of `axis` has everything."""
        alone = Axis.of(None, axis.name)
        return cls(axis, alone, axis, Nodes.apart(alone), own_grads=own_grads)

    @property
    def in_few_bits(self) -> bool:
        """May what travels lose something?"""
        return self.compressed or self.own_grads


@dataclass
class Momentum:
    """Says of a bucket that `main_grads` is the mean of gradients that an optimizer keeps.

    fades: where what came is no good, the mean of the step before is multiplied by that instead.
    gradient: of this step alone [n], undivided, where the second moment is to take it up; what that
    moment keeps of itself is `decay` then. Without, it stays as it is. rate: of this update, where
    it is that of several steps. alone: the mean is of this rank, not the same on all.
    """

    fades: float | None = None
    gradient: torch.Tensor | None = None
    decay: float = 1.0
    rate: float | None = None
    alone: bool = False


@dataclass(eq=False)
class Bucket:
    """Some parameters as flat buffers of `numel` elements (padding stays zero).

    params: what the model computes with, in the model's dtype; the parameters are views of it.
    Where parameters are sharded, its memory is there only while they are used.
    shard: of these, the block that this rank owns: a view, or memory of its own.
    main_params, main_grads: fp32, of that block. With an fp32 model `main_params` is `shard`
    itself, unless the optimizer's state lives elsewhere; otherwise an update leaves its result in
    `low_params` too, for `shard`. If that follows by compressed deltas, `low_params` is None.
    grads: fp32, all of them; where they are sharded, None but while backward fills it.
    stages: the pipeline stages of this rank that use these parameters.
    """

    index: int
    sharing: Sharing
    stages: tuple[int, ...]
    slots: list[Slot]
    params: torch.Tensor
    shard: torch.Tensor
    main_params: torch.Tensor
    low_params: torch.Tensor | None
    main_grads: torch.Tensor
    grads: torch.Tensor | None
    new_state: NewState
    rounded: bool = False  # `low_params`, by who updated `main_params`
    collected: bool = False  # `main_grads` has gradients of this step
    last: bool = True  # are gradients that leave the last ones of this step?
    momentum: Momentum | None = None  # where it has their mean over steps
    gaps: list[tuple[int, int]] = field(default_factory=list)  # padding: [start, stop)

    @property
    def axis(self) -> Axis:
        """The ranks whose gradients are summed: those that hold the same parameters."""
        return self.sharing.axis

    @property
    def numel(self) -> int:
        return self.params.numel()

    @property
    def trained(self) -> bool:
        return bool(self.main_grads.numel())

    @property
    def owned(self) -> tuple[int, int]:
        """The elements [start, stop) that this rank updates."""
        inner = self.sharing.inner
        size = self.numel // inner.degree
        return inner.rank * size, (inner.rank + 1) * size

    def round(self) -> None:
        """Let `shard` be `main_params` in the model's dtype."""
        if self.low_params is None:
            return
        if not self.rounded:
            self.low_params.copy_(self.main_params)
        if self.low_params is not self.shard:
            self.shard.copy_(self.low_params, non_blocking=True)
        self.rounded = False

    def take_up(self, slot: Slot) -> None:
        """Let the main parameters be what `slot`'s parameter, of which all is here, has become."""
        start, stop = self.owned
        first, last = max(slot.start, start), min(slot.stop, stop)
        if first < last:
            part = slice(first - start, last - start)
            self.shard[part].copy_(self.params[first:last])
            if self.main_params is not self.shard:
                self.main_params[part].copy_(self.params[first:last])

    def open_grads(self) -> torch.Tensor:
        """Return the buffer that backward fills; where gradients are sharded it is made now."""
        if self.grads is None:
            device = self.params.device
            self.grads = torch.empty(self.numel, dtype=torch.float32, device=device)
            self.clear_gaps()
        return self.grads

    def clear_gaps(self) -> None:
        """Make padding zero again: of what shares a scale with a NaN, all has become one."""
        if self.grads is not None:
            for start, stop in self.gaps:
                self.grads[start:stop].zero_()

    def clear_owned_gaps(self, block: torch.Tensor) -> None:
        """Make padding zero in a flat tensor of the owned block."""
        begin, end = self.owned
        for start, stop in self.gaps:
            if max(start, begin) < min(stop, end):
                block[max(start, begin) - begin : min(stop, end) - begin].zero_()

    def segments(self) -> Iterator[Segment]:
        """Yield the stretches of one sort that this rank owns."""
        begin, end = self.owned
        for sort in dict.fromkeys(slot.sort for slot in self.slots):
            slots = [slot for slot in self.slots if slot.sort == sort]
            first, last = max(begin, slots[0].start), min(end, slots[-1].stop)
            if first < last:
                yield Segment(self, *sort, first, last)


@dataclass(frozen=True)
class Segment:
    """A flat stretch of one bucket that this rank owns, its parameters all of one kind.

    Each is held by `num_replicas` ranks along the axes that shard the model.
    """

    bucket: Bucket
    kind: str
    num_replicas: int
    start: int
    stop: int

    @property
    def main_params(self) -> torch.Tensor:
        return self.of(self.bucket.main_params)

    @property
    def main_grads(self) -> torch.Tensor:
        return self.of(self.bucket.main_grads)

    @property
    def low_params(self) -> torch.Tensor | None:
        """What the model computes with, if that is not `main_params` itself."""
        low = self.bucket.low_params
        return None if low is None else self.of(low)

    def new_state(self) -> torch.Tensor:
        """Return zeros, one for each element, where the optimizer's state lives."""
        return self.bucket.new_state(self.stop - self.start)

    def parts(self) -> Iterator[tuple[Slot, int, int]]:
        """Yield (slot, a, b): elements [a, b) of this segment are of that parameter.

        They may be a part of it, where the owner's block begins or ends inside it.
        """
        for slot in self.bucket.slots:
            first, last = max(slot.start, self.start), min(slot.stop, self.stop)
            if slot.sort == (self.kind, self.num_replicas) and first < last:
                yield slot, first - self.start, last - self.start

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """Return this segment's part of a flat tensor of the owned block."""
        begin = self.bucket.owned[0]
        return block[self.start - begin : self.stop - begin]


def check_trainable(model: nn.Module) -> None:
    """Refuse a model that buckets cannot hold.

    Raises:
        BigtrainError: nothing to train, or a parameter that is not fp32, bf16 or fp16 on a device.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise BigtrainError(
            f"{type(model).__name__} has no trainable parameter",
            why="every parameter has requires_grad=False, or there is none",
            mend="leave requires_grad on for what is to be trained",
        )
    for name, param in trainable:
        if param.dtype not in (torch.float32, torch.bfloat16, torch.float16) or param.is_meta:
            raise BigtrainError(
                f"parameter {name} cannot be trained: dtype {param.dtype}, device {param.device}",
                why="buckets hold fp32, bf16 or fp16 parameters that exist on a device",
                mend="convert it (model.float()) or materialize it before parallelize",
            )


@dataclass(frozen=True)
class Wanted:
    """A parameter that is to be put into a bucket, and what those of one bucket have in common."""

    name: str
    param: nn.Parameter
    kind: str
    shard: Shard
    sharing: Sharing
    stages: tuple[int, ...]

    @property
    def group(self) -> tuple[object, ...]:
        return id(self.sharing), self.stages, self.param.device, self.param.requires_grad


def build_buckets(
    wanted: Sequence[Wanted],
    *,
    bucket_mb: float,
    dtype: torch.dtype,
    new_state: NewState | None = None,
    uncut: Set[str] = frozenset(),
) -> list[Bucket]:
    """Move parameters into flat buckets of about `bucket_mb` MiB of fp32.

    Buckets follow the reverse order of registration, which is about the order in which backward
    makes gradients ready. The model computes in `dtype` afterwards. All ranks of an axis get the
    parameters of its first rank: one broadcast a bucket. Buckets are filled one after the other, so
    that at most one of them is held twice.

    new_state(numel): makes zeros where main parameters and the optimizer's state live, if that is
    not simply the device. uncut: kinds of parameters that must have one owner each.
    """
    return [
        _fill(index, group, dtype, new_state, whole=group[0].kind in uncut)
        for index, group in enumerate(_group(list(reversed(wanted)), bucket_mb, uncut))
    ]


def _group(wanted: Iterable[Wanted], bucket_mb: float, uncut: Set[str]) -> Iterator[list[Wanted]]:
    limit = bucket_mb * 2**20 / 4
    group: list[Wanted] = []
    size, key = 0, None
    for each in wanted:
        whole = each.kind in uncut and each.sharing.inner.degree > 1
        before, key = key, (each.group, whole and (each.kind, each.shard.num_replicas))
        # Of what is not cut, one after the other for each owner.
        full = size + each.param.numel() > limit * (each.sharing.inner.degree if whole else 1)
        if group and (full or key != before):
            yield group
            group, size = [], 0
        group.append(each)
        size += each.param.numel()
    if group:
        yield group


def _place(slots: list[Slot], degree: int) -> int:
    """Give each slot its place; return the size of an owner's block, cut wherever its end falls."""
    slots.sort(key=lambda slot: slot.sort)  # stable
    end = 0
    for slot in slots:
        slot.start = end
        end = _aligned(slot.stop)
    return _aligned(-(-end // degree))


def _place_whole(slots: list[Slot], degree: int) -> int:
    """Give each owner about as much: the largest parameters first, each to who has least."""
    loads = [0] * degree
    owners: list[list[Slot]] = [[] for _ in loads]
    for slot in sorted(slots, key=lambda slot: -slot.shape.numel()):
        owner = loads.index(min(loads))
        owners[owner].append(slot)
        loads[owner] += _aligned(slot.shape.numel())
    for owner, mine in enumerate(owners):
        start = owner * max(loads)
        for slot in mine:
            slot.start = start
            start = _aligned(slot.stop)
    slots.sort(key=lambda slot: slot.start)
    return max(loads)


def _aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _fill(
    index: int,
    group: list[Wanted],
    dtype: torch.dtype,
    new_state: NewState | None,
    *,
    whole: bool,
) -> Bucket:
    sharing, trained = group[0].sharing, group[0].param.requires_grad
    slots = [Slot(w.name, w.param, w.kind, w.shard, w.param.shape) for w in group]
    degree = sharing.inner.degree
    numel = degree * (_place_whole if whole and degree > 1 else _place)(slots, degree)
    device = slots[0].param.device
    full = torch.zeros(numel, dtype=torch.float32 if trained else dtype, device=device)
    for slot in slots:
        slot.view(full).copy_(slot.param.detach())
    broadcast(full, sharing.axis, f"broadcast of bucket {index}")

    def zeros(numel: int) -> torch.Tensor:
        return torch.zeros(numel, dtype=torch.float32, device=device)

    params = full.to(dtype)  # itself, if it is of that dtype
    for slot in slots:
        slot.param.data = slot.view(params)
        slot.version = slot.param._version
    size = numel // sharing.inner.degree
    block = slice(sharing.inner.rank * size, (sharing.inner.rank + 1) * size)
    shard = params[block].clone() if sharing.sharded_params else params[block]
    main, low = shard, None
    by_deltas = sharing.compressed and not sharing.sharded_params
    if trained and (dtype != torch.float32 or new_state is not None or by_deltas):
        main = (new_state or zeros)(size)
        main.copy_(full[block])
    if main is not shard and not by_deltas:
        low = shard if main.device == shard.device else torch.empty_like(shard, device=main.device)
    grads = zeros(numel) if trained and not sharing.sharded_grads else None
    in_place = grads is not None and not sharing.own_grads
    main_grads = grads[block] if in_place else zeros(size if trained else 0)  # type: ignore[index]
    if trained and main.device != device:
        main_grads = torch.zeros_like(main)
    ends, starts = [0, *(slot.stop for slot in slots)], [*(slot.start for slot in slots), numel]
    gaps = [(a, b) for a, b in zip(ends, starts, strict=True) if a < b]
    return Bucket(
        index,
        sharing,
        group[0].stages,
        slots,
        params,
        shard,
        main,
        low,
        main_grads,
        grads,
        new_state or zeros,
        gaps=gaps,
    )
