"""The folder of a run: who may use it, what is in it. No torch."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bigtrain.config.load import dump
from bigtrain.config.schema import Config
from bigtrain.errors import RunFolderError


@dataclass(frozen=True)
class RunFolder:
    """Where the files of a run are."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def next_config(self) -> Path:
        """The config of a run that has not begun yet; it becomes `config` when it has."""
        return self.path / "config.next.yaml"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 without any."""
        names = [path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def status(self) -> Path:
        """How the run is, by its servers."""
        return self.path / "status.json"

    @property
    def curve(self) -> Path:
        return self.path / "loss.png"


def open_run(config: Config, *, resume: bool, restart: bool) -> tuple[RunFolder, IO[str]]:
    """Make the run folder ready and return it with its lock.

    The effective config is written as `next_config`: it replaces the config of the run only when
    the run has really begun (`begin`), so that a failed --resume leaves a good one behind.

    The lock is an open file: keep it as long as the run lasts; it is freed however the process
    ends. With `restart`, what is there is moved aside first, to `<dir>.old-N`; nothing is deleted.

    Raises:
        RunFolderError: not writable, in use by another run, or holding a run already.
    """
    folder = RunFolder(Path(config.run.dir))
    if "\0" in config.run.dir or not config.run.dir.isprintable():
        raise RunFolderError(
            f"run.dir = {config.run.dir!r} is no path",
            why="it has characters that a file name cannot have",
            mend="set run.dir to a folder, like runs/try",
        )
    with explained_io(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder.path)
        if restart and _holds_run(folder):
            lock.close()
            _move_aside(folder.path.absolute())
            folder.path.mkdir(parents=True)
            lock = _lock(folder.path)
        if not resume and _holds_run(folder):
            raise RunFolderError(
                f"{folder.path} holds a run already",
                why="starting over would mix two runs, or lose the first",
                mend="--resume continues it, --restart moves it aside and starts over, "
                "run.dir=... takes another folder",
            )
        for part in (folder.logs, folder.checkpoints):
            part.mkdir(exist_ok=True)
        folder.next_config.write_text(dump(config), encoding="utf-8")
    return folder, lock


def begin(folder: RunFolder, *, keep: bool = False) -> None:
    """Make the config of the run that has begun the config of the folder.

    keep: where it was, too, for processes that begin later; the launcher removes it there.
    """
    with explained_io(folder.path):
        source = folder.next_config
        if keep:
            source = folder.path / ".config.yaml"
            shutil.copyfile(folder.next_config, source)
        os.replace(source, folder.config)


@contextlib.contextmanager
def explained_io(path: Path) -> Iterator[None]:
    """Turn an OSError on files of the run into a RunFolderError that says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise RunFolderError(
            f"cannot write to {error.filename or path}: {error.strerror or error}",
            why="the disk is full" if full else "the run keeps its logs and checkpoints there",
            mend="make room, then --resume" if full else "fix the folder, or set another run.dir",
        ) from error


def _holds_run(folder: RunFolder) -> bool:
    """Tell whether a run is in the folder, or those of a sweep, whose folders are 0, 1, ..."""
    return any(
        one.metrics.exists() or any(one.checkpoints.glob("step-*"))
        for one in (
            folder,
            *(RunFolder(p) for p in folder.path.glob("[0-9]*") if p.name.isdecimal()),
        )
    )


def _lock(path: Path) -> IO[str]:
    lock = open(path / ".lock", "a+")  # noqa: SIM115  the caller keeps it open
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise RunFolderError(
            f"another run is using {path}" + (f" (process {owner})" if owner else ""),
            why="two runs in one folder would overwrite each other",
            mend="wait for it, stop it, or set another run.dir",
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _move_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    os.rename(path, aside)
