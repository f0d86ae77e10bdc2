"""Every CUDA source compiles for every architecture, and keeps its values in registers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bigtrain.kernels import build

SOURCES = build.CUDA.sources()

# As many values as threads of a block can have registers, and more, all needed until the end.
GREEDY = r"""
__global__ void __launch_bounds__(1024) greedy(const float *x, float *y) {
  float value[128];
#pragma unroll
  for (int k = 0; k < 128; k++) value[k] = x[k * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 128; k++) y[k * 1024 + threadIdx.x] = value[127 - k] * value[k];
}
"""


def nvcc() -> str:
    try:
        return build.compiler_of(build.CUDA)
    except build.NoCompiler as error:
        pytest.skip(str(error))


def compiled(source: Path, folder: Path) -> str:
    """Compile as the library is, and return what the assembler says of registers."""
    command = [nvcc(), *build.CUDA.flags_of(source), '-DBT_KEY=""', "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(folder / "object.o")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def spilling(said: str) -> list[str]:
    """Return the kernels that spill, each with its architecture and the bytes."""
    found, kernel = [], ""
    for line in said.splitlines():
        if "Compiling entry function" in line:
            kernel = line.partition("function ")[2]
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spills and spills.groups() != ("0", "0"):
            found.append(f"{kernel}: {spills[0]}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=[f"{s.parent.name}/{s.stem}" for s in SOURCES])
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    said = compiled(source, tmp_path)
    kernels = said.count("Compiling entry function")
    assert said.count("bytes spill stores") >= kernels
    assert kernels > 0 or "__global__" not in source.read_text()
    assert "warning" not in said, said
    assert spilling(said) == []


def test_spills_are_seen(tmp_path: Path) -> None:
    """What must spill is found to, on each architecture."""
    source = tmp_path / "greedy.cu"
    source.write_text(GREEDY)
    found = spilling(compiled(source, tmp_path))
    for number in ("80", "90", "100"):
        assert any("greedy" in line and f"sm_{number}" in line for line in found), found
