"""YAML as a tree of values that remembers the file, line and column of every key.

Numbers and booleans follow YAML 1.2 (`1e-3` is a number, `no` and `on` are text), which is what
people mean. Duplicate keys are problems, never silently the last one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bigtrain.errors import Problem

Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list] = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    """Return 010 as ten and 0o10 as eight, as YAML 1.2 has it."""
    text = str(loader.construct_scalar(node))
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
_BAD = object()  # stands for a value that has been reported already
# The empty scalar is looked up under "".
_Loader.yaml_implicit_resolvers.setdefault("", []).append(
    ("tag:yaml.org,2002:null", re.compile(r"^$"))
)


@dataclass
class Tree:
    """Values as plain dicts and lists, and where each key was written."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Return where `key` was written, or else the nearest place around or below it."""
        for end in range(len(key), 0, -1):
            if key[:end] in self.places:
                return self.places[key[:end]]
        below = (where for other, where in self.places.items() if other[: len(key)] == key)
        return next(below, "")

    def set(self, key: tuple[str, ...], value: Any, place: str) -> None:
        """Set one dotted key, making the sections around it."""
        section = self.values
        for depth, name in enumerate(key[:-1], start=1):
            if not isinstance(section.get(name), dict):
                section[name] = {}
                self.places[key[:depth]] = place
            section = section[name]
        section[key[-1]] = value
        self.places = {
            old: where for old, where in self.places.items() if old[: len(key)] != tuple(key)
        }
        self.places[tuple(key)] = place

    def merge(self, over: Tree, default_kinds: Mapping[str, str]) -> None:
        """Lay `over` on top: sections merge key by key, everything else is replaced.

        A section whose alternative changes (another `kind`, or a `factory`) is replaced whole:
        the keys of a gpt mean nothing to a llama. `default_kinds` tells what a section is whose
        `kind` nobody wrote.
        """
        for name, value in over.values.items():
            mine = self.values.get(name)
            default = default_kinds.get(name)
            sections = isinstance(mine, dict) and isinstance(value, dict)
            if sections and _same_variant(mine or {}, value, default):
                for key, item in value.items():
                    self.set((name, key), item, "")
            else:
                self.set((name,), value, "")
        self.places = {key: place for key, place in self.places.items() if place}
        self.places.update(over.places)
        self.problems += over.problems


def _same_variant(mine: dict, over: dict, default: str | None) -> bool:
    if "factory" in over or "factory" in mine:
        return "kind" not in over and ("factory" in over) <= ("factory" in mine)
    return "kind" not in over or over["kind"] == mine.get("kind", default)


def read_tree(text: str, source: str) -> Tree:
    """Parse one YAML document; syntax errors and duplicate keys become problems of the tree."""
    tree = Tree()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        why = "the parser says: " + ", ".join(filter(None, (error.context, error.problem)))
        mend = "check the indentation (spaces, no tabs), colons and quotes around this place"
        tree.problems.append(Problem("this is not valid YAML", why=why, mend=mend, where=where))
        return tree
    except (yaml.YAMLError, RecursionError) as error:
        why = f"the parser says: {error}".replace("\n", " ")
        mend = "save the file as plain UTF-8 text, without deep nesting"
        tree.problems.append(Problem("this is not valid YAML", why=why, mend=mend, where=source))
        return tree
    if node is None:
        return tree
    if not isinstance(node, yaml.MappingNode):
        tree.problems.append(
            Problem(
                "a config is made of `section: {key: value}` lines, this is something else",
                mend="start from configs/quickstart.yaml",
                where=f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}",
            )
        )
        return tree
    tree.values = _convert(node, (), source, tree, ())
    # `train:` with nothing below it is an empty section (all its keys are commented out).
    tree.values = {k: {} if v is None and k != "extends" else v for k, v in tree.values.items()}
    return tree


def read_file(path: Path) -> Tree:
    """Read one YAML file; an unreadable file becomes a problem of the tree."""
    try:
        return read_tree(path.read_text(encoding="utf-8"), str(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        problem = Problem(
            f"cannot read the config: {reason}",
            mend="check the path; configs/ has one config per technique to start from",
            where=str(path),
        )
        return Tree(problems=[problem])


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader above would not read as text, which PyYAML's own rules do not."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def write_tree(values: dict[str, Any]) -> str:
    """Return YAML that `read_tree` reads back as the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_value(value: Any) -> str:
    """Return a value in one line of YAML, as `read_value` reads it back."""
    line = yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=1 << 30)
    return line.strip()[1:-1]


def read_value(text: str, source: str) -> tuple[Any, list[Problem]]:
    """Return the value that `text` has in YAML, as on the right of `key: `, and what is wrong."""
    tree = Tree()
    try:
        node = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        mend = "quote it for the shell and for YAML, like run.dir='\"a: b\"'"
        return None, [Problem("the value is not valid YAML", where=source, mend=mend)]
    value = None if node is None else _convert(node, (), "", tree, ())
    return value, [dataclasses.replace(problem, where=source) for problem in tree.problems]


def _convert(
    node: yaml.Node, key: Key, source: str, tree: Tree, around: tuple[yaml.Node, ...]
) -> Any:
    """Return the plain value of a node; `around` are the nodes that it is inside of."""
    if any(node is outer for outer in around):
        what, mend = "this alias leads back into itself", "remove the anchor and write values"
        tree.problems.append(Problem(what, mend=mend, where=_place(node, source)))
        return _BAD
    around = (*around, node)
    if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN:
        what, mend = f"the tag {node.tag} is not read", "write plain sections and lists; no tags"
        tree.problems.append(Problem(what, mend=mend, where=_place(node, source)))
        return _BAD
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, key, source, tree, around)
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, child in enumerate(node.value):
            item = (*key, index)
            tree.places[item] = _place(child, source)
            items.append(_convert(child, item, source, tree, around))
        return items
    try:
        return _Loader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        why = f"the parser says: {getattr(error, 'problem', error)}"
        mend = "write plain numbers, text, lists and sections; no tags"
        tree.problems.append(
            Problem("cannot read this value", why=why, mend=mend, where=_place(node, source))
        )
        return _BAD


def _convert_mapping(
    node: yaml.MappingNode, key: Key, source: str, tree: Tree, around: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name_node, child in node.value:
        where = _place(name_node, source)
        if not isinstance(name_node, yaml.ScalarNode):
            what, mend = "a key must be plain text", "write `key: value`"
            tree.problems.append(Problem(what, mend=mend, where=where))
            continue
        name = str(name_node.value)
        full = (*key, name)
        if name in values:
            dotted = ".".join(map(str, full))
            tree.problems.append(
                Problem(
                    f"{dotted} is given twice",
                    why=f"the first one is at {tree.places[full]}; only one of them can hold",
                    mend="remove one of the two",
                    where=where,
                )
            )
            continue
        tree.places[full] = where
        value = _convert(child, full, source, tree, around)
        if value is not _BAD:
            values[name] = value
    return values


def _place(node: yaml.Node, source: str) -> str:
    return f"{source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
