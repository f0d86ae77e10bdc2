"""The configs in configs/, and the schema that editors use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit_helpers import ROOT

from bigtrain.cli import app
from bigtrain.config.load import load_config
from bigtrain.config.schema import Section

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    for section in base.__subclasses__():
        yield section
        yield from sections(section)


def test_quickstart_is_shipped() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_config_loads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is named in documents: from the root of the repository."""
    monkeypatch.chdir(ROOT)
    load_config(str(path.relative_to(ROOT)))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_first_line_names_the_schema(path: Path) -> None:
    """So that editors complete keys; the path is relative to the file."""
    first = path.read_text().splitlines()[0]
    marker, _, schema = first.partition("$schema=")
    assert marker == "# yaml-language-server: "
    assert (path.parent / schema).resolve() == ROOT / "configs" / "schema.json"


def test_schema_file_is_up_to_date() -> None:
    """After a change of the schema: `bigtrain schema > configs/schema.json`."""
    result = CliRunner().invoke(app, ["schema"])
    assert result.exit_code == 0
    shipped = (ROOT / "configs" / "schema.json").read_text()
    assert json.loads(shipped) == json.loads(result.stdout)


def test_schema_knows_extends() -> None:
    assert "extends" in json.loads((ROOT / "configs" / "schema.json").read_text())["properties"]


@pytest.mark.parametrize("section", list(sections()), ids=lambda section: section.__name__)
def test_every_key_is_described(section: type[Section]) -> None:
    """Descriptions are what an editor shows."""
    for name, field in section.model_fields.items():
        assert field.description, f"{section.__name__}.{name} has no docstring"
        assert field.description.endswith("."), f"{section.__name__}.{name}: a sentence, please"


def test_all_sections_are_seen() -> None:
    """The description test above sees all there is."""
    assert {s.__name__ for s in sections()} >= {"Config", "GptModel", "FactoryData", "LogSection"}
