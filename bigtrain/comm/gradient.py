"""The one path of a gradient: backward -> flat bucket -> sync -> optimizer -> parameters.

While backward runs, each parameter's gradient is moved into its bucket. In the last microbatch of
a step a bucket is handed to the sync strategy as soon as it is complete and all buckets before it
have been handed over, so that every rank issues the same collectives in the same order, whatever
its own data made it compute. What did not take part in a step counts as a zero gradient.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from bigtrain.comm.block import Block, NamedBlock, Shard
from bigtrain.comm.buckets import Bucket, Segment, Slot
from bigtrain.comm.collectives import all_reduce, broadcast
from bigtrain.comm.mesh import Axis
from bigtrain.comm.sync import GradientSync
from bigtrain.errors import BigtrainError
from bigtrain.ops.grad_norm import grad_norm
from bigtrain.ops.later import Gradient, Product
from bigtrain.ops.op import Kernels


class _State(enum.Enum):
    IDLE = "no backward has run in this step"
    ACCUMULATING = "some gradients are not final yet"
    REDUCED = "the step is finished already"


class GradientPath:
    """Gradients of one model replica, in flat buckets, averaged over the data-parallel axis.

    A step is: `backward(loss, last=False)` for all microbatches but the last, `backward(loss)`,
    `finish()`, an optimizer step on `segments()`, `publish()`. A schedule that makes gradients
    final at several moments uses `accumulate` and `add` in place of `backward`.

    shards: what each parameter and buffer of the model is of its full tensor, by name.
    model_axes: the axes along which the model is split.
    names: of parameters and buffers in the full model, where `model` is a part that may know them
        by another name (tied ones). axis_of: which ranks hold a parameter of that name, if it is
        not the data-parallel axis alone. device: where the model is.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: list[Bucket],
        sync: GradientSync,
        shards: Mapping[str, Shard],
        model_axes: Sequence[Axis] = (),
        names: Mapping[torch.Tensor, str] | None = None,
        axis_of: Callable[[str], Axis] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.buckets = buckets
        self.sync = sync
        self.shards = shards
        self.model_axes = model_axes
        self.names = names or {}
        self.axis_of = axis_of or (lambda name: sync.axis)
        self.device = device or torch.device("cpu")
        self._state = _State.IDLE
        self._in_backward = False
        self._final: Collection[nn.Parameter] = ()  # whose gradients this backward completes
        self._next = 0  # buckets before this one were handed to sync
        self._missing = [0] * len(buckets)  # slots of each bucket whose gradient is not final
        self._published: list[torch.Tensor] = []  # copies of the buffers, to go back to
        self._places = {slot.param: (bucket, slot) for bucket in buckets for slot in bucket.slots}
        for param, (bucket, slot) in self._places.items():
            param.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket, slot))

    def equalize(self) -> None:
        """Give every rank the parameters (frozen ones too) and buffers of the axis's first rank."""
        for bucket in self.buckets:
            broadcast(bucket.main_params, bucket.axis, f"broadcast of bucket {bucket.index}")
            bucket.round()
        for name, param in self.model.named_parameters():
            if not param.requires_grad:
                axis = self.axis_of(self.names.get(param, name))
                broadcast(param, axis, "broadcast of a frozen parameter")
        self._equalize_buffers()

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
        over = self._state is _State.ACCUMULATING and self._next == len(self.buckets)
        if over and self.buckets:
            raise BigtrainError(
                "backward after the last backward of a step",
                why="buckets may be on the wire already, so their gradients cannot change",
                mend="pass last=False for all microbatches but the last, then finish()",
            )
        with self.accumulate(self._places if last else ()):
            yield

    @contextmanager
    def accumulate(self, final: Collection[nn.Parameter] = ()) -> Iterator[None]:
        """Collect the gradients of whatever backward passes run inside, undivided.

        Those of `final` are complete then: each bucket is reduced as soon as all of its parameters
        are, and those before it.

        Raises:
            BigtrainError: a gradient arrives whose bucket was reduced already.
        """
        if self._state is not _State.ACCUMULATING:
            self._begin_step()
        self._in_backward, self._final = True, final
        try:
            yield
        finally:
            self._in_backward, self._final = False, ()
        for param in final:
            bucket, slot = self._places[param]
            if not slot.ready:  # it took no part in the last backward
                self._settle(bucket, slot)

    def add(self, param: nn.Parameter, gradient: Gradient) -> None:
        """Add to the gradient of `param` what does not come through autograd, in `accumulate`."""
        self._add(*self._places[param], gradient)

    def finish(self) -> None:
        """Return when every gradient is its mean over the axis.

        With an fp32 model `param.grad` shows it; otherwise only the fp32 main gradients have it.

        Raises:
            CommError: a rank died or did not come in time.
        """
        if self._state is not _State.ACCUMULATING or self._next < len(self.buckets):
            raise BigtrainError(
                f"finish() while {self._state.value}",
                why="a step ends with one backward(loss) that is the last",
                mend="call backward(loss) for the last microbatch first",
            )
        self.sync.finish()
        self._state = _State.REDUCED
        for bucket in self.buckets:
            if bucket.params.dtype == bucket.main_grads.dtype:
                for slot in bucket.slots:
                    slot.param.grad = slot.view(bucket.main_grads)

    def publish(self) -> None:
        """Bring the updated parameters, and the first rank's buffers, to every rank of the axis."""
        for bucket in self.buckets:
            self.sync.publish(bucket)
        self._equalize_buffers()

    def abandon(self) -> None:
        """Forget the step under way: no gradients, and buffers as they were last published.

        For a step that must not count (a NaN), or whose backward raised; on all ranks alike.
        """
        self.sync.finish()
        self._state = _State.IDLE
        for buffer, before in zip(self._buffers(), self._published, strict=True):
            buffer.copy_(before)

    # -- what others ask -----------------------------------------------------------------------

    def segments(self) -> list[Segment]:
        """Return what this rank's optimizer updates: flat stretches of one kind."""
        return [s for bucket in self.buckets for s in bucket.segments(*self.sync.owned(bucket))]

    def grad_norm(self, kernels: Kernels = "auto") -> torch.Tensor:
        """Return the 2-norm of the finished gradient over all parameters, a scalar.

        What several ranks hold counts once. Communicates one number over each axis that splits
        the model.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        segments = self.segments()
        for replicas in dict.fromkeys(segment.num_replicas for segment in segments):
            alike = [s.main_grads for s in segments if s.num_replicas == replicas]
            total += grad_norm(alike, kernels=kernels).squares / replicas
        total = self.sync.sum_over_owners(total)
        for axis in self.model_axes:
            all_reduce(total, axis, "all_reduce of the gradient norm")
        return total.sqrt().float()

    def nonfinite_parameters(self, *, gradients: bool) -> list[str]:
        """Return the names of parameters with a NaN or an infinity, in the gradient or itself.

        Only of what this rank holds.
        """
        return [
            slot.name
            for bucket in self.buckets
            for flat in [bucket.main_grads if gradients else bucket.main_params]
            if not flat.isfinite().all()
            for slot in bucket.slots
            if not slot.view(flat).isfinite().all()
        ]

    def blocks(self, prefix: str, flats: list[torch.Tensor]) -> Iterator[NamedBlock]:
        """Yield one flat tensor per segment (as `segments()` lists them) as named blocks."""
        for segment, flat in zip(self.segments(), flats, strict=True):
            assert flat.numel() == segment.stop - segment.start
            for slot in segment.bucket.slots:
                start, stop = max(slot.start, segment.start), min(slot.stop, segment.stop)
                if slot.sort != (segment.kind, segment.num_replicas) or start >= stop:
                    continue
                block = Block.rows(slot.param.shape, start - slot.start, stop - slot.start)
                part = flat[start - segment.start : stop - segment.start].view(block.sizes)
                replica = self.sync.replica()
                yield from slot.shard.named_blocks(prefix + slot.name, block, part, replica)

    # -- inside --------------------------------------------------------------------------------

    def _begin_step(self) -> None:
        self._state = _State.ACCUMULATING
        self._next = 0
        for bucket in self.buckets:
            self._missing[bucket.index] = len(bucket.slots)
            for slot in bucket.slots:
                slot.touched = slot.ready = False
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
        if not slot.ready and slot.touched and param in self._final:
            self._settle(bucket, slot)

    def _add(self, bucket: Bucket, slot: Slot, gradient: Gradient) -> None:
        if bucket.index < self._next:
            raise BigtrainError(
                f"the gradient of {slot.name} arrived twice in the last backward",
                why="its bucket is on the wire already; re-entrant backward passes do this",
                mend="use torch.utils.checkpoint with use_reentrant=False",
            )
        view = slot.view(bucket.main_grads)
        if isinstance(gradient, Product):
            gradient.add_to(view, first=not slot.touched)
        elif slot.touched:
            view.add_(gradient)
        else:
            view.copy_(gradient)
        slot.touched = True

    def _settle(self, bucket: Bucket, slot: Slot) -> None:
        """Note that the gradient of `slot` is final, and hand over what is complete by that."""
        slot.ready = True
        self._missing[bucket.index] -= 1
        while self._next < len(self.buckets) and not self._missing[self._next]:
            bucket = self.buckets[self._next]
            self._next += 1
            for each in bucket.slots:
                if not each.touched:
                    each.view(bucket.main_grads).zero_()
            self.sync.reduce(bucket)

    def _buffers(self) -> list[torch.Tensor]:
        """Return what training may change besides parameters: the buffers that are saved.

        Looked up each time, since a module may put a new tensor in a buffer's place.
        """
        saved = self.model.state_dict(keep_vars=True)
        return [buffer for name, buffer in self.model.named_buffers() if name in saved]

    def _equalize_buffers(self) -> None:
        """Give every rank the buffers of the first rank: one broadcast per dtype."""
        buffers = self._buffers()
        for dtype in dict.fromkeys(buffer.dtype for buffer in buffers):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.reshape(-1) for buffer in same])
            broadcast(flat, self.sync.axis, "broadcast of the buffers")
            for buffer, part in zip(same, flat.split([b.numel() for b in same]), strict=True):
                buffer.copy_(part.view(buffer.shape))
        self._published = [buffer.clone() for buffer in buffers]
