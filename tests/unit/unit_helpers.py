"""What several unit tests share."""

from __future__ import annotations

from pathlib import Path

from bigtrain.config.load import load_config
from bigtrain.config.schema import Config
from bigtrain.errors import BigtrainError

ROOT = Path(__file__).parents[2]


def load_text(folder: Path, text: str, *overrides: str, world_size: int | None = None) -> Config:
    """Return the config that is written as `text`."""
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), overrides, world_size)


def assert_explained(error: BigtrainError, *words: str) -> None:
    """The message says where, what and how to mend it, and names all `words`."""
    problem = error.problem
    assert problem.what
    assert problem.mend
    for word in words:
        assert word in str(error), f"{word!r} is not in:\n{error}"
