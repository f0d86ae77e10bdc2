"""Does the clock tell the truth? Measured pipeline steps beside the simulator's prediction.

    python benchmarks/pipeline_clock.py --ranks 2 4 --steps 8

Every schedule trains the same GPT on N gloo ranks, one thread each, taking turns step by step in
the same processes. Of each step, every rank records when each action started and stopped. The
prediction takes the mean F, B, I and W of each stage from these records, and the time of a message
from a ping-pong of the same size, and plays the table; no waiting is put in. Measured is the time
from a barrier to the end of the last rank's last action. Prints a Markdown table with the peak
number of activations in flight (measured = the table's, or it stops), and what the executor itself
costs per action, with stages that compute next to nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.models import GPT
from bigtrain.optim import AdamW
from bigtrain.pipeline.layer import Layer
from bigtrain.pipeline.run import Pipeline
from bigtrain.pipeline.schedule import make_table
from bigtrain.pipeline.simulate import Costs, simulate
from bigtrain.pipeline.validate import validate

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v", "dualpipe_v")
VOCAB, SEQ_LEN, LAYERS, HIDDEN, HEADS, MICROBATCH = 4096, 128, 8, 384, 6, 2
WARMUP = 2


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return model(*batch)


def part_of_loss(model: Any, number: int, batch: Any) -> torch.Tensor:
    return loss_of(model, batch)


def virtual(schedule: str) -> int:
    return 2 if schedule == "interleaved" else 1


def train(mesh: Mesh, num_microbatches: int, steps: int, schedules: list[str]) -> dict[str, Any]:
    """Take steps with each schedule in turn; return their records."""
    torch.manual_seed(1234)
    tokens = torch.randint(VOCAB, (MICROBATCH * num_microbatches, SEQ_LEN + 1))
    batches = list(
        zip(tokens[:, :-1].split(MICROBATCH), tokens[:, 1:].split(MICROBATCH), strict=True)
    )
    running: dict[str, tuple[Pipeline, AdamW]] = {}
    for schedule in schedules:
        torch.manual_seed(1234)
        model = GPT(VOCAB, SEQ_LEN, LAYERS, HIDDEN, HEADS, tie_embeddings=False)
        pipeline = build_pipeline(
            model,
            mesh,
            schedule=schedule,
            virtual_stages=virtual(schedule),
            example=batches[0],
            loss_of=loss_of,
        )
        running[schedule] = pipeline, AdamW(pipeline.path.segments(), lr=1e-4)
    records: dict[str, Any] = {schedule: [] for schedule in schedules}
    for _ in range(WARMUP + steps):
        for schedule, (pipeline, optimizer) in running.items():
            pipeline.trace = []
            dist.barrier()
            begin = time.perf_counter()
            pipeline.run(batches, part_of_loss)
            records[schedule].append((time.perf_counter() - begin, pipeline.trace))
            pipeline.path.finish()
            optimizer.step()
            pipeline.path.publish()
    peaks = {schedule: pipeline.peak_in_flight for schedule, (pipeline, _) in running.items()}
    return {
        "records": records,
        "peaks": peaks,
        "transfer": ping_pong(next(iter(running.values()))[0]),
    }


def ping_pong(pipeline: Pipeline, rounds: int = 30) -> float:
    """Return how long a message of activations takes between the first two ranks, in seconds."""
    links, rank = pipeline.links, pipeline.axis.rank
    message = torch.zeros(MICROBATCH, SEQ_LEN, HIDDEN)
    times = []
    dist.barrier()
    for _ in range(rounds):
        begin = time.perf_counter()
        if rank == 0:
            links.send(message, 1, "ping").wait()
            links.receive(message, 1, "pong").wait()
        elif rank == 1:
            links.receive(message, 0, "ping").wait()
            links.send(message, 0, "pong").wait()
        times.append((time.perf_counter() - begin) / 2)
    return statistics.median(times)


def report(num_ranks: int, num_microbatches: int, schedules: list[str], ranks: list[Any]) -> None:
    for schedule in schedules:
        table = make_table(schedule, num_ranks, num_microbatches, virtual(schedule))
        peaks = tuple(rank["peaks"][schedule] for rank in ranks)
        assert peaks == validate(table).peak_in_flight, (schedule, peaks)
        ratios, times = [], []
        runs = list(zip(*(rank["records"][schedule][WARMUP:] for rank in ranks), strict=True))
        for run in runs:
            measured = max(took for took, _ in run)
            costs = costs_of([trace for _, trace in run], table.num_stages, ranks[0]["transfer"])
            ratios.append(float(simulate(table, costs).step_time) / measured)
            times.append((measured, float(simulate(table, costs).step_time)))
        low, middle, high = statistics.quantiles(ratios, n=4)
        measured, predicted = (statistics.median(column) for column in zip(*times, strict=True))
        print(
            f"| {schedule} | {num_ranks} | {num_microbatches} | {1e3 * measured:.0f} "
            f"| {1e3 * predicted:.0f} | **{middle:.3f}** ({low:.3f} to {high:.3f}) "
            f"| {' '.join(map(str, peaks))} |",
            flush=True,
        )


def costs_of(traces: list[Any], num_stages: int, transfer: float) -> Costs:
    """Return the mean time of each kind of action, by stage, of one step."""
    spent: dict[tuple[str, int], list[float]] = {}
    for action, begin, end in (each for trace in traces for each in trace):
        spent.setdefault((action.kind, action.stage), []).append(end - begin)
    mean = {key: statistics.fmean(values) for key, values in spent.items()}

    def of(kind: str, stage: int) -> float:
        return mean.get((kind, stage), 0.0)

    stages = range(num_stages)
    weight = [of("W", s) for s in stages]
    # A table may have whole backwards and split ones; the mean over both is what it plays.
    backward = []
    for s in stages:
        whole, halves = spent.get(("B", s), []), spent.get(("I", s), [])
        split = of("I", s) + of("W", s)
        both = len(whole) + len(halves)
        backward.append((sum(whole) + split * len(halves)) / both)
    return Costs([of("F", s) for s in stages], backward, weight, transfer)


class Light(nn.Module):
    """Two stages that compute next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.ones(4)) for _ in range(2))

    def begin(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.first

    def end(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.second).sum()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.begin(x))

    def pipeline_layers(self) -> list[Layer]:
        return [
            Layer("begin", self.begin, ("first",), ("x",)),
            Layer("end", self.end, ("second",)),
        ]


