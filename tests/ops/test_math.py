"""The vector functions of bt_math.h, in each instruction set, against fp64."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bigtrain.kernels import build

TARGETS = [target for target in build.cpu_targets() if build.runs_here(target)]
SOURCE = """
#include "bt_math.h"
template <class Function> static void apply(int64_t n, const float *x, float *y, Function f) {
  bt::vectors(0, n, [=](int64_t i, auto lanes) {
    bt::store(y + i, f(bt::load(x + i, lanes)), lanes);
  });
}
#define TEST(name) extern "C" __attribute__((visibility("default"))) \\
  void test_##name(int64_t n, const float *x, float *y) { \\
    apply(n, x, y, [](bt::F v) { return bt::name(v); }); \\
  }
TEST(exp) TEST(log) TEST(tanh) TEST(erf) TEST(sigmoid)
"""
EXACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.special.erf,
    "sigmoid": torch.sigmoid,
}
MOST_ULP = {"exp": 1.5, "log": 1.5, "tanh": 2.0, "erf": 2.0, "sigmoid": 3.0}


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: target.name)
def functions(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, np.ndarray], np.ndarray]:
    """function(name, x) of one instruction set, compiled as the kernels of the model are."""
    target: build.Target = request.param
    folder = tmp_path_factory.mktemp(target.name)
    source, library = folder / "functions.cpp", folder / "functions.so"
    source.write_text(SOURCE)
    flags = target.flags_of(Path("model") / source.name)
    command = [build.compiler_of(target), *flags, "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    handle = ctypes.CDLL(str(library))

    def call(name: str, x: np.ndarray) -> np.ndarray:
        y = np.full_like(x, 12345.0)
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (x, y)]
        handle[f"test_{name}"](ctypes.c_int64(x.size), *pointers)
        return y

    return call


def exact(name: str, x: np.ndarray) -> np.ndarray:
    return EXACT[name](torch.from_numpy(x).double()).numpy()


def error_in_ulp(y: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distances in units of the last place of fp32; 0 where both overflow, or both are NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = wanted.astype(np.float32)
        unit = np.spacing(np.minimum(np.abs(nearest), np.finfo(np.float32).max))
        distance = np.abs(y.astype(np.float64) - wanted) / unit
    same = (y == nearest) | (np.isnan(y) & np.isnan(nearest))
    return np.where(same, np.minimum(np.nan_to_num(distance), 0.5), distance)


def check(name: str, x: np.ndarray, y: np.ndarray) -> None:
    error = error_in_ulp(y, exact(name, x))
    assert not np.isnan(error).any(), x[np.isnan(error)][:5]
    worst = int(error.argmax())
    assert error[worst] <= MOST_ULP[name], f"{error[worst]} ulp: {name}({x[worst]}) = {y[worst]}"


@pytest.mark.parametrize("name", EXACT)
def test_every_exponent(functions: Callable[..., np.ndarray], name: str) -> None:
    """All signs and exponents, every 3001st number: infinities, NaN, denormals, zeros."""
    x = np.arange(0, 2**32, 3001, dtype=np.uint32).view(np.float32)
    check(name, x, functions(name, x))


@pytest.mark.parametrize("name", EXACT)
def test_where_it_bends(functions: Callable[..., np.ndarray], name: str) -> None:
    """Dense where functions change their form, overflow or underflow."""
    places = [
        0.0,
        0.625,
        0.921875,
        1.0,
        2**0.5,
        0.5**0.5,
        4.0,
        9.0,
        16.7,
        44.0,
        87.34,
        88.7228,
        103.97,
    ]
    dense = [place + np.linspace(-0.05, 0.05, 40_001) for place in places]
    x = np.concatenate([*dense, *(-d for d in dense), np.linspace(-20, 20, 400_001)])
    check(name, x.astype(np.float32), functions(name, x.astype(np.float32)))


@pytest.mark.parametrize("name", EXACT)
def test_special_values(functions: Callable[..., np.ndarray], name: str) -> None:
    """To the bit, wherever C says what it is."""
    inf, nan, tiny = np.inf, np.nan, np.float32(1e-45)
    pairs = {
        "exp": [(-inf, 0), (inf, inf), (0, 1), (-104, 0), (-103.5, tiny), (89, inf), (3e38, inf)],
        "log": [(-inf, nan), (inf, inf), (0, -inf), (-0.0, -inf), (-1, nan), (-tiny, nan), (1, 0)],
        "tanh": [(-inf, -1), (inf, 1), (0, 0), (tiny, tiny), (-tiny, -tiny), (3e38, 1), (-10, -1)],
        "erf": [(-inf, -1), (inf, 1), (0, 0), (3e38, 1), (-4.5, -1)],
        "sigmoid": [(-inf, 0), (inf, 1), (0, 0.5), (3e38, 1), (-3e38, 0)],
    }[name]
    x, wanted = np.array([*pairs, (nan, nan), (-nan, nan)], dtype=np.float32).T.copy()
    np.testing.assert_array_equal(functions(name, x.copy()), wanted)
    if name in ("tanh", "erf"):
        assert np.signbit(functions(name, np.array([-0.0], dtype=np.float32)))[0]


def test_lanes_are_independent(functions: Callable[..., np.ndarray]) -> None:
    """Each length, and one NaN, leave the others as they are; nothing is written behind the end."""
    x = np.linspace(-3, 3, 67).astype(np.float32)
    whole = functions("exp", x)
    for n in range(67):
        np.testing.assert_array_equal(functions("exp", x[:n].copy()), whole[:n])
    x[5] = np.nan
    y = functions("exp", x)
    assert np.isnan(y[5])
    np.testing.assert_array_equal(np.delete(y, 5), np.delete(whole, 5))
