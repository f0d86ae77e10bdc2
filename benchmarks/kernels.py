"""Every kernel beside the machine's copy bandwidth and beside what a user would otherwise call.

python benchmarks/kernels.py [--threads 1] [--library avx512|avx2|baseline] [--device cpu|cuda]
    [--only compression "layer_norm" ...] [--rounds 11] [--mib 16] [--compile] [--reuse-memory]
    [--markdown]

The cases are in kernel_cases.py. Each has one system after the other do the same work on tensors of
its own, `rounds` times round, in a rotating order; a call shorter than 2 ms is repeated until it
takes that long. The first result of every system must be that of ours, or it stops. In every round
the machine also copies 64 MB of fp32 (torch's copy_, on as many threads), so a drift cancels in:

of copy  bytes that an ideal implementation moves / our seconds / bytes per second of the copy,
         which counts what it reads and what it writes; the median over rounds
peer     seconds of the peer / our seconds: the median over rounds (and their range)

In both the last number is of the best time of each: on a busy machine the steadiest one.

Forward is measured as in training: autograd takes notes. Backward is torch.autograd.grad of a graph
that is kept, so it has no forward in it. Our kernels are used even where bigtrain leaves the work
to torch (kernels="on"). --compile adds torch.compile of the peers; on CUDA that is always so, and
Liger is one of the peers if it can be imported. --reuse-memory keeps freed memory in the process,
so that no system waits for the operating system to clear pages for large results (CPU only).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

COPY_BYTES = 2 * 64 * 2**20
SHORTEST = 2e-3  # seconds
TOLERANCE = 0.1  # of the norm of a result: torch sums bf16 gradients of weights to 5 %
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "sve", "bf16")
COLUMNS = ("case", "ours, ms: median (best)", "B / element", "GB/s", "of copy", "peer / ours")

Run = Callable[[], Any]


@dataclass
class Candidate:
    """One system in one case, and how long a call took in each round."""

    name: str
    run: Run
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)


# -- measuring -------------------------------------------------------------------------------------


def clock_cpu(run: Run, repeats: int) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def clock_cuda(run: Run, repeats: int) -> float:
    """Return the seconds of a call, by events in the stream."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def measure(candidates: list[Candidate], rounds: int, clock: Callable[[Run, int], float]) -> None:
    """Fill in the seconds of all candidates, which take turns."""
    for candidate in candidates:
        clock(candidate.run, 1)  # caches, allocators, compilation
        once = max(clock(candidate.run, 1), 1e-7)
        candidate.repeats = max(1, math.ceil(SHORTEST / once))
    for index in range(rounds):
        first = index % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            candidate.seconds.append(clock(candidate.run, candidate.repeats))


def same(result: Any, expected: Any) -> bool:
    """Return whether results, tensors or nested lists of them, agree."""
    import torch

    def flat(value: Any) -> torch.Tensor:
        if isinstance(value, torch.Tensor):
            return value.detach().float().flatten()
        return torch.cat([flat(part) for part in value])

    one, other = flat(result), flat(expected)
    return one.shape == other.shape and bool((one - other).norm() <= TOLERANCE * other.norm())


def candidates_of(case: Any, setting: Any) -> list[Candidate]:
    """Bind our function and the peers of `case` to tensors of their own, and compare results.

    Raises:
        SystemExit: a peer computes something else.
    """
    found, expected = [], None
    for name, function in case.systems(setting).items():
        candidate = Candidate(name, case.bind(function, setting))
        result = candidate.run() if case.compared else None
        if name == "ours":
            expected = result
        elif result is not None and not same(result, expected):
            raise SystemExit(f"{case.name}: {name} computes something else than ours")
        found.append(candidate)
    return found


def copying(device: str) -> Run:
    """Return what copies COPY_BYTES / 2."""
    import torch

    source = torch.ones(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source).fill_(0.0)
    return lambda: target.copy_(source)


# -- the table -------------------------------------------------------------------------------------


def ratios(one: list[float], other: list[float]) -> list[float]:
    return [a / b for a, b in zip(one, other, strict=True)]


def middle_and_range(numbers: list[float], digits: int = 2) -> str:
    low, middle, high = (f"{f(numbers):.{digits}f}" for f in (min, statistics.median, max))
    return f"**{middle}** ({low} to {high}"


