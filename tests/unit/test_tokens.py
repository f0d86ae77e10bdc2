"""Token files and text files, when they are as they should be."""

from __future__ import annotations

import math
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from bigtrain.config.schema import TextData, TokenData
from bigtrain.data.build import open_data, prepare_data
from bigtrain.data.corpus import packed, stdlib_files, text_files
from bigtrain.data.tokens import TokenDataset, fingerprint, ngram_entropies, open_tokens


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", ">u2"])
def test_windows_and_targets(dtype: str, tmp_path: Path) -> None:
    """Sample i is T tokens from i*T on, its targets are one further; a partial one is left out."""
    np.save(tmp_path / "t.npy", np.arange(14, dtype=dtype))
    dataset = TokenDataset(open_tokens(tmp_path / "t.npy", "data.train"), 4, 14, "data.train")
    assert len(dataset) == 3
    assert dataset[2]["tokens"].tolist() == [8, 9, 10, 11]
    assert dataset[2]["targets"].tolist() == [9, 10, 11, 12]
    batch = dataset.read_batch([2, 0])
    assert batch["tokens"].tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "t.npy", np.arange(14, dtype="uint8"))
    assert isinstance(open_tokens(tmp_path / "t.npy", "data.train"), np.memmap)


def test_token_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(50, dtype="uint16"))
    np.save(tmp_path / "b.npy", np.arange(20, dtype="uint16"))
    config = TokenData(
        kind="tokens",
        train=str(tmp_path / "a.npy"),
        validation=str(tmp_path / "b.npy"),
        seq_len=5,
    )
    source = open_data(config, prepare_data(config), vocab_size=50)
    assert (len(source.train), len(source.validation)) == (9, 3)
    assert (source.items_per_sample, source.unit) == (5, "tokens")


def test_fingerprint_tells_data_apart() -> None:
    tokens = np.arange(5000, dtype="uint16")
    other = tokens.copy()
    other[-1] = 7
    marks = {fingerprint(t) for t in (tokens, other, tokens[:-1], tokens.astype("uint32"))}
    assert len(marks) == 4
    assert fingerprint(tokens) == fingerprint(tokens.copy())


def test_entropies_by_hand() -> None:
    """abab...: one bit a letter, and nothing left to learn once the letter before is known."""
    unigram, bigram = ngram_entropies(np.array([0, 1] * 1000, dtype="uint8"))
    assert unigram == pytest.approx(math.log(2))
    assert bigram == pytest.approx(0, abs=1e-6)
    same, none = ngram_entropies(np.full(100, 255, dtype="uint8"))
    assert same == none == pytest.approx(0)


def test_entropies_of_coin_tosses() -> None:
    tosses = np.random.default_rng(0).integers(0, 2, 100_000, dtype="uint8")
    assert ngram_entropies(tosses) == pytest.approx((math.log(2), math.log(2)), abs=1e-3)


def test_text_of_several_files(tmp_path: Path) -> None:
    """About the asked share of the files is held out, whole files, each byte in one part."""
    for index in range(20):
        (tmp_path / f"{index:02}.txt").write_text(f"<{index:02}>")
    config = TextData(
        kind="text",
        files=[str(tmp_path / "*.txt")],
        validation_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
    )
    parts = [bytes(np.load(path)) for path in prepare_data(config)]
    pieces = [part.split(b"\n\x00\n") for part in parts]
    assert [len(p) for p in pieces] == [16, 4]
    assert sorted(pieces[0] + pieces[1]) == [f"<{index:02}>".encode() for index in range(20)]


def test_text_of_one_file(tmp_path: Path) -> None:
    """Its last part is held out."""
    (tmp_path / "a.txt").write_bytes(bytes(range(100)))
    train, held_out = packed([tmp_path / "a.txt"], 0.1, str(tmp_path / "cache"))
    assert bytes(np.load(train)) == bytes(range(90))
    assert bytes(np.load(held_out)) == bytes(range(90, 100))


def test_packing_is_cached_until_a_file_changes(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one " * 20)
    cache = str(tmp_path / "cache")
    first = packed([text], 0.1, cache)
    written = [path.stat().st_mtime_ns for path in first]
    assert packed([text], 0.1, cache) == first
    assert [path.stat().st_mtime_ns for path in first] == written
    assert packed([text], 0.2, cache) != first
    os.utime(text, ns=(1, 1))
    assert packed([text], 0.1, cache) != first
    assert not list(Path(cache).glob("*.tmp"))


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sorted, each file once, folders left out, ** over all folders, relative to where one is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub.md").mkdir()
    for name in ("b.md", "a.md", "sub.md/c.md"):
        (tmp_path / name).write_text("text")
    assert text_files(["*.md", "a.md"]) == [Path("a.md"), Path("b.md")]
    assert text_files(["**/*.md"]) == [Path("a.md"), Path("b.md"), Path("sub.md/c.md")]


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of its sources in a fixed order; no tests, which hold odd bytes on purpose."""
    for index in range(60):
        (tmp_path / f"m{index:02}.py").write_text("pass")
    for other in ("json/__init__.py", "test/a.py", "site-packages/b.py", "json/tests/c.py"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).write_text("pass")
    (tmp_path / "lib.so").write_text("native")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    names = [str(file.relative_to(tmp_path)) for file in stdlib_files()]
    assert names == ["json/__init__.py", *(f"m{index:02}.py" for index in range(60))]
