"""From files and command line to a checked Config: defaults < extends < file < overrides.

Everything that is wrong is collected and raised as one ConfigError.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bigtrain.config.check import check
from bigtrain.config.schema import VARIANTS, Config, Section
from bigtrain.config.yaml_tree import Key, Tree, read_file, read_value, write_tree
from bigtrain.errors import BigtrainError, ConfigError, Problem

_DEFAULT_KINDS = {section: next(iter(kinds)) for section, kinds in VARIANTS.items()}
_DEFAULT_KINDS["engine"] = "native"


def load_config(
    path: str,
    overrides: Sequence[str] = (),
    world_size: int | Callable[[Config], int] | None = None,
) -> Config:
    """Return the config in the YAML file at `path` with dotted `overrides` ("train.steps=20").

    `world_size`, where the number of ranks is known or a function of the config, is checked against
    the degrees.

    Raises:
        ConfigError: with every problem found, each with file:line:column, cause and mend.
    """
    tree = _read_chain(Path(path), seen=())
    tree.problems += _apply_overrides(tree, overrides)
    config, problems = _validate(tree, world_size)
    problems = sorted([*tree.problems, *problems], key=_reading_order)
    if problems:
        raise ConfigError(path, problems)
    assert config is not None
    return config


def dump(config: Config) -> str:
    """Return the effective config, every key included, as YAML that `load` reads back."""
    text = write_tree(config.model_dump())
    return f"# The effective config of this run: every key, defaults included.\n{text}"


def _read_chain(path: Path, seen: tuple[Path, ...]) -> Tree:
    """Read `path` on top of what it extends; paths in `extends` are relative to the file."""
    over = _spelled_out(read_file(path))
    if "extends" not in over.values:
        return over
    where = over.places[("extends",)]
    parent = over.values.pop("extends")
    problem = None
    if not isinstance(parent, str):
        mend = "write it like `extends: quickstart.yaml`"
        problem = Problem("extends takes the path of one YAML file", where=where, mend=mend)
    elif "\0" in parent:
        problem = Problem("extends takes the path of one YAML file", where=where, mend="correct it")
    elif (path.parent / parent).resolve() in (path.resolve(), *seen):
        problem = Problem(
            f"extends: {parent} leads back to this file",
            why="a config cannot be its own base",
            mend="remove one extends of the circle",
            where=where,
        )
    if problem is not None:
        over.problems.append(problem)
        return over
    base_path = path.parent / parent
    if not base_path.is_file():
        over.problems.append(
            Problem(
                f"extends: there is no file {base_path}",
                why="the path is relative to the folder of the file that extends",
                mend="correct the path",
                where=where,
            )
        )
        return over
    tree = _read_chain(base_path, (*seen, path.resolve()))
    tree.merge(over, _DEFAULT_KINDS)
    return tree


def _spelled_out(tree: Tree) -> Tree:
    """Read `engine: deepspeed` as `engine: {kind: deepspeed}`, so that files can be merged."""
    short = tree.values.get("engine")
    if isinstance(short, str):
        tree.values["engine"] = {"kind": short}
        tree.places["engine", "kind"] = tree.places["engine",]
    return tree


def _apply_overrides(tree: Tree, overrides: Sequence[str]) -> list[Problem]:
    problems = []
    # A kind decides which keys there are, so kinds come first, wherever they stand.
    for text in sorted(overrides, key=lambda text: not _chooses_kind(text.partition("=")[0])):
        place = f"command line: {text}"
        dotted, equals, value_text = text.partition("=")
        key = tuple(dotted.split("."))
        if not equals or not all(key) or len(key) < 2:
            problems.append(
                Problem(
                    "an override is section.key=value",
                    mend="write it like train.steps=20",
                    where=place,
                )
            )
            continue
        value, faults = read_value(value_text, place)
        if faults:
            problems += faults
            continue
        if _chooses_kind(dotted):
            over = Tree({key[0]: {key[1]: value}}, {key[:1]: place, key: place})
            tree.merge(over, _DEFAULT_KINDS)
        else:
            tree.set(key, value, place)
    return problems


def _chooses_kind(dotted: str) -> bool:
    return dotted.partition(".")[2] in ("kind", "factory")


def _validate(
    tree: Tree, world_size: int | Callable[[Config], int] | None
) -> tuple[Config | None, list[Problem]]:
    """Validate the tree; where keys are bad, check the rest as if they had their defaults."""
    try:
        config = Config.model_validate(tree.values)
        bad: set[Key] = set()
        problems: list[Problem] = []
    except ValidationError as failure:
        problems, bad = [], set()
        for error in failure.errors():
            key = _strip_tags(error["loc"])
            bad.add(key)
            problems.append(_explain(error, key, tree))
        try:
            config = Config.model_validate(_without(tree.values, bad))
        except ValidationError:
            return None, problems  # a required key is missing: no sense in checking combinations
    bad_dotted = {".".join(map(str, key)) for key in bad}
    try:
        world = world_size(config) if callable(world_size) else world_size
    except BigtrainError:
        if not problems and not check(config):
            raise
        world = None  # what is wrong with the config comes first
    for problem in check(config, world):
        if bad_dotted.isdisjoint(problem.keys):
            problems.append(_located(problem, tree))
    return config, problems


def _reading_order(problem: Problem) -> tuple[str, int, int]:
    """Sort by file, line and column; the command line comes last."""
    source, *position = problem.where.rsplit(":", 2)
    if len(position) == 2 and all(part.isdigit() for part in position):
        return source, int(position[0]), int(position[1])
    return "\uffff", 0, 0


def _located(problem: Problem, tree: Tree) -> Problem:
    """Point at the first key of the problem that somebody wrote."""
    for dotted in problem.keys:
        key = tuple(dotted.split("."))
        if key in tree.places:
            where = tree.places[key]
            break
    else:
        where = tree.place(tuple(problem.keys[0].split("."))) if problem.keys else ""
    where = where or "defaults"
    return Problem(problem.what, problem.why, problem.mend, where, problem.keys)


def _strip_tags(loc: tuple[int | str, ...]) -> Key:
    """Return the key that pydantic's location means: without the names of union branches."""
    return (loc[0], *loc[2:]) if loc[0] in VARIANTS else loc


