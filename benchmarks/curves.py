"""One curve under any number of ranks, through a kill and a resume: the numbers and the picture.

python benchmarks/curves.py [--steps 150] [--picture docs/images/curves.png]

Runs the quickstart on 1, 2 and 4 ranks, and once more on 2 ranks where all processes are killed
with SIGKILL in the middle and the run is resumed on 4. Prints how far the loss of any step is from
the run on 1 rank, and compares the ids of the samples that each step has read.
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


def command(folder: Path, ranks: int, steps: int) -> list[str]:
    overrides = [f"run.dir={folder}", f"parallel.dp={ranks}", f"train.steps={steps}"]
    overrides += ["log.sample_ids=true", "checkpoint.every=20", "train.microbatch=8"]
    return [BIGTRAIN, "launch", str(CONFIG), *overrides, "eval.every=0", "eval.generate=0"]


def run(folder: Path, ranks: int, steps: int, resume: bool = False) -> None:
    options = ["--resume"] if resume else []
    subprocess.run(
        [*command(folder, ranks, steps), *options], check=True, stdout=subprocess.DEVNULL
    )


def run_and_kill(folder: Path, ranks: int, steps: int, at: int) -> None:
    """Start a run and kill the launcher and every rank once step `at` is recorded."""
    process = subprocess.Popen(command(folder, ranks, steps), stdout=subprocess.DEVNULL)
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
    styles = [
        ("#9db8d9", "-", 6),
        ("#1f4e8c", "-", 2.5),
        ("#c8501e", "--", 1.5),
        ("black", ":", 1.5),
    ]
    for (name, curve), (color, style, width) in zip(curves.items(), styles, strict=True):
        axes.plot(curve.keys(), curve.values(), style, color=color, linewidth=width, label=name)
    axes.axvline(killed_at, color="#888888", linewidth=1)
    axes.annotate("kill -9 of all, resumed\non twice the ranks", (killed_at + 1, 4.5), fontsize=9)
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
        folders = {f"{ranks} rank(s)": Path(name) / str(ranks) for ranks in (1, 2, 4)}
        for ranks, folder in zip((1, 2, 4), folders.values(), strict=True):
            run(folder, ranks, steps)
        folder = folders["2 ranks, killed, resumed on 4"] = Path(name) / "killed"
        run_and_kill(folder, 2, steps, killed_at)
        run(folder, 4, steps, resume=True)
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
