"""Seconds from the command to the first step on two Slurm nodes, beside bare srun of the same.

    python benchmarks/launch.py [rounds]

Brings up a real Slurm on virtual nodes of this machine (needs root and `make slurm`), holds
an allocation of two nodes, and starts two ranks on each in turn: by `bigtrain launch`, and by srun
with a task for each rank. Both train the same; the first step is there when its record is.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

from real_slurm import Slurm, why_no_slurm
from runs import BIN, Bench
from virtual_nodes import MANAGER

RUN = ("config.yaml", "parallel.dp=4", "launch.processes=2", "train.steps=2", "eval.samples=8")
WAYS = {
    "bigtrain launch": ("bigtrain", "launch", *RUN),
    "bare srun": (
        *("srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--overlap"),
        *(sys.executable, "-m", "bigtrain.train", *RUN),
    ),
}


def first_step(slurm: Slurm, folder: Path, command: tuple[str, ...], name: str) -> float:
    """Return the seconds until the run `name` has recorded its first step."""
    record = folder / name / "metrics.jsonl"
    begin = time.perf_counter()
    with subprocess.Popen(
        [*slurm.nodes.inside(MANAGER, folder), *command, f"run.dir={name}"],
        env=os.environ | slurm.env | allocation(slurm),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        while not (record.exists() and record.stat().st_size):
            if process.poll() not in (None, 0):
                raise SystemExit(f"{command}: {process.communicate()[1].decode()}")
            time.sleep(0.002)
        seconds = time.perf_counter() - begin
        if process.wait(60):
            raise SystemExit(f"{command}: exit code {process.returncode}")
    return seconds


def allocation(slurm: Slurm) -> dict[str, str]:
    """Return the environment of the allocation, as salloc gives it."""
    number = slurm.ask("squeue", "-h", "-o", "%i")
    return {
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": slurm.job(int(number))["NodeList"],
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_CPUS_PER_NODE": "4(x2)",
    }


def main() -> None:
    """Measure in turn, and print medians and their ratio."""
    if reason := why_no_slurm():
        raise SystemExit(reason)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    os.environ["PATH"] = f"{BIN}:{os.environ['PATH']}"
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        bench = Bench(work)
        slurm = Slurm(work / "slurm", 2)
        try:
            slurm.ask("sbatch", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 3000")
            while slurm.ask("squeue", "-h", "-o", "%T") != "RUNNING":
                time.sleep(0.05)
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(rounds + 1):
                for way, command in WAYS.items():
                    seconds = first_step(slurm, work, command, f"{way[:2]}-{number}")
                    if number:  # the first round fills caches
                        found[way].append(seconds)
        finally:
            slurm.cancel_all()
            slurm.close()
            bench.close()
    for way, times in found.items():
        middle = statistics.median(times)
        print(f"{way:16} {middle:5.2f} s  ({min(times):.2f} to {max(times):.2f})")
    ours, theirs = (statistics.median(times) for times in found.values())
    print(f"ratio            {ours / theirs:5.2f}")


if __name__ == "__main__":
    main()
