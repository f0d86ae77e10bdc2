"""Flat buckets: one contiguous buffer each for parameters, main parameters and main gradients.

A bucket is what one collective carries and what the optimizer updates in one pass. Inside it,
parameters of one kind (decayed, not decayed) lie side by side, so that a kind is one flat segment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from bigtrain.comm.block import Shard
from bigtrain.comm.mesh import Axis
from bigtrain.errors import BigtrainError

_ALIGNMENT = 16  # elements: 64 bytes of fp32, a cache line and a vector register


@dataclass
class Slot:
    """The place of one parameter in its bucket: elements [start, start + numel).

    `shard` is what the parameter is of its full tensor.
    """

    name: str
    param: nn.Parameter
    kind: str
    shard: Shard
    start: int
    # Of the step under way: has a gradient arrived, and is it the last that will?
    touched: bool = False
    ready: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.param.numel()

    @property
    def sort(self) -> tuple[str, int]:
        """What all parameters of a segment have in common: kind, and number of replicas."""
        return self.kind, self.shard.num_replicas

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this parameter's part of a flat buffer of the bucket, in its own shape."""
        return flat[self.start : self.stop].view(self.param.shape)


@dataclass
class Bucket:
    """Some parameters as flat buffers, all of the same length (padding stays zero).

    axis: the ranks whose gradients are summed: those that hold the same parameters.
    params: what the model computes with, in the model's dtype; the parameters are views of it.
    main_params, main_grads: fp32. With an fp32 model `main_params` is `params` itself.
    """

    index: int
    axis: Axis
    slots: list[Slot]
    params: torch.Tensor
    main_params: torch.Tensor
    main_grads: torch.Tensor
    rounded: bool = False  # by who updated `main_params`, in the same pass

    def round(self) -> None:
        """Let `params` be `main_params` in the model's dtype."""
        if self.params is not self.main_params and not self.rounded:
            self.params.copy_(self.main_params)
        self.rounded = False

    @property
    def numel(self) -> int:
        return self.params.numel()

    def segments(self, start: int, stop: int) -> Iterator[Segment]:
        """Cut elements [start, stop) where the sort of parameter changes."""
        for sort in dict.fromkeys(slot.sort for slot in self.slots):
            slots = [slot for slot in self.slots if slot.sort == sort]
            first, last = max(start, slots[0].start), min(stop, slots[-1].stop)
            if first < last:
                yield Segment(self, *sort, first, last)


@dataclass(frozen=True)
class Segment:
    """A flat stretch of one bucket whose parameters are all of one kind.

    Each is held by `num_replicas` ranks along the axes that shard the model.
    """

    bucket: Bucket
    kind: str
    num_replicas: int
    start: int
    stop: int

    @property
    def main_params(self) -> torch.Tensor:
        return self.bucket.main_params[self.start : self.stop]

    @property
    def main_grads(self) -> torch.Tensor:
        return self.bucket.main_grads[self.start : self.stop]

    @property
    def low_params(self) -> torch.Tensor | None:
        """What the model computes with, if that is not `main_params` itself."""
        if self.bucket.params is self.bucket.main_params:
            return None
        return self.bucket.params[self.start : self.stop]


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


def build_buckets(
    parameters: Sequence[tuple[str, nn.Parameter]],
    *,
    bucket_mb: float,
    dtype: torch.dtype,
    kind_of: Callable[[str, nn.Parameter], str],
    shards: Mapping[str, Shard],
    axis_of: Callable[[str], Axis],
) -> list[Bucket]:
    """Move trainable parameters, given by name, into flat buckets of about `bucket_mb` MiB of fp32.

    Buckets follow the reverse order of registration, which is about the order in which backward
    makes gradients ready. Those of one bucket have the same `axis_of`. The model computes in
    `dtype` afterwards. Buckets are filled one after the other, so that at most one of them is held
    twice.
    """
    trainable = [(name, p) for name, p in reversed(parameters) if p.requires_grad]
    axes = {name: axis_of(name) for name, _ in trainable}
    return [
        _fill(index, axes[group[0][0]], group, dtype, kind_of, shards)
        for index, group in enumerate(_group(trainable, axes, bucket_mb))
    ]


def _group(
    named: Iterable[tuple[str, nn.Parameter]], axes: Mapping[str, Axis], bucket_mb: float
) -> Iterator[list[tuple[str, nn.Parameter]]]:
    limit = bucket_mb * 2**20 / 4
    group: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, param in named:
        full = size + param.numel() > limit
        if group and (
            full or param.device != group[0][1].device or axes[name] is not axes[group[0][0]]
        ):
            yield group
            group, size = [], 0
        group.append((name, param))
        size += param.numel()
    if group:
        yield group


def _fill(
    index: int,
    axis: Axis,
    group: list[tuple[str, nn.Parameter]],
    dtype: torch.dtype,
    kind_of: Callable[[str, nn.Parameter], str],
    shards: Mapping[str, Shard],
) -> Bucket:
    slots = [Slot(name, param, kind_of(name, param), shards[name], 0) for name, param in group]
    slots.sort(key=lambda slot: slot.sort)  # stable
    end = 0
    for slot in slots:
        slot.start = end
        end = -(-slot.stop // _ALIGNMENT) * _ALIGNMENT
    device = group[0][1].device
    main_params = torch.zeros(end, dtype=torch.float32, device=device)
    for slot in slots:
        slot.view(main_params).copy_(slot.param.detach())
    params = main_params if dtype == torch.float32 else main_params.to(dtype)
    for slot in slots:
        slot.param.data = slot.view(params)
    return Bucket(index, axis, slots, params, main_params, torch.zeros_like(main_params))
