"""The kernel libraries: which is for a device, where it is, why there is none, how it is called.

A wheel carries libraries; a checkout builds them into the user's cache when they are first wanted,
and anew when a source changes. Where there is none, torch does the work; that is said once.

    BIGTRAIN_KERNELS=auto|off|require   off: torch does all; require: no library is an error
    BIGTRAIN_CUDA=auto|off|require      the same for CUDA alone
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.errors import BigtrainError, Problem
from bigtrain.kernels import build

log = logging.getLogger(__name__)

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as bt_abi.h numbers them
_HEADER = build.HERE / "include" / "bt_abi.h"
_C_TYPES: Mapping[str, Any] = {
    "int": ctypes.c_int,
    "int64_t": ctypes.c_int64,
    "uint32_t": ctypes.c_uint32,
    "float": ctypes.c_float,
    "const char *": ctypes.c_char_p,
}


class Library:
    """A loaded library. `target` is what it was built for: an instruction set, or architectures."""

    def __init__(self, path: Path) -> None:
        """Load `path`.

        Raises:
            OSError: it is no library for this machine.
            AttributeError: it lacks a function of bt_abi.h.
        """
        handle = ctypes.CDLL(str(path))
        self.path = path
        self.functions: dict[str, Callable[..., Any]] = {}
        for name, (result, parameters) in prototypes().items():
            function = getattr(handle, name)
            function.restype, function.argtypes = result, parameters
            self.functions[name] = function
        self.key = self.functions["bt_key"]().decode()
        self.target = self.functions["bt_target"]().decode()

    def call(self, name: str, device: torch.device, *args: Any) -> None:
        """Call the function `name`; tensors are passed by address, dtypes by number.

        `device` and the stream, which all functions take last, are added here.

        Raises:
            BigtrainError: the function says that it failed.
        """
        index, stream = -1, None
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            stream = torch._C._cuda_getCurrentRawStream(index)
        status = self.functions[name](*map(_plain, args), index, stream)
        if status:
            raise BigtrainError(
                f"the kernel {name} failed: {self.functions['bt_error'](status).decode()}",
                where=str(self.path),
                why=f"status {status}, on {device}",
                mend="BIGTRAIN_KERNELS=off goes on without kernels; please report this",
            )

    def ask(self, name: str, *args: int) -> int:
        """Return what a function that only computes a size gives."""
        return int(self.functions[name](*args))


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return DTYPES[value] if isinstance(value, torch.dtype) else value


@functools.cache
def prototypes() -> Mapping[str, tuple[Any, list[Any]]]:
    """Return the functions of bt_abi.h: name -> (type of the result, types of the parameters)."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", _HEADER.read_text(), flags=re.DOTALL)
    found = re.findall(r"BT_API\s+(const char \*|int64_t|int)\s*(bt_\w+)\(([^)]*)\);", text)
    return {
        name: (_C_TYPES[result], [_c_type(p) for p in parameters.split(",") if p.strip() != "void"])
        for result, name, parameters in found
    }


def _c_type(parameter: str) -> Any:
    if "*" in parameter:
        return ctypes.c_void_p
    return _C_TYPES[parameter.split()[0]]


# -- finding ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Missing:
    """Why there is no library. `wanted`: nobody asked to go without."""

    problem: Problem
    wanted: bool = True


def library_of(device: torch.device) -> Library | None:
    """Return the library for tensors of `device`, or None: torch does the work (said once).

    Raises:
        BigtrainError: there is none, but it is required.
    """
    if device.type not in ("cpu", "cuda"):
        return None
    found = find(device.type)
    return found if isinstance(found, Library) else None


