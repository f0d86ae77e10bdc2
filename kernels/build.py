"""Builds the kernel libraries with the compilers of this machine. Needs nothing but them.

A library is a set of sources for one target: an instruction set of the CPU, or CUDA. Its `key` is a
hash of its sources and flags, and is compiled into it, so that a library that was built from other
sources is known as such. setup.py builds into the package; a checkout builds into the user's cache,
one folder a key, when a library is first wanted. Used by setup.py, so it imports nothing of
bigtrain.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
PREBUILT = HERE / "lib"
EXACT = ("optimizer", "compression")  # folders whose kernels give the same bits everywhere
WAIT_SECONDS = 600.0
_KEEP = 6  # builds of one target in the cache; older ones are removed

_GXX = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
)  # psabi: no vector crosses our interface
# Not -ffast-math: linked with it, a library makes the whole process flush denormals to zero.
_CPU = (*_GXX, "-fno-math-errno", "-fno-trapping-math", "-Wno-maybe-uninitialized")
# The CUDA kernels as C++, for tests on machines without a GPU.
_EMULATED = (*_GXX, "-O2", "-x", "c++", "-DCUDA_ON_CPU", "-Wno-unknown-pragmas")
_NVCC = (
    *("-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"),
    *("-Xfatbin", "-compress-all", "--threads", "2"),
)
_CUDA_ARCHITECTURES = ("80", "90", "100")


class BuildError(Exception):
    """A library could not be built; the text is what the compiler said."""


class NoCompiler(BuildError):
    """There is no compiler for a target on this machine."""


@dataclass(frozen=True)
class Target:
    """What a library is built for: `folder` has its sources, `flags` go to every one of them."""

    name: str
    folder: str
    flags: tuple[str, ...]
    key_of_all: str | None = None  # the key, if these flags are those that a compiler can do

    @property
    def file(self) -> str:
        return f"libbt_{self.name}.so"

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    @property
    def suffix(self) -> str:
        return ".cpp" if self.folder == "cpu" else ".cu"

    def sources(self) -> list[Path]:
        return sorted((HERE / self.folder).rglob(f"*{self.suffix}"))

    def headers(self) -> list[Path]:
        return sorted(
            path
            for folder in ("include", self.folder)
            for path in (HERE / folder).rglob("*.[hc]*")
            if path.suffix in (".h", ".cuh")
        )

    def flags_of(self, source: Path) -> list[str]:
        exact = source.parent.name in EXACT
        unfused = "--fmad=false" if self.is_cuda else "-ffp-contract=off"
        return [*self.flags, *([unfused] if exact else []), f"-I{HERE / 'include'}"]

    def key(self) -> str:
        """Return the hash of what this library is built from."""
        if self.key_of_all is not None:
            return self.key_of_all
        digest = hashlib.sha256()
        for path in (*self.sources(), *self.headers()):
            digest.update(f"{path.relative_to(HERE)}\0{len(path.read_bytes())}\0".encode())
            digest.update(path.read_bytes())
        digest.update(repr((self.name, self.flags, EXACT)).encode())
        return digest.hexdigest()[:16]


def _cpu(name: str, *march: str) -> Target:
    return Target(f"cpu_{name}", "cpu", (*_CPU, *march, f'-DBT_TARGET="{name}"'))


def _cuda(architectures: Sequence[str], key: str | None = None) -> Target:
    names = " ".join(f"sm_{number}" for number in architectures)
    gencode = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in architectures]
    last = architectures[-1]
    gencode.append(f"-gencode=arch=compute_{last},code=compute_{last}")  # PTX, for what is newer
    return Target("cuda", "cuda", (*_NVCC, *gencode, f'-DBT_TARGET="{names}"'), key)


CPU_TARGETS: Mapping[str, Sequence[Target]] = {  # by machine, the best first
    "x86_64": (
        _cpu("avx512", "-march=x86-64-v4", "-mprefer-vector-width=512"),
        _cpu("avx2", "-march=x86-64-v3"),
        _cpu("baseline", "-march=x86-64"),
    ),
    "aarch64": (_cpu("neon"),),
}
CUDA = _cuda(_CUDA_ARCHITECTURES)
EMULATED = Target("emulated", "cuda", (*_EMULATED, '-DBT_TARGET="emulated"'))

SANITIZED = Target(
    "sanitized", "cuda", (*EMULATED.flags, "-O1", "-g1", "-fsanitize=address")
)  # the same, to see accesses outside of memory

_NEEDS = {  # what /proc/cpuinfo must list
    "cpu_avx512": "avx512f avx512bw avx512cd avx512dq avx512vl avx2 fma f16c bmi1 bmi2",
    "cpu_avx2": "avx2 fma f16c bmi1 bmi2 movbe",
    "cpu_baseline": "",
    "cpu_neon": "",
}


def cpu_targets() -> Sequence[Target]:
    """Return the targets of this kind of machine, the best first."""
    return CPU_TARGETS.get(platform.machine(), (_cpu("generic"),))


def runs_here(target: Target, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether this processor has what a CPU target needs, asked of the kernel."""
    needs = set(_NEEDS.get(target.name, "").split())
    if not needs:
        return True
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return needs <= set(flags.partition(":")[2].split())


# -- compilers -------------------------------------------------------------------------------------


