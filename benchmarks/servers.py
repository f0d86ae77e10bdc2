"""Parameter servers beside what a user would take instead: an all-reduce in as many ranks.

    python benchmarks/servers.py speed [WORKERS...]      tokens/s of sync over data parallel
    python benchmarks/servers.py push [MB]               bytes per second pushed, over a plain copy
    python benchmarks/servers.py straggler [WORKERS]     rounds/s with one worker five times slower
    python benchmarks/servers.py deaths                  what the end of a worker or a server costs
    python benchmarks/servers.py local [STEPS [SEED]]    bytes and losses of local steps

What others send over loopback counts as ours: for bytes, call `local` in a namespace of its own,
    unshare -n sh -c "ip link set lo up; python benchmarks/servers.py local"
Runs are launched one after the other on this machine, over loopback; ratios are of one call.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
GPT = {
    "model": {
        "kind": "gpt",
        "num_layers": 4,
        "hidden_size": 384,
        "num_heads": 6,
        "max_seq_len": 64,
    },
    "data": {"kind": "stdlib", "seq_len": 64},
    "run": {"device": "cpu"},
    "launch": {"threads_per_rank": 1},
    "eval": {"samples": 0},
    "checkpoint": {"keep_last": 1},
    "log": {"every": 1000},
}


def run(folder: Path, name: str, config: dict[str, Any], *options: str) -> list[dict[str, Any]]:
    """Launch a run to its end and return its records, with the seconds at which each came."""
    path = folder / f"{name}.yaml"
    where = folder / name
    config = {**config, "run": {**config.get("run", {}), "dir": str(where)}}
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).parent / "bigtrain", "launch", str(path), *options]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen: list[float] = []
    watcher = threading.Thread(target=_watch, args=(where / "metrics.jsonl", seen, process))
    watcher.start()
    said, _ = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{said}")
    records = [json.loads(line) for line in (where / "metrics.jsonl").read_text().splitlines()]
    for record, at in zip(records, seen, strict=False):
        record["at"] = at
    return records


def _watch(path: Path, seen: list[float], process: subprocess.Popen) -> None:
    """Note when each line of a file came, within 5 ms."""
    while process.poll() is None:
        time.sleep(0.005)
        if path.exists():
            lines = path.read_bytes().count(b"\n")
            seen += [time.monotonic()] * (lines - len(seen))


def steps_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if "loss" in record]


def tokens_per_second(records: list[dict[str, Any]]) -> float:
    """Return the median over steps, without the first ones."""
    return statistics.median(r["items_per_second"] for r in steps_of(records)[5:])


def speed(folder: Path, counts: list[int], steps: int = 40, pairs: int = 3) -> None:
    print("| workers | data parallel, tokens/s | sync, 1 server | ratio |\n|---|---|---|---|")
    for count in counts:
        base = {**GPT, "train": {"steps": steps, "global_batch": 4 * count}}
        ratios, speeds = [], []
        for pair in range(pairs):
            peer = run(folder, f"dp{count}-{pair}", {**base, "parallel": {"dp": count}})
            server = {"servers": 1, "workers": count, "mode": "sync"}
            served = {**base, "parallel": {"dp": 1}, "server": server}
            ours = run(folder, f"ps{count}-{pair}", served)
            speeds.append(tokens_per_second(peer))
            ratios.append(tokens_per_second(ours) / speeds[-1])
        middle = statistics.median(ratios)
        print(
            f"| {count} | {statistics.median(speeds):,.0f} "
            f"| {middle * statistics.median(speeds):,.0f} "
            f"| **{middle:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


# -- pushes ----------------------------------------------------------------------------------------


def push(size_mb: int, workers: int = 2, times: int = 5) -> None:
    """Compare pushes into a server with as many plain socket copies, over loopback."""
    plain = [_plain_copy(size_mb << 20, workers) for _ in range(times)]
    ours = [_pushes(size_mb << 20, workers) for _ in range(times)]
    ratio = statistics.median(ours) / statistics.median(plain)
    print(f"plain copy  {statistics.median(plain) / 1e9:.2f} GB/s over {workers} connections")
    print(f"pushes      {statistics.median(ours) / 1e9:.2f} GB/s, ratio {ratio:.2f}")


def _plain_copy(size: int, workers: int) -> float:
    """Return bytes per second of `workers` processes that send `size` to one that receives."""
    listener = socket.create_server(("127.0.0.1", 0))
    children = []
    for _ in range(workers):
        if (child := os.fork()) == 0:
            data = memoryview(bytearray(size))
            with socket.create_connection(listener.getsockname()) as sock:
                sock.recv(1)
                sock.sendall(data)
                sock.recv(1)
            os._exit(0)
        children.append(child)
    socks = [listener.accept()[0] for _ in range(workers)]
    rooms = [memoryview(bytearray(size)) for _ in range(workers)]
    begun = time.perf_counter()

    def take(sock: socket.socket, room: memoryview) -> None:
        sock.send(b"x")
        got = 0
        while got < size:
            got += sock.recv_into(room[got:])
        sock.send(b"x")

    threads = [threading.Thread(target=take, args=p) for p in zip(socks, rooms, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    for child in children:
        os.waitpid(child, 0)
    return workers * size / took


def _pushes(size: int, workers: int) -> float:
    """Return bytes per second of `workers` processes that push `size` into one server."""
    from bigtrain.server.client import Client
    from bigtrain.server.protocol import Who
    from bigtrain.server.rounds import Rules
    from bigtrain.server.server import Server, Setup
    from bigtrain.server.table import BlockSpec, Stretch, bytes_of

    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    numel = size // 4 // 4
    specs = [
        BlockSpec(key, numel, "float32", (0,), (Stretch("decay", 1, 0, numel),)) for key in range(4)
    ]
    pipes = []
    for worker in range(workers):
        read, write = os.pipe()
        if os.fork() == 0:
            client = Client(Who("worker", worker), [address], "token")
            client.start(specs)
            grads = [torch.zeros(numel) for _ in specs]
            if client.wanted[0]["fill"]:
                values = {(s.key, 0): bytes_of(g) for s, g in zip(specs, grads, strict=True)}
                client.fill(values, {"step": 0, "num_updates": 0, "cursor": 0})
            client.ready()
            clock, took = 0, []
            for _ in range(4):
                turn = client.next_turn(clock)
                clock = turn["clock"]
                begun = time.perf_counter()
                for spec, grad in zip(specs, grads, strict=True):
                    client.push(clock, spec.key, bytes_of(grad))
                client.report(clock, turn["version"], [0.0], client.wait_pushed(clock))
                took.append(time.perf_counter() - begun)
            client.next_turn(clock)
            os.write(write, json.dumps(min(took[1:])).encode())
            client.leave()
            os._exit(0)
        pipes.append(read)
    rules = Rules("sync", workers, workers)

    class Policy:
        def begin(self, about: Any) -> None: ...

        def update(self, closed: Any, squares: float) -> Any:
            from bigtrain.server.board import Update

            return Update(0.0, 1.0, True, 0.0)

        def is_held(self, closed: Any) -> bool:
            return False

    from bigtrain.config.schema import SgdOptimizer
    from bigtrain.optim import make_optimizer

    plain = SgdOptimizer(kind="sgd", momentum=0.0)
    server = Server(
        Setup(0, [address], "token", rules, 1),
        lambda segments: make_optimizer(segments, plain),
        Policy(),
    )
    server.serve(listener)
    slowest = max(json.loads(os.read(pipe, 100)) for pipe in pipes)
    return workers * size / slowest


# -- uneven and dying workers ----------------------------------------------------------------------


def uneven(workers: int, slow: int, steps: int, **server: Any) -> dict[str, Any]:
    arguments = {"seconds": 0.1, "slow": slow, "times": 5.0}
    return {
        "model": {"factory": "uneven:model", "args": arguments},
        "data": {"factory": "uneven:data"},
        "run": {"device": "cpu"},
        "parallel": {"dp": 1},
        "server": {"servers": 1, "workers": workers, "mode": "sync", **server},
        "train": {"steps": steps, "global_batch": workers},
        "eval": {"samples": 0},
        "log": {"every": 1000},
    }


def straggler(folder: Path, workers: int, steps: int = 60) -> None:
    """Compare rounds beside a slow worker with undisturbed ones; and samples."""
    found = {}
    for name, slow, server in (
        ("undisturbed", -1, {}),
        ("all wait for it", 0, {}),
        ("quorum", 0, {"quorum": workers - 1}),
    ):
        records = steps_of(run(folder, name, uneven(workers, slow, steps, **server)))
        seconds = records[-1]["at"] - records[5]["at"]
        found[name] = sum(r["items"] for r in records[6:]) / seconds
    bar = 0.9 * (workers - 1) / workers
    for name, samples in found.items():
        ratio = samples / found["undisturbed"]
        print(f"{name:18} {samples:6.1f} samples/s  {ratio:.2f}", f"(bar {bar:.2f})")


def deaths(folder: Path, steps: int = 100) -> None:
    """Tell the longest pause that the end of a worker or of a server makes."""
    for name, drill in (
        ("nothing", ""),
        ("worker killed", "kill:worker=1,step=30"),
        ("board's server killed", "kill:server=0,step=30"),
        ("other server killed", "kill:server=1,step=30"),
    ):
        config = uneven(3, -1, steps, servers=2, replicas=2)
        records = steps_of(run(folder, name, config, *(["--chaos", drill] if drill else [])))
        ats = [record["at"] for record in records if "at" in record]
        waits = [later - earlier for earlier, later in itertools.pairwise(ats[5:])]
        pause, usual = max(waits), statistics.median(waits)
        print(f"{name:24} longest pause {pause:.2f} s, a step takes {usual:.2f} s", flush=True)


# -- local steps -----------------------------------------------------------------------------------


def local(folder: Path, steps: int, seed: int, workers: int = 2) -> None:
    """Compare bytes over loopback and losses at equal tokens."""
    small = {
        **GPT,
        "model": {**GPT["model"], "hidden_size": 128, "num_heads": 4, "num_layers": 2},
        "run": {**GPT["run"], "seed": seed},
        "eval": {"samples": 256},
        "optimizer": {"kind": "adamw", "lr": 2e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 40},
    }
    base = {**small, "train": {"steps": steps, "global_batch": 8 * workers}}
    print("| | bytes a step, of the all-reduce's | validation loss |\n|---|---|---|")
    plain = None
    for name, server in (
        ("all-reduce", None),
        ("local 20, fp32", {"push": "fp32", "pull": "fp32"}),
        ("local 20, int4, int4", {}),
        ("local 20, int4, int4, 4 fragments", {"fragments": 4}),
        ("local 20, fp32, no momentum", {"push": "fp32", "pull": "fp32", **NO_MOMENTUM}),
        ("local 20, onebit, onebit", {"push": "onebit", "pull": "onebit", **NO_MOMENTUM}),
        ("local 20, topk, topk, rate 1.8", {"push": "topk", "pull": "topk", **FAST}),
    ):
        config = {**base, "parallel": {"dp": workers}}
        if server is not None:
            whole = {"servers": 1, "workers": workers, "mode": "local", **server}
            config = {**base, "parallel": {"dp": 1}, "server": whole}
        ends = []
        for length in (steps // 2, steps):  # what starting takes cancels out
            before = loopback_bytes()
            shorter = {**config, "train": {**config["train"], "steps": length}}
            records = run(folder, f"{name}-{length}".replace(" ", ""), shorter)
            ends.append(loopback_bytes() - before)
        each = (ends[1] - ends[0]) / (steps - steps // 2)
        plain = plain or each
        loss = [r["validation_loss"] for r in records if "validation_loss" in r][-1]
        print(f"| {name} | 1/{plain / each:.0f} | {loss:.4f} |", flush=True)


NO_MOMENTUM = {"outer_momentum": 0.0, "outer_lr": 1.0}
FAST = {"outer_momentum": 0.0, "outer_lr": 1.8}  # makes good for what comes late


def loopback_bytes() -> int:
    """Return what was sent over loopback in this network namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    [line] = [line for line in lines if line.strip().startswith("lo:")]
    return int(line.split()[9])


def main(arguments: list[str]) -> None:
    command, *rest = arguments or ["help"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if command == "speed":
            speed(folder, [int(text) for text in rest] or [2, 3, 4])
        elif command == "push":
            push(int(rest[0]) if rest else 256)
        elif command == "straggler":
            straggler(folder, int(rest[0]) if rest else 4)
        elif command == "deaths":
            deaths(folder)
        elif command == "local":
            steps, seed = [int(text) for text in rest] + [1000, 1234][len(rest) :]
            local(folder, steps, seed)
        else:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