def _without(values: dict[str, Any], bad: set[Key]) -> dict[str, Any]:
    pruned = copy.deepcopy(values)
    for key in bad:
        section: Any = pruned
        # Lists are dropped whole: what is left of one would have another meaning.
        stop = next((i for i, name in enumerate(key) if isinstance(name, int)), len(key))
        for name in key[: stop - 1]:
            section = section.get(name) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(key[stop - 1], None)
    return pruned


def _explain(error: ErrorDetails, key: Key, tree: Tree) -> Problem:
    """Say a pydantic error in our own words, with the nearest key or the legal values."""
    dotted = ".".join(map(str, key))
    where = tree.place(key)
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    given = f"{dotted} = {_show(value)}"
    if kind == "extra_forbidden":
        legal = _legal_keys(key[:-1], tree.values)
        near = difflib.get_close_matches(str(key[-1]), legal, n=1, cutoff=0.6)
        prefix = "".join(f"{name}." for name in key[:-1])
        mend = f"did you mean {prefix}{near[0]}? " if near else ""
        return Problem(
            f"{dotted} is not a key" + (f" (its value here: {_show(value)})"),
            why="unknown keys are refused, so that a typing error cannot go unnoticed",
            mend=f"{mend}legal keys {'here' if key[:-1] else 'at the top'}: {', '.join(legal)}",
            where=where,
        )
    if kind == "missing":
        what, why = f"{dotted} is missing", "this section has no default for it"
        return Problem(what, why=why, mend=f"add {key[-1]}: ... to {key[0]}", where=where)
    if kind == "union_tag_invalid":
        legal = [name for name in VARIANTS[str(key[0])] if name != "factory"]
        value = value.get("kind") if isinstance(value, dict) else value
        near = difflib.get_close_matches(str(value), legal, n=1, cutoff=0.5)
        return Problem(
            f"{dotted}.kind = {_show(value)} is not one of them",
            mend=(f"did you mean {near[0]}? " if near else "")
            + f"legal: {', '.join(legal)}"
            + (
                ", or factory: package.module:function"
                if "factory" in VARIANTS[str(key[0])]
                else ""
            ),
            where=tree.place((*key, "kind")),
        )
    if kind == "literal_error":
        legal = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = difflib.get_close_matches(
            _OFTEN_MEANT.get(str(value), str(value)), legal, n=1, cutoff=0.5
        )
        mend = (f"did you mean {near[0]}? " if near else "") + f"legal: {', '.join(legal)}"
        return Problem(f"{given} is not a legal value", mend=mend, where=where)
    expected = _EXPECTED.get(kind, "").format(**context)
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        what = f"{given} is not a section" if len(key) == 1 else f"{given} is not a mapping"
        mend = f"write `{key[-1]}:` and its keys indented below it"
        return Problem(what, mend=mend, where=where)
    if expected:
        return Problem(given, why=f"it must be {expected}", mend=_hint(kind, value), where=where)
    return Problem(given, why=error["msg"], mend="correct the value", where=where)


_OFTEN_MEANT = {"gpu": "cuda", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "int_or_auto": "a positive whole number, or auto",
    "scale_or_dynamic": "dynamic, or a number from 1 to 1e38",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list of at least {min_length} item(s)",
    "too_long": "a list of at most {max_length} item(s)",
    "string_too_short": "text that is not empty",
    "string_pattern_mismatch": "of the form package.module:function",
    "finite_number": "a finite number",
}


def _hint(kind: str, value: Any) -> str:
    if isinstance(value, str) and kind in ("int_type", "float_type"):
        try:
            float(value.replace("_", ""))
        except ValueError:
            return "give a number"
        return f"write it without quotes or separators: {value.replace('_', '')}"
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "no", "off", "1", "0"):
        return f"write {'true' if str(value).lower() in ('yes', 'on', '1') else 'false'}"
    if kind == "string_type" and isinstance(value, bool | int | float):
        return f'put it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    if kind == "string_type":
        return "give text, or remove the key"
    return "correct the value"


def _legal_keys(section: Key, values: dict[str, Any]) -> list[str]:
    """Return the keys that may stand in `section`, for the alternative that is chosen there."""
    if not section:
        return ["extends", *Config.model_fields]
    name = str(section[0])
    model: type[Section]
    if name in VARIANTS:
        chosen = values.get(name, {})
        default = next(iter(VARIANTS[name]))
        by_factory = "factory" in chosen and "factory" in VARIANTS[name]
        kind = "factory" if by_factory else chosen.get("kind", default)
        model = VARIANTS[name][kind]
    else:
        model = _section_of(Config, name)
        for inner in section[1:]:
            model = _section_of(model, str(inner))
    return list(model.model_fields)


def _section_of(model: type[Section], name: str) -> type[Section]:
    """Return the section that a key of another one holds, which may be left empty."""
    annotation = model.model_fields[name].annotation
    options = get_args(annotation) or (annotation,)
    return next(one for one in options if isinstance(one, type) and issubclass(one, Section))


def _show(value: Any) -> str:
    if value is None:
        return "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
