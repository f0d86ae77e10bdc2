"""Who may use a run folder, and what happens to what is in it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from unit_helpers import assert_explained

from bigtrain.config.load import load_config
from bigtrain.config.schema import Config, RunSection
from bigtrain.errors import RunFolderError
from bigtrain.run_folder import RunFolder, begin, explained_io, open_run


def configured(folder: Path | str) -> Config:
    return Config(run=RunSection(dir=str(folder), seed=5))


def opened(
    folder: Path | str, *, resume: bool = False, restart: bool = False
) -> tuple[RunFolder, IO[str]]:
    return open_run(configured(folder), resume=resume, restart=restart)


def leave_run(folder: Path) -> None:
    """Leave behind what a run has written."""
    run, lock = opened(folder)
    run.metrics.write_text('{"step": 1}\n')
    (run.checkpoints / "step-00000001").mkdir()
    lock.close()


def test_new_folder_is_made_ready(tmp_path: Path) -> None:
    """With everything around it, and the effective config inside."""
    run, lock = opened(tmp_path / "a" / "b")
    assert run.logs.is_dir()
    assert run.checkpoints.is_dir()
    assert load_config(str(run.next_config)) == configured(tmp_path / "a" / "b")
    assert not lock.closed
    lock.close()


def test_existing_empty_folder_is_fine(tmp_path: Path) -> None:
    opened(tmp_path)[1].close()
    opened(tmp_path)[1].close()  # a run that ended before its first step left nothing to lose


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints/step-00000001"])
def test_folder_that_holds_a_run_is_refused(trace: str, tmp_path: Path) -> None:
    (tmp_path / trace).mkdir(parents=True)
    with pytest.raises(RunFolderError) as caught:
        opened(tmp_path)
    assert_explained(caught.value, str(tmp_path), "--resume", "--restart", "run.dir")


def test_refusal_changes_nothing(tmp_path: Path) -> None:
    leave_run(tmp_path)
    (tmp_path / "config.yaml").write_text("the old one")
    with pytest.raises(RunFolderError):
        opened(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "the old one"
    opened(tmp_path, resume=True)[1].close()  # and the lock is free


def test_resume_keeps_what_is_there(tmp_path: Path) -> None:
    leave_run(tmp_path)
    run, lock = opened(tmp_path, resume=True)
    lock.close()
    assert run.metrics.read_text() == '{"step": 1}\n'
    assert (run.checkpoints / "step-00000001").is_dir()


def test_resume_of_nothing_is_a_start(tmp_path: Path) -> None:
    opened(tmp_path / "new", resume=True)[1].close()
    assert (tmp_path / "new" / "config.next.yaml").is_file()


def test_config_changes_only_when_the_run_begins(tmp_path: Path) -> None:
    """A resume that fails leaves the config of the run as it was."""
    leave_run(tmp_path)
    (tmp_path / "config.yaml").write_text("the old one")
    run, lock = opened(tmp_path, resume=True)
    assert run.config.read_text() == "the old one"
    begin(run)
    lock.close()
    assert load_config(str(run.config)) == configured(tmp_path)
    assert not run.next_config.exists()


def test_restart_moves_aside(tmp_path: Path) -> None:
    """Nothing is deleted, however often."""
    folder = tmp_path / "run"
    leave_run(folder)
    for number in (1, 2):
        run, lock = opened(folder, restart=True)
        assert not run.metrics.exists()
        assert list(run.checkpoints.iterdir()) == []
        assert (tmp_path / f"run.old-{number}" / "checkpoints" / "step-00000001").is_dir()
        lock.close()
        leave_run(folder)


def test_restart_of_an_empty_folder_moves_nothing(tmp_path: Path) -> None:
    opened(tmp_path / "run")[1].close()
    opened(tmp_path / "run", restart=True)[1].close()
    assert os.listdir(tmp_path) == ["run"]


def test_restart_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    leave_run(Path("."))
    try:
        opened(".", restart=True)[1].close()
    except RunFolderError:
        return  # to refuse it is as good
    assert (tmp_path / "run.old-1").is_dir()


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"restart": True}])
def test_lock_refuses_a_second_run(how: dict, tmp_path: Path) -> None:
    """Even one that would move the folder aside; the process that holds it is named."""
    run, lock = opened(tmp_path)
    run.metrics.write_text("")
    with pytest.raises(RunFolderError) as caught:
        opened(tmp_path, **how)
    assert_explained(caught.value, "another run is using", f"process {os.getpid()}")
    assert run.metrics.exists()
    lock.close()


def test_lock_ends_with_its_process(tmp_path: Path) -> None:
    """However that ends: nobody has to remove a file."""
    script = (
        "import os, sys; from bigtrain.run_folder import open_run;"
        "from bigtrain.config.schema import Config, RunSection;"
        "keep = open_run(Config(run=RunSection(dir=sys.argv[1])), resume=False, restart=False);"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)])
    assert done.returncode == -9
    opened(tmp_path)[1].close()


def test_damaged_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_bytes(b"\xff\xfe not a number")
    opened(tmp_path)[1].close()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere"])
def test_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        opened(tmp_path / place)
    assert_explained(caught.value, "cannot write to", place, "run.dir")


@pytest.mark.parametrize("inside", ["checkpoints", "logs"])
def test_file_where_a_folder_belongs(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).write_text("")
    with pytest.raises(RunFolderError, match=inside):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["nul\0", "line\nend"], ids=ascii)
def test_name_that_no_file_system_takes(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError):
        opened(str(tmp_path / name))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_told_as_such(number: int, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught, explained_io(tmp_path):
        raise OSError(number, os.strerror(number))
    assert_explained(caught.value, str(tmp_path), "the disk is full", "--resume")


def test_other_io_errors_name_their_file(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError) as caught, explained_io(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/some/file")
    assert_explained(caught.value, "/some/file", "Permission denied", "run.dir")
    assert isinstance(caught.value.__cause__, PermissionError)
