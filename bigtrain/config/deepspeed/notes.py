"""What keys of DeepSpeed mean here that have no key of their own: dotted name -> in a sentence.

A name that ends in `.*` is for all keys below it that have no line of their own.
"""

from __future__ import annotations

_ALWAYS = "always so here"
_MEMORY = "nothing to set: what is needed is gathered layer by layer"
_NONE = "bigtrain has nothing like it; leave it out"

NOTES: dict[str, str] = {
    "optimizer.*": "no such key here",
    "scheduler.*": "no such key here: see the schedule section",
    "wall_clock_breakdown": "metrics.jsonl has every step's speed; use torch.profiler for more",
    "memory_breakdown": "use torch.profiler",
    "dump_state": "the effective config is written to run.dir/config.yaml",
    "steps_per_print": "log.every",
    "prescale_gradients": "gradients are weighted by item counts and summed in fp32; no scaling",
    "gradient_predivide_factor": "gradients are summed in fp32, which does not overflow",
    "sparse_gradients": "gradients of embeddings are dense",
    "communication_data_type": "gradients are summed in fp32",
    "data_types.*": "gradients are added up in fp32",
    "zero_allow_untested_optimizer": "the optimizers here are all meant for ZeRO",
    "zero_force_ds_cpu_optimizer": "updates run where the state lives",
    "seq_parallel_communication_data_type": "activations travel in the precision of the model",
    "disable_allgather": _ALWAYS,
    "load_universal_checkpoint": "every checkpoint can be resumed under any layout",
    "use_node_local_storage": "run.dir must be shared by all nodes",
    "checkpoint.*": "checkpoints are always written by all ranks, and can be resumed on any layout",
    "amp.*": "use train.precision=bf16",
    "torch_autocast.*": "use train.precision=bf16, which casts the whole model",
    "fp16.auto_cast": "inputs that are floating-point always take the model's dtype",
    "fp16.consecutive_hysteresis": "loss scaling has no such key here",
    "fp16.fp16_master_weights_and_grads": "main parameters and gradients are always fp32",
    "fp16.fp16_master_weights_and_gradients": "main parameters and gradients are always fp32",
    "fp16.*": "a key of loss scaling; bf16 needs none",
    "bf16.bf16_master_weights_and_grads": "main parameters and gradients are always fp32",
    "bf16.immediate_grad_update": _ALWAYS,
    "bf16.check_grad_overflow": "always looked at: train.on_nonfinite says what then",
    "bf16.*": "main parameters, gradients and moments are always fp32",
    "zero_optimization.contiguous_gradients": _ALWAYS,
    "zero_optimization.overlap_comm": "buckets always travel while backward runs",
    "zero_optimization.reduce_scatter": _ALWAYS,
    "zero_optimization.allgather_partitions": _ALWAYS,
    "zero_optimization.allgather_bucket_size": "buckets are those of gradients: parallel.bucket_mb",
    "zero_optimization.round_robin_gradients": "owners have equal parts of every bucket",
    "zero_optimization.load_from_fp32_weights": _ALWAYS,
    "zero_optimization.elastic_checkpoint": "every checkpoint can be resumed under any layout",
    "zero_optimization.ignore_unused_parameters": "what takes no part counts as a zero gradient",
    "zero_optimization.legacy_stage1": "the old stage 1 of DeepSpeed is gone there too",
    "zero_optimization.sub_group_size": "updates go bucket by bucket: parallel.bucket_mb",
    "zero_optimization.cpu_offload": "the old spelling of offload_optimizer: use zero.offload",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "checkpoints are always whole",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "checkpoints are always whole",
    "zero_optimization.stage3_max_live_parameters": _MEMORY,
    "zero_optimization.stage3_max_reuse_distance": _MEMORY,
    "zero_optimization.stage3_prefetch_bucket_size": _MEMORY,
    "zero_optimization.stage3_param_persistence_threshold": _MEMORY,
    "zero_optimization.stage3_model_persistence_threshold": _MEMORY,
    "zero_optimization.zero_hpz_partition_size": "ZeRO++'s second copy inside a node: not here; "
    "parameters are gathered over all data-parallel ranks",
    "zero_optimization.zero_quantized_weights": "ZeRO++'s quantised gathers: not here; parameters "
    "travel in the precision of the model",
    "zero_optimization.zero_quantized_gradients": "ZeRO++'s quantised reduction: not here; "
    "gradients travel in fp32",
    "zero_optimization.mics_shard_size": "MiCS: not here; ranks share over the whole axis",
    "zero_optimization.offload_optimizer.*": "zero.offload and zero.offload_dir are all there is",
    "zero_optimization.offload_param.*": "parameters stay on the device that computes; "
    "zero.offload is for optimizer state",
    "zero_optimization.*": _NONE,
    "aio.*": "reading and writing of offloaded state has no keys here",
    "pipeline.partition": "stages are cut to equal cost: pipeline.split and pipeline.cost",
    "pipeline.activation_checkpoint_interval": "checkpoint in the model (torch.utils.checkpoint)",
    "pipeline.*": "see docs/pipeline.md for what a pipeline can be told here",
    "tensor_parallel.*": "a model brings a plan, or parallel.tensor_plan has one",
    "activation_checkpointing.*": "checkpoint in the model: torch.utils.checkpoint with "
    "use_reentrant=False",
    "tensorboard.*": "always written, to run.dir/tensorboard",
    "csv_monitor.*": "always written as JSON lines: run.dir/metrics.jsonl",
    "wandb.*": "metrics.jsonl and TensorBoard are written; sync those",
    "comet.*": "metrics.jsonl and TensorBoard are written; sync those",
    "monitor_config.*": "metrics.jsonl and TensorBoard are always written",
    "comms_logger.*": "use torch.profiler to see collectives",
    "flops_profiler.*": "use torch.profiler",
    "elasticity.*": "a run can be resumed on any number of ranks; set train.global_batch to one "
    "that all of them divide",
    "autotuning.*": _NONE,
    "data_efficiency.*": "bring a dataset of your own: data.factory",
    "curriculum_learning.*": "bring a dataset of your own: data.factory",
    "progressive_layer_drop.*": "bring a model of your own: model.factory",
    "eigenvalue.*": _NONE,
    "quantize_training.*": _NONE,
    "compression_training.*": _NONE,
    "sparse_attention.*": "bring a model of your own: model.factory",
    "hybrid_engine.*": _NONE,
    "compile.*": "compile in your own model.factory",
    "timers.*": "metrics.jsonl has the speed of every step",
    "nebula.*": _NONE,
}


def note_on(dotted: str) -> str | None:
    """Return what a key means here, by its own line or that of a section around it."""
    if dotted in NOTES:
        return NOTES[dotted]
    names = dotted.split(".")
    for end in range(len(names), 0, -1):
        found = NOTES.get(".".join([*names[:end], "*"]))
        if found is not None:
            return found
    return None


def has_lines(section: str) -> bool:
    """Are there keys of this section with lines of their own, not just one line for all?"""
    return any(key.startswith(f"{section}.") and key != f"{section}.*" for key in NOTES)
