"""Runs as real processes: start, wait for what they do, look at what they leave, clean up.

All processes of a `Bench` carry a mark in their environment, which ranks and what they start
inherit; so /proc tells what is alive, and nothing survives a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PATIENCE = 120.0  # seconds that any wait may take before the test fails
GONE = 5.0  # seconds within which a failed or killed run has no process left

# What tests/conftest.py or a shell may have set, and a user has not.
NOT_PASSED_ON = ("BIGTRAIN_", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "COLUMNS", "LINES")

# What a run that takes about two seconds is.
BASE: dict[str, Any] = {
    "run": {"dir": "run"},
    "model": {
        "kind": "gpt",
        "num_layers": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "max_seq_len": 32,
    },
    "data": {
        "kind": "text",
        "files": ["text/*.txt"],
        "seq_len": 32,
        "validation_fraction": 0.2,
        "cache_dir": "cache",
    },
    "parallel": {"dp": 2},
    "train": {"steps": 8, "global_batch": 8},
    "eval": {"samples": 16},
    "log": {"every": 1},
}

SLOW = ("model.factory=parts:model", "model.args={slow: 0.05}")
"""Overrides for steps of about 60 ms, so that a test can act in the middle of a run."""


def wait_for(what: str, condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Return the first true value of `condition()`; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain for: {what}"
        time.sleep(0.004)
    return value


@dataclass
class RunFiles:
    """What a run leaves in its folder; it was started in `cwd`."""

    cwd: Path
    folder: Path

    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, without a last line that is being written."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        text = path.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def losses(self) -> list[float]:
        """Return the training losses, step by step; every step is there once."""
        records = [r for r in self.metrics() if "loss" in r]
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        return [r["loss"] for r in records]

    def validation_losses(self) -> dict[int, float]:
        return {r["step"]: r["validation_loss"] for r in self.metrics() if "validation_loss" in r}

    def sample_ids(self) -> dict[int, list[int]]:
        """Return the sample ids of each step, over all ranks, sorted; no rank has a step twice."""
        ids: dict[int, list[int]] = {}
        for path in (self.folder / "samples").glob("rank-*.jsonl"):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            steps = [record["step"] for record in records]
            assert len(set(steps)) == len(steps), f"{path} has a step twice"
            for record in records:
                ids.setdefault(record["step"], []).extend(record["ids"])
        return {step: sorted(some) for step, some in sorted(ids.items())}

    def checkpoints(self) -> list[str]:
        """Return the names of what a user would take for a checkpoint, oldest first."""
        return sorted(p.name for p in (self.folder / "checkpoints").glob("step-*"))

    def verify(self) -> str:
        """Check all checkpoints with `bigtrain ckpt verify`; return what it says."""
        done = subprocess.run(
            [BIN / "bigtrain", "ckpt", "verify", self.folder],
            cwd=self.cwd,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass
class Run(RunFiles):
    """A launcher (or torchrun) that was started, and the folder it works in."""

    process: subprocess.Popen
    mark: str
    out_path: Path
    err_path: Path

    # -- while it runs -------------------------------------------------------------------------

    def ranks(self) -> dict[int, int]:
        """Return the process id of each live rank, without the loader processes of ranks."""
        found = {}
        mine = marked(self.mark)
        ranks = {pid for pid, env in mine.items() if "RANK" in env and pid != self.process.pid}
        for pid in ranks:
            if parent(pid) not in ranks:
                found[int(mine[pid]["RANK"])] = pid
        return found

    def wait_ranks(self, count: int) -> dict[int, int]:
        """Return the process ids of `count` ranks once they have been started."""
        wait_for(f"{count} ranks", lambda: len(self.ranks()) == count or self.ended())
        return self.ranks()

    def wait_step(self, step: int) -> None:
        """Return once metrics.jsonl has the record of `step`."""

        def there() -> bool:
            return any(r["step"] >= step for r in self.metrics()) or self.ended()

        wait_for(f"step {step}", there)

    def wait_path(self, pattern: str) -> None:
        """Return once something in the working folder matches the glob `pattern`."""
        wait_for(pattern, lambda: any(self.cwd.glob(pattern)) or self.ended())

    def wait_library(self, pid: int, name: str, seconds: float = PATIENCE) -> None:
        """Return once process `pid` has a library of this name in its memory."""

        def there() -> bool:
            with contextlib.suppress(OSError):
                return name in Path(f"/proc/{pid}/maps").read_text()
            return False

        wait_for(f"{name} in process {pid}", there, seconds)

    def ended(self) -> bool:
        return self.process.poll() is not None

    def send(self, number: int) -> None:
        """Send a signal to the launcher alone."""
        self.process.send_signal(number)

    def kill_all(self) -> None:
        """SIGKILL to all ranks and the launcher, as when the machine loses power."""
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()
        self.wait_gone()

    def wait(self, seconds: float = PATIENCE) -> int:
        """Return the exit code of the launcher, as a shell shows it."""
        code = self.process.wait(seconds)
        return code if code >= 0 else 128 - code

    def wait_gone(self, seconds: float = GONE) -> None:
        """Return once no process of the run is left."""
        wait_for("no process left", lambda: not marked(self.mark), seconds)

    # -- what it leaves ------------------------------------------------------------------------

    @property
    def out(self) -> str:
        return self.out_path.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(encoding="utf-8", errors="replace")

    @property
    def shown(self) -> str:
        """All that the screen showed, for the messages of assertions."""
        return f"--- stdout\n{self.out}\n--- stderr\n{self.err}"

    def assert_told(self, *words: str) -> None:
        """The launcher ended with one error, which has these words, and nobody saw a traceback."""
        assert self.process.returncode != 0
        assert len(re.findall(r"^error: ", self.err, re.MULTILINE)) == 1, self.shown
        message = self.err[self.err.index("error: ") :]
        for word in words:
            assert word in message, self.shown
        assert "Traceback" not in self.out + self.err, self.shown

    def assert_clean(self) -> None:
        """No traceback at the user, no process left, every checkpoint whole."""
        assert "Traceback" not in self.out + self.err, self.shown
        self.wait_gone()
        if self.checkpoints():
            self.verify()


class Bench:
    """A working folder with text to train on, a config, and the processes started there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.mark = uuid.uuid4().hex
        self.num_runs = 0
        make_text(path / "text")
        (path / "config.yaml").write_text(yaml.safe_dump(BASE))

    def start(
        self,
        *overrides: str,
        resume: bool = False,
        restart: bool = False,
        config: str = "config.yaml",
        command: tuple[str, ...] = ("bigtrain", "launch"),
        **popen: Any,
    ) -> Run:
        """Start `bigtrain launch config.yaml` with these overrides and return at once.

        The config's run.dir is `run`, unless an override says `run.dir=...`.
        """
        options = ["--resume"] * resume + ["--restart"] * restart
        self.num_runs += 1
        out, err = (self.path / f"screen-{self.num_runs}.{name}" for name in ("out", "err"))
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(NOT_PASSED_ON)},
            "BENCH_MARK": self.mark,
            "PYTHONPATH": str(Path(__file__).parent),
        }
        program, *arguments = command
        with open(out, "wb") as out_file, open(err, "wb") as err_file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": out_file, "stderr": err_file}
            process = subprocess.Popen(
                [BIN / program, *arguments, config, *overrides, *options],
                cwd=self.path,
                env=environment,
                **{**streams, "start_new_session": True, **popen},
            )
        folder = "run"
        for override in overrides:
            if override.startswith("run.dir="):
                folder = override.removeprefix("run.dir=")
        return Run(self.path, self.path / folder, process, self.mark, out, err)

    def launch(self, *overrides: str, code: int | None = 0, **options: Any) -> Run:
        """Start a run, wait for its end, and check its exit code (None: any but 0)."""
        run = self.start(*overrides, **options)
        got = run.wait()
        assert (got != 0) if code is None else (got == code), f"exit code {got}\n{run.shown}"
        run.wait_gone()
        return run

    def close(self) -> None:
        """End whatever is left."""
        for _ in range(50):
            alive = marked(self.mark)
            if not alive:
                break
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            time.sleep(0.05)


def make_text(folder: Path, num_files: int = 6) -> None:
    """Write a few files of invented words, about 10 KB each, always the same."""
    folder.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    for number in range(num_files):
        (folder / f"{number}.txt").write_text(" ".join(draw.choices(words, k=1800)))


def marked(mark: str) -> dict[int, dict[str, str]]:
    """Return the live processes that have the mark, with their environments; no zombies."""
    return {pid: env for pid, env in _environments() if env.get("BENCH_MARK") == mark}


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            entries = (path / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        yield int(path.name), dict(e.split("=", 1) for e in entries if "=" in e)


def parent(pid: int) -> int:
    """Return the parent of a process; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def run_example(ranks: int, script: str, *options: str) -> str:
    """Run an example, alone if `ranks` is 0, and return what it prints."""
    launcher = [sys.executable]
    if ranks:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*launcher, script, *options],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
