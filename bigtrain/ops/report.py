"""Who does each operation on this machine, and why: what `bigtrain doctor` shows."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch

from bigtrain.errors import BigtrainError
from bigtrain.kernels import build
from bigtrain.machine import num_cores
from bigtrain.ops.library import DTYPES, Library, Missing, find
from bigtrain.ops.op import LEFT_TO_TORCH

# By the names that `chosen` is asked with.
OPERATIONS = {
    "optimizer": (*("adamw_", "sgd_", "lamb_", "lion_", "adagrad_", "adagrad_rows_", "grad_norm"),),
    "compression": (
        *("sign_pack_", "sign_residual", "sign_unpack_mean"),
        *("quantize_", "dequantize_mean", "delta_pack_", "delta_apply_"),
    ),
    "model": (
        *(
            "layer_norm",
            "rms_norm",
            "bias_gelu",
            "exact_gelu",
            "swiglu",
            "rotary",
            "masked_softmax",
        ),
        *("cross_entropy", "bias_dropout_residual"),
    ),
}


def doctor_lines() -> Iterator[str]:
    """Yield what this machine is, which kernel libraries it has, and who does each operation."""
    yield f"machine  {platform.machine()}, {num_cores()} core(s), {_gpus()}"
    yield f"python   {platform.python_version()}, torch {torch.__version__}"
    libraries = {}
    for kind in ("cpu", "cuda"):
        if kind == "cuda" and not torch.cuda.is_available():
            continue
        libraries[kind], line = _look(kind)
        yield f"{kind:<8} {line}"
    yield ""
    yield "operation".ljust(24) + "".join(kind.ljust(44) for kind in libraries).rstrip()
    for group, names in OPERATIONS.items():
        yield group
        for name in names:
            done_by = (_done_by(name, kind, found) for kind, found in libraries.items())
            yield f"  {name:<22}" + "".join(text.ljust(44) for text in done_by).rstrip()


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(dict.fromkeys(f"{names.count(name)} x {name}" for name in names))


def _look(kind: str) -> tuple[Library | None, str]:
    try:
        found = find(kind)
    except BigtrainError as error:  # required, and not there
        return None, str(error).replace("\n", " ")
    if isinstance(found, Missing):
        it = found.problem
        return None, f"{it.what}: {it.why}" + (f". {it.mend}" if it.mend else "")
    shipped = found.path.parent == build.PREBUILT
    return found, f"{found.path} ({found.target}, {'shipped' if shipped else 'built here'})"


def _done_by(name: str, kind: str, library: Library | None) -> str:
    if library is None:
        return "torch: there is no library"
    kernel, left = f"kernel ({library.target})", LEFT_TO_TORCH[kind].get(name)
    if left is None:
        return kernel
    everything = len(left.dtypes) == len(DTYPES)
    return f"torch: {left.why}" if everything else f"{kernel}; {left.why}"
