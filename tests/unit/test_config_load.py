"""From files and command line to a Config: who wins, and what values mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit_helpers import ROOT, load_text

from bigtrain.config.load import dump, load_config
from bigtrain.config.schema import Config, FactoryModel, GptModel, LlamaModel
from bigtrain.errors import ConfigError


def test_precedence(tmp_path: Path) -> None:
    """defaults < extends < file < overrides, key by key."""
    (tmp_path / "base.yaml").write_text(
        "train: {steps: 1, global_batch: 10, precision: bf16}\nrun: {seed: 1}\n"
    )
    text = "extends: base.yaml\ntrain: {steps: 2, global_batch: 20}\n"
    config = load_text(tmp_path, text, "train.steps=3")
    assert config.train.steps == 3
    assert config.train.global_batch == 20
    assert config.train.precision == "bf16"
    assert config.run.seed == 1
    assert config.run.dir == Config().run.dir


def test_extends_of_extends_is_relative_to_each_file(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "root.yaml").write_text("train: {steps: 7}\n")
    (tmp_path / "a" / "middle.yaml").write_text("extends: b/root.yaml\nlog: {every: 3}\n")
    config = load_text(tmp_path, "extends: a/middle.yaml\n")
    assert (config.train.steps, config.log.every) == (7, 3)


def test_lists_are_replaced_not_joined(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("data: {kind: text, files: [a.txt, b.txt]}\n")
    config = load_text(tmp_path, "extends: base.yaml\ndata: {files: [c.txt]}\n")
    assert config.data.files == ["c.txt"]
    assert load_text(tmp_path, "data: {kind: text}", "data.files=[d.txt]").data.files == ["d.txt"]


def test_problems_point_into_the_file_that_has_them(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("train:\n  steps: many\n")
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "extends: base.yaml\nlog:\n  every: 0\n")
    places = [Path(problem.where).name for problem in caught.value.problems]
    assert places == ["base.yaml:2:3", "config.yaml:3:3"]


def test_syntax_problems_of_both_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("log: {every: 1, every: 2}\n")
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, "extends: base.yaml\ntrain: {steps: 1, steps: 2}\n")
    what = [problem.what for problem in caught.value.problems]
    assert what == ["log.every is given twice", "train.steps is given twice"]


def test_mistakes_have_no_consequences(tmp_path: Path) -> None:
    """A wrong value is told once, and not also that its default does not fit to other keys."""
    text = "train: {global_batch: many}\nparallel: {dp: 3}\n"
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    assert [problem.what for problem in caught.value.problems] == ['train.global_batch = "many"']


def test_overridden_mistake_is_forgiven(tmp_path: Path) -> None:
    """What is replaced is not judged."""
    assert load_text(tmp_path, "train: {steps: many}", "train.steps=5").train.steps == 5


def test_last_override_wins(tmp_path: Path) -> None:
    assert load_text(tmp_path, "", "train.steps=5", "train.steps=6").train.steps == 6


def test_kind_replaces_the_section(tmp_path: Path) -> None:
    """The keys of a gpt mean nothing to a llama."""
    (tmp_path / "base.yaml").write_text("model: {kind: gpt, dropout: 0.5, num_layers: 9}\n")
    config = load_text(tmp_path, "extends: base.yaml\nmodel: {kind: llama}\n")
    assert config.model == LlamaModel(kind="llama")


def test_same_kind_merges_the_section(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: {kind: gpt, dropout: 0.5}\n")
    config = load_text(tmp_path, "extends: base.yaml\nmodel: {kind: gpt, num_layers: 9}\n")
    assert config.model == GptModel(dropout=0.5, num_layers=9)


def test_override_of_kind_replaces_the_section(tmp_path: Path) -> None:
    text = "model: {kind: gpt, dropout: 0.5}\n"
    config = load_text(tmp_path, text, "model.kind=llama", "model.num_kv_heads=2")
    assert config.model == LlamaModel(kind="llama", num_kv_heads=2)


def test_override_of_kind_counts_first_wherever_it_stands(tmp_path: Path) -> None:
    config = load_text(tmp_path, "", "model.num_kv_heads=2", "model.kind=llama")
    assert config.model == LlamaModel(kind="llama", num_kv_heads=2)


def test_naming_the_default_kind_replaces_nothing(tmp_path: Path) -> None:
    config = load_text(tmp_path, "model: {dropout: 0.5}", "model.kind=gpt")
    assert config.model == GptModel(dropout=0.5)


def test_factory_and_kind_replace_each_other(tmp_path: Path) -> None:
    config = load_text(
        tmp_path, "model: {kind: gpt, dropout: 0.5}", "model.factory=m:f", "model.args.n=3"
    )
    assert config.model == FactoryModel(factory="m:f", args={"n": 3})
    back = load_text(tmp_path, "model: {factory: m:f, args: {n: 3}}", "model.kind=gpt")
    assert back.model == GptModel()


def test_other_factory_keeps_the_args(tmp_path: Path) -> None:
    config = load_text(tmp_path, "model: {factory: m:f, args: {n: 3}}", "model.factory=m:g")
    assert config.model == FactoryModel(factory="m:g", args={"n": 3})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E3", 1000.0),
        ("+.5", 0.5),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("12", 12),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("1_000", "1_000"),
        ("12:30:00", "12:30:00"),
        ("2026-01-31", "2026-01-31"),
        ("0b11", "0b11"),
        ("'12'", "12"),
        ("nullable", "nullable"),
        ("1e", "1e"),
        ("010", 10),
    ],
)
def test_values_follow_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    """In the file and on the command line alike."""
    in_file = load_text(tmp_path, f"model:\n  factory: m:f\n  args:\n    x: {text}\n")
    on_line = load_text(tmp_path, "model: {factory: m:f}", f"model.args.x={text}")
    assert in_file.model.args == on_line.model.args == {"x": value}
    assert type(in_file.model.args["x"]) is type(value)


def test_aliases_are_copies(tmp_path: Path) -> None:
    config = load_text(tmp_path, "log: {every: &n 5}\neval: {every: *n}\n")
    assert config.log.every == config.eval.every == 5


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.kind=llama", "optimizer.kind=sgd", "schedule.kind=wsd"],
        ["optimizer.lr=1e-8", "optimizer.weight_decay=1e22", "optimizer.eps=5e-324"],
        ["run.seed=9223372036854775807", "run.deterministic=true", "parallel.dp=2"],
        ["run.dir='a: b # c'", "train.max_grad_norm=", "checkpoint.keep_every=5"],
        ["data.kind=text", "data.files=['no', 'é 😀.txt', '~', '12', '2026-01-31']"],
        ["model.factory=m:f", "model.args={a: , b: [1, {c: '1.5'}], d: ''}", "eval.generate=0"],
        pytest.param(["run.dir='1e5'"]),
        pytest.param(["run.dir='0o17'"]),
    ],
)
def test_dump_is_read_back(overrides: list[str], tmp_path: Path) -> None:
    """The effective config in the run folder is the config that ran."""
    config = load_config(str(ROOT / "configs" / "quickstart.yaml"), overrides)
    assert load_text(tmp_path, dump(config)) == config


def test_dump_has_every_key(tmp_path: Path) -> None:
    text = dump(Config())
    for section in Config.model_fields:
        assert f"\n{section}:\n" in text
    assert "  max_grad_norm: 1.0\n" in text


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=0o9",
        f"train.steps={'9' * 5000}",
        "train.steps=!!python/name:os.getcwd",
        "train.steps=*nothing",
        "train.steps={[a]: b}",
        "train.steps=a: b: c",
        "train.steps=\0",
    ],
)
def test_odd_override_is_a_config_error(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="command line"):
        load_text(tmp_path, "model: {factory: m:f}", override)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a: " + "[" * 2000 + "]" * 2000),
        "model: {factory: m:f, args: &x {y: *x}}",
        pytest.param('extends: "a\\0b"'),
        pytest.param("run: !thing {seed: 3}"),
        "optimizer: {lr: .inf}",
        "parallel: {timeout_seconds: .inf}",
        "train: *nowhere",
        "run: {dir: ''}",
        "train: {steps: !!timestamp 2026-01-31}",
        "%YAML 9.9\n---\ntrain: {}",
    ],
)
def test_odd_yaml_is_a_config_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        load_text(tmp_path, text)
