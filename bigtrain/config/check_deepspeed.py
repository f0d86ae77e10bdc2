"""What goes together with `engine: deepspeed`. A rule as those of check.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bigtrain.config.schema import Config, PipelineSection, ZeroSection
from bigtrain.errors import Problem

DEEPSPEED_OPTIMIZERS = ("adamw", "sgd")

# Keys of DeepSpeed's configuration that follow from ours, and what to use in their place.
OURS_IN_DEEPSPEED = {
    "train_batch_size": "set train.global_batch",
    "train_micro_batch_size_per_gpu": "set train.microbatch",
    "gradient_accumulation_steps": "it is train.global_batch / (dp * train.microbatch)",
    "gradient_clipping": "set train.max_grad_norm",
    "optimizer": "use the optimizer section",
    "scheduler": "use the schedule section",
    "bf16": "set train.precision=bf16",
    "fp16": "set train.precision",
    "amp": "set train.precision",
    "torch_autocast": "set train.precision",
    "data_types": "gradients are added up in fp32",
    "communication_data_type": "gradients travel in fp32",
    "managed_gradient_accumulation": "the trainer says when a step ends",
    "zero_allow_untested_optimizer": "it is on",
    "zero_force_ds_cpu_optimizer": "it is off",
    "tensor_parallel": "that engine splits no model; engine.kind=native does",
    "pipeline": "that engine splits no model; engine.kind=native does",
    "zero_optimization.stage": "set zero.stage",
    "zero_optimization.offload_optimizer": "set zero.offload",
    "zero_optimization.mics_shard_size": "checkpoints could not tell who has what",
}


def deepspeed_rule(config: Config, world_size: int | None) -> Iterator[Problem]:
    """Yield what DeepSpeed's engine cannot do, and keys for it that follow from ours."""
    if config.engine.kind != "deepspeed":
        if config.engine.config:
            yield Problem(
                "engine.config is for engine.kind = deepspeed",
                why="these keys are DeepSpeed's own",
                mend="remove engine.config, or set engine.kind=deepspeed",
                keys=("engine.config", "engine.kind"),
            )
        return
    split = [axis for axis in ("tp", "pp", "cp") if getattr(config.parallel, axis) > 1]
    for axis in split:
        yield Problem(
            f"parallel.{axis} = {getattr(config.parallel, axis)} with engine.kind = deepspeed",
            why="that engine trains data-parallel replicas (with ZeRO), and splits no model",
            mend=f"set parallel.{axis}=1, or engine.kind=native",
            keys=(f"parallel.{axis}", "engine.kind"),
        )
    if config.pipeline != PipelineSection() and "pp" not in split:
        yield Problem(
            "a pipeline section with engine.kind = deepspeed",
            why="that engine trains data-parallel replicas (with ZeRO), and splits no model",
            mend="remove the pipeline section, or set engine.kind=native",
            keys=("pipeline", "engine.kind"),
        )
    if config.optimizer.kind not in DEEPSPEED_OPTIMIZERS:
        yield Problem(
            f"optimizer.kind = {config.optimizer.kind} with engine.kind = deepspeed",
            why="DeepSpeed cuts parameters anywhere, so an update must be element by element",
            mend=f"set optimizer.kind to {' or '.join(DEEPSPEED_OPTIMIZERS)}, "
            "or engine.kind=native",
            keys=("optimizer.kind", "engine.kind"),
        )
    precision, stage = config.train.precision, config.zero.stage
    if precision not in ("fp32", "bf16"):
        yield Problem(
            f"train.precision = {precision} with engine.kind = deepspeed",
            why="its loss scaling is not connected with the trainer's",
            mend="set train.precision=bf16, or engine.kind=native",
            keys=("train.precision", "engine.kind"),
        )
    if precision == "bf16" and stage == 0:
        yield Problem(
            "train.precision = bf16 with engine.kind = deepspeed and zero.stage = 0",
            why="DeepSpeed would add up gradients in bf16 there; in stages 1 to 3 it does so in "
            "fp32, as bigtrain does",
            mend="set zero.stage=1, or engine.kind=native",
            keys=("zero.stage", "train.precision", "engine.kind"),
        )
    if config.zero.offload not in ("none", "cpu"):
        yield Problem(
            f"zero.offload = {config.zero.offload} with engine.kind = deepspeed",
            why="DeepSpeed has no optimizer state on disk before its first update, so a run could "
            "not be resumed (and its I/O operator takes minutes to compile)",
            mend="set zero.offload=cpu, or engine.kind=native",
            keys=("zero.offload", "engine.kind"),
        )
    elif config.zero.offload != "none" and stage == 0:
        yield Problem(
            f"zero.offload = {config.zero.offload} with engine.kind = deepspeed and zero.stage = 0",
            why="DeepSpeed offloads in stages 1 to 3",
            mend="set zero.stage=1 (or 2, 3), or zero.offload=none",
            keys=("zero.offload", "zero.stage", "engine.kind"),
        )
    for key in sorted(ZeroSection.model_fields.keys() - {"stage", "offload", "offload_dir"}):
        if getattr(config.zero, key) != getattr(ZeroSection(), key):
            yield Problem(
                f"zero.{key} has no meaning with engine.kind = deepspeed",
                why="that engine has settings of its own for how it shares out",
                mend=f"remove zero.{key}; engine.config takes DeepSpeed's keys",
                keys=(f"zero.{key}", "engine.kind"),
            )
    for key, mend in OURS_IN_DEEPSPEED.items():
        section, _, name = key.partition(".")
        given = config.engine.config.get(section)
        if (section in config.engine.config) if not name else _has(given, name):
            yield Problem(
                f"engine.config.{key} is not DeepSpeed's to say here",
                why="a run has one config, and this follows from another key of it",
                mend=f"remove it; {mend}",
                keys=(f"engine.config.{key}", f"engine.config.{section}", "engine.config"),
            )


def _has(section: Any, name: str) -> bool:
    return isinstance(section, dict) and name in section
