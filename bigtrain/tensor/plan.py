"""Plans of tensor parallelism: data that says how each module of a model is split.

A plan maps patterns of module names to styles:

    {"token_embedding": "vocab", "blocks.*.mlp.up": "column", "blocks.*.mlp.down": "row", ...}

In a pattern `*` stands for one component of a name, `**` for any number of them. What the styles do
is told by `apply_tensor_parallel`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn

from bigtrain.config.schema import StyleName
from bigtrain.errors import BigtrainError

STYLES: tuple[str, ...] = get_args(StyleName)


@dataclass(frozen=True)
class Style:
    """How a module is split: `kind`, and for column and row the heads that are never cut.

    units, share: see ColumnParallelLinear. A string in a plan is a Style without units.
    """

    kind: str
    units: tuple[int, ...] = ()
    share: bool = False


Plan = Mapping[str, str | Style]


def match_plan(model: nn.Module, plan: Plan) -> dict[str, Style]:
    """Return the style of each module that `plan` names, in the order of the model.

    Raises:
        BigtrainError: a pattern matches nothing, two match one module, or a style is unknown.
    """
    if not plan:
        raise BigtrainError(
            "the plan is empty",
            why="it would split nothing, and every rank would do the same work",
            mend="name the modules to split, or use a degree of 1",
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    chosen: dict[str, tuple[str, Style]] = {}
    for pattern, given in plan.items():
        style = Style(given) if isinstance(given, str) else given
        if style.kind not in STYLES:
            raise BigtrainError(
                f"the plan gives {pattern!r} an unknown style: {style.kind!r}",
                why=f"the styles are {', '.join(STYLES)}",
                mend="use one of them" + _like(style.kind, STYLES),
            )
        found = [name for name in names if matches(pattern, name)]
        if not found:
            raise BigtrainError(
                f"the plan's pattern {pattern!r} matches no module of {type(model).__name__}",
                why="* stands for one component of a name, ** for any number of them",
                mend="correct it" + _like(pattern, names),
            )
        for name in found:
            if name in chosen:
                raise BigtrainError(
                    f"the plan names {name} twice: {chosen[name][0]!r} and {pattern!r}",
                    why="a module is split in one way",
                    mend="make the patterns exclude each other",
                )
            chosen[name] = pattern, style
    _refuse_nested({name: style for name, (_, style) in chosen.items()})
    return {name: chosen[name][1] for name in names if name in chosen}


def matches(pattern: str, name: str) -> bool:
    """Is `name` one that `pattern` stands for?"""
    wild = {"**.": r"(.*\.)?", "**": ".*", "*": r"[^.]+"}
    parts = re.split(r"(\*\*\.|\*\*|\*)", pattern)
    regex = "".join(wild.get(part, re.escape(part)) for part in parts)
    return re.fullmatch(regex, name) is not None


def _refuse_nested(chosen: Mapping[str, Style]) -> None:
    """Refuse to sum the gradients of all that is in a module, and to split a part of it too."""
    for name, style in chosen.items():
        inside = [other for other in chosen if other.startswith(f"{name}.")]
        if style.kind in ("replicate", "sequence") and inside:
            raise BigtrainError(
                f"the plan gives {name} the style {style.kind}, and also names {inside[0]}",
                why=f"{style.kind} is about all parameters in {name}",
                mend="name the parts of it one by one",
            )


def _like(wanted: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.3)
    return f"; did you mean {near[0]!r}?" if near else ""
