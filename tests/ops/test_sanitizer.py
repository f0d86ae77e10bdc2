"""Every CUDA source, as C++ and under the address sanitizer, on sizes that end anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bigtrain.kernels import build

SCRIPT = """
import sys
import torch
from bigtrain.ops import op
from bigtrain.ops.activations import bias_gelu, swiglu
from bigtrain.ops.adagrad import adagrad_, adagrad_rows_
from bigtrain.ops.cross_entropy import cross_entropy
from bigtrain.ops.delta import delta_apply_, delta_pack_
from bigtrain.ops.dropout import bias_dropout_residual
from bigtrain.ops.grad_norm import unscale_
from bigtrain.ops.lamb import lamb_
from bigtrain.ops.library import Library
from bigtrain.ops.lion import lion_
from bigtrain.ops.norms import layer_norm, rms_norm
from bigtrain.ops.optimizer import adamw_, sgd_
from bigtrain.ops.quantize import dequantize_mean, quantize_
from bigtrain.ops.rotary import rotary
from bigtrain.ops.signs import sign_pack_, sign_residual, sign_unpack_mean
from bigtrain.ops.softmax import masked_softmax

library = Library(sys.argv[1])
called = set()
call = library.call
library.call = lambda name, *args: (called.add(name), call(name, *args))
op.library_of = lambda device: library


def new(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


def flat(n, low):
    main, grad, m, v = new(n), new(n, dtype=low), new(n), new(n).abs()
    param, divisor = main.to(low, copy=True), torch.tensor(2.0)
    adamw_(main, grad, m, v, step=1, lr=0.1, param=param, divisor=divisor, kernels="on")
    sgd_(main, grad, m, lr=0.1, momentum=0.9, nesterov=True, param=param, kernels="on")
    lamb_(main, grad, m, v, torch.tensor([0, n // 2, n]), step=1, lr=0.1, kernels="on")
    lion_(main, grad, m, lr=0.1, param=param, divisor=divisor, kernels="on")
    adagrad_(main, grad, v, lr=0.1, param=param, divisor=divisor, kernels="on")
    unscale_([grad, new(n), new(3)], divisor, kernels="on")
    table, rows = new(5, n), torch.tensor([0, 4])
    adagrad_rows_(table, rows, new(2, n, dtype=low), torch.zeros(5), lr=0.1, kernels="on")
    state, scales = torch.zeros(n), torch.zeros(-(-n // 128))
    wire, bits = sign_pack_(grad, state, scales, block=128, kernels="on")
    sign_residual(state, scales, 128, kernels="on")
    sign_unpack_mean(bits[None], wire[None], n, 128, kernels="on")
    for num_bits in (4, 8):
        wire, codes = quantize_(grad, state, num_bits=num_bits, block=64, kernels="on")
        dequantize_mean(codes[None], wire[None], n, num_bits=num_bits, block=64, kernels="on")
        sent = delta_pack_(main, param, num_bits=num_bits, block=64, kernels="on")
        delta_apply_(param, *sent, num_bits=num_bits, block=64, kernels="on")


def model(rows, cols, low):
    x, w = new(rows, cols, dtype=low).requires_grad_(), new(cols, dtype=low).requires_grad_()
    y = layer_norm(x, w, w, residual=x, kernels="on")[0] + rms_norm(x, w, kernels="on")
    y = bias_gelu(y, w, "tanh", kernels="on") + bias_gelu(y, w, "none", kernels="on")
    y = swiglu(y, y, kernels="on")
    y = bias_dropout_residual(y, w, y, 0.3, torch.arange(rows), kernels="on")
    y = y + masked_softmax(y[None, None], causal=True, kernels="on")[0, 0]
    cross_entropy(y, torch.arange(rows) % cols, kernels="on").backward()
    z = new(2, rows, 3, 2 * cols, dtype=low).requires_grad_()
    rotary(z, torch.rand(2, rows, cols), kernels="on").sum().backward()


for low in (torch.float32, torch.bfloat16):
    for n in (1, 7, 1000, 2049):
        flat(n, low)
    for rows, cols in ((1, 1), (3, 7), (5, 33), (2, 300)):
        model(rows, cols, low)
print(" ".join(sorted(called)))
"""


@pytest.mark.timeout(300)
def test_no_access_outside_of_memory() -> None:
    path = build.build_cached(build.SANITIZED)
    asan = subprocess.run(
        [build.compiler_of(build.SANITIZED), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    if not Path(asan).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "LD_PRELOAD": asan, "ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    calls = (build.HERE / "include" / "bt_abi.h").read_text().count("BT_API int bt_")
    assert len(done.stdout.split()) == calls, done.stdout
