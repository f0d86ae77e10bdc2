"""Functions of the user's: what is wrong with them is said before they train."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from unit_helpers import assert_explained

from bigtrain.config.schema import FactoryData
from bigtrain.data.build import open_data
from bigtrain.data.stream import TrainStream, validation_batches
from bigtrain.errors import BigtrainError, DataError
from bigtrain.factory import call_factory, import_function

SOURCE = """
    import torch

    class Items:
        def __init__(self, item, length=4):
            self.item, self.length = item, length
        def __len__(self):
            return self.length
        def __getitem__(self, index):
            return self.item(index) if callable(self.item) else self.item

    def good(split, width=2): return Items({"x": torch.zeros(width)})
    def tuples(split): return Items((torch.zeros(2), 1))
    def tensors(split): return Items(torch.zeros(2))
    def numbers(split): return Items(3)
    def nones(split): return Items(None)
    def objects(split): return Items({"x": object()})
    def strings(split): return Items({"x": "text"})
    def ragged(split): return Items(lambda i: {"x": torch.zeros(i + 1)})
    def keys_differ(split): return Items(lambda i: {f"key{i}": 1})
    def empty(split): return Items({}, 0)
    def iterator(split): return iter([])
    def nothing(split): pass
    def no_split(): return Items({})
    def needs_more(width, split): return Items({})
    def missing_file(split): raise FileNotFoundError(2, "No such file", "digits.csv")
    value = 3
"""
NAME = "users_factories_of_this_test"


@pytest.fixture(autouse=True)
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, with a module of the user's."""
    (tmp_path / f"{NAME}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path and forgets the module's folder
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return tmp_path


def first_batches(function: str, num_workers: int = 0, **args: Any) -> tuple[dict, dict]:
    """Return the first batch of each split of a dataset, as a run reads them."""
    config = FactoryData(factory=f"{NAME}:{function}", args=args, num_workers=num_workers)
    source = open_data(config, [], None)
    where = {"seed": 1, "microbatch": 2, "rank": 0, "degree": 1}
    stream = TrainStream(
        source.train, cursor=0, num_microbatches=1, num_workers=num_workers, **where
    )
    try:
        _, train = stream.next()
    finally:
        if num_workers:
            stream._batches._shutdown_workers()
    _, held_out = next(validation_batches(source.validation, 4, **where))
    return train, held_out


def test_good_factory() -> None:
    train, held_out = first_batches("good", width=3)
    assert train["x"].shape == held_out["x"].shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module_anywhere:f", ["no module named no_such_module_anywhere", "run from"]),
        (f"{NAME}:goood", ["no function goood", "good"]),
        (f"{NAME}:value", ["no function value"]),
        ("os.:getcwd", ["cannot import os."]),
        (f"{NAME}.inner:f", ["cannot import"]),
    ],
)
def test_function_that_does_not_exist(name: str, words: list[str]) -> None:
    with pytest.raises(BigtrainError) as caught:
        import_function(name, where="model.factory")
    assert_explained(caught.value, "model.factory", *words)


def test_module_that_lacks_a_module(users_folder: Path) -> None:
    """The one that is missing is named, not the one that is there."""
    (users_folder / "needs_another.py").write_text("import no_such_module_anywhere\n")
    with pytest.raises(BigtrainError, match="no module named no_such_module_anywhere"):
        import_function("needs_another:f", where="model.factory")


@pytest.mark.parametrize(
    ("function", "args", "words"),
    [
        ("no_split", {}, ["unexpected keyword argument 'split'", "no_split()"]),
        ("needs_more", {}, ["missing a required argument: 'width'", "(width, split)"]),
        ("good", {"widht": 3}, ["unexpected keyword argument 'widht'", "(split, width=2)"]),
    ],
)
def test_wrong_arguments(function: str, args: dict, words: list[str]) -> None:
    """The signature is shown, and which config key to change."""
    with pytest.raises(BigtrainError) as caught:
        first_batches(function, **args)
    assert_explained(caught.value, "data.factory", "data.args", *words)


def test_functions_without_a_signature() -> None:
    with pytest.raises(BigtrainError, match="cannot be called"):
        call_factory("builtins:dict", {"a": 1}, where="model.factory")


def test_errors_inside_a_factory_keep_their_traceback() -> None:
    """They are the user's own, who needs the line."""
    with pytest.raises(FileNotFoundError, match=r"digits\.csv"):
        first_batches("missing_file")


@pytest.mark.parametrize("function", ["iterator", "nothing"])
def test_no_dataset(function: str) -> None:
    with pytest.raises(DataError) as caught:
        first_batches(function)
    assert_explained(caught.value, "data.factory", "__len__", "__getitem__")


def test_empty_dataset() -> None:
    with pytest.raises(DataError, match=r"split='train'.* is empty"):
        first_batches("empty")


@pytest.mark.parametrize("function", ["tuples", "tensors"])
def test_samples_that_are_no_dicts(function: str) -> None:
    with pytest.raises(DataError) as caught:
        first_batches(function)
    assert_explained(caught.value, "data.factory", "dict", "model(**batch)")


@pytest.mark.parametrize(
    "function",
    [
        "numbers",
        pytest.param("nones"),
        pytest.param("objects"),
        pytest.param("ragged"),
        pytest.param("keys_differ"),
        pytest.param("strings"),
    ],
)
def test_samples_that_make_no_batch(function: str) -> None:
    with pytest.raises(DataError) as caught:
        first_batches(function)
    assert_explained(caught.value, "data.factory")


def test_error_of_a_loader_process_reads_the_same() -> None:
    with pytest.raises(DataError) as caught:
        first_batches("tuples", num_workers=1)
    assert "Traceback" not in str(caught.value)
    assert_explained(caught.value, "data.factory", "dict", "model(**batch)")
