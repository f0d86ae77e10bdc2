"""One curve under any layout, through a kill and a resume: the numbers and the picture.

python benchmarks/curves.py [--steps 150] [--picture docs/images/curves.png]

Runs the quickstart on 1 rank, then data parallel, tensor parallel and both on up to 8 ranks, and
once more as dp=2 where all processes are killed with SIGKILL in the middle and the run is resumed
as tp=4. Prints how far the loss of any step is from the run on 1 rank, and compares
the ids of the samples that each step has read.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BIGTRAIN = str(Path(sys.executable).with_name("bigtrain"))


# (dp, tp, sequence parallel): how each run is spread, and the style of its line.
LAYOUTS = {
    "1 rank": (1, 1, False),
    "dp=2": (2, 1, False),
    "dp=4": (4, 1, False),
    "tp=2": (1, 2, False),
    "tp=4, sequence parallel": (1, 4, True),
    "dp=2 x tp=2": (2, 2, False),
    "dp=4 x tp=2, sequence parallel": (4, 2, True),
    "dp=2 x tp=4": (2, 4, False),
}
Spread = tuple[int, int, bool]


def command(folder: Path, spread: Spread, steps: int) -> list[str]:
    dp, tp, sequence = spread
    overrides = [f"run.dir={folder}", f"parallel.dp={dp}", f"parallel.tp={tp}"]
    overrides += [f"parallel.sequence_parallel={str(sequence).lower()}", f"train.steps={steps}"]
    overrides += ["log.sample_ids=true", "checkpoint.every=20", "train.microbatch=8"]
    return [BIGTRAIN, "launch", str(CONFIG), *overrides, "eval.every=0", "eval.generate=0"]


def run(folder: Path, spread: Spread, steps: int, resume: bool = False) -> None:
    options = ["--resume"] if resume else []
    subprocess.run(
        [*command(folder, spread, steps), *options], check=True, stdout=subprocess.DEVNULL
    )


def run_and_kill(folder: Path, spread: Spread, steps: int, at: int) -> None:
    """Start a run and kill the launcher and every rank once step `at` is recorded."""
    process = subprocess.Popen(command(folder, spread, steps), stdout=subprocess.DEVNULL)
    while len(losses(folder)) < at:
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be killed")
        time.sleep(0.05)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    process.kill()
    process.wait()


def losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def samples(folder: Path) -> dict[int, list[int]]:
    read: dict[int, list[int]] = {}
    for path in (folder / "samples").glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            read.setdefault(record["step"], []).extend(record["ids"])
    return {step: sorted(ids) for step, ids in sorted(read.items())}


def draw(curves: dict[str, dict[int, float]], killed_at: int, target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colors = "#dbe5f1 #b5cbe4 #86a9d2 #f3c9a5 #e79a5b #9fd3a8 #57a867 #8a5fb0".split()  # noqa: SIM905
    for index, (name, curve) in enumerate(curves.items()):
        if index < len(colors):  # each thinner than those below it, so that all can be seen
            style = {"color": colors[index], "linewidth": 15 - 1.8 * index}
        else:
            style = {"color": "black", "linewidth": 1, "linestyle": ":"}
        axes.plot(curve.keys(), curve.values(), label=name, **style)
    axes.axvline(killed_at, color="#888888", linewidth=1)
    axes.annotate(
        "kill -9 of all, resumed\nunder another layout", (killed_at + 1, 3.25), fontsize=9
    )
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    steps, killed_at = options.steps, options.steps // 2
    with tempfile.TemporaryDirectory() as name:
        folders = {label: Path(name) / str(index) for index, label in enumerate(LAYOUTS)}
        for label, folder in folders.items():
            run(folder, LAYOUTS[label], steps)
        folder = folders["dp=2, killed, resumed as tp=4"] = Path(name) / "killed"
        run_and_kill(folder, LAYOUTS["dp=2"], steps, killed_at)
        run(folder, LAYOUTS["tp=4, sequence parallel"], steps, resume=True)
        curves = {label: losses(folder) for label, folder in folders.items()}
        reads = {label: samples(folder) for label, folder in folders.items()}
    first = next(iter(curves))
    print("| run | largest difference of a step's loss from 1 rank | samples |")
    print("|---|---|---|")
    for label, curve in curves.items():
        assert list(curve) == list(range(1, steps + 1)), f"{label}: steps are missing or doubled"
        gap = max(abs(curve[step] - loss) for step, loss in curves[first].items())
        same = "the same in every step" if reads[label] == reads[first] else "DIFFERENT"
        print(f"| {label} | {gap:.1e} | {same} |")
    if options.picture:
        draw(curves, killed_at, options.picture)


if __name__ == "__main__":
    main()
