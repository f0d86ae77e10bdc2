"""Optimizers on flat segments, and learning-rate schedules."""

from bigtrain.optim.adagrad import Adagrad
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.build import build_optimizer, make_optimizer
from bigtrain.optim.kinds import (
    WHOLE_KINDS,
    KindOf,
    decay_kind,
    kinds_for,
    known_kind,
    matrix_kinds,
)
from bigtrain.optim.lamb import LAMB
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.onebit_lamb import OneBitLAMB
from bigtrain.optim.optimizer import Optimizer
from bigtrain.optim.schedule import learning_rate
from bigtrain.optim.sgd import SGD

__all__ = [
    "LAMB",
    "SGD",
    "WHOLE_KINDS",
    "Adagrad",
    "AdamW",
    "KindOf",
    "Lion",
    "Muon",
    "OneBitLAMB",
    "Optimizer",
    "build_optimizer",
    "decay_kind",
    "kinds_for",
    "known_kind",
    "learning_rate",
    "make_optimizer",
    "matrix_kinds",
]