def cells(case: Any, elements: int, candidates: list[Candidate]) -> Iterator[str]:
    """Yield a row of the table."""
    ours, *peers, copy = candidates
    moved = case.bytes * elements
    median, best = statistics.median(ours.seconds), min(ours.seconds)
    of_copy = moved / COPY_BYTES * statistics.median(ratios(copy.seconds, ours.seconds))
    yield case.name
    yield f"{median * 1e3:.3f} ({best * 1e3:.3f})"
    yield f"{case.bytes:.4g}"
    yield f"{moved / median / 1e9:.2f}"
    yield f"{of_copy:.2f} ({moved / COPY_BYTES * min(copy.seconds) / best:.2f})"
    yield "; ".join(
        f"{peer.name} {middle_and_range(ratios(peer.seconds, ours.seconds))}, "
        f"{min(peer.seconds) / best:.2f})"
        for peer in peers
    )


def show(row: list[str], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(row) + " |", flush=True)
        return
    widths = (52, 25, 13, 9, 13, 0)
    text = "".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    print(text.replace("**", ""), flush=True)


def machine(options: argparse.Namespace, target: str) -> Iterator[str]:
    """Yield what measured."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    about = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = about.get("flags", about.get("Features", "")).split()
    yield (
        f"{about.get('model name', platform.machine()).strip()}, {os.cpu_count()} core(s), "
        f"{' '.join(flag for flag in FLAGS if flag in flags)}"
    )
    if options.device == "cuda":
        yield f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    yield f"Python {platform.python_version()}, torch {torch.__version__}, library {target}"
    yield f"{options.threads} thread(s), {options.rounds} rounds, {options.mib} Mi elements" + (
        ", memory reused" * options.reuse_memory
    )


# -- running ---------------------------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--library", choices=("avx512", "avx2", "baseline", "neon"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[""], help="groups, or parts of names")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--mib", type=int, default=16, help="Mi elements of flat blocks")
    parser.add_argument("--compile", action="store_true", help="torch.compile of peers, too")
    parser.add_argument("--reuse-memory", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    options.compile |= options.device == "cuda"
    return options


def library(options: argparse.Namespace) -> str:
    """Choose the library for all operations, and return what it is built for.

    Raises:
        SystemExit: there is none.
    """
    import torch

    from bigtrain.kernels import build
    from bigtrain.ops import library, op

    if options.library and options.device == "cpu":
        target = next(t for t in build.cpu_targets() if t.name == f"cpu_{options.library}")
        loaded: Any = library.load(build.build_cached(target), target)
        op.library_of = lambda device: loaded
    else:
        loaded = library.library_of(torch.device(options.device))
    if not isinstance(loaded, library.Library):
        raise SystemExit(f"no library: {loaded or 'bigtrain doctor tells why'}")
    return loaded.target


def keep_memory() -> None:
    """Have malloc take all memory from one heap, and give none back."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
    if not (libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("this malloc cannot be told to keep its memory")


def main() -> None:
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when torch and libraries are loaded
    if options.reuse_memory:
        keep_memory()
    import torch
    from kernel_cases import CASES, Setting

    torch.set_num_threads(options.threads)
    for line in machine(options, library(options)):
        print(line, end="\n\n" if options.markdown else "\n")
    show(list(COLUMNS), options.markdown)
    if options.markdown:
        print("|---" * len(COLUMNS) + "|")
    setting = Setting(options.device, options.mib * 2**20, options.compile)
    copy, copies = copying(options.device), []
    clock = clock_cuda if options.device == "cuda" else clock_cpu
    for case in CASES:
        if not any(wanted == case.group or wanted in case.name for wanted in options.only):
            continue
        candidates = [*candidates_of(case, setting), Candidate("copy", copy)]
        measure(candidates, options.rounds, clock)
        copies += candidates[-1].seconds
        show(list(cells(case, case.elements(setting), candidates)), options.markdown)
    if not copies:
        sys.exit(f"no case is called {' or '.join(options.only)}")
    rates = [COPY_BYTES / seconds / 1e9 for seconds in copies]
    print(f"\ncopy: {middle_and_range(rates, 1)}) GB/s".replace("*", ""))


if __name__ == "__main__":
    main()
