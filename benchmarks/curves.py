"""One curve under any layout, through a kill and a resume: the numbers and the picture.

python benchmarks/curves.py [--steps 150] [--picture docs/images/curves.png]

Runs the quickstart on 1 rank, then data, tensor and pipeline parallel and mixed on up to 8 ranks,
and again as dp=2 and as pp=4, where all processes are killed with SIGKILL in the middle and the run
is resumed as tp=4 and as tp=2. Prints how far the loss of any step is from the run on 1 rank, and
compares the ids of the samples that each step has read.
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
from typing import NamedTuple

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BIGTRAIN = str(Path(sys.executable).with_name("bigtrain"))


class Spread(NamedTuple):
    """How a run is spread over ranks."""

    dp: int = 1
    tp: int = 1
    sequence: bool = False
    pp: int = 1
    schedule: str = "1f1b"


LAYOUTS = {
    "1 rank": Spread(),
    "dp=2": Spread(dp=2),
    "dp=4": Spread(dp=4),
    "tp=2": Spread(tp=2),
    "tp=4, sequence parallel": Spread(tp=4, sequence=True),
    "dp=2 x tp=2": Spread(dp=2, tp=2),
    "dp=4 x tp=2, sequence parallel": Spread(dp=4, tp=2, sequence=True),
    "dp=2 x tp=4": Spread(dp=2, tp=4),
    "pp=2": Spread(pp=2),
    "pp=4": Spread(pp=4),
    "pp=2 x dp=2, zb_v": Spread(pp=2, dp=2, schedule="zb_v"),
    "pp=2 x tp=2": Spread(pp=2, tp=2),
}
# All are killed in the middle, and go on as something else.
KILLED = {
    "dp=2, killed, resumed as tp=4": ("dp=2", "tp=4, sequence parallel"),
    "pp=4, killed, resumed as tp=2": ("pp=4", "tp=2"),
}


def command(folder: Path, spread: Spread, steps: int) -> list[str]:
    overrides = [f"run.dir={folder}", f"parallel.pp={spread.pp}", f"parallel.dp={spread.dp}"]
    overrides += [f"parallel.tp={spread.tp}", f"pipeline.schedule={spread.schedule}"]
    overrides += [f"parallel.sequence_parallel={str(spread.sequence).lower()}"]
    overrides += [f"train.steps={steps}", "train.microbatch=8"]
    overrides += ["log.sample_ids=true", f"checkpoint.every={max(1, min(20, steps // 4))}"]
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

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    colors = "#dbe5f1 #b5cbe4 #86a9d2 #f3c9a5 #e79a5b #9fd3a8 #57a867 #8a5fb0".split()  # noqa: SIM905
    colors += "#f2b8c0 #dd7684 #b8374a #6e1423".split()  # noqa: SIM905
    assert len(colors) == len(LAYOUTS)
    for index, (name, curve) in enumerate(curves.items()):
        if index < len(colors):  # each thinner than those below it, so that all can be seen
            style = {"color": colors[index], "linewidth": 15 - 1.2 * index}
        else:
            color, line, width = (("black", "-", 1.8), ("#ffd84d", ":", 1.2))[index - len(colors)]
            style = {"color": color, "linewidth": width, "linestyle": line}
        axes.plot(curve.keys(), curve.values(), label=name, **style)
    axes.axvline(killed_at, color="#888888", linewidth=1)
    axes.annotate(
        "kill -9 of all, resumed\nunder another layout",
        (killed_at - 1, 0.04),
        xycoords=("data", "axes fraction"),
        horizontalalignment="right",
        fontsize=9,
    )
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
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
        for label, (before, after) in KILLED.items():
            folder = folders[label] = Path(name) / f"killed-{before}"
            run_and_kill(folder, LAYOUTS[before], steps, killed_at)
            run(folder, LAYOUTS[after], steps, resume=True)
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
