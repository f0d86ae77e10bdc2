"""Kinds of parameters: what an optimizer does alike lies side by side in a bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from bigtrain.config.schema import MuonOptimizer, Section
from bigtrain.errors import BigtrainError

DECAY, NO_DECAY, MATRIX = "decay", "no_decay", "matrix"

WHOLE_KINDS = frozenset({MATRIX})
"""Kinds whose parameters need one owner each: buckets never cut them between ranks."""

KindOf = Callable[[str, nn.Parameter], str]
"""What kind a parameter is, by its name in the full model and itself."""


def known_kind(name: str, param: nn.Parameter, kind_of: KindOf) -> str:
    """Return the kind of a parameter.

    Raises:
        BigtrainError: it is none that optimizers know.
    """
    kind = kind_of(name, param)
    if kind not in (DECAY, NO_DECAY, MATRIX):
        raise BigtrainError(
            f"{name} is of kind {kind!r}, which no optimizer knows",
            why=f"kinds are {DECAY!r}, {NO_DECAY!r} and {MATRIX!r} (whole matrices, for Muon)",
            mend="let kind_of return one of these",
        )
    return kind


def decay_kind(name: str, param: nn.Parameter) -> str:
    """Return which kind a parameter is: matrices and embeddings decay, norms and biases do not."""
    return DECAY if param.ndim >= 2 else NO_DECAY


def kinds_for(config: Section, model: nn.Module) -> KindOf:
    """Return how the optimizer that `config` describes sorts the parameters of `model`."""
    return matrix_kinds(model, config.exclude) if isinstance(config, MuonOptimizer) else decay_kind


def matrix_kinds(model: nn.Module, exclude: Sequence[str] = ("*head*", "*embed*")) -> KindOf:
    """Return what tells Muon's matrices from what it leaves to AdamW.

    They are the parameters of two or more dims that are no embedding, not tied to one, and whose
    names match none of the patterns `exclude`. `model` is the full one, not yet cut into stages.
    """
    looked_up = _embeddings(model)

    def kind_of(name: str, param: nn.Parameter) -> str:
        hidden = param.ndim >= 2 and name not in looked_up
        if hidden and not any(fnmatchcase(name, pattern) for pattern in exclude):
            return MATRIX
        return decay_kind(name, param)

    return kind_of


def _embeddings(model: nn.Module) -> set[str]:
    """Return all names of the parameters whose rows are looked up by an embedding."""
    tables = {
        param
        for module in model.modules()
        # An embedding that is split by its vocabulary is no nn.Embedding, but has its attributes.
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or hasattr(module, "num_embeddings")
        for param in module.parameters(recurse=False)
    }
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, param in every if param in tables}
