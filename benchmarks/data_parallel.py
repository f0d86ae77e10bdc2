"""bigtrain's data parallel step beside torch DistributedDataParallel and a plain loop.

python benchmarks/data_parallel.py [--repeats 5] [--steps 12] [--ranks 1 2 4]

Every system trains the same model on the same samples from the same seed, with the same threads, in
processes of its own (started by torchrun), one system after the other, `repeats` times round. A row
has the median over repeats of the ratio within one round, so that a drift of the machine cancels.

plain  one process, a loop by hand: torch AdamW(fused=True), clip_grad_norm_
ddp    torch DistributedDataParallel with its defaults, the same optimizer and clipping
view   the same with gradient_as_bucket_view=True
ours   bigtrain's Trainer: also records its loss over all ranks at every step
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, PER_RANK, WARMUP = 128, 4, 3
MODEL = {"vocab_size": 256, "max_seq_len": SEQ_LEN, "num_layers": 8, "hidden_size": 384}
LR, CLIP, SEED = 1e-4, 1.0, 1234


def make_config(folder: Path, ranks: int, steps: int) -> Any:
    from bigtrain.config.schema import Config

    return Config.model_validate(
        {
            "run": {"seed": SEED},
            "model": {"num_heads": 6, **MODEL},
            "data": {
                "kind": "tokens",
                "train": str(folder / "train.npy"),
                "validation": str(folder / "train.npy"),
                "seq_len": SEQ_LEN,
            },
            "parallel": {"dp": ranks},
            "train": {"steps": steps, "global_batch": PER_RANK * ranks, "max_grad_norm": CLIP},
            "optimizer": {"lr": LR},
            "schedule": {"kind": "constant"},
        }
    )


def run_ours(folder: Path, steps: int) -> tuple[list[float], list[float]]:
    import bigtrain

    mesh = bigtrain.init()
    trainer = bigtrain.Trainer(make_config(folder, mesh.dp.degree, steps), mesh, folder)
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(trainer.train_step().loss)
        times.append(time.perf_counter() - start)
    return times, losses


def run_peer(folder: Path, steps: int, kind: str) -> tuple[list[float], list[float]]:
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from bigtrain.data.stream import TrainStream, seed_everything
    from bigtrain.data.tokens import TokenDataset, open_tokens
    from bigtrain.models import GPT

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    tokens = open_tokens(folder / "train.npy", "benchmark")
    stream = TrainStream(
        TokenDataset(tokens, SEQ_LEN, None, "benchmark"),
        seed=SEED,
        cursor=0,
        microbatch=PER_RANK,
        num_microbatches=1,
        rank=rank,
        degree=ranks,
    )
    seed_everything(SEED)
    model: torch.nn.Module = GPT(num_heads=6, **MODEL)
    if kind != "plain":
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model, gradient_as_bucket_view=kind == "view")
    decay = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    times, losses = [], []
    for _ in range(steps):
        start = time.perf_counter()
        _, batch = stream.next()
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
        if kind != "plain":  # outside of the timing: only to compare the curves
            mean = torch.tensor(losses[-1])
            dist.all_reduce(mean)
            losses[-1] = mean.item() / ranks
    return times, losses


def worker(kind: str, folder: Path, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    times, losses = run_ours(folder, steps) if kind == "ours" else run_peer(folder, steps, kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {"seconds": statistics.median(times[WARMUP:]), "peak_mb": peak, "losses": losses}
    (folder / f"{kind}-{os.environ['RANK']}.json").write_text(json.dumps(record))
    os._exit(0)


def measure(kind: str, folder: Path, ranks: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__]
    command += ["--worker", kind, "--folder", str(folder), "--steps", str(steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    subprocess.run(command, check=True, env=environment, timeout=600, stderr=subprocess.DEVNULL)
    records = [json.loads((folder / f"{kind}-{r}.json").read_text()) for r in range(ranks)]
    return {
        "seconds": max(record["seconds"] for record in records),
        "peak_mb": max(record["peak_mb"] for record in records),
        "losses": records[0]["losses"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder, options.steps)
        return
    import torch

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    print("| ranks | peer | tokens/s, ours / peer | peak memory, ours / peer | loss, largest gap |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        np.save(folder / "train.npy", np.frombuffer(text, dtype=np.uint8))
        for ranks in options.ranks:
            compare(folder, ranks, options.repeats, options.steps)


def compare(folder: Path, ranks: int, repeats: int, steps: int) -> None:
    peers = ["plain"] if ranks == 1 else ["ddp", "view"]
    rounds = []
    for index in range(repeats):
        order = ["ours", *peers] if index % 2 else [*peers, "ours"]
        rounds.append({kind: measure(kind, folder, ranks, steps) for kind in order})
    for peer in peers:
        speed = [r[peer]["seconds"] / r["ours"]["seconds"] for r in rounds]
        memory = [r["ours"]["peak_mb"] / r[peer]["peak_mb"] for r in rounds]
        gap = max(
            abs(a - b)
            for r in rounds
            for a, b in zip(r["ours"]["losses"], r[peer]["losses"], strict=True)
        )
        tokens = (
            PER_RANK * ranks * SEQ_LEN / statistics.median(r["ours"]["seconds"] for r in rounds)
        )
        spread = f"{min(speed):.2f} to {max(speed):.2f}"
        peak = statistics.median(r["ours"]["peak_mb"] for r in rounds)
        print(
            f"| {ranks} | {peer} | **{statistics.median(speed):.3f}** ({spread}; ours "
            f"{tokens:,.0f}) | {statistics.median(memory):.3f} (ours {peak:.0f} MB) | {gap:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
