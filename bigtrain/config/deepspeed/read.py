"""JSON as values that remember the file, line and column of every key."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bigtrain.errors import ConfigError, Problem

Path_ = tuple[str | int, ...]
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+')


def read_json(path: Path) -> tuple[dict[str, Any], dict[Path_, str]]:
    """Return what the file has, and the place (file:line:column) of each key.

    Raises:
        ConfigError: it cannot be read, is no JSON object, or has a key twice.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        what, mend = f"cannot read the file: {reason}", "give the path of a DeepSpeed JSON config"
        raise ConfigError(source, [Problem(what, mend=mend, where=source)]) from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{source}:{error.lineno}:{error.colno}"
        mend = "look for a missing or an extra comma or quote there; JSON has no comments"
        problem = Problem("this is not valid JSON", f"the parser says: {error.msg}", mend, where)
        raise ConfigError(source, [problem]) from error
    except RecursionError as error:
        problem = Problem("this is not valid JSON", "it is nested too deeply", where=source)
        raise ConfigError(source, [problem]) from error
    if not isinstance(values, dict):
        what, mend = "a DeepSpeed config is one JSON object", "write {...} around its keys"
        raise ConfigError(source, [Problem(what, mend=mend, where=f"{source}:1:1")])
    places, twice = _places(text, source)
    if twice:
        raise ConfigError(source, twice)
    return values, places


def _places(text: str, source: str) -> tuple[dict[Path_, str], list[Problem]]:
    """Return where each key of valid JSON is, and which are given twice."""
    places: dict[Path_, str] = {}
    twice: list[Problem] = []
    around: list[str | int] = []  # the key or index at each level
    opened: list[str] = []
    expects_key = False
    line, line_start, done = 1, 0, 0
    for match in _TOKEN.finditer(text):
        token = match.group()
        newlines = text.count("\n", done, match.start())
        if newlines:
            line, line_start = line + newlines, text.rindex("\n", done, match.start()) + 1
        done = match.start()
        if token in "{[":
            opened.append(token)
            around.append("" if token == "{" else 0)
            expects_key = token == "{"
        elif token in "}]":
            opened.pop()
            around.pop()
        elif token == ",":
            expects_key = opened[-1] == "{"
            index = around[-1]
            if isinstance(index, int):
                around[-1] = index + 1
        elif expects_key and token[0] == '"':
            around[-1] = json.loads(token)
            key, where = tuple(around), f"{source}:{line}:{match.start() - line_start + 1}"
            if key in places:
                dotted = ".".join(map(str, key))
                why = f"the first one is at {places[key]}; only one of them can hold"
                twice.append(Problem(f"{dotted} is given twice", why, "remove one", where))
            places[key] = where
            expects_key = False
    return places, twice
