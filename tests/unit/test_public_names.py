"""`from bigtrain import ...`"""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import bigtrain


@pytest.mark.parametrize("name", bigtrain.__all__)
def test_public_name_loads(name: str) -> None:
    """Each of them, and with a docstring."""
    assert inspect.getdoc(getattr(bigtrain, name))


def test_lists_agree() -> None:
    assert set(bigtrain.__all__) == set(bigtrain._PUBLIC)


def test_no_module_shadows_a_public_name() -> None:
    """Else `from bigtrain import it` gives the module, once something has imported that."""
    modules = {path.stem for path in Path(bigtrain.__file__).parent.iterdir()}
    assert modules.isdisjoint(bigtrain.__all__)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bigtrain.nothing
