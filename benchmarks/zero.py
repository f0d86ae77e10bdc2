"""bigtrain's ZeRO beside DDP, torch's ZeroRedundancyOptimizer and FSDP2, and DeepSpeed.

python benchmarks/zero.py speed  [--ranks 2 4] [--rounds 12] [--kinds ...] [--deepspeed]
python benchmarks/zero.py memory [--ranks 2 4] [--kinds ...] [--deepspeed]
python benchmarks/zero.py wire   [--ranks 2 4] [--kinds ...] [--deepspeed]

One thread per rank, a GPT with heads tied to the embedding, AdamW, clipping; see zero_peers.py for
the kinds. DeepSpeed's are left out unless --deepspeed, with a Python that has it.

speed   tokens/s against DDP. All kinds live in the same ranks and take turns of 3 steps, so that a
        drift of the machine is the same for all: a ratio is the median of the ratios to DDP in the
        same round. DeepSpeed's kinds have processes of their own, with a DDP of their own.
memory  MB per rank of 101M parameters, each kind in fresh processes: what was predicted for a step,
        what a finished step has left (RSS, less what there was after steps of a tiny model), the
        most that a step has had beyond the same, and the most of the process in all (VmHWM).
wire    bytes a step over all ranks, on the loopback of a network namespace of its own (needs
        `unshare`), as multiples of the bytes of the fp32 parameters, and the closed form for ours.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from zero_peers import DEEPSPEED, KINDS, SEED, SEQ_LEN, Engine, build, make_model

STEPS, WARMUP = 3, 2  # steps of a turn, rounds
SPEED = [k for k in KINDS if k not in DEEPSPEED and k not in ("fsdp2-3-bf16", "ours-3-bf16")]
MEMORY = ["ddp", "zro", "ours-0", "ours-1", "fsdp2-2", "ours-2", "fsdp2-3", "ours-3"]
DEFAULTS = {"speed": SPEED, "memory": MEMORY, "wire": [*MEMORY, "ours-3-kept"]}


class Samples:
    """Draws the same batches of bytes on every run; a rank takes its share."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.text = np.load(folder / "train.npy", mmap_mode="r")
        self.draw, self.batch = np.random.default_rng(SEED), batch

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.batch * dist.get_world_size()
        starts = self.draw.integers(0, len(self.text) - SEQ_LEN, count)
        mine = starts[dist.get_rank() :: dist.get_world_size()]
        rows = np.stack([self.text[start : start + SEQ_LEN + 1] for start in mine])
        windows = torch.from_numpy(rows.astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# -- in the ranks ----------------------------------------------------------------------------------


def take_turns(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of each turn of each kind, and the losses of its last steps."""
    engines = {kind: build(kind, "14M", options.batch) for kind in options.kinds}
    samples = Samples(options.folder, options.batch)
    records: dict[str, Any] = {kind: {"seconds": [], "losses": []} for kind in engines}
    for turn in range(WARMUP + options.rounds):
        batches = [samples.next() for _ in range(STEPS)]
        first = turn % len(engines)
        order = [*engines, *engines][first : first + len(engines)]
        for kind in order if turn % 2 else order[::-1]:
            dist.barrier()
            start = time.perf_counter()
            losses = [engines[kind].step(*batch) for batch in batches]
            engines[kind].settle()
            dist.barrier()
            records[kind]["seconds"].append(time.perf_counter() - start)
            records[kind]["losses"] += [float(loss) for loss in losses]
    return records


def weigh(options: argparse.Namespace) -> dict[str, Any]:
    """Return MB of one kind, which is alone in this process."""
    (kind,) = options.kinds
    tiny = build(kind, "tiny", options.batch)  # so that all code is loaded that a step needs
    for _ in range(2):
        tiny.step(*Samples(options.folder, options.batch).next())
        tiny.settle()
    before = status("VmRSS")
    engine = build(kind, "101M", options.batch)
    built = status("VmHWM")
    samples = Samples(options.folder, options.batch)
    for _ in range(2):  # the first step of ours learns the order of gathers; optimizers make state
        engine.step(*samples.next())
        engine.settle()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
    for _ in range(2):
        engine.step(*samples.next())
        engine.settle()
    steady, peak = status("VmRSS"), status("VmHWM")
    record = {
        "before": before,
        "steady": steady - before,
        "step": peak - before,
        "peak": max(built, peak),
    }
    record["predicted"] = predicted(engine)
    return {kind: record}


def predicted(engine: Engine) -> list[float] | None:
    """Return what was predicted for ours: MB after a step, and at most."""
    path = getattr(engine, "path", None)
    if path is None:
        return None
    from bigtrain.zero.memory import predict

    section, moments = engine.section, engine.optimizer.num_bytes  # type: ignore[attr-defined]
    memory = predict(path, section, moments)
    return [memory.steady / 1e6, memory.peak / 1e6]


def status(key: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise KeyError(key)


def count_bytes(options: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes that a step of one kind sends over all ranks, and those expected."""
    (kind,) = options.kinds
    engine = build(kind, "14M", options.batch)
    samples = Samples(options.folder, options.batch)
    for _ in range(3):
        engine.step(*samples.next())
    engine.settle()
    counts = []
    for _ in range(2):
        dist.barrier()
        time.sleep(0.2)
        counts.append(loopback())
        dist.barrier()
        for _ in range(4 if len(counts) == 1 else 0):
            engine.step(*samples.next())
        engine.settle()
    return {kind: {"bytes": (counts[1] - counts[0]) / 4, "expected": closed_form(engine)}}


def loopback() -> int:
    """Return the bytes that have come in on the loopback of this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    raise KeyError("lo")


def closed_form(engine: Engine) -> float | None:
    """Return the bytes that ours should send: of gradients and of parameters, over all ranks.

    Gradients once, (n-1)/n of them from each rank. Parameters the same, after the update; where
    they are sharded, for forward, and for backward all but the two buckets that forward used last.
    """
    path = getattr(engine, "path", None)
    if path is None:
        return None
    others = dist.get_world_size() - 1
    total, again = 0.0, []
    for bucket in path.buckets:
        wire = getattr(path.sync, "wire", None)
        total += others * bucket.numel * (wire.bytes_per_element(bucket) if wire else 2 * 4)
        if bucket.sharing.inner.degree > 1:
            again.append(others * bucket.numel * bucket.params.element_size())
            total += again[-1]
    keeper = getattr(path.sync, "keeper", None)
    if (
        keeper is not None
        and keeper.reshard_after_forward
        and path.buckets[0].sharing.sharded_params
    ):
        total += sum(again[1:-1])
    return total


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    do = {"speed": take_turns, "memory": weigh, "wire": count_bytes}[options.command]
    records = do(options)
    (options.folder / f"{dist.get_rank()}.json").write_text(json.dumps(records))
    dist.barrier()
    os._exit(0)


# -- around them -----------------------------------------------------------------------------------


def run_ranks(
    ranks: int, kinds: list[str], folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return what each rank has recorded, of kinds that share the processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, options.command, "--worker"]
    command += ["--folder", str(folder), "--batch", str(options.batch)]
    command += ["--rounds", str(options.rounds), "--kinds", *kinds]
    if options.command == "wire":
        command = ["unshare", "--net", sys.executable, __file__, "inside", "--", *command]
    root = str(Path(__file__).resolve().parents[1])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    result = subprocess.run(
        command, env=environment, timeout=3600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if result.returncode:
        sys.exit(f"{kinds} on {ranks} ranks failed:\n{result.stdout.decode()[-4000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def inside(command: list[str]) -> None:
    """Switch on the loopback of a new network namespace, and become `command`."""
    up, get, change = 0x1, 0x8913, 0x8914  # IFF_UP, SIOCGIFFLAGS, SIOCSIFFLAGS
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        (flags,) = struct.unpack("16xH14x", fcntl.ioctl(any_socket, get, request))
        fcntl.ioctl(any_socket, change, struct.pack("16sH14x", b"lo", flags | up))
    os.execvp(command[0], command)


def show_speed(options: argparse.Namespace, folder: Path) -> None:
    print("| ranks | kind | ms a step | tokens/s, kind / ddp | quartiles | loss, gap to ddp |")
    print("|---|---|---|---|---|---|")
    for ranks in options.ranks:
        mine = [kind for kind in options.kinds if kind not in DEEPSPEED and kind != "ddp"]
        theirs = [kind for kind in options.kinds if kind in DEEPSPEED]
        for kinds in filter(None, (mine, theirs)):
            records = run_ranks(ranks, ["ddp", *kinds], folder, options)
            for kind in ["ddp", *kinds]:
                show_ratio(ranks, kind, records)


def show_ratio(ranks: int, kind: str, records: list[dict[str, Any]]) -> None:
    seconds = {k: records[0][k]["seconds"][WARMUP:] for k in ("ddp", kind)}
    ratios = [b / a for a, b in zip(seconds[kind], seconds["ddp"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    means = {
        k: [sum(losses) / ranks for losses in zip(*(r[k]["losses"] for r in records), strict=True)]
        for k in ("ddp", kind)
    }
    gap = max(abs(a - b) for a, b in zip(means["ddp"], means[kind], strict=True))
    print(
        f"| {ranks} | {kind} | {1000 * statistics.median(seconds[kind]) / STEPS:.0f} "
        f"| **{statistics.median(ratios):.3f}** | {low:.2f} to {high:.2f} | {gap:.1e} |",
        flush=True,
    )


def show_memory(options: argparse.Namespace, folder: Path) -> None:
    print("| ranks | kind | predicted, steady | steady | predicted, step | step | whole process |")
    print("|---|---|---|---|---|---|---|")
    for ranks in options.ranks:
        for kind in options.kinds:
            records = [r[kind] for r in run_ranks(ranks, [kind], folder, options)]
            guess = records[0]["predicted"]
            steady, step, peak = (max(r[k] for r in records) for k in ("steady", "step", "peak"))
            first, second = (f"{g:.0f}" for g in guess) if guess else ("", "")
            print(
                f"| {ranks} | {kind} | {first} | {steady:.0f} | {second} | {step:.0f} "
                f"| {peak:.0f} |",
                flush=True,
            )


def show_wire(options: argparse.Namespace, folder: Path) -> None:
    if shutil.which("unshare") is None:
        sys.exit("no `unshare` here: bytes of other processes would be counted too")
    print("| ranks | kind | MB a step | as a multiple of P | closed form |")
    print("|---|---|---|---|---|")
    whole = 4 * sum(param.numel() for param in make_model("14M").parameters()) / 1e6
    for ranks in options.ranks:
        for kind in options.kinds:
            record = run_ranks(ranks, [kind], folder, options)[0][kind]
            mb, expected = record["bytes"] / 1e6, record["expected"]
            form = f"{expected / 1e6 / whole:.2f} P" if expected else ""
            print(f"| {ranks} | {kind} | {mb:.1f} | {mb / whole:.2f} P | {form} |", flush=True)


def main() -> None:
    if sys.argv[1:2] == ["inside"]:
        inside(sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["speed", "memory", "wire"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, help="samples of a rank; speed 4, else 1")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--deepspeed", action="store_true", help="also DeepSpeed, if it is here")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    options.batch = options.batch or (4 if options.command == "speed" else 1)
    if options.worker:
        worker(options)
        return
    more = list(DEEPSPEED) if options.deepspeed else []
    options.kinds = options.kinds or [*DEFAULTS[options.command], *more]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}\n")
    show = {"speed": show_speed, "memory": show_memory, "wire": show_wire}[options.command]
    with tempfile.TemporaryDirectory() as name:
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        np.save(Path(name) / "train.npy", np.frombuffer(text, dtype=np.uint8))
        show(options, Path(name))


if __name__ == "__main__":
    main()
