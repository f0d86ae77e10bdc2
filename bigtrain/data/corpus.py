"""Text files as bytes: packed once into two token files in a cache folder.

The default corpus is the source of Python's standard library: real text that every machine has.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bigtrain.errors import DataError
from bigtrain.machine import share

_SEPARATOR = b"\n\x00\n"  # between files; a byte that text does not have


# Tests, installed packages, and half a megabyte of prose in one string.
_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}


def stdlib_files() -> list[Path]:
    """Return the source files of the running Python's standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_SOURCE]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if len(files) < 50:
        raise DataError(
            f"Python's standard library has only {len(files)} source files in {root}",
            where="data.kind",
            why="some installations ship it compiled only",
            mend="set data.kind=text and data.files to text files of your own",
        )
    return sorted(files)


def text_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name.

    Raises:
        DataError: a pattern names no file.
    """
    files: set[Path] = set()
    for pattern in patterns:
        found = {Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
        found = {path for path in found if path.is_file()}
        if not found:
            raise DataError(
                f"no file matches {pattern}",
                where="data.files",
                why=f"looked from {os.getcwd()}",
                mend="correct the pattern; ** stands for any folders",
            )
        files |= found
    return sorted(files)


def packed(files: Sequence[Path], fraction: float, cache_dir: str | None) -> tuple[Path, Path]:
    """Return token files (train, validation) of the bytes of `files`; made unless cached.

    About `fraction` of the files, chosen by a hash of their place in the list, is held out; of a
    single file its last part. Files appear in the cache folder whole or not at all.

    Raises:
        DataError: a file cannot be read, or the cache folder cannot be written.
    """
    folder = Path(cache_dir) if cache_dir else default_cache_dir()
    try:
        key = _fingerprint(files, fraction)
        targets = [folder / f"{key}-{part}.npy" for part in ("train", "validation")]
        if not all(target.exists() for target in targets):
            folder.mkdir(parents=True, exist_ok=True)
            for target, tokens in zip(targets, _split(files, fraction), strict=True):
                _write(target, tokens)
    except OSError as error:
        raise DataError(
            f"cannot pack the text files: {error}",
            where="data",
            why=f"{len(files)} files are packed into {folder}",
            mend="make the files readable and the folder writable, or set data.cache_dir",
        ) from error
    return targets[0], targets[1]


def _fingerprint(files: Sequence[Path], fraction: float) -> str:
    key = hashlib.sha256(f"bytes-1 {fraction}".encode())
    for file in files:
        stat = file.stat()
        key.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return key.hexdigest()[:16]


def default_cache_dir() -> Path:
    """Return the user's cache folder for bigtrain."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "bigtrain"


def _split(files: Sequence[Path], fraction: float) -> tuple[np.ndarray, np.ndarray]:
    if len(files) == 1:
        data = files[0].read_bytes()
        cut = int(len(data) * (1 - fraction))
        return _bytes(data[:cut]), _bytes(data[cut:])
    held_out = min(len(files) - 1, max(1, round(len(files) * fraction)))
    chosen = set(sorted(range(len(files)), key=_scatter)[:held_out])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        parts[index in chosen].append(file.read_bytes())
    return _bytes(_SEPARATOR.join(parts[0])), _bytes(_SEPARATOR.join(parts[1]))


def _scatter(index: int) -> bytes:
    return hashlib.sha256(str(index).encode()).digest()


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def _write(target: Path, tokens: np.ndarray) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, tokens)
            share(Path(file.name))
            file.flush()
            os.fsync(file.fileno())
        except BaseException:  # also Ctrl-C: no half of a file stays in the cache
            os.unlink(file.name)
            raise
    os.replace(file.name, target)
