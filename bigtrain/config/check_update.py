"""Rules about the update: schedule, optimizer, precision. Pure, as `check`, which runs them."""

from __future__ import annotations

from collections.abc import Iterator

from bigtrain.config.schema import Config, MuonOptimizer, SgdOptimizer, TrainSection
from bigtrain.errors import Problem


def _schedule(config: Config, world_size: int | None) -> Iterator[Problem]:
    schedule, steps = config.schedule, config.train.steps
    if schedule.decay_steps and schedule.kind != "wsd":
        yield Problem(
            f"schedule.decay_steps has no meaning for schedule.kind = {schedule.kind}",
            why="only wsd has a decay of its own length; the others decay over the whole run",
            mend="remove schedule.decay_steps, or set schedule.kind=wsd",
            keys=("schedule.decay_steps", "schedule.kind"),
        )
    elif schedule.decay_steps and schedule.warmup_steps + schedule.decay_steps > steps:
        yield Problem(
            f"schedule: {schedule.warmup_steps} warm-up + {schedule.decay_steps} decay steps are "
            f"more than train.steps = {steps}",
            why="warm-up and decay must both fit into the run",
            mend="shorten schedule.warmup_steps or schedule.decay_steps",
            keys=("schedule.decay_steps", "schedule.warmup_steps", "train.steps"),
        )


def _momentum(config: Config, world_size: int | None) -> Iterator[Problem]:
    optimizer = config.optimizer
    if isinstance(optimizer, SgdOptimizer) and optimizer.nesterov and not optimizer.momentum:
        yield Problem(
            "optimizer.nesterov = true with optimizer.momentum = 0",
            why="Nesterov's form looks ahead along the momentum",
            mend="set optimizer.momentum=0.9, or optimizer.nesterov=false",
            keys=("optimizer.nesterov", "optimizer.momentum"),
        )


def _whole_matrices(config: Config, world_size: int | None) -> Iterator[Problem]:
    if isinstance(config.optimizer, MuonOptimizer) and config.parallel.tp > 1:
        yield Problem(
            f"optimizer.kind = muon with parallel.tp = {config.parallel.tp}",
            why="Newton-Schulz needs whole matrices, and tensor parallelism splits them",
            mend="set parallel.tp=1 (and more dp or pp), or optimizer.kind=adamw",
            keys=("parallel.tp", "optimizer.kind"),
        )


def _loss_scale(config: Config, world_size: int | None) -> Iterator[Problem]:
    train = config.train
    fixed = isinstance(train.loss_scale, float)
    if train.precision != "fp16" and train.loss_scale is not None:
        yield Problem(
            f"train.loss_scale has no meaning for train.precision = {train.precision}",
            why="only gradients in fp16 need it: its smallest number is 6e-8",
            mend="remove train.loss_scale (leave it empty), or set train.precision=fp16",
            keys=("train.loss_scale", "train.precision"),
        )
    if (train.precision != "fp16" or fixed) and (
        train.loss_scale_window != TrainSection().loss_scale_window
    ):
        why = "a fixed loss scale" if fixed else f"train.precision = {train.precision}"
        yield Problem(
            f"train.loss_scale_window has no meaning for {why}",
            why="it tells when the dynamic loss scale of fp16 doubles",
            mend="remove train.loss_scale_window, or set train.precision=fp16 and "
            "train.loss_scale=dynamic",
            keys=("train.loss_scale_window", "train.precision", "train.loss_scale"),
        )


UPDATE_RULES = (_schedule, _momentum, _whole_matrices, _loss_scale)
