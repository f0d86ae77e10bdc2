"""Building, finding and loading: what is missing, stale or foreign is named, and mended."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.kernels import build
from bigtrain.ops import library as libraries
from bigtrain.ops.library import Library, Missing, find, library_of, load, prototypes
from bigtrain.ops.optimizer import sgd_

BEST = next(target for target in build.cpu_targets() if build.runs_here(target))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No library was looked for yet; there is none in the package."""
    find.cache_clear()
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "lib")
    yield
    find.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build, "_nvcc_candidates", lambda: iter(()))


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bigtrain" / "kernels"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> build.Target:
    """A target with one small source, which is quick to build."""
    here = tmp_path / "here"
    (here / "cpu").mkdir(parents=True)
    (here / "include").mkdir()
    source = 'extern "C" const char *bt_key(void) { return BT_KEY; }\n'
    (here / "cpu" / "tiny.cpp").write_text(source)
    monkeypatch.setattr(build, "HERE", here)
    return build.Target("tiny", "cpu", ("-fPIC",))


def shipped(tmp_path: Path, built: Path) -> Path:
    folder = tmp_path / "lib"
    folder.mkdir()
    return Path(shutil.copy(built, folder / BEST.file))


def test_every_prototype_is_read() -> None:
    """As many as the header has, and with the types that it says."""
    text = (build.HERE / "include" / "bt_abi.h").read_text()
    assert len(prototypes()) == text.count("\nBT_API ")
    result, parameters = prototypes()["bt_sgd"]
    names = [kind.__name__ for kind in parameters]
    assert result.__name__ == "c_int"
    assert names[:6] == ["c_long", "c_void_p", "c_void_p", "c_int", "c_void_p", "c_int"]
    assert names[-2:] == ["c_int", "c_void_p"]


def test_every_function_is_in_every_library(loaded: dict[str, Library]) -> None:
    for library in loaded.values():
        assert set(library.functions) == set(prototypes())


def test_shipped_library_needs_no_compiler(
    loaded: dict[str, Library], no_compiler: None, empty_cache: Path, tmp_path: Path
) -> None:
    path = shipped(tmp_path, loaded[BEST.name].path)
    found = find("cpu")
    assert isinstance(found, Library)
    assert found.path == path
    assert not empty_cache.exists()


