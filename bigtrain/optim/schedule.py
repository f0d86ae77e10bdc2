"""The learning rate as a pure function of the step, so that there is no schedule state to save."""

from __future__ import annotations

import math

from bigtrain.config.schema import ScheduleSection


def learning_rate(schedule: ScheduleSection, peak: float, step: int, steps: int) -> float:
    """Return the rate of update `step` (counted from 0) of a run of `steps` updates.

    Warm-up rises linearly and reaches `peak` at its last step. Then: constant; linear or cosine
    fall to `min_lr_ratio * peak` at the last step of the run; wsd stays at the peak and falls
    linearly over its last `decay_steps` (https://arxiv.org/abs/2404.06395).
    """
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    decay = steps - warmup
    if schedule.kind == "wsd":
        decay = schedule.decay_steps or max(1, min(decay, steps // 10))
    into = step - (steps - decay) + 1  # 1 at the first step of the fall, `decay` at the last
    progress = min(max(into / max(1, decay), 0.0), 1.0)
    if schedule.kind == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return peak * (1 - (1 - schedule.min_lr_ratio) * progress)
