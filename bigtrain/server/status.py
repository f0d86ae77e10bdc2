"""How a run with servers is, as its board tells it. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import BigtrainError

OLD_SECONDS = 5.0  # after which what a status says may not hold any more


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Write it, so that a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    hidden = path.with_suffix(".next")
    hidden.write_text(json.dumps({"time": time.time(), **status}))
    os.replace(hidden, path)


def read_status(path: Path) -> dict[str, Any]:
    """Return what the board of a run has told last.

    Raises:
        BigtrainError: there is nothing, or no status.
    """
    try:
        status = json.loads(path.read_text())
        if not isinstance(status, dict) or "version" not in status:
            raise ValueError("it is no status")
    except (OSError, ValueError) as error:
        raise BigtrainError(
            f"there is no status in {path}",
            why=str(error),
            mend="give the folder of a run with servers (its run.dir), once its first round began",
        ) from error
    return status


def status_lines(status: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yield how the run is, for people."""
    age = now - status["time"]
    over = f", {age:.0f} s ago: it has ended, or hangs" if age > OLD_SECONDS else ""
    outcome = status.get("outcome")
    parts = outcome["parts"] if outcome is not None else []
    speed = status["rounds_per_second"] * len(parts) * status["samples"]
    yield (
        f"round {status['version']} ({status['mode']}), {status['rounds_per_second']:.2f} "
        f"rounds/s, {speed:,.0f} samples/s{over}"
    )
    if outcome is not None:
        workers = ", ".join(str(part[0]) for part in parts)
        yield (
            f"last round: workers {workers}; parameters at most {outcome['staleness']} versions "
            f"old ({status['most_stale']} in this run)"
        )
    yield f"shares of the data that were given to another worker: {status['num_returned']}"
    for server, lives in status["servers"].items():
        board = ", keeps the board" if int(server) == status["board"] else ""
        yield f"server {server}  {'lives' if lives else 'is gone'}{board}"
    for worker, about in status["workers"].items():
        again = f", started again {about['incarnation']} times" * (about["incarnation"] > 0)
        does = "computes" if about["computes"] else "waits"
        since = f"began {about['seconds']:.1f} s ago"
        awaited = status.get("waits_for", {}).get(worker)
        wait = f"; others wait for its part of {awaited}" if awaited else ""
        yield f"worker {worker}  round {about['round']}, {does}, {since}{again}{wait}"
    for worker in range(status["num_workers"]):
        if str(worker) not in status["workers"]:
            yield f"worker {worker}  is not there"
    held = status["held_bytes"] / 1e6
    yield f"server {status['board']} holds {held:,.1f} MB, beside gradients that wait"