def test_without_library_and_compiler_torch_does_it(
    no_compiler: None, empty_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main = torch.ones(4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sgd_(main, torch.ones(4), None, lr=0.25)
    assert main.tolist() == [0.25] * 4
    (record,) = caplog.records  # said once
    assert "no C++ compiler (no-such-compiler)" in record.message
    assert "Install g++" in record.message
    assert "torch does their work" in record.message


def test_required_but_missing(
    no_compiler: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIGTRAIN_KERNELS", "require")
    with pytest.raises(BigtrainError, match="no kernels on the cpu") as error:
        sgd_(torch.ones(4), torch.ones(4), None, lr=0.25)
    assert "no C++ compiler" in error.value.problem.why
    assert "Install g++" in error.value.problem.mend


def test_off_is_silent(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("BIGTRAIN_KERNELS", "off")
    assert library_of(torch.device("cpu")) is None
    assert isinstance(find("cpu"), Missing)
    assert not caplog.records


@pytest.mark.parametrize("variable", ["BIGTRAIN_KERNELS", "BIGTRAIN_CUDA"])
def test_a_wish_that_is_none(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(BigtrainError, match=f"{variable} is 'maybe'; it can be auto, off or"):
        find("cuda")


def test_cuda_can_be_off_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIGTRAIN_CUDA", "off")
    found = find("cuda")
    assert isinstance(found, Missing)
    assert found.problem.why == "BIGTRAIN_CUDA=off"
    assert isinstance(find("cpu"), Library)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (b"", "is not for this machine, or damaged"),
        (b"\x7fELF\x01garbage", "is not for this machine, or damaged"),
        (None, "is stale: it was built from other sources"),
    ],
)
def test_a_bad_shipped_library_is_named_and_replaced(
    loaded: dict[str, Library],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: bytes | None,
    message: str,
) -> None:
    path = shipped(tmp_path, loaded[BEST.name].path)
    key = BEST.key().encode()
    path.write_bytes(path.read_bytes().replace(key, b"0" * 16) if damage is None else damage)
    with caplog.at_level(logging.WARNING):
        found = find("cpu")
    assert isinstance(found, Library)
    assert found.path != path  # the one in the cache
    (record,) = caplog.records
    assert str(path) in record.message
    assert message in record.message


def test_a_bad_shipped_library_and_no_compiler(
    no_compiler: None, empty_cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / BEST.file).write_bytes(b"not a library")
    found = find("cpu")
    assert isinstance(found, Missing)
    assert "not for this machine, or damaged" in found.problem.why
    assert "Install g++" in found.problem.mend


def test_a_foreign_library_of_the_same_name(tmp_path: Path) -> None:
    """A shared object that is somebody else's has none of our functions."""
    source = tmp_path / "other.c"
    source.write_text("int hello(void) { return 1; }\n")
    path = tmp_path / BEST.file
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(path)], check=True)
    found = load(path, BEST)
    assert isinstance(found, str)
    assert "stale" in found


def test_a_changed_source_changes_the_key(tiny: build.Target) -> None:
    before = tiny.key()
    assert tiny.key() == before
    header = build.HERE / "include" / "new.h"
    header.write_text("#define X\n")
    with_header = tiny.key()
    (build.HERE / "cpu" / "tiny.cpp").write_text("// other\n")
    assert len({before, with_header, tiny.key()}) == 3


def test_built_once_and_again_after_a_change(tiny: build.Target, empty_cache: Path) -> None:
    path = build.build_cached(tiny)
    made = path.stat().st_mtime_ns
    assert build.build_cached(tiny).stat().st_mtime_ns == made
    source = build.HERE / "cpu" / "tiny.cpp"
    source.write_text(source.read_text() + "// changed\n")
    assert build.build_cached(tiny) != path


def test_one_builds_and_others_wait(tiny: build.Target, empty_cache: Path) -> None:
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(build.build_cached(tiny))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(paths)) == 1
    assert len(paths) == 6
    left = sorted(p.name for p in paths[0].parent.iterdir())
    assert left == [tiny.file, "lock"]  # nothing half-built


def test_a_source_that_does_not_compile(tiny: build.Target, empty_cache: Path) -> None:
    (build.HERE / "cpu" / "tiny.cpp").write_text("this is no C++\n")
    with pytest.raises(build.BuildError, match=r"tiny\.cpp:1") as error:
        build.build_cached(tiny)
    assert "error:" in str(error.value)
    assert not build.cached(tiny).exists()