def compiler_of(target: Target) -> str:
    """Return the compiler that builds `target`.

    Raises:
        NoCompiler: there is none; the text says where it was looked for.
    """
    if not target.is_cuda:
        wanted = os.environ.get("CXX")
        tried = [wanted] if wanted else ["g++"]
        found = next(filter(None, map(shutil.which, tried)), None)
        if found is None:
            raise NoCompiler(f"there is no C++ compiler ({', '.join(tried)}) on this machine")
        return found
    for candidate in _nvcc_candidates():
        if os.access(candidate, os.X_OK):
            return str(candidate)
    raise NoCompiler("there is no nvcc in CUDA_HOME, in PATH, or from the nvidia-cuda-nvcc wheel")


def _nvcc_candidates() -> Iterator[Path]:
    home = os.environ.get("CUDA_HOME")
    if home:
        yield Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    if found:
        yield Path(found)
    yield Path("/usr/local/cuda/bin/nvcc")
    for folder in sys.path:
        yield from sorted(Path(folder).glob("nvidia/cu*/bin/nvcc"))


def known_to(compiler: str, target: Target) -> Target:
    """Return `target` without the architectures that this nvcc does not know (an older toolkit)."""
    if not target.is_cuda:
        return target
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [n for n in _CUDA_ARCHITECTURES if f"compute_{n}" in listed.split()]
    if not known:
        raise BuildError(f"{compiler} knows none of the architectures {_CUDA_ARCHITECTURES}")
    return _cuda(known, target.key())


# -- building --------------------------------------------------------------------------------------


def build(targets: Sequence[Target], folder: Path) -> list[Path]:
    """Build the libraries of `targets` into `folder`, all sources side by side; replace atomically.

    Raises:
        BuildError: a compiler is missing or refuses a source; `folder` cannot be written.
    """
    if not targets:
        return []
    compilers = {target.name: compiler_of(target) for target in targets}
    targets = [known_to(compilers[target.name], target) for target in targets]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
            return _build(targets, compilers, folder, Path(scratch))
    except OSError as error:
        raise BuildError(f"{folder} cannot be written: {error}") from error


def _build(
    targets: Sequence[Target], compilers: Mapping[str, str], folder: Path, scratch: Path
) -> list[Path]:
    commands: list[list[str]] = []
    objects: dict[str, list[str]] = {target.name: [] for target in targets}
    for target in targets:
        for source in target.sources():
            object_file = str(scratch / f"{target.name}-{source.parent.name}-{source.stem}.o")
            objects[target.name].append(object_file)
            commands.append(
                [
                    *(compilers[target.name], *target.flags_of(source)),
                    *(f'-DBT_KEY="{target.key()}"', "-c", str(source), "-o", object_file),
                ]
            )
    with ThreadPoolExecutor(num_cores()) as pool:
        list(pool.map(_run, commands))  # raises what the first that failed raised
    built = []
    for target in targets:
        fresh = scratch / target.file
        link = ["-shared", *objects[target.name], "-o", str(fresh)]
        openmp = _cudart_folder(compilers[target.name]) if target.is_cuda else ["-fopenmp"]
        sanitized = [flag for flag in target.flags if flag.startswith("-fsanitize")]
        _run([compilers[target.name], *openmp, *sanitized, *link])
        with open(fresh, "rb") as file:
            os.fsync(file.fileno())  # a name must not outlive a loss of power without its contents
        built.append(fresh.replace(folder / target.file))
    return built


def _cudart_folder(nvcc: str) -> list[str]:
    """Return what tells nvcc of pip's wheels where its libraries are; a toolkit's knows."""
    folder = Path(nvcc).parent.parent / "lib"
    return [f"-L{folder}"] if folder.is_dir() else []


def num_cores() -> int:
    """Return the processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[:20])
        raise BuildError(f"{' '.join(command)}\n{said}")


# -- the cache of a checkout -----------------------------------------------------------------------


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "bigtrain" / "kernels"


def cached(target: Target) -> Path:
    """Return where the cache has, or would have, the library of `target`."""
    return cache_folder() / f"{target.name}-{platform.machine()}-{target.key()}" / target.file


def build_cached(target: Target) -> Path:
    """Return the library of `target`, built into the cache if it is not there.

    Of several processes that want it, one builds and the others wait; if it fails, for all of them.

    Raises:
        BuildError: it cannot be built, or another process takes too long over it.
    """
    path = cached(target)
    if path.exists():
        with suppress(OSError):  # a folder of somebody else's serves as well
            os.utime(path.parent)
        return path
    compiler_of(target)  # before a folder is made for nothing
    try:
        return _build_cached(target, path)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written: {error}") from error


def _build_cached(target: Target, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    failed, began = path.parent / "failed", time.time()
    with _locked(path.parent / "lock"):
        if path.exists():
            return path
        if failed.exists() and failed.stat().st_mtime >= began:  # while this one waited
            raise BuildError(failed.read_text())
        try:
            build([target], path.parent)
        except BuildError as error:
            failed.write_text(str(error))
            raise
        _forget_old(target)
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    end = time.monotonic() + WAIT_SECONDS
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BuildError(f"another process holds {path} for too long") from None
                time.sleep(0.05)
        yield


def _forget_old(target: Target) -> None:
    """Remove the builds of `target` that were not used for longest."""
    folders = [f for f in cache_folder().glob(f"{target.name}-*") if f.is_dir()]
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime)[:-_KEEP]:
        shutil.rmtree(folder, ignore_errors=True)


def wish(variable: str) -> str:
    """Return what BIGTRAIN_KERNELS or BIGTRAIN_CUDA says: auto, off or require.

    Raises:
        BuildError: it is something else.
    """
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "off", "require"):
        raise BuildError(f"{variable} is {value!r}; it can be auto, off or require")
    return value
