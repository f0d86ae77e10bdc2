"""bigtrain: train large models on many devices, layered over torch.distributed.

Public names load when they are first used, so that `import bigtrain` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Adagrad": "bigtrain.optim",
    "AdamW": "bigtrain.optim",
    "BigtrainError": "bigtrain.errors",
    "ColumnParallelLinear": "bigtrain.tensor",
    "GradientPath": "bigtrain.comm.gradient",
    "LAMB": "bigtrain.optim",
    "Layer": "bigtrain.pipeline.layer",
    "Layout": "bigtrain.config.layout",
    "Lion": "bigtrain.optim",
    "Mesh": "bigtrain.comm.mesh",
    "Muon": "bigtrain.optim",
    "OneBitLAMB": "bigtrain.optim",
    "Pipeline": "bigtrain.pipeline.run",
    "ParallelAttention": "bigtrain.tensor",
    "ParallelMLP": "bigtrain.tensor",
    "RowParallelLinear": "bigtrain.tensor",
    "SGD": "bigtrain.optim",
    "ServerEmbedding": "bigtrain.server.embedding",
    "Style": "bigtrain.tensor",
    "Trainer": "bigtrain.trainer",
    "VocabParallelCrossEntropy": "bigtrain.tensor",
    "VocabParallelEmbedding": "bigtrain.tensor",
    "ZeroSection": "bigtrain.config.schema",
    "apply_tensor_parallel": "bigtrain.tensor",
    "build_pipeline": "bigtrain.compose",
    "gather_sequence": "bigtrain.tensor",
    "split_sequence": "bigtrain.tensor",
    "sum_gradients": "bigtrain.tensor",
    "init": "bigtrain.comm.init",
    "leave": "bigtrain.comm.init",
    "load_config": "bigtrain.config.load",
    "matrix_kinds": "bigtrain.optim",
    "parallelize": "bigtrain.compose",
    "shards_of": "bigtrain.comm.block",
    "vocab_parallel_cross_entropy": "bigtrain.tensor",
}

if TYPE_CHECKING:
    from bigtrain.comm.block import shards_of
    from bigtrain.comm.gradient import GradientPath
    from bigtrain.comm.init import init, leave
    from bigtrain.comm.mesh import Mesh
    from bigtrain.compose import build_pipeline, parallelize
    from bigtrain.config.layout import Layout
    from bigtrain.config.load import load_config
    from bigtrain.config.schema import ZeroSection
    from bigtrain.errors import BigtrainError
    from bigtrain.optim import LAMB, SGD, Adagrad, AdamW, Lion, Muon, matrix_kinds
    from bigtrain.pipeline.layer import Layer
    from bigtrain.pipeline.run import Pipeline
    from bigtrain.server.embedding import ServerEmbedding
    from bigtrain.tensor import (
        ColumnParallelLinear,
        ParallelAttention,
        ParallelMLP,
        RowParallelLinear,
        Style,
        VocabParallelCrossEntropy,
        VocabParallelEmbedding,
        apply_tensor_parallel,
        gather_sequence,
        split_sequence,
        sum_gradients,
        vocab_parallel_cross_entropy,
    )
    from bigtrain.trainer import Trainer

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "AdamW",
    "BigtrainError",
    "ColumnParallelLinear",
    "GradientPath",
    "Layer",
    "Layout",
    "Lion",
    "Mesh",
    "Muon",
    "OneBitLAMB",
    "ParallelAttention",
    "ParallelMLP",
    "Pipeline",
    "RowParallelLinear",
    "ServerEmbedding",
    "Style",
    "Trainer",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "ZeroSection",
    "apply_tensor_parallel",
    "build_pipeline",
    "gather_sequence",
    "init",
    "leave",
    "load_config",
    "matrix_kinds",
    "parallelize",
    "shards_of",
    "split_sequence",
    "sum_gradients",
    "vocab_parallel_cross_entropy",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bigtrain' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