def test_one_failure_is_enough_for_all_who_wait(
    tiny: build.Target, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[str] = []

    def fail(*args: object) -> None:
        attempts.append("one")
        time.sleep(0.3)
        raise build.BuildError("this compiler is too old")

    monkeypatch.setattr(build, "build", fail)
    told: list[str] = []

    def want() -> None:
        with pytest.raises(build.BuildError) as error:
            build.build_cached(tiny)
        told.append(str(error.value))

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert told == ["this compiler is too old"] * 4
    assert attempts == ["one"]
    with pytest.raises(build.BuildError):  # a later process tries again
        build.build_cached(tiny)
    assert len(attempts) == 2


def test_a_damaged_library_in_the_cache_is_built_anew(
    loaded: dict[str, Library],
    empty_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, path = loaded[BEST.name].path, build.cached(BEST)
    path.parent.mkdir(parents=True)
    path.write_bytes(whole.read_bytes()[:5000])  # as a loss of power leaves it

    def build_it(targets: list[build.Target], folder: Path) -> None:
        shutil.copy(whole, folder / targets[0].file)

    monkeypatch.setattr(build, "build", build_it)
    found = find("cpu")
    assert isinstance(found, Library)
    assert found.path == path
    (record,) = caplog.records
    assert str(path) in record.message
    assert "built anew" in record.message


def test_a_cache_of_somebody_else_serves(
    loaded: dict[str, Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "utime", refuse)
    assert isinstance(find("cpu"), Library)


def test_a_shipped_library_that_is_passed_over_is_named(
    loaded: dict[str, Library], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not only where one is built in its place, also where another shipped one serves."""
    if len(loaded) < 3:
        pytest.skip("this processor has one target")
    others = [target for target in build.cpu_targets() if build.runs_here(target)]
    path = shipped(tmp_path, loaded[others[0].name].path)
    path.write_bytes(b"damaged")
    shutil.copy(loaded[others[1].name].path, tmp_path / "lib" / others[1].file)
    found = find("cpu")
    assert isinstance(found, Library)
    assert found.target == others[1].name.removeprefix("cpu_")
    assert f"{path} is not for this machine, or damaged" in caplog.text


def test_architectures_that_an_older_nvcc_does_not_know(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho compute_80; echo compute_90\n")
    nvcc.chmod(0o755)
    known = build.known_to(str(nvcc), build.CUDA)
    assert known.key() == build.CUDA.key()
    assert not any("100" in flag for flag in known.flags)
    assert "-gencode=arch=compute_90,code=compute_90" in known.flags
    assert '-DBT_TARGET="sm_80 sm_90"' in known.flags
    nvcc.write_text("#!/bin/sh\necho compute_50\n")
    with pytest.raises(build.BuildError, match="none of the architectures"):
        build.known_to(str(nvcc), build.CUDA)


def test_a_cache_that_cannot_be_written(
    tiny: build.Target, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.build_cached(tiny)


def test_old_builds_are_removed(tiny: build.Target, empty_cache: Path) -> None:
    for number in range(10):
        folder = empty_cache / f"{tiny.name}-{number}"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    (empty_cache / "other-1").mkdir()
    build.build_cached(tiny)
    names = {folder.name for folder in empty_cache.iterdir()}
    assert len(names) == 1 + build._KEEP
    assert "other-1" in names
    assert build.cached(tiny).parent.name in names


def test_what_a_processor_needs(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    avx2 = "avx2 fma f16c bmi1 bmi2 movbe"
    targets = build.CPU_TARGETS["x86_64"]
    for flags, names in [
        ("sse2", ["cpu_baseline"]),
        (avx2, ["cpu_avx2", "cpu_baseline"]),
        (f"{avx2} avx512f", ["cpu_avx2", "cpu_baseline"]),
    ]:
        cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
        assert [t.name for t in targets if build.runs_here(t, cpuinfo)] == names
    assert not build.runs_here(targets[0], tmp_path / "nothing")


def test_a_failing_kernel_says_so(loaded: dict[str, Library]) -> None:
    library = loaded[BEST.name]
    x = torch.ones(4)
    with pytest.raises(BigtrainError, match="bt_sgd failed: an argument is outside") as error:
        library.call("bt_sgd", x.device, 4, x, None, 7, x, 9, None, None, 0.1, 0.0, 0.0, False)
    assert "BIGTRAIN_KERNELS=off" in str(error.value)


def test_loading_leaves_denormals_alone(loaded: dict[str, Library]) -> None:
    """A library linked with -ffast-math would make the process flush them to zero."""
    assert len(loaded) > 1
    assert float(torch.tensor([1e-40]) * 1) > 0


def test_importing_is_quick_and_builds_nothing(tmp_path: Path) -> None:
    """Importing never needs a compiler, and looks for no library."""
    script = "import bigtrain.ops.optimizer, bigtrain.ops.grad_norm, bigtrain.ops.lamb"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "CXX": "no-such-compiler"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, timeout=60)
    assert not (tmp_path / "bigtrain").exists()
    assert libraries.find.cache_info().currsize == 0
