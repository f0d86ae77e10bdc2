"""Ranks in containers: the words that apptainer is given, and what is started by them."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from runs import BIN, Bench

pytestmark = pytest.mark.cluster

# It takes the options that are given, writes them down, and runs the command without an image.
APPTAINER = """#!/bin/bash
echo "$@" >> apptainer-words
[ "$1" = exec ] || exit 9
shift
while [ "$1" != image.sif ]; do shift || exit 8; done
shift
exec "$@"
"""


@pytest.fixture
def apptainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "apptainer"
    path.parent.mkdir()
    path.write_text(APPTAINER)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{path.parent}:{BIN}:{os.environ['PATH']}")
    return path


def test_ranks_in_apptainer(apptainer: Path, bench: Bench) -> None:
    container = f"{{kind: apptainer, image: image.sif, mounts: [/data], python: {sys.executable}}}"
    run = bench.launch(f"launch.container={container}", "parallel.dp=2")
    assert len(run.losses()) == 8
    words = (bench.path / "apptainer-words").read_text()
    here = bench.path
    assert f"exec --nv --pwd {here} --bind {here} --bind /data image.sif" in words
    run.wait_gone()


def test_a_container_that_does_not_start(apptainer: Path, bench: Bench) -> None:
    container = "{kind: apptainer, image: other.sif}"
    run = bench.launch(f"launch.container={container}", code=1)
    run.assert_told("0 of 1 nodes joined", "apptainer ended with exit code 8")


def test_pyxis_needs_srun(bench: Bench) -> None:
    run = bench.launch("launch.container={kind: pyxis, image: ubuntu}", code=2)
    run.assert_told("pyxis", "srun", "--slurm")


def test_servers_and_workers_in_apptainer(apptainer: Path, bench: Bench) -> None:
    container = f"{{kind: apptainer, image: image.sif, python: {sys.executable}}}"
    servers = ("parallel.dp=1", "server.servers=1", "server.mode=sync")
    run = bench.launch(f"launch.container={container}", *servers, "train.steps=3")
    assert len(run.losses()) == 3
    assert (bench.path / "apptainer-words").read_text().count("exec --nv") == 1
    run.wait_gone()