@functools.cache
def find(kind: str) -> Library | Missing:
    """Find, check and load the library for "cpu" or "cuda", or say why there is none.

    Raises:
        BigtrainError: there is none, but it is required.
    """
    try:
        wishes = {build.wish("BIGTRAIN_KERNELS")}
        if kind == "cuda":
            wishes.add(build.wish("BIGTRAIN_CUDA"))
    except build.BuildError as error:
        raise BigtrainError(str(error), mend="set it to one of these, or not at all") from None
    if "off" in wishes:
        variable = (
            "BIGTRAIN_CUDA" if build.wish("BIGTRAIN_KERNELS") != "off" else "BIGTRAIN_KERNELS"
        )
        return Missing(Problem(f"no kernels on the {kind}", why=f"{variable}=off"), wanted=False)
    found = _find(kind)
    if isinstance(found, Missing):
        it = found.problem
        if "require" in wishes:
            raise BigtrainError(it.what, why=it.why, mend=it.mend)
        log.warning("%s: %s; torch does their work, slower. %s", it.what, it.why, it.mend)
    return found


def _find(kind: str) -> Library | Missing:
    targets = [build.CUDA]
    if kind == "cpu":
        targets = [target for target in build.cpu_targets() if build.runs_here(target)]
    faults: list[str] = []
    for target in targets:
        path = build.PREBUILT / target.file
        if path.exists():
            found = load(path, target)
            if isinstance(found, Library):
                return _usable(kind, found, faults)
            faults.append(found)
    try:
        found = _from_cache(targets[0])
    except build.NoCompiler as error:
        found = faults[0] if faults else str(error)
    except build.BuildError as error:
        found = str(error)
    if isinstance(found, Library):
        return _usable(kind, found, faults)
    return Missing(Problem(f"no kernels on the {kind}", why=found, mend=_mend(kind)))


def _from_cache(target: build.Target) -> Library | str:
    """Load the library of `target` from the cache; build it if it is not there, or damaged."""
    if not build.cached(target).exists():
        log.info("building %s, once", target.file)
    found = load(build.build_cached(target), target)
    if isinstance(found, str):
        log.warning("%s; it is built anew", found)
        with contextlib.suppress(OSError):
            build.cached(target).unlink()
        found = load(build.build_cached(target), target)
    return found


def _usable(kind: str, library: Library, faults: list[str]) -> Library | Missing:
    """Name the libraries that were passed over, and see whether a GPU can run this one."""
    for fault in faults:
        log.warning("%s; %s is used in its place", fault, library.path)
    if kind == "cuda":
        try:
            one = torch.zeros(1, device="cuda")
            nothing = (None, 0.0, 0.0, 0.0, False)
            library.call("bt_sgd", one.device, 1, one, None, 0, one, 0, None, *nothing)
        except BigtrainError as error:
            name, number = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            what = f"{name} (sm_{number[0]}{number[1]}) cannot run {library.path}: {error}"
            mend = f"it was built for {library.target}; a CUDA 13 library needs driver 580 or newer"
            return Missing(Problem("no kernels on the cuda", why=what, mend=mend))
    return library


def load(path: Path, target: build.Target) -> Library | str:
    """Load the library of `target` at `path`, or return what is wrong with it."""
    try:
        if not _is_whole(path):
            return f"{path} is not for this machine, or damaged (it is cut off)"
        library = Library(path)
    except OSError as error:
        return f"{path} is not for this machine, or damaged ({error})"
    except AttributeError as error:
        return f"{path} is stale: it was built from other sources ({error})"
    if library.key != target.key():
        return f"{path} is stale: it was built from other sources (key {library.key})"
    return library


def _is_whole(path: Path) -> bool:
    """Return whether an ELF file has all that its header tells of; loading half a one may crash."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        return False
    table, size, count = (
        struct.unpack_from("<Q", header, 40)[0],
        *struct.unpack_from("<HH", header, 58),
    )
    return path.stat().st_size >= table + size * count


def _mend(kind: str) -> str:
    packages = "nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-crt nvidia-nvvm nvidia-cuda-cccl"
    compiler = "g++" if kind == "cpu" else f"nvcc (the CUDA toolkit, or pip install {packages})"
    return (
        f"Install {compiler} and start again, or install bigtrain anew where there is one; "
        f"BIGTRAIN_{'KERNELS' if kind == 'cpu' else 'CUDA'}=off silences this"
    )
