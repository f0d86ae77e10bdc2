"""A disk that fills up, at several moments, on a small file system of its own."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import Bench

pytestmark = pytest.mark.cluster

Disk = Callable[[int], Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A function that mounts a file system of so many KiB as `disk` in the working folder."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "bigtrain-test", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.strip()}")
        return place

    yield make
    if place.is_mount():
        ctypes.CDLL(None).umount2(os.fsencode(place), 2)  # MNT_DETACH: also while in use


def fill(place: Path, leave_kib: int) -> Path:
    """Fill the file system but for so much, and return the file that fills it."""
    filler = place / "filler"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    with open(filler, "wb") as file:
        file.write(bytes(max(0, free - leave_kib * 1024)))
    return filler


RUN = ("run.dir=disk/run", "train.steps=12")
KEEP_ALL = ("checkpoint.every=1", "checkpoint.keep_last=100")


def test_full_from_the_start(bench: Bench, disk: Disk) -> None:
    fill(disk(256), leave_kib=0)
    run = bench.launch(*RUN, code=1)
    run.assert_told("cannot write to disk/run", "the disk is full", "make room")


def test_full_before_the_first_checkpoint(bench: Bench, disk: Disk) -> None:
    place = disk(1024)
    filler = fill(place, leave_kib=160)  # a checkpoint has 260 KiB
    run = bench.launch(*RUN, "checkpoint.every=4", code=1)
    run.assert_told("checkpoint of step 4 was not written", "No space left", "make room")
    assert run.checkpoints() == []
    assert not list((run.folder / "checkpoints").glob(".writing-*"))
    filler.unlink()
    again = bench.launch(*RUN, resume=True)
    assert len(again.losses()) == 12
    again.assert_clean()


def test_full_after_some_checkpoints(bench: Bench, disk: Disk) -> None:
    place = disk(2048)
    filler = fill(place, leave_kib=1100)
    run = bench.launch(*RUN, *KEEP_ALL, code=1)
    run.assert_told("was not written to disk/run/checkpoints", "No space left", "make room")
    good = run.checkpoints()
    assert good
    assert all(f"disk/run/checkpoints/{name}  good" in run.verify() for name in good)
    assert not list((run.folder / "checkpoints").glob(".writing-*"))
    filler.unlink()
    again = bench.launch(*RUN, resume=True)
    assert f"resumed from disk/run/checkpoints/{good[-1]}" in again.out
    assert len(again.losses()) == 12
    again.assert_clean()


@pytest.mark.parametrize("leave_kib", [8, 32])
def test_full_while_logging(bench: Bench, disk: Disk, leave_kib: int) -> None:
    """No checkpoint is in the way: logs, metrics and TensorBoard fill the rest of the disk."""
    place = disk(1024)
    filler = fill(place, leave_kib=leave_kib)
    run = bench.launch(*RUN[:1], "train.steps=2000", "eval.samples=0", code=1)
    run.assert_told("the disk is full", "make room")
    assert run.checkpoints() == []
    filler.unlink()
    again = bench.launch(*RUN, "parallel.dp=1", resume=True)
    assert len(again.losses()) == 12
    again.assert_clean()


def test_full_cache_of_the_data(bench: Bench, disk: Disk) -> None:
    place = disk(256)
    fill(place, leave_kib=16)
    run = bench.launch("data.cache_dir=disk/cache", code=1)
    run.assert_told("cannot pack the text files", "No space left", "data.cache_dir")
    assert list((place / "cache").iterdir()) == []
