"""A run with kernels, without them, and on a machine where they cannot be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from runs import BIN, Bench, Run

pytestmark = pytest.mark.cluster

LLAMA = ("model.kind=llama",)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No library was built yet, and nothing can build one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture(scope="module")
def reference(shared_bench: Bench) -> Run:
    return shared_bench.launch("run.dir=reference", "run.kernels=off")


def assert_same_curve(run: Run, reference: Run) -> None:
    assert run.losses() == pytest.approx(reference.losses(), rel=2e-6)


@pytest.mark.parametrize("kernels", ["auto", "on"])
def test_kernels_change_nothing(bench: Bench, reference: Run, kernels: str) -> None:
    run = bench.launch(f"run.kernels={kernels}")
    assert_same_curve(run, reference)
    assert "kernels on the cpu" not in run.out
    run.assert_clean()


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_model_and_precision(bench: Bench, model: str, precision: str) -> None:
    overrides = [*(LLAMA if model == "llama" else ()), f"train.precision={precision}"]
    on = bench.launch(*overrides, "run.kernels=on", "run.dir=on")
    off = bench.launch(*overrides, "run.kernels=off", "run.dir=off")
    # In bf16 and fp16 what is rounded once by a kernel is rounded several times by torch.
    tolerance = 2e-6 if precision == "fp32" else 4e-3
    assert on.losses() == pytest.approx(off.losses(), rel=tolerance)
    assert ("loss scale 65,536" in on.out) == (precision == "fp16")
    scales = {record.get("loss_scale") for record in on.metrics()}
    assert scales - {None} == ({65536.0} if precision == "fp16" else set())


def test_no_library_and_no_compiler(bench: Bench, reference: Run, no_compiler: None) -> None:
    """It trains, and says once that it does so without kernels, why, and how to mend it."""
    run = bench.launch()
    assert_same_curve(run, reference)
    assert run.out.count("no kernels on the cpu") == 1, run.shown
    for words in ("no C++ compiler (no-such-compiler)", "torch does their work", "Install g++"):
        assert words in run.out
    run.assert_clean()


def test_said_once_under_torchrun(bench: Bench, no_compiler: None) -> None:
    run = bench.launch(
        command=("torchrun", "--standalone", "--nproc-per-node", "2", "-m", "bigtrain.train")
    )
    assert (run.out + run.err).count("no kernels on the cpu") == 1, run.shown


@pytest.mark.timeout(240)
def test_built_by_the_run_that_wants_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two ranks want a library that nobody built: one builds, the other waits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    run = bench.start("train.steps=2")
    assert run.wait(200) == 0, run.shown  # compiling takes ten seconds, on a loaded machine more
    assert run.out.count("building libbt_cpu_") == 1, run.shown
    (library,) = (tmp_path / "empty" / "bigtrain" / "kernels").glob("*/libbt_cpu_*.so")
    assert library.stat().st_size > 10_000


def doctor(folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        [BIN / "bigtrain", "doctor", "--quick"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def test_doctor_names_the_library(tmp_path: Path) -> None:
    out = doctor(tmp_path)
    assert "nothing is wrong" in out
    assert "libbt_cpu_" in out
    assert "adamw_                kernel (" in out


def test_doctor_says_why_there_is_none(no_compiler: None, tmp_path: Path) -> None:
    out = doctor(tmp_path, code=1)
    assert "1 thing is wrong" in out
    assert "no C++ compiler (no-such-compiler)" in out
    assert "adamw_                torch: there is no library" in out
