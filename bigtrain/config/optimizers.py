"""The optimizer section of a config: one class for each kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bigtrain.config.section import Section

Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]


class AdamwOptimizer(Section):
    kind: Literal["adamw"] = "adamw"
    """AdamW with decoupled weight decay."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    betas: Betas = [0.9, 0.95]
    """Decay of the first and of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices and embeddings; norms and biases have none."""


class SgdOptimizer(Section):
    kind: Literal["sgd"]
    """Stochastic gradient descent with momentum."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the velocity."""
    nesterov: bool = False
    """Look ahead along the velocity."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 decay of matrices and embeddings; norms and biases have none."""


class LambOptimizer(Section):
    kind: Literal["lamb"]
    """LAMB: AdamW's direction, with steps in proportion to the parameter; for large batches."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate."""
    betas: Betas = [0.9, 0.999]
    """Decay of the first and of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of matrices and embeddings; norms and biases have none."""


class AdagradOptimizer(Section):
    kind: Literal["adagrad"]
    """Adagrad: steps shrink by the root of all squared gradients so far."""
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """Peak learning rate."""
    eps: Annotated[float, Field(gt=0)] = 1e-10
    """Added to the root of the sum of squares."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 decay of matrices and embeddings; norms and biases have none."""


class LionOptimizer(Section):
    kind: Literal["lion"]
    """Lion: the sign of a momentum; half of AdamW's state."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate: a third to a tenth of AdamW's."""
    betas: Betas = [0.9, 0.99]
    """Share of the momentum in a step's direction; decay of the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 1.0
    """Decay of matrices and embeddings: three to ten times AdamW's. Norms and biases have none."""


class MuonOptimizer(Section):
    kind: Literal["muon"]
    """Muon for hidden matrices, AdamW for embeddings, the output head, norms and biases."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Peak learning rate of matrices. With scale: keller, about 0.02."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decay of matrices and embeddings; norms and biases have none."""
    scale: Literal["match_rms", "keller"] = "match_rms"
    """Length of a matrix's step: match_rms is as AdamW's, keller max(1, rows / cols) ** 0.5."""
    num_iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """Newton-Schulz iterations of an update."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Dtype of Newton-Schulz; auto is bf16 on GPUs, fp32 on CPUs."""
    exclude: list[Annotated[str, Field(min_length=1)]] = ["*head*", "*embed*"]
    """Patterns of names of matrices that AdamW updates; embeddings are left to it anyway."""
    adamw_lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of AdamW as a share of lr. With scale: keller, about 0.015."""
    betas: Betas = [0.9, 0.95]
    """AdamW's decay of the first and of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of AdamW's second moment."""
