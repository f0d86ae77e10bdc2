"""Ctrl-C while the launcher imports and reads: it counts, also where somebody swallows it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigtrain import cli
from bigtrain.errors import Stopped


def interrupted(swallow: bool, then: Exception | None) -> Any:
    def read(*_: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt if swallow else ()):
            os.kill(os.getpid(), signal.SIGINT)
        if then is not None:
            raise then
        return None, None

    return read


@pytest.mark.parametrize("then", [None, ImportError("half an import")])
@pytest.mark.parametrize("swallow", [True, False])
def test_an_interrupt_is_not_lost(
    swallow: bool, then: Exception | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli, "_read", interrupted(swallow, then))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="stopped before any rank was started"):
        cli.launch(str(tmp_path / "any.yaml"))
    assert signal.getsignal(signal.SIGINT) is before


def test_errors_are_those_of_who_raised_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        raise ValueError("mine")

    monkeypatch.setattr(cli, "_read", read)
    with pytest.raises(ValueError, match="mine"):
        cli.launch("any.yaml")
