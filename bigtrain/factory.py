"""Functions of the user's that a config names as "package.module:function"."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from bigtrain.errors import BigtrainError


def import_function(name: str, where: str) -> Callable[..., Any]:
    """Return the function `name`, looked up in installed packages and in the current folder.

    Raises:
        BigtrainError: no such module or function; an error inside the module is passed on as it is.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BigtrainError(
            f"cannot import {module_name}: no module named {error.name}",
            where=where,
            why=f"looked in the installed packages and in {here}",
            mend="install it, or run from the folder that holds it",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if callable(value) and n[0] != "_"]
        raise BigtrainError(
            f"{module_name} has no function {function_name}",
            where=where,
            mend=f"it has: {', '.join(names[:20]) or 'none'}",
        )
    return function


def call_factory(name: str, args: Mapping[str, Any], where: str, **more: Any) -> Any:
    """Return what the function `name` returns for these keyword arguments.

    Raises:
        BigtrainError: it cannot be imported, or does not take these arguments.
    """
    function = import_function(name, where)
    twice = sorted(args.keys() & more.keys())
    if twice:
        raise BigtrainError(
            f"{', '.join(twice)} is not for args",
            where=where,
            why=f"bigtrain itself gives it to {name}",
            mend=f"remove it from {where.replace('factory', 'args')}",
        )
    arguments = {**args, **more}
    try:
        inspect.signature(function).bind(**arguments)
    except (TypeError, ValueError) as error:
        raise BigtrainError(
            f"{name} cannot be called with ({', '.join(arguments)})",
            where=where,
            why=str(error),
            mend=f"make {where.replace('factory', 'args')} fit {name}{_signature(function)}",
        ) from error
    return function(**arguments)


def _signature(function: Callable[..., Any]) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return "(...)"
