"""Whatever is in a config file: `load_config` returns, or raises ConfigError."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from unit_helpers import ROOT, load_text

from bigtrain.errors import ConfigError

SNIPPETS = [
    *("\t", "  ", "\n", ": ", " #", "- ", "[", "]", "{", "}", '"', "'", "|", "> ", "? ", "%", "@"),
    *("&a ", "*a", "!!int ", "!!python/name:os.getcwd ", "!x ", "<<: ", "---\n", "...\n", "~"),
    *("null", "auto", "-1", "1e9", ".nan", "é", "\x85", "\0", "extends: ", "true", "kind: "),
]


def mutated(text: str, dice: random.Random) -> str:
    """Return `text` after one to four cuts, repeats, insertions or exchanges."""
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(text) + 1)
        stop = start + dice.randint(1, 12)
        text = dice.choice(
            [
                text[:start] + dice.choice(SNIPPETS) + text[start:],
                text[:start] + text[stop:],
                text[:start] + text[start:stop] * 2 + text[stop:],
                text[:start] + chr(dice.randrange(32, 127)) + text[start + 1 :],
            ]
        )
        lines = text.split("\n")
        if dice.random() < 0.3:
            lines.insert(dice.randrange(len(lines)), dice.choice(lines))
        text = "\n".join(lines)
    return text


@pytest.mark.parametrize("seed", range(8))
def test_mutated_quickstart(seed: int, tmp_path: Path) -> None:
    original = (ROOT / "configs" / "quickstart.yaml").read_text()
    dice = random.Random(seed)
    reports = []
    for _ in range(50):
        try:
            load_text(tmp_path, mutated(original, dice))
        except ConfigError as error:
            reports.append(error.problems)
    assert 10 < len(reports) < 50  # the mutations are neither harmless nor hopeless
    assert all(problems for problems in reports)
    assert all(p.what and p.where for problems in reports for p in problems)
