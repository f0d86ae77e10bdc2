"""A conversion as a YAML config with comments, and as lines for the screen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bigtrain.config.check import check
from bigtrain.config.deepspeed.convert import Conversion, line_of, shown
from bigtrain.config.schema import VARIANTS, Config
from bigtrain.config.yaml_tree import write_tree
from bigtrain.errors import BigtrainError, ConfigError, Problem

_ORDER = ("parallel", "zero", "train", "optimizer", "schedule", "log")
_HEAD = """\
# Made from {source} by `bigtrain convert`.
# That file does not say what is trained on what: fill in `model` and `data` (docs/config.md has
# all keys; without them a small GPT learns from the source files of Python), and `train.steps`.
"""


def yaml_of(conversion: Conversion) -> str:
    """Return the config as YAML, which passes `bigtrain check`.

    Raises:
        ConfigError: values that are not legal here.
    """
    _leave_out_what_cannot_be(conversion)
    lines = [_HEAD.format(source=conversion.source)]
    sections = conversion.sections
    for section in (*_ORDER, *(name for name in sections if name not in _ORDER)):
        if section not in sections:
            continue
        lines.append(f"{section}:")
        for key, value in sections[section].items():
            comment = conversion.comments.get((section, key), "")
            text = f"  {key}: {_scalar(value)}"
            lines.append(f"{text:<30}  # {comment}" if comment else text)
        lines.append("")
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_scalar(each) for each in value)}]"
    if value is None:
        return "null"
    return write_tree({"x": value}).partition(": ")[2].strip()


def _leave_out_what_cannot_be(conversion: Conversion) -> None:
    """Remove keys that do not fit the default model, and say so; other faults are errors."""
    for _ in range(4):
        try:
            problems = check(Config.model_validate(conversion.sections))
        except ValidationError as failure:
            raise ConfigError(
                conversion.source,
                [
                    Problem(
                        f"{_dotted(error['loc'])} would be {shown(error['input'])}",
                        why=error["msg"],
                        mend="correct it in the DeepSpeed config",
                        where=conversion.source,
                    )
                    for error in failure.errors()
                ],
            ) from failure
        if not problems:
            return
        removed = [
            conversion.leave_out(section, key, problem)
            for problem in problems
            for section, key in [("parallel", "tp"), ("parallel", "pp"), ("zero", "offload")]
            if f"{section}.{key}" in problem.keys
        ]
        if not any(removed):
            raise ConfigError(conversion.source, problems)


def _dotted(loc: tuple[int | str, ...]) -> str:
    """Return a key as it is written, without the name that pydantic has for an alternative."""
    names = (loc[0], *loc[2:]) if loc[0] in VARIANTS else loc
    return ".".join(map(str, names))


def report_lines(conversion: Conversion) -> list[str]:
    """Return what is not carried over as it is, in the order of the file."""
    remarks = sorted(conversion.remarks, key=lambda remark: line_of(remark.where))
    if not remarks:
        return ["every key has its equivalent"]
    many = "1 key is" if len(remarks) == 1 else f"{len(remarks)} keys are"
    lines = [f"{many} not the same here:"]
    for remark in remarks:
        lines.append(f"  {remark.where}: {remark.key} = {shown(remark.value)}")
        lines.append(f"      {remark.meaning}")
    return lines


def write_new(path: Path, text: str) -> None:
    """Write a file that must not exist yet.

    Raises:
        BigtrainError: it does, or it cannot be written.
    """
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        mend = "give another name with -o, or remove it"
        raise BigtrainError(f"{path} is there already", mend=mend) from error
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise BigtrainError(f"cannot write {path}: {reason}", mend="give another path") from error
