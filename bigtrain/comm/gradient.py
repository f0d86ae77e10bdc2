"""The one path of a gradient: backward -> flat bucket -> sync -> optimizer -> parameters.

While backward runs, each parameter's gradient is moved into its bucket. A bucket is handed to the
sync strategy as soon as it is complete and all buckets before it have been handed over, so that
every rank issues the same collectives in the same order, whatever its own data made it compute.
That is in the last microbatch of a step, or in each, where gradients are sharded. What did not take
part counts as a zero gradient.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from bigtrain.comm.block import Block, NamedBlock, Shard
from bigtrain.comm.buckets import Bucket, Segment, Slot
from bigtrain.comm.collectives import all_reduce, broadcast
from bigtrain.comm.mesh import Axis
from bigtrain.comm.model_buffers import ModelBuffers
from bigtrain.comm.sync import GradientSync, Passage
from bigtrain.comm.wire import Averages
from bigtrain.errors import BigtrainError
from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.later import Gradient, Product
from bigtrain.ops.op import Kernels

log = logging.getLogger(__name__)


class _State(enum.Enum):
    IDLE = "no backward has run in this step"
    ACCUMULATING = "some gradients are not final yet"
    REDUCED = "the step is finished already"


class _Departures:
    """Buckets that leave in one order: each once it is complete and those before it have left."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self._missing = {bucket.index: len(bucket.slots) for bucket in buckets}
        self._next = 0
        for bucket in buckets:
            for slot in bucket.slots:
                slot.ready = False

    def settle(self, bucket: Bucket, slot: Slot) -> Iterator[Bucket]:
        """Note that the gradient of `slot` is final, and yield what can leave by that."""
        slot.ready = True
        self._missing[bucket.index] -= 1
        while self._next < len(self.buckets) and not self._missing[self.buckets[self._next].index]:
            self._next += 1
            yield self.buckets[self._next - 1]


