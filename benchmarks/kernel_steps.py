"""A training step with kernels beside the same step in plain torch, on one rank.

python benchmarks/kernel_steps.py [--config configs/quickstart.yaml] [--steps 30] [key=value ...]

Two trainers in one process take turns, step by step, on the same samples from the same seed.
Printed: the median over steps of the ratio of their times, and the largest gap of their losses.
Plain torch is what a machine without a compiler has: the update is its reference, in many passes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import bigtrain
from bigtrain.config.load import load_config
from bigtrain.trainer import Trainer

WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    mesh = bigtrain.init()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for kernels in ("auto", "off"):
            alone = ["parallel.dp=1", "train.global_batch=16", f"run.kernels={kernels}"]
            config = load_config(wanted.config, [*alone, *wanted.overrides], 1)
            trainers[kernels] = Trainer(config, mesh, Path(folder) / kernels)
        compare(trainers, wanted.steps)
    sys.stdout.flush()
    os._exit(0)  # gloo may abort at exit


def compare(trainers: dict[str, Trainer], steps: int) -> None:
    ratios, gaps = [], []
    for step in range(WARMUP + steps):
        seconds, losses = {}, {}
        for kernels in sorted(trainers, reverse=step % 2 == 1):
            begin = time.perf_counter()
            losses[kernels] = trainers[kernels].train_step().loss
            seconds[kernels] = time.perf_counter() - begin
        gaps.append(abs(losses["auto"] - losses["off"]))
        if step >= WARMUP:
            ratios.append(seconds["off"] / seconds["auto"])
    quarters = statistics.quantiles(ratios, n=4)
    print(
        f"time without / with kernels: {statistics.median(ratios):.3f} "
        f"(quartiles {quarters[0]:.3f} to {quarters[2]:.3f}), {steps} steps; "
        f"largest gap of the loss {max(gaps):.1e}"
    )


if __name__ == "__main__":
    main()
