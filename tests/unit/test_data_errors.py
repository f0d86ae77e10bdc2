"""Bad data: a DataError that says where, what and how to mend it, and no other exception."""

from __future__ import annotations

import io
import pickle
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from unit_helpers import assert_explained

from bigtrain.config.schema import TextData, TokenData
from bigtrain.data import corpus
from bigtrain.data.build import open_data, prepare_data
from bigtrain.data.tokens import open_tokens
from bigtrain.errors import DataError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, np.arange(100, dtype="uint8"))
    return file.getvalue()


GOOD = npy(np.arange(100, dtype="uint8"))
BAD_FILES = {
    "empty": b"",
    "cut in the magic": GOOD[:3],
    "cut in the header": GOOD[:60],
    "header only": GOOD[:128],
    "cut in the tokens": GOOD[:150],
    "text": b"hello this is text\n" * 10,
    "pickle": pickle.dumps([1, 2, 3]),
    "objects": npy(np.array([{}, []], dtype=object)),
    "archive": npz(),
    "cut archive": npz()[:100],
    "broken header": GOOD.replace(b"(100,)", b"((((,)"),
    "signed": npy(np.arange(100, dtype="int64")),
    "wide": npy(np.arange(100, dtype="uint64")),
    "floats": npy(np.zeros(100, dtype="float32")),
    "two dims": npy(np.zeros((10, 10), dtype="uint8")),
    "one number": npy(np.array(3, dtype="uint8")),
    "no tokens": npy(np.zeros(0, dtype="uint8")),
    "too short": npy(np.zeros(8, dtype="uint8")),
}


def token_data(path: Path) -> TokenData:
    return TokenData(kind="tokens", train=str(path), validation=str(path), seq_len=8)


def text_data(folder: Path, *files: str, **settings: float | str) -> TextData:
    where = {"cache_dir": str(folder / "cache"), **settings}
    return TextData(kind="text", files=[str(folder / f) for f in files], seq_len=8, **where)


@pytest.mark.parametrize(
    "name",
    list(BAD_FILES),
)
def test_bad_token_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    path.write_bytes(BAD_FILES[name])
    config = token_data(path)
    with pytest.raises(DataError) as caught:
        open_data(config, prepare_data(config), vocab_size=256)
    assert_explained(caught.value, "data.train")


def test_good_token_file(tmp_path: Path) -> None:
    """The bytes that the bad ones are made of are good."""
    (tmp_path / "tokens.npy").write_bytes(GOOD)
    config = token_data(tmp_path / "tokens.npy")
    assert len(open_data(config, prepare_data(config), vocab_size=256).train) == 12


@pytest.mark.parametrize("name", ["nowhere.npy", ".", "nul\0"])
def test_no_token_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_tokens(tmp_path / name, "data.validation")
    assert_explained(caught.value, "data.validation", str(tmp_path))


def test_pickle_is_not_advised(tmp_path: Path) -> None:
    """numpy's own text tells to load the file unsafely: not ours."""
    path = tmp_path / "tokens.npy"
    path.write_bytes(b"hello this is text\n" * 10)
    with pytest.raises(DataError) as caught:
        open_tokens(path, "data.train")
    assert "unsafely" not in str(caught.value)


def test_mutated_header(tmp_path: Path) -> None:
    """Whatever is in a header: tokens, or a DataError."""
    dice = random.Random(0)
    path = tmp_path / "tokens.npy"
    for _ in range(300):
        data = bytearray(GOOD)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(128)] = dice.choice(b"0123456789(){}[]',:<>|u \n\xff\0")
        path.write_bytes(data)
        try:
            open_tokens(path, "data.train")
        except DataError:
            continue


def test_token_outside_of_the_vocabulary(tmp_path: Path) -> None:
    """Found when it is read: which samples, which token, which limit."""
    (tmp_path / "tokens.npy").write_bytes(GOOD)
    config = token_data(tmp_path / "tokens.npy")
    source = open_data(config, prepare_data(config), vocab_size=80)
    assert source.train[8]["tokens"].max() < 80
    with pytest.raises(DataError) as caught:
        source.train[9]
    assert_explained(
        caught.value, "data.train", "token 80", "samples [9]", "model.vocab_size is 80"
    )


