"""Every kernel library of this machine, and the CUDA sources as C++ in all four orders.

`library` gives a test each of them in turn, and lets bigtrain.ops take it for tensors of `device`.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from bigtrain.kernels import build
from bigtrain.ops import library as libraries
from bigtrain.ops.library import Library

ORDERS = range(4)
CPU = [target for target in build.cpu_targets() if build.runs_here(target)]
NAMES = [
    *(target.name for target in CPU),
    *(f"emulated_{order}" for order in ORDERS),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="there is no GPU")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def loaded() -> dict[str, Library]:
    """All libraries, built where they are not in the cache."""
    targets = [*CPU, build.EMULATED]
    return {target.name: Library(build.build_cached(target)) for target in targets}


@pytest.fixture(params=NAMES)
def library(
    request: pytest.FixtureRequest, loaded: dict[str, Library], monkeypatch: pytest.MonkeyPatch
) -> Library:
    """One implementation, which all operations use inside of the test."""
    name, _, order = request.param.partition("_")
    if name == "cuda":
        found = libraries.find("cuda")
        assert isinstance(found, Library), found
    else:
        found = loaded["emulated" if name == "emulated" else request.param]
    if name == "emulated":
        ctypes.CDLL(str(found.path)).bt_emulation_order(int(order))
    monkeypatch.setattr("bigtrain.ops.op.library_of", lambda device: found)
    return found


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where tensors of the implementation under test live."""
    params = getattr(request.node, "callspec", None)
    name = params.params.get("library") if params else None
    return torch.device("cuda" if name == "cuda" else "cpu")
