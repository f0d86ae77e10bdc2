"""What is known of one step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer update.

    loss: mean over the global batch, in nats for language models. sample_ids: what this rank read.
    loss_scale: of this step, in fp16; loss and grad_norm are without it.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    items: int
    items_per_second: float
    skipped: bool
    sample_ids: list[int]
    loss_scale: float | None = None


@dataclass(frozen=True)
class SaveRecord:
    """What the checkpoint of `step` has cost."""

    step: int
    save_seconds: float


@dataclass(frozen=True)
class EvalRecord:
    """The held-out loss after `step` updates."""

    step: int
    validation_loss: float