def overhead(schedule: str, repeats: int = 50) -> tuple[float, float]:
    """Return microseconds per compute action: all of it, and of it what plain torch takes."""
    torch.set_num_threads(1)
    mesh = Mesh.build(Layout(), World(0, 1, 0, 1), torch.device("cpu"))
    batches = [torch.ones(4) for _ in range(32)]
    pipeline = build_pipeline(
        Light(), mesh, schedule=schedule, virtual_stages=virtual(schedule), split=["end"]
    )
    row = make_table(schedule, 1, len(batches), virtual(schedule)).rows[0]
    plain = Light()

    def staged() -> None:
        pipeline.run(batches, lambda model, number, batch: model(batch))
        pipeline.path.finish()

    def directly() -> None:
        for batch in batches:
            plain(batch).backward()

    def least(run: Any) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return 1e6 * statistics.median(times) / len(row)

    return least(staged), least(directly)


def worker(
    rank: int, num: int, meet: str, microbatches: int, steps: int, names: list[str], out: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meet}",
        rank=rank,
        world_size=num,
        timeout=timedelta(minutes=5),
    )
    mesh = Mesh.build(Layout(pp=num), World(rank, num, rank, num), torch.device("cpu"))
    torch.save(train(mesh, microbatches, steps, names), out / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort at exit


def run(num_ranks: int, num_microbatches: int, steps: int, schedules: list[str]) -> None:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        meet = str(Path(folder) / uuid.uuid4().hex)
        args = (num_ranks, meet, num_microbatches, steps, schedules, Path(folder))
        ranks = [context.Process(target=worker, args=(rank, *args)) for rank in range(num_ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(1800)
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
        found = [torch.load(Path(folder) / f"{r}.pt", weights_only=False) for r in range(num_ranks)]
    report(num_ranks, num_microbatches, schedules, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES))
    args = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}\n")
    print(
        "| schedule | ranks | microbatches | measured ms | predicted ms | predicted / measured "
        "| in flight |"
    )
    print("|---|---|---|---|---|---|---|")
    for num_ranks in args.ranks:
        run(num_ranks, args.microbatches, args.steps, args.schedules)
    print("\n| executor | microseconds per action | of these plain torch |\n|---|---|---|")
    for schedule in ("interleaved", "zb_v"):
        staged, plain = overhead(schedule)
        print(f"| {schedule} | {staged:.0f} | {plain:.0f} |")


if __name__ == "__main__":
    main()
