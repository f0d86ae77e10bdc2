"""What the loss is multiplied by before backward, so that small gradients are not zero in fp16."""

from __future__ import annotations

from dataclasses import dataclass

from bigtrain.config.schema import TrainSection

INITIAL, MINIMUM = 2.0**16, 1.0


@dataclass
class LossScale:
    """A scale that is as large as fp16 allows, or a fixed one (https://arxiv.org/abs/1710.03740).

    It halves with every overflow, and doubles after `window` steps in a row without one; with
    window None it stays. `scale` and `good_steps` are all there is to save.
    """

    scale: float = INITIAL
    window: int | None = None
    good_steps: int = 0

    @property
    def dynamic(self) -> bool:
        return self.window is not None

    @property
    def exhausted(self) -> bool:
        """Did the gradient overflow with the smallest scale too?"""
        return self.dynamic and self.scale < MINIMUM

    def found(self, overflow: bool) -> None:
        """Note how a step went: did its gradient overflow?"""
        if self.window is None:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.good_steps >= self.window:
            self.scale, self.good_steps = 2 * self.scale, 0


def build_loss_scale(config: TrainSection) -> LossScale:
    """Return the scale that `config` describes; without fp16 it is 1, and stays."""
    if config.precision != "fp16":
        return LossScale(1.0)
    if isinstance(config.loss_scale, float):
        return LossScale(config.loss_scale)
    return LossScale(window=config.loss_scale_window)
