"""Who imports whom, read from the source by `ast`, and the table of DESIGN.md section 3."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = {
    "bigtrain": ROOT / "bigtrain",
    "bigtrain.launch": ROOT / "launch",
    "bigtrain.kernels": ROOT / "kernels",
}

LEVELS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors binding config factory kernels lifetime machine run_folder slurm_lists",
        "comm ops",
        "tensor pipeline zero onebit server optim",
        "models data checkpoint observe export plan",
        "parallelize compose engines trainer train run serve joined doctor",
    )
)
OUTSIDE = frozenset({"launch", "cli", ""})  # "" is bigtrain/__init__.py
KNOWN = frozenset.union(OUTSIDE, *LEVELS)
PURE = (  # files of higher levels that belong to level 0: all may import them, they no torch
    "bigtrain.doctor.facts",
    "bigtrain.doctor.findings",
    "bigtrain.doctor.measured",
    "bigtrain.doctor.report",
    "bigtrain.pipeline.closed_form",
    "bigtrain.pipeline.columns",
    "bigtrain.pipeline.draw",
    "bigtrain.pipeline.generators",
    "bigtrain.pipeline.layer",
    "bigtrain.pipeline.play",
    "bigtrain.pipeline.report",
    "bigtrain.pipeline.schedule",
    "bigtrain.pipeline.simulate",
    "bigtrain.pipeline.table",
    "bigtrain.pipeline.table_file",
    "bigtrain.pipeline.validate",
    "bigtrain.pipeline.wire_faults",
    "bigtrain.pipeline.wires",
    "bigtrain.server.chaos",
    "bigtrain.server.environment",
    "bigtrain.server.fragments",
    "bigtrain.server.placement",
    "bigtrain.server.protocol",
    "bigtrain.server.rounds",
    "bigtrain.server.shares",
    "bigtrain.server.status",
)
TORCH_FREE = ("bigtrain.checkpoint.manifest", "bigtrain.checkpoint.report", *PURE)
DRAWS = frozenset({"bigtrain.pipeline.draw"})  # may import matplotlib, in a function
LIGHT = frozenset({"yaml", "pydantic", "pydantic_core"})  # what level 0 may import from outside


@dataclass(frozen=True)
class Import:
    """One import: the absolute name that is imported, and whether a function does it."""

    target: str
    lazy: bool
    line: int


def part_of(module: str) -> str:
    """Return the part of bigtrain that `module` belongs to: "config" for "bigtrain.config.load"."""
    return [*module.split("."), ""][1]


def level_of(part: str) -> int | None:
    """Return the level of a part, or None if DESIGN.md gives it no place."""
    return next((level for level, parts in enumerate(LEVELS) if part in parts), None)


def imports_of(source: str, module: str, is_package: bool = False) -> list[Import]:
    """Return what `module` imports at run time: all but the imports under `if TYPE_CHECKING`."""
    package = module if is_package else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for child in node.orelse:
                visit(child, lazy)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, lazy, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            found.extend(Import(f"{base}.{a.name}", lazy, node.lineno) for a in node.names)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or inside)

    visit(ast.parse(source), lazy=False)
    return found


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parents = package.split(".")
    base = parents[: len(parents) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def violation(module: str, imported: Import) -> str | None:
    """Return why `module` may not import that, or None if it may."""
    part = part_of(module)
    if part not in KNOWN:
        return f"{part} has no place in DESIGN.md's table: put it into LEVELS"
    top = imported.target.split(".")[0]
    if top != "bigtrain":
        light = level_of(part) == 0 or part == "launch" or module in TORCH_FREE
        draws = module in DRAWS and imported.lazy and top == "matplotlib"
        if light and not draws and top not in sys.stdlib_module_names | LIGHT:
            return f"{top} is neither the standard library nor one of {', '.join(sorted(LIGHT))}"
        return None
    target = part_of(imported.target)
    if target.startswith("__"):
        return None  # bigtrain.__version__
    if target not in KNOWN:
        return f"bigtrain.{target} has no place in the table; import from where it lives"
    if target == part and part:
        return None
    pure = any(f"{imported.target}.".startswith(f"{name}.") for name in PURE)
    if pure and part not in ("cli", ""):
        return None
    allowed = _allowed(part, imported.lazy)
    return None if target in allowed else f"{part or 'bigtrain'} may not import bigtrain.{target}"


def _allowed(part: str, lazy: bool) -> frozenset[str]:
    if part == "cli":
        return KNOWN if lazy else frozenset({"errors"})
    if part == "":
        return KNOWN if lazy else frozenset()
    if part == "launch":
        return LEVELS[0]
    level = level_of(part)
    assert level is not None
    if level == 4:
        return frozenset.union(*LEVELS)
    below = frozenset.union(LEVELS[0], LEVELS[1] if level else frozenset())
    return below | {"tensor"} if part == "models" else below


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) of every source file of the package."""
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            names = path.relative_to(folder).with_suffix("").parts
            yield ".".join([package, *(n for n in names if n != "__init__")]), path


def reaches(start: str, forbidden: str) -> list[str] | None:
    """Return a chain of module-level imports from module `start` to `forbidden`, or None."""
    files = dict(modules())
    seen = {start}
    chains = [[start]]
    while chains:
        chain = chains.pop()
        for name in _loaded_by(chain[-1], files):
            if name.split(".")[0] == forbidden:
                return [*chain, name]
            if name in files and name not in seen:
                seen.add(name)
                chains.append([*chain, name])
    return None


def _loaded_by(module: str, files: dict[str, Path]) -> Iterator[str]:
    """Yield what importing `module` loads first: the packages around it, then its own imports."""
    path = files[module]
    yield from _with_parents(module)
    for found in imports_of(path.read_text(), module, path.name == "__init__.py"):
        if not found.lazy:
            yield from _with_parents(found.target)


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])
