"""Optimizers on flat segments, and learning-rate schedules."""

from bigtrain.optim.optimizer import SGD, AdamW, Optimizer, decay_kind
from bigtrain.optim.schedule import learning_rate

__all__ = ["SGD", "AdamW", "Optimizer", "decay_kind", "learning_rate"]
