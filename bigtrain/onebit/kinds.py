"""From the config's compression section to a wire, or to a strategy of its own."""

from __future__ import annotations

import torch

from bigtrain.comm.mesh import Axis
from bigtrain.comm.wire import Wire
from bigtrain.config.schema import CompressionSection
from bigtrain.onebit.codec import Casts, Codec, Codes, Signs, TopK
from bigtrain.onebit.feedback import FeedbackWire
from bigtrain.onebit.lowrank import LowRankWire
from bigtrain.onebit.momentum import MomentumWire
from bigtrain.onebit.published import MeanMomentum, Published
from bigtrain.onebit.switch import Switch
from bigtrain.ops.op import Kernels

CODES_BLOCK, SIGNS_BLOCK = 256, 1024  # elements of a scale, of gradients and of momentum
UPDATE_BLOCK, SIGNS_UPDATE_BLOCK = 1024, 512  # of updates


def packing_wire(
    plain: Wire,
    refreshing: Wire,
    section: CompressionSection,
    senders: int,
    kernels: Kernels = "auto",
) -> Wire:
    """Return the wire of that kind. `plain` carries what goes exactly, `refreshing` gradients for
    the variance; `senders` is the number of nodes."""
    if section.kind in ("default", "max"):
        return _momentum_wire(plain, refreshing, section, senders, kernels)
    every, down = section.resync_every, Codes(8, UPDATE_BLOCK, kernels)
    if section.kind == "powersgd":
        return LowRankWire(plain, section.rank, down, resync_every=every)
    if section.kind == "topk":
        largest = TopK(section.density)
        return FeedbackWire(plain, largest, down, resync_every=every)
    if section.kind in ("bf16", "fp16"):
        cast = Casts(torch.bfloat16 if section.kind == "bf16" else torch.float16)
        return FeedbackWire(plain, cast, cast, resync_every=every)
    up = Codes(4 if section.kind == "safe" else 8, section.block or CODES_BLOCK, kernels)
    return FeedbackWire(plain, up, down, resync_every=every)


def published(axis: Axis, section: CompressionSection, kernels: Kernels = "auto") -> Published:
    """Return the strategy of 1-bit Adam and LAMB, or of 0/1 Adam."""
    signs, local = Signs(section.block or SIGNS_BLOCK, kernels), None
    if section.kind == "zero_one":  # from the first step on; the variance, too, takes up that one
        switch, local = Switch(refresh_every=1, always=True), section.local_steps
        switch.begin("compressed")
    else:
        switch = Switch(first=section.warmup_steps, refresh_every=0, always=True)
    return Published(axis, MeanMomentum(axis, signs, switch, local))


def _momentum_wire(
    plain: Wire, refreshing: Wire, section: CompressionSection, senders: int, kernels: Kernels
) -> Wire:
    signs = Signs(section.block or SIGNS_BLOCK, kernels)
    down: Codec = Codes(4, UPDATE_BLOCK, kernels)
    if section.kind == "max":
        down = Signs(SIGNS_UPDATE_BLOCK, kernels)
    switch = Switch(
        first=section.warmup_steps,
        refresh_every=section.refresh_every,
        always=section.when == "always",
    )
    every = section.resync_every
    return MomentumWire(plain, refreshing, signs, down, switch, resync_every=every, senders=senders)
