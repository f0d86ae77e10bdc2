"""`bigtrain convert`: DeepSpeed configs as they are found in the wild, and malformed ones.

tests/golden/deepspeed/NAME.json must give the YAML in NAME.yaml and the report in NAME.txt; a file
in bad/ must give the error in its .txt. `BIGTRAIN_UPDATE_GOLDEN=1` rewrites them.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner
from unit_helpers import ROOT, assert_explained

from bigtrain.cli import app
from bigtrain.config.check import layout_of
from bigtrain.config.deepspeed.convert import convert
from bigtrain.config.deepspeed.read import read_json
from bigtrain.config.deepspeed.write import report_lines, write_new, yaml_of
from bigtrain.config.load import load_config
from bigtrain.errors import BigtrainError, ConfigError

GALLERY = ROOT / "tests" / "golden" / "deepspeed"
GOOD = sorted(path.stem for path in GALLERY.glob("*.json"))


def compare(golden: Path, text: str) -> None:
    if os.environ.get("BIGTRAIN_UPDATE_GOLDEN") == "1":
        golden.write_text(text, encoding="utf-8")
    assert golden.exists(), f"no {golden}: write it with BIGTRAIN_UPDATE_GOLDEN=1"
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GOOD)
def test_gallery(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML is the golden one and can be run; every key of the file is accounted for."""
    monkeypatch.chdir(GALLERY)
    conversion = convert(Path(f"{name}.json"))
    compare(Path(f"{name}.yaml"), yaml_of(conversion))
    compare(Path(f"{name}.txt"), "\n".join(report_lines(conversion)) + "\n")
    layout_of(load_config(f"{name}.yaml"), 1 if name == "empty" else _ranks(name))


def converted(path: Path) -> str:
    """Return the YAML, or else what is said of the file."""
    try:
        return yaml_of(convert(path))
    except ConfigError as error:
        return str(error)


def _ranks(name: str) -> int:
    parallel = load_config(f"{name}.yaml").parallel
    return int(parallel.dp) * parallel.tp * parallel.pp


@pytest.mark.parametrize("name", sorted(path.stem for path in (GALLERY / "bad").glob("*.json")))
def test_bad(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GALLERY / "bad")
    with pytest.raises(ConfigError) as caught:
        yaml_of(convert(Path(f"{name}.json")))
    compare(Path(f"{name}.txt"), f"{caught.value}\n")
    for problem in caught.value.problems:
        assert problem.where
        assert problem.mend


@pytest.mark.parametrize("name", GOOD)
def test_every_key_is_carried_over_or_remarked(name: str) -> None:
    _, places = read_json(GALLERY / f"{name}.json")
    conversion = convert(GALLERY / f"{name}.json")
    known = conversion.taken | {remark.key for remark in conversion.remarks}
    for key in places:
        dotted = ".".join(map(str, key))
        around = [".".join(map(str, key[:end])) for end in range(1, len(key) + 1)]
        below = any(name.startswith(f"{dotted}.") for name in known)
        assert below or any(name in known for name in around), f"nothing is said of {dotted}"


def test_places_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n\t"a\\"b": [1, {"c": "x:{,}"}],\n  "d": {"e": -1.5e3}, "f": null}')
    _, places = read_json(path)
    short = {key: where.rpartition("x.json:")[2] for key, where in places.items()}
    assert short == {
        ('a"b',): "2:2",
        ('a"b', 1, "c"): "2:15",
        ("d",): "3:3",
        ("d", "e"): "3:9",
        ("f",): "3:23",
    }


def test_ranks_that_the_file_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}')
    sections = convert(path, ranks=3).sections
    assert sections["parallel"]["dp"] == 3
    assert sections["train"]["global_batch"] == 24
    path.write_text('{"train_batch_size": 24, "gradient_accumulation_steps": 2}')
    assert convert(path, ranks=3).sections["train"]["microbatch"] == 4
    with pytest.raises(ConfigError, match="cannot be shared by 5 ranks"):
        convert(path, ranks=5)
    path.write_text(
        '{"train_batch_size": 24, "gradient_accumulation_steps": 2, '
        '"train_micro_batch_size_per_gpu": 4}'
    )
    with pytest.raises(ConfigError, match="give --ranks 3"):
        convert(path, ranks=2)


def test_verb(tmp_path: Path) -> None:
    """Writes once, and never over a file; without -o the YAML alone is on stdout."""
    out = tmp_path / "config.yaml"
    command = ["convert", str(GALLERY / "zero1_fp16.json")]
    done = CliRunner().invoke(app, [*command, "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "fp16.loss_scale" in done.output
    assert f"bigtrain check {out}" in done.output
    checked = CliRunner().invoke(app, ["check", str(out)])
    assert checked.exit_code == 0
    assert ": good" in checked.output
    shown = CliRunner().invoke(app, command)
    assert shown.stdout.startswith("# Made from")
    assert "fp16.loss_scale" not in shown.stdout
    before = out.read_text()
    with pytest.raises(BigtrainError) as caught:
        write_new(out, "x")
    assert_explained(caught.value, "is there already")
    assert out.read_text() == before
    with pytest.raises(BigtrainError, match="cannot write"):
        write_new(tmp_path / "none" / "x.yaml", "x")


@pytest.mark.parametrize("seed", range(30))
def test_any_damage_is_told(seed: int, tmp_path: Path) -> None:
    """A file with bytes lost or changed converts, or is refused with a reason; no traceback."""
    draw = random.Random(seed)
    text = (GALLERY / f"{draw.choice(GOOD)}.json").read_text()
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["", '"', "{", "1", "true", ","]) + text[place + 1 :]
    path = tmp_path / "x.json"
    path.write_text(text)
    assert str(path) in converted(path)


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "zero_optimization", "fp16", "pipeline"])
@pytest.mark.parametrize("value", ["null", "3", '"x"', "[]", "{}", '{"type": 3}', '{"params": 1}'])
def test_sections_of_another_kind(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(f'{{"{key}": {value}}}')
    text = converted(path)
    assert "mend" in text or "Made from" in text