class GradientPath:
    """Gradients of one model replica, in flat buckets, averaged over the data-parallel axis.

    A step is: `backward(loss, last=False)` for all microbatches but the last, `backward(loss)`,
    `finish()`, an optimizer step on `segments()`, `publish()`. A schedule that makes gradients
    final at several moments uses `accumulate` and `add` in place of `backward`.

    buckets: of all parameters that are trained, and of frozen ones if these are sharded.
    shards: what each parameter and buffer of the model is of its full tensor, by name.
    model_axes: the axes along which the model is split; `layer_axis` is the one inside layers.
    names: of parameters and buffers in the full model, where `model` is a part that may know them
        by another name (tied ones). axis_of: which ranks hold a parameter of that name, if it is
        not the data-parallel axis alone. device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: Sequence[Bucket],
        sync: GradientSync,
        shards: Mapping[str, Shard],
        model_axes: Sequence[Axis] = (),
        layer_axis: Axis | None = None,
        names: Mapping[torch.Tensor, str] | None = None,
        axis_of: Callable[[str], Axis] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.buckets = [bucket for bucket in buckets if bucket.trained]
        self.frozen = [bucket for bucket in buckets if not bucket.trained]
        self.sync = sync
        self.shards = shards
        self.model_axes, self.layer_axis = model_axes, layer_axis
        self.names = names or {}
        self.axis_of = axis_of or (lambda name: sync.axis)
        self.device = device or torch.device("cpu")
        every = [slot for bucket in self.buckets for slot in bucket.slots]
        self.slots = sorted(every, key=lambda slot: slot.name)
        self._state = _State.IDLE
        self._in_backward = False
        self._final: Collection[nn.Parameter] = ()  # whose gradients this backward completes
        self._open: set[nn.Parameter] = set()  # whose gradients are not final in this step
        self._by_step = self._by_passage = _Departures(())
        self._unpublished = list(self.buckets)
        self._progress: dict[str, Any] | None = None
        self._to_review = False  # a step is over whose end nobody has looked at
        self._buffers = ModelBuffers(model, sync.axis)
        self._places = {
            slot.param: (bucket, slot) for bucket in self.buckets for slot in bucket.slots
        }
        for param, (bucket, slot) in self._places.items():
            param.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket, slot))
        self._equalize(buckets)
        sync.attach(model, buckets)

    def _equalize(self, buckets: Sequence[Bucket]) -> None:
        """Give every rank the first rank's frozen parameters and buffers; buckets are equal."""
        held = {slot.param for bucket in buckets for slot in bucket.slots}
        for name, param in self.model.named_parameters():
            if param not in held:
                axis = self.axis_of(self.names.get(param, name))
                broadcast(param, axis, "broadcast of a frozen parameter")
        self._buffers.equalize()

    # -- a step --------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss` (a scalar, this rank's mean) to the step's.

        The mean over ranks is taken here, by dividing the loss by the degree of the axis. With
        `last`, buckets are reduced while backward runs.

        Raises:
            BigtrainError: a second last backward in one step.
            CommError: a collective could not be started.
        """
        with self.microbatch(last=last):
            degree = self.sync.axis.degree
            (loss / degree if degree > 1 else loss).backward()

    @contextmanager
    def microbatch(self, *, last: bool) -> Iterator[None]:
        """Collect the gradients of whatever backward passes run inside, undivided.

        Raises:
            BigtrainError: the last microbatch of the step is over.
        """
        if self._state is _State.ACCUMULATING and self._places and not self._open:
            raise BigtrainError(
                "backward after the last backward of a step",
                why="buckets may be on the wire already, so their gradients cannot change",
                mend="pass last=False for all microbatches but the last, then finish()",
            )
        with self.accumulate(self._places if last else ()):
            yield

    @contextmanager
    def accumulate(
        self,
        final: Collection[nn.Parameter] = (),
        stage: int = 0,
        kind: Passage = "backward",
    ) -> Iterator[None]:
        """Collect the gradients of whatever backward passes run inside, undivided.

        Those of `final` are complete then: each bucket is reduced as soon as all of its parameters
        are, and those before it. Where gradients are sharded, all buckets of `stage` are reduced,
        but not in a backward for the "inputs", whose other half will bring the rest.

        Raises:
            BigtrainError: a gradient arrives whose bucket was reduced already.
        """
        if self._state is not _State.ACCUMULATING:
            self._begin_step()
        filling = [b for b in self.buckets if b.sharing.sharded_grads and stage in b.stages]
        leaving = filling if kind != "inputs" else []
        for slot in (slot for bucket in filling for slot in bucket.slots):
            slot.ready = False
        self._by_passage = _Departures(leaving)
        self._in_backward, self._final = True, final
        try:
            with self.sync.passage(kind, stage):
                yield
        finally:
            self._in_backward = False
        for bucket in leaving:
            for slot in bucket.slots:
                self._settle(bucket, slot)
        for param in final:
            self._settle(*self._places[param])  # if it took no part in the last backward
        self._open.difference_update(final)
        self._by_passage, self._final = _Departures(()), ()

    def forward(self, stage: int = 0) -> AbstractContextManager[None]:
        """Surround one forward of `stage`. A call of the whole model does so itself."""
        return self.sync.passage("forward" if torch.is_grad_enabled() else "evaluation", stage)

    def unsharded(self) -> AbstractContextManager[None]:
        """Have all parameters whole inside, to look at them or to change them.

        All ranks that share them enter it together, and make the same changes. Communicates an
        all-gather of what is sharded.
        """
        return self.sync.unsharded()

    def add(self, param: nn.Parameter, gradient: Gradient) -> None:
        """Add to the gradient of `param` what does not come through autograd, in `accumulate`."""
        self._add(*self._places[param], gradient)

    def finish(self) -> None:
        """Return when every gradient is its mean over the axis.

        With an fp32 model `param.grad` shows it; otherwise only the fp32 main gradients have it.
        Where momentum comes in place of a gradient, nothing shows it.

        Raises:
            CommError: a rank died or did not come in time.
        """
        if self._state is not _State.ACCUMULATING or self._open:
            raise BigtrainError(
                f"finish() while {self._state.value}",
                why="a step ends with one backward(loss) that is the last",
                mend="call backward(loss) for the last microbatch first",
            )
        self.sync.finish()
        assert all(b.collected for b in self.buckets if b.sharing.sharded_grads)
        self._state = _State.REDUCED
        self._to_review = True
        self._unpublished = list(reversed(self.buckets))  # in the order of the next forward
        for bucket in self.buckets:
            self._take_up_changes(bucket)
            sharing = bucket.sharing
            whole = sharing.inner.degree == 1 and bucket.grads is not None
            if whole and not sharing.own_grads and bucket.params.dtype == torch.float32:
                for slot in bucket.slots:
                    slot.param.grad = slot.view(bucket.main_grads)

    def publish(self, bucket: Bucket | None = None) -> None:
        """Begin to bring updated parameters to every rank of the axis; wherever they are used next,
        that is waited for.

        Those of one bucket; or of all for which that was not done yet, and the first rank's
        buffers, which ends the step.
        """
        # In one order on all ranks: of some buckets a rank may own nothing, so none says them.
        while self._unpublished and (bucket is None or bucket in self._unpublished):
            self.sync.publish(self._unpublished.pop(0))
        if bucket is None:
            self.sync.published()
            self._unpublished = list(reversed(self.buckets))
            self._buffers.equalize()
            self._review()

    def _review(self) -> None:
        ledger, stepped, self._to_review = self.sync.ledger, self._to_review, False
        if ledger is not None:
            ledger.review(self.buckets, self._sum_over_all, self.device, stepped=stepped)

    def settle(self) -> None:
        """Return when nothing is on the wire any more, once the last step is published."""
        self.sync.settle()

    def abandon(self) -> None:
        """Forget the step under way: no gradients, and buffers as they were last published.

        For a step that must not count (a NaN), or whose backward raised; on all ranks alike.
        """
        self.sync.finish()
        self._state, self._to_review = _State.IDLE, False
        for bucket in self.buckets:
            if self.sync.ledger is not None:
                self.sync.ledger.abandon(bucket)
            bucket.grads = None if bucket.sharing.sharded_grads else bucket.grads
        self._buffers.restore()

    def consolidate(self) -> None:
        """Bring to owners what ranks keep of gradients for later, and exact parameters to all.

        All ranks call it before they save; the run that goes on and the one that resumes then do
        the same. Communicates only where a ledger keeps something.
        """
        ledger = self.sync.ledger
        if ledger is not None and ledger.keeps:
            self.settle()  # of the last step; what is published next would take its place
            for bucket in self.buckets:
                self._take_up_changes(bucket)
                ledger.consolidate(bucket)
            self.publish()
            self.settle()

    def updated_by(self, averages: Averages) -> None:
        """Take note of the optimizer that will update what this path brings."""
        if self.sync.ledger is not None:
            self.sync.ledger.updated_by(averages)

    def divided(self, divisor: torch.Tensor | None) -> None:
        """Note by what the optimizer divides the gradient of this step, before it does.

        What a ledger has kept of a gradient that is too long is as much too long. Looks at the
        number, which waits for a GPU, only where a ledger keeps something.
        """
        ledger = self.sync.ledger
        if ledger is not None and ledger.keeps:
            ledger.divided(self.buckets, 1.0 if divisor is None else float(divisor))

    def rescale(self, scale: float) -> None:
        """Note by what losses are multiplied from the next backward on, so that small gradients are
        not zero in fp16. At first it is 1. On all ranks alike; communicates nothing."""
        if self.sync.ledger is not None:
            self.sync.ledger.rescale(self.buckets, scale)

    def errors(self) -> Iterator[tuple[Segment, torch.Tensor]]:
        """Yield what all ranks together keep of each segment for later, where a ledger does."""
        for bucket in self.buckets:
            kept = self.sync.ledger.kept(bucket) if self.sync.ledger is not None else None
            if kept is not None:
                for segment in bucket.segments():
                    yield segment, segment.of(kept)

    def restore(self, errors: Mapping[Bucket, torch.Tensor]) -> None:
        """Keep what was saved of each bucket's block; of others nothing."""
        for bucket in self.buckets:
            if self.sync.ledger is not None:
                self.sync.ledger.restore(bucket, errors.get(bucket))

    @property
    def progress(self) -> dict[str, Any] | None:
        """What the ledger must know to go on in the same way, beside `errors`.

        A path that compresses nothing passes on what it was given.
        """
        ledger = self.sync.ledger
        return ledger.progress if ledger is not None and ledger.keeps else self._progress

    @progress.setter
    def progress(self, saved: dict[str, Any] | None) -> None:
        self._progress = saved
        if self.sync.ledger is not None:
            self.sync.ledger.progress = saved

    def replicas(self) -> Iterator[NamedBlock]:
        """Yield what ranks compute with, where it is not the main parameters, as named blocks."""
        replica = self.sync.axis.rank, self.sync.axis.degree
        for bucket in self.buckets:
            if bucket.sharing.compressed and not bucket.sharing.sharded_params:
                for slot in bucket.slots:
                    whole = Block.whole(slot.shape)
                    part = slot.view(bucket.params)
                    yield from slot.shard.named_blocks("replica." + slot.name, whole, part, replica)

    # -- what others ask -----------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """Return what this rank's optimizer updates: flat stretches of one kind."""
        return [segment for bucket in self.buckets for segment in bucket.segments()]

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        """Return the 2-norm of the finished gradient over all parameters, a scalar.

        What several ranks hold counts once. Communicates one number over each axis that splits
        the model.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        segments: list[Segment] = []
        for bucket in self.buckets:
            squares = self.sync.ledger.squares(bucket) if self.sync.ledger is not None else None
            if squares is not None:
                total += squares
            else:
                segments += bucket.segments()
        for replicas in dict.fromkeys(segment.num_replicas for segment in segments):
            alike = [s.main_grads for s in segments if s.num_replicas == replicas]
            total += grad_norm(alike, kernels=kernels).squares / replicas
        return self._sum_over_all(total).sqrt().float()

    def _sum_over_all(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of what each owner of each part of the model has."""
        total = self.sync.sum_over_owners(value)
        for axis in self.model_axes:
            all_reduce(total, axis, "all_reduce over the parts of the model")
        return total

    def sum_over_parts(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` [len(slots), k], each row summed over the ranks with parts of that slot.

        Parts are the owners' along the data-parallel axis, and the shards of split layers. What
        several ranks hold counts once. Communicates `values` over these axes.
        """
        copies = [s.shard.num_replicas // max(1, len(s.shard.stages)) for s in self.slots]
        total = values / torch.tensor(copies, dtype=values.dtype, device=values.device)[:, None]
        total = self.sync.sum_over_owners(total)
        if self.layer_axis is not None:
            all_reduce(total, self.layer_axis, "all_reduce of the norms of parameters")
        return total

    def nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        """Return the names of parameters with a NaN or an infinity, in the gradient or itself.

        Only of what this rank holds.
        """
        found = []
        for segment in self.segments():
            flat = segment.main_grads if gradients else segment.main_params
            if not flat.isfinite().all():
                parts = segment.parts()
                found += [slot.name for slot, a, b in parts if not flat[a:b].isfinite().all()]
        return list(dict.fromkeys(found))

    def blocks(
        self, prefix: str, flats: Sequence[torch.Tensor | None], segments: Sequence[Segment] = ()
    ) -> Iterator[NamedBlock]:
        """Yield one flat tensor per segment (as `segments()` lists them) as named blocks."""
        replica = self.sync.replica()
        for segment, flat in zip(segments or self.segments(), flats, strict=True):
            if flat is None:
                continue
            assert flat.numel() == segment.stop - segment.start
            for slot, a, b in segment.parts():
                first = segment.start + a - slot.start
                for block in Block.cover(slot.shape, first, first + b - a):
                    part = flat[a : a + block.numel].view(block.sizes)
                    a += block.numel
                    yield from slot.shard.named_blocks(prefix + slot.name, block, part, replica)

    def frozen_blocks(self, prefix: str) -> Iterator[NamedBlock]:
        """Yield the frozen parameters that are sharded, as named blocks."""
        segments = [segment for bucket in self.frozen for segment in bucket.segments()]
        if segments:
            yield from self.blocks(prefix, [s.main_params for s in segments], segments)

    # -- inside --------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._state = _State.ACCUMULATING
        self._open = set(self._places)
        self._by_step = _Departures([b for b in self.buckets if not b.sharing.sharded_grads])
        for bucket in self.buckets:
            bucket.collected, bucket.momentum = False, None
            for slot in bucket.slots:
                slot.touched = False
                slot.param.grad = None

    def _on_gradient(self, bucket: Bucket, slot: Slot, param: nn.Parameter) -> None:
        """Move a fresh gradient into the bucket; called by autograd when it is complete."""
        if not self._in_backward:
            raise BigtrainError(
                f"the gradient of {slot.name} came from outside of the gradient path",
                why="loss.backward() neither averages over ranks nor reduces buckets",
                mend="call backward(loss) of what parallelize() returned",
            )
        if param.grad is not None:  # else it was given to `add`
            grad = param.grad
            self._add(bucket, slot, grad.to_dense() if grad.is_sparse else grad)
            param.grad = None
        if slot.touched and (bucket.sharing.sharded_grads or param in self._final):
            self._settle(bucket, slot)

    def _add(self, bucket: Bucket, slot: Slot, gradient: Gradient) -> None:
        if slot.ready:
            raise BigtrainError(
                f"the gradient of {slot.name} arrived twice in the last backward",
                why="its bucket is on the wire already; re-entrant backward passes do this",
                mend="use torch.utils.checkpoint with use_reentrant=False",
            )
        view = slot.view(bucket.open_grads())
        if isinstance(gradient, Product):
            gradient.add_to(view, first=not slot.touched)
        elif slot.touched:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        slot.touched = True

    def _settle(self, bucket: Bucket, slot: Slot) -> None:
        """Note that the gradient of `slot` is final, and hand over what is complete by that."""
        sharded = bucket.sharing.sharded_grads
        departures = self._by_passage if sharded else self._by_step
        if slot.ready or bucket not in departures.buckets:
            return
        for each in departures.settle(bucket, slot):
            grads = each.open_grads()
            for other in each.slots:
                if not other.touched:
                    other.view(grads).zero_()
                other.touched = other.touched and not sharded
            open_later = self._open.difference(self._final)
            each.last = not sharded or all(other.param not in open_later for other in each.slots)
            self.sync.reduce(each)

    def _take_up_changes(self, bucket: Bucket) -> None:
        """Take up what others than the optimizer have written into parameters since last time.

        Raises:
            BigtrainError: a parameter was given other memory than its bucket's.
        """
        if bucket.sharing.sharded_params:
            return  # `unsharded` sees to it
        begin, size = bucket.params.data_ptr(), bucket.params.element_size()
        for slot in bucket.slots:
            param = slot.param
            if param.numel() and param.data_ptr() != begin + slot.start * size:
                raise BigtrainError(
                    f"{slot.name} is not in its bucket any more",
                    why="it was given other memory (param.data = ..., model.to(...), "
                    "load_state_dict(assign=True)), which the optimizer does not know",
                    mend="change values in place: with torch.no_grad(): param.copy_(...)",
                )
            if param._version != slot.version:
                slot.version = param._version
                bucket.take_up(slot)
