"""The configuration that DeepSpeed's engine gets: what ours means to it, and raw keys."""

from __future__ import annotations

from typing import Any

from bigtrain.config.schema import Config

_NEVER = 2**31 - 1


def deepspeed_config(
    config: Config, microbatch: int, num_microbatches: int, dp: int
) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run of `dp` ranks.

    Clipping, the learning rate and the update are the trainer's, so DeepSpeed's are off.
    """
    bf16 = config.train.precision == "bf16"
    elements = int(config.parallel.bucket_mb * 2**20 / 4)
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
    }
    if config.zero.offload != "none":
        zero["offload_optimizer"] = {"device": config.zero.offload}
    ours: dict[str, Any] = {
        "train_batch_size": microbatch * num_microbatches * dp,
        "train_micro_batch_size_per_gpu": microbatch,
        "gradient_accumulation_steps": num_microbatches,
        "gradient_clipping": 0.0,
        "steps_per_print": _NEVER,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    return _merged(config.engine.config, ours)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return both, sections key by key; where both have a value it is that of `over`."""
    merged = dict(under)
    for key, value in over.items():
        mine = merged.get(key)
        both = isinstance(mine, dict) and isinstance(value, dict)
        merged[key] = _merged(mine or {}, value) if both else value
    return merged
