"""A launched run that a hundred random events hit, beside one that none does.

    python benchmarks/chaos.py [EVENTS] [SEED]

Workers and servers are killed, stopped, cut off and slowed down (`--chaos`); those that end come
back. Prints how both runs ended, and what processes are left: none. (What is to happen to a process
that is not there at that step does not happen: of 120 events some 100 do. A round that lacks
workers has fewer tokens, which others read later.)
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

WORKERS, SERVERS = 4, 3
APART, SERVERS_APART = 8, 120  # steps between two events, and between two that servers suffer
LEASE = 2.0

CONFIG: dict[str, Any] = {
    "model": {
        "kind": "gpt",
        "num_layers": 2,
        "hidden_size": 128,
        "num_heads": 4,
        "max_seq_len": 64,
    },
    "data": {"kind": "stdlib", "seq_len": 64},
    "run": {"device": "cpu"},
    "launch": {"threads_per_rank": 1},
    "parallel": {"dp": 1},
    "train": {"global_batch": 32},
    "schedule": {"kind": "constant", "warmup_steps": 20},
    "eval": {"samples": 256},
    "server": {
        "servers": SERVERS,
        "replicas": 2,
        "workers": WORKERS,
        "mode": "sync",
        "lease_seconds": LEASE,
        "restarts": 1000,
    },
    "checkpoint": {"every": 100, "keep_last": 1},
    "log": {"every": 1000},
}


def events_of(count: int, seed: int) -> list[str]:
    """Return random events, of which servers suffer one at a time: each block is on two."""
    draw, found, server_at = random.Random(seed), [], 0
    for number in range(count):
        step = 10 + number * APART
        if step - server_at >= SERVERS_APART:
            who, server_at = f"server={draw.randrange(SERVERS)}", step
        else:
            who = f"worker={draw.randrange(WORKERS)}"
        what = draw.choice(("kill", "stop", "cut", "delay"))
        seconds = draw.choice((0.3, 2 * LEASE))  # shorter or longer than the lease
        more = {"kill": "", "delay": f",seconds={seconds},ms=20"}.get(what, f",seconds={seconds}")
        found.append(f"{what}:{who},step={step}{more}")
    return found


def run(folder: Path, name: str, steps: int, chaos: list[str]) -> tuple[list[dict[str, Any]], str]:
    """Launch a run, and return its records and what it has said."""
    config = {**CONFIG, "run": {"device": "cpu", "dir": str(folder / name)}}
    config["train"] = {**CONFIG["train"], "steps": steps}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "bigtrain"), "launch", str(path)]
    for event in chaos:
        command += ["--chaos", event]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stdout + done.stderr


def left_over(mark: str) -> list[int]:
    """Return processes that have the mark in their environment, but for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def main() -> None:
    count, seed = (int(given) for given in (sys.argv[1:] + ["120", "1"][len(sys.argv) - 1 :])[:2])
    events, steps = events_of(count, seed), 10 + count * APART + 50
    mark = uuid.uuid4().hex
    os.environ["CHAOS_MARK"] = mark
    with tempfile.TemporaryDirectory() as temporary:
        print(
            "| | steps | tokens | last 20 losses | validation loss | drills | started again "
            "| seconds |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for name, chaos in (("calm", []), ("chaos", events)):
            began = time.monotonic()
            records, said = run(Path(temporary), name, steps, chaos)
            losses = [r["loss"] for r in records if "loss" in r]
            validation = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
            mean = statistics.mean(losses[-20:])
            tokens = sum(r["items"] for r in records if "items" in r)
            again = said.count("it is started again")
            print(
                f"| {name} | {len(losses)} | {tokens} | {mean:.4f} | {validation:.4f} | "
                f"{said.count('drill: ')} | {again} | {time.monotonic() - began:.0f} |",
                flush=True,
            )
        time.sleep(2 * LEASE + 1)  # for those who wake what was stopped
        print(f"processes left: {left_over(mark)}")


if __name__ == "__main__":
    main()
