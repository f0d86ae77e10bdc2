"""Tensor and sequence parallelism: layers that are split inside, and plans that split a model."""

from bigtrain.tensor.apply import apply_tensor_parallel
from bigtrain.tensor.blocks import ParallelAttention, ParallelMLP
from bigtrain.tensor.embedding import VocabParallelEmbedding
from bigtrain.tensor.linear import ColumnParallelLinear, RowParallelLinear, SharedInput
from bigtrain.tensor.loss import VocabParallelCrossEntropy, vocab_parallel_cross_entropy
from bigtrain.tensor.plan import Plan, Style
from bigtrain.tensor.regions import (
    gather_channels,
    gather_sequence,
    reduce_sum,
    reduce_to_sequence,
    split_channels,
    split_sequence,
    sum_gradients,
)

__all__ = [
    "ColumnParallelLinear",
    "ParallelAttention",
    "ParallelMLP",
    "Plan",
    "RowParallelLinear",
    "SharedInput",
    "Style",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "apply_tensor_parallel",
    "gather_channels",
    "gather_sequence",
    "reduce_sum",
    "reduce_to_sequence",
    "split_channels",
    "split_sequence",
    "sum_gradients",
    "vocab_parallel_cross_entropy",
]
