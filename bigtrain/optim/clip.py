"""What gradients are divided by, as plain numbers."""

from __future__ import annotations


def grad_divisor(norm: float, correction: float, most: float | None) -> float:
    """Return what undivided gradients are divided by, in one pass: `correction` makes the mean of
    them, and what is longer than `most` then is clipped to it. norm: of that mean."""
    clip = max(1.0, (norm + 1e-6) / most) if most else 1.0
    return correction * clip
