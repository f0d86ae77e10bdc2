"""Compressed gradients and updates, whose errors are sent the next time."""
