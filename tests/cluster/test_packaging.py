"""The wheel holds the library and the launcher, and needs no torch to be built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


def test_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("bigtrain", "launch"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "torch.py").write_text("raise SystemExit('torch was imported while building')\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    (wheel,) = tmp_path.glob("bigtrain-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in ((ROOT / "bigtrain", "bigtrain"), (ROOT / "launch", "bigtrain/launch")):
        for path in folder.rglob("*.py"):
            assert f"{package}/{path.relative_to(folder).as_posix()}" in names
    assert "bigtrain/py.typed" in names
    assert not any(name.startswith(("tests/", "launch/", "examples/")) for name in names)
