"""Fixtures of the tests that start real processes."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import Bench

# A shell that starts pytest in the background has it ignore Ctrl-C, and so all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A working folder whose processes all end with the test."""
    made = Bench(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def shared_bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench for runs that several tests of a module look at."""
    made = Bench(tmp_path_factory.mktemp("bench"))
    try:
        yield made
    finally:
        made.close()
