"""The wheel holds the library, the launcher and built kernels, and needs no torch to be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bigtrain.kernels import build

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
FOLDERS = {"bigtrain": "bigtrain", "launch": "bigtrain/launch", "kernels": "bigtrain/kernels"}


def make_wheel(tmp_path: Path, **environment: str) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "torch.py").write_text("raise SystemExit('torch was imported while building')\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*pip, "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(source), **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("bigtrain-*.whl")
    return wheel


@pytest.mark.timeout(300)
def test_wheel_with_kernels(tmp_path: Path) -> None:
    """It is for this kind of machine and any Python; installed, it needs no compiler."""
    wheel = make_wheel(tmp_path, BIGTRAIN_CUDA="off")
    assert wheel.name.split("-", 2)[2].startswith("py3-none-linux_")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in names
    for target in build.cpu_targets():
        assert f"bigtrain/kernels/lib/{target.file}" in names
    assert "bigtrain/py.typed" in names
    assert not any(
        name.startswith(("tests/", "launch/", "kernels/", "examples/")) for name in names
    )
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = "from bigtrain.ops.library import find; print(find('cpu').path)"
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-c",
            f"import sys; sys.path[:0] = {[str(site), *sys.path]}; {script}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=tmp_path,
    )
    assert done.stdout.startswith(str(site)), done.stdout + done.stderr


def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """It is for any machine, and has the sources, to be built where there is a compiler."""
    wheel = make_wheel(tmp_path, CXX="no-such-compiler", BIGTRAIN_CUDA="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any(name.endswith(".so") for name in names)
    assert "bigtrain/kernels/cpu/optimizer/adamw.cpp" in names


def test_wheel_that_must_have_kernels(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"there is no C\+\+ compiler"):
        make_wheel(tmp_path, CXX="no-such-compiler", BIGTRAIN_KERNELS="require")
