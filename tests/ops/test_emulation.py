"""The emulation of CUDA on the CPU: right kernels run in every order, wrong ones are caught."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bigtrain.kernels import build

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None,
    reason="the emulation of CUDA needs g++ on x86-64",
)

ORDERS = range(4)

# Each kernel stores to `out`, which main() prints, one number a word. `// at:` names a line.
PROGRAM = r"""
#include <cstdio>
#include <string>
#include <vector>
#include "bt_device.cuh"

__global__ void barrier(int *out) {
  __shared__ int turned[64];
  BT_DYN_SHARED(int, dynamic);
  turned[63 - threadIdx.x] = threadIdx.x;
  dynamic[threadIdx.x] = 100 * blockIdx.x;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = turned[threadIdx.x] + dynamic[63 - threadIdx.x];
}

__global__ void no_barrier(int *out) {
  __shared__ int turned[64];
  turned[63 - threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = turned[threadIdx.x];
}

__global__ void unwritten(int *out) {
  __shared__ float fixed[4];
  BT_DYN_SHARED(float, dynamic);
  if (threadIdx.x == 99) fixed[0] = 0;
  out[threadIdx.x] = fixed[threadIdx.x % 4] != fixed[threadIdx.x % 4] &&
                     dynamic[threadIdx.x] != dynamic[threadIdx.x];
}

// Lanes take part in a different number of collectives before they meet again.
__global__ void shuffles(int *out) {
  const int lane = threadIdx.x;
  int value = lane;
  if (lane < 16) value = __shfl_xor_sync(0xffffu, value, 1);
  int sum = __shfl_sync(~0u, value, 3);              // 2
  sum += 10 * __shfl_xor_sync(~0u, lane, 31);        // 31 - lane
  sum += 1000 * __shfl_down_sync(~0u, lane, 1, 8);   // the next of eight; the last keeps its own
  sum += 100000 * __shfl_up_sync(~0u, lane, 2, 16);  // two before, of sixteen
  out[lane] = sum;
}

__global__ void votes(int *out) {
  const int lane = threadIdx.x;
  out[lane] = lane < 4 ? __ballot_sync(0xfu, lane != 2) : __ballot_sync(~0xfu, lane == 31) >> 31;
  out[lane] += 100 * __any_sync(~0u, lane == 9) + 1000 * __all_sync(~0u, lane < 32) +
               10000 * __any_sync(~0u, lane == 32) + 10000 * __all_sync(~0u, lane > 0);
}

__global__ void sums(double *out, const float *x) {
  out[threadIdx.x] = block_sum(double(x[threadIdx.x])) + 1e6 * block_max(x[threadIdx.x], 0.0f);
}

__global__ void atomics(int *out) {
  atomicAdd(&out[0], 1);
  atomicMax(&out[1], int(blockIdx.x * blockDim.x + threadIdx.x));
}

__global__ void early_exit(int *out) {
  __shared__ int seen[64];
  if (threadIdx.x >= 40) return;
  seen[39 - threadIdx.x] = threadIdx.x;
  __syncthreads();
  out[threadIdx.x] = seen[threadIdx.x] + __popc(__ballot_sync(~0u, 1));
}

// Thread 32 is alone in its warp: the lanes beside it are not waited for, and give NaN.
__global__ void thirty_three(int *out) {
  __shared__ int votes[2];
  const int lane = threadIdx.x % 32;
  const unsigned there = __ballot_sync(~0u, 1);
  if (lane == 0) votes[threadIdx.x / 32] = __popc(there);
  __syncthreads();
  const float beside = __shfl_xor_sync(~0u, 1.0f, 1);
  out[threadIdx.x] = 100 * votes[0] + votes[1] + 10000 * (beside != beside);
}

__global__ void divergent(int *out) {
  if (threadIdx.x < 32) __syncthreads();  // at: one branch
  else __syncthreads();  // at: other branch
  out[threadIdx.x] = 1;
}

__global__ void deadlock(int *out) {
  if (threadIdx.x == 5) __syncthreads();  // at: a barrier
  out[threadIdx.x] = __shfl_sync(~0u, 1, 0);  // at: a shuffle
}

__global__ void two_collectives(int *out) {
  if (threadIdx.x < 8) out[0] = __shfl_sync(~0u, 1, 0);  // at: a collective
  else out[1] = __shfl_sync(~0u, 1, 0);  // at: another collective
}

__global__ void not_in_mask(int *out) {
  out[threadIdx.x] = __shfl_sync(0xffu, 1, 0);  // at: the mask
}

__global__ void too_far(int *out) {
  out[threadIdx.x + 1] = 1;  // at: the store
}

__global__ void too_far_shared(int *out) {
  BT_DYN_SHARED(int, dynamic);
  dynamic[threadIdx.x + 1] = 1;  // at: the shared store
  out[threadIdx.x] = 1;
}

template <typename T> void print(const T *out, int count) {
  for (int i = 0; i < count; i++) printf("%.17g ", double(out[i]));
}

int main(int, char **argv) {
  const std::string name = argv[1];
  std::vector<int> memory(128);
  int *const out = memory.data();
#define RUN(kernel, grid, threads, shared, count)           \
  if (name == #kernel) {                                    \
    BT_LAUNCH(kernel, grid, threads, shared, nullptr, out); \
    printf("%d ", int(cudaGetLastError()));                 \
    print(out, count);                                      \
  }
  RUN(barrier, 2, 64, 64 * sizeof(int), 128)
  RUN(no_barrier, 1, 64, 0, 64)
  RUN(unwritten, 3, 32, 32 * sizeof(float), 32)
  RUN(shuffles, 1, 32, 0, 32)
  RUN(votes, 1, 32, 0, 32)
  RUN(atomics, 7, 50, 0, 2)
  RUN(early_exit, 1, 64, 0, 64)
  RUN(thirty_three, 1, 33, 0, 33)
  RUN(divergent, 1, 64, 0, 64)
  RUN(deadlock, 1, 32, 0, 32)
  RUN(two_collectives, 1, 32, 0, 2)
  RUN(not_in_mask, 1, 32, 0, 32)
  RUN(too_far, 1, 128, 0, 0)
  RUN(too_far_shared, 1, 32, 32 * sizeof(int), 0)
  if (name == "sums") {
    float x[256];
    double sum[256];
    for (int i = 0; i < 256; i++) x[i] = i;
    BT_LAUNCH(sums, 1, 256, 0, nullptr, sum, x);
    print(sum, 256);
  }
  if (name == "impossible") {
    BT_LAUNCH(barrier, 1, 1025, 0, nullptr, out);
    printf("%d ", int(cudaGetLastError()));
    printf("%d ", int(cudaGetLastError()));
    BT_LAUNCH(barrier, 1, 64, 64 * 1024, nullptr, out);
    printf("%d ", int(cudaGetLastError()));
    cudaFuncSetAttribute(barrier, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 * 1024);
    BT_LAUNCH(barrier, 1, 64, 64 * 1024, nullptr, out);
    printf("%d ", int(cudaGetLastError()));
  }
  if (name == "halves")
    for (const float x : {1.0f + 0x1p-8f, 1.0f + 0x3p-8f, 0x1p-130f, 0x1.fep127f, 0x1.ffp127f,
                          1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 0x1p-24f, 65519.0f, 65520.0f})
      printf("%a %a ", rounded<bf16>(x), rounded<fp16>(x));
}
"""


def compiled(folder: Path, *flags: str) -> Path:
    source, program = folder / "program.cu", folder / "program"
    source.write_text(PROGRAM)
    command = ["g++", "-x", "c++", "-std=c++17", "-g1", "-DCUDA_ON_CPU", "-Wall", *flags]
    command += [
        f"-I{build.HERE / 'include'}",
        "-Wno-unknown-pragmas",
        str(source),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("emulation"), "-O1", "-fopenmp")


def run(program: Path, kernel: str, order: int = 0) -> subprocess.CompletedProcess[str]:
    """Run one kernel; where turns are taken in `order`."""
    environ = {**os.environ, "CUDA_ON_CPU_ORDER": str(order), "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [str(program), kernel], env=environ, capture_output=True, text=True, timeout=60
    )


def numbers(program: Path, kernel: str, order: int = 0) -> list[float]:
    done = run(program, kernel, order)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def line_of(mark: str) -> int:
    """Return the number of the line that the program marks with `// at: mark`."""
    lines = PROGRAM.splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"// at: {mark}"))


@pytest.mark.parametrize("order", ORDERS)
def test_right_kernels(program: Path, order: int) -> None:
    """Barriers, shared memory, collectives and atomics give what CUDA gives, in every order."""
    block = [63 - i for i in range(64)]
    assert numbers(program, "barrier", order) == [0, *block, *(100 + x for x in block)]

    def shuffled(i: int) -> int:
        down = i if i % 8 == 7 else i + 1
        up = i if i % 16 < 2 else i - 2
        return 2 + 10 * (31 - i) + 1000 * down + 100000 * up

    assert numbers(program, "shuffles", order) == [0, *map(shuffled, range(32))]
    assert numbers(program, "votes", order) == [0, *[1100 + 0b1011] * 4, *[1100 + 1] * 28]
    assert numbers(program, "sums", order) == [255e6 + 255 * 128] * 256
    assert numbers(program, "atomics", order) == [0, 350, 349]


@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_are_not_there(program: Path, order: int) -> None:
    """Threads that have returned, or never were, are not waited for, as on hardware."""
    counts = [32] * 32 + [8] * 8 + [0] * 24
    places = [39 - i for i in range(40)] + [0] * 24
    expected = [a + b for a, b in zip(counts, places, strict=True)]
    assert numbers(program, "early_exit", order) == [0, *expected]
    assert numbers(program, "thirty_three", order) == [0, *[3201] * 32, 13201]


def test_missing_barrier_shows(program: Path) -> None:
    """Without __syncthreads the result is wrong in some order, which is why tests run in all."""
    right = [0, *(63 - i for i in range(64))]
    assert any(numbers(program, "no_barrier", order) != right for order in ORDERS)


def test_unwritten_shared_memory_is_nan(program: Path) -> None:
    assert numbers(program, "unwritten") == [0, *[1] * 32]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("kernel", "says", "lines"),
    [
        ("divergent", "divergent __syncthreads", ["one branch", "other branch"]),
        ("deadlock", "deadlock", ["a barrier", "a shuffle"]),
        ("two_collectives", "different collectives", ["a collective", "another collective"]),
        ("not_in_mask", "not in the mask", ["the mask"]),
    ],
)
def test_wrong_meetings_abort(
    program: Path, kernel: str, says: str, lines: list[str], order: int
) -> None:
    """What hardware hangs on, or leaves undefined, ends the program and names the lines."""
    done = run(program, kernel, order)
    assert done.returncode < 0
    assert says in done.stderr
    named = {int(number) for number in re.findall(r"program\.cu:(\d+)", done.stderr)}
    assert named == {line_of(line) for line in lines}


def test_impossible_launch_is_an_error(program: Path) -> None:
    """Too many threads, or more shared memory than was asked for; an error is read once."""
    assert numbers(program, "impossible") == [9, 0, 1, 0]


def test_halves_are_rounded_to_nearest_even(program: Path) -> None:
    torch = pytest.importorskip("torch")
    said = [float.fromhex(word) for word in run(program, "halves").stdout.split()]
    ones = [2**-8, 3 * 2**-8, None, None, None, 2**-11, 3 * 2**-11, None, None, None]
    large = [2.0**-130, 1.9921875 * 2.0**127, 1.99609375 * 2.0**127, 2.0**-24, 65519.0, 65520.0]
    rest = iter(large)
    given = torch.tensor([1 + x if x is not None else next(rest) for x in ones])
    halves = torch.stack([given.bfloat16().float(), given.half().float()], 1)
    assert said == halves.flatten().tolist()


def test_stores_out_of_bounds_are_named(tmp_path: Path) -> None:
    """The address sanitizer names the line of the kernel, in global and in shared memory."""
    program = compiled(tmp_path, "-O1", "-fsanitize=address")
    for kernel, mark in (("too_far", "the store"), ("too_far_shared", "the shared store")):
        done = run(program, kernel)
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr
        assert f"program.cu:{line_of(mark)}" in done.stderr
    assert run(program, "barrier").returncode == 0
