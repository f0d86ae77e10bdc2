"""How a model says that it is a chain of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Layer(NamedTuple):
    """One link of a chain: `call` is given what the layer before returned (a tuple as several
    arguments), and after that the arguments of the model's forward that `takes` names.

    modules: names of the modules and parameters of the model that it uses.
    """

    name: str
    call: Callable[..., Any]
    modules: tuple[str, ...]
    takes: tuple[str, ...] = ()