def test_glob_that_matches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = TextData(kind="text", files=["*.nothing"], cache_dir="cache")
    with pytest.raises(DataError) as caught:
        prepare_data(config)
    assert_explained(caught.value, "data.files", "*.nothing", str(tmp_path))


@pytest.mark.parametrize("name", ["folder", "dangling", "nul\0"])
def test_path_that_is_no_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(DataError) as caught:
        prepare_data(text_data(tmp_path, name))
    assert_explained(caught.value, "data.files", "no file matches")


@pytest.mark.parametrize(
    "texts",
    [("",), ("", ""), ("hello " * 50, ""), ("", "hello " * 50)],
    ids=["the only one", "all", "second", "first"],
)
def test_empty_text_files(texts: tuple[str, ...], tmp_path: Path) -> None:
    for index, text in enumerate(texts):
        (tmp_path / f"{index}.txt").write_text(text)
    config = text_data(tmp_path, "*.txt")
    with pytest.raises(DataError) as caught:
        open_data(config, prepare_data(config), vocab_size=256)
    assert_explained(caught.value, "data")


def test_large_share_of_few_files(tmp_path: Path) -> None:
    """However large the share that is held out, one file is left to train on."""
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text("hello " * 50)
    config = text_data(tmp_path, "*.txt", validation_fraction=0.9)
    assert len(open_data(config, prepare_data(config), vocab_size=256).train) > 0


def test_short_text(tmp_path: Path) -> None:
    """The held-out part of a short file is no sample."""
    (tmp_path / "a.txt").write_text("hello " * 20)
    config = text_data(tmp_path, "a.txt")
    with pytest.raises(DataError) as caught:
        open_data(config, prepare_data(config), vocab_size=256)
    assert_explained(caught.value, "6 tokens do not make one sample of 8 + 1", "data.seq_len")


def test_short_text_names_the_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 20)
    config = text_data(tmp_path, "a.txt")
    with pytest.raises(DataError, match="validation"):
        open_data(config, prepare_data(config), vocab_size=256)


def test_unreadable_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("hello")
    fail_with(monkeypatch, Path, "read_bytes", PermissionError(13, "Permission denied", "a.txt"))
    with pytest.raises(DataError) as caught:
        prepare_data(text_data(tmp_path, "a.txt"))
    assert_explained(caught.value, "data", "Permission denied", "a.txt")


def test_text_that_vanishes(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        corpus.packed([tmp_path / "gone.txt"], 0.1, str(tmp_path / "cache"))


@pytest.mark.parametrize("cache", ["a.txt", "a.txt/below", "/proc/nowhere"])
def test_cache_that_cannot_be_written(cache: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 50)
    config = text_data(tmp_path, "a.txt", cache_dir=str(tmp_path / cache))
    with pytest.raises(DataError) as caught:
        prepare_data(config)
    assert_explained(caught.value, cache, "data.cache_dir")


def test_full_disk_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("hello " * 50)
    fail_with(monkeypatch, np, "save", OSError(28, "No space left on device"))
    with pytest.raises(DataError, match="No space left on device"):
        prepare_data(text_data(tmp_path, "a.txt"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_cache_is_told_apart(tmp_path: Path) -> None:
    """The user did not write that file, and can only delete it."""
    (tmp_path / "a.txt").write_text("hello " * 50)
    config = text_data(tmp_path, "a.txt")
    for path in prepare_data(config):
        Path(path).write_bytes(b"damaged")
    with pytest.raises(DataError) as caught:
        open_data(config, prepare_data(config), vocab_size=256)
    assert "delete" in caught.value.problem.mend or "remove" in caught.value.problem.mend


def test_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError) as caught:
        corpus.stdlib_files()
    assert_explained(caught.value, "data.kind", "0 source files", "data.kind=text")


def fail_with(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, error: Exception
) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(owner, name, fail)
    return fail
