"""From the config's optimizer section to an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from bigtrain.comm.buckets import Segment
from bigtrain.comm.gradient import GradientPath
from bigtrain.config.schema import (
    AdagradOptimizer,
    AdamwOptimizer,
    CompressionKind,
    LambOptimizer,
    LionOptimizer,
    MuonOptimizer,
    SgdOptimizer,
)
from bigtrain.ops.op import Kernels
from bigtrain.optim.adagrad import Adagrad
from bigtrain.optim.adamw import AdamW
from bigtrain.optim.lamb import LAMB
from bigtrain.optim.lion import Lion
from bigtrain.optim.muon import Muon
from bigtrain.optim.onebit_lamb import OneBitLAMB
from bigtrain.optim.optimizer import Optimizer, Source
from bigtrain.optim.sgd import SGD

OptimizerConfig = (
    AdamwOptimizer | SgdOptimizer | LambOptimizer | AdagradOptimizer | LionOptimizer | MuonOptimizer
)

_CLASSES: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "sgd": SGD,
    "lamb": LAMB,
    "adagrad": Adagrad,
    "lion": Lion,
    "muon": Muon,
}


def build_optimizer(
    path: GradientPath,
    config: OptimizerConfig,
    kernels: Kernels = "auto",
    compression: CompressionKind = "none",
) -> Optimizer:
    """Return the optimizer that `config` describes, for what `path` has on this rank.

    compression: how gradients come; LAMB is 1-bit LAMB where that is onebit.

    Raises:
        BigtrainError: the parameters do not suit it.
    """
    kind = OneBitLAMB if config.kind == "lamb" and compression == "onebit" else None
    return _make(kind or _CLASSES[config.kind], path, config, kernels)


def make_optimizer(
    segments: Sequence[Segment], config: OptimizerConfig, kernels: Kernels = "auto"
) -> Optimizer:
    """Return the optimizer that `config` describes, for segments that belong to no path."""
    return _make(_CLASSES[config.kind], segments, config, kernels)


def _make(
    kind: type[Optimizer], source: Source, config: OptimizerConfig, kernels: Kernels
) -> Optimizer:
    # The keys of a section are the arguments of its class; `exclude` is for `kinds_for`.
    options = config.model_dump(exclude={"kind", "exclude"})
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    return kind(source, kernels=kernels, **options)
