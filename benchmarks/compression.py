"""Seconds, bytes and losses of compressed training, beside what a user would take instead.

    python benchmarks/compression.py wire [rounds]          four nodes, links of three speeds
    python benchmarks/compression.py loss [steps] [seeds]   two ranks, beside the exact curve

`wire` makes four network namespaces on this machine (root, iproute2) and limits what each may send.
In every node one rank trains a GPT of 10M parameters by each way in turn, step by step; bytes are
those of the network card. `loss` trains a GPT on the text of Python's standard library.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import bigtrain
from bigtrain.comm.mesh import Mesh
from bigtrain.config.schema import CompressionSection
from bigtrain.models import GPT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "cluster"))

RATES = ("1gbit", "100mbit", "")
NODES = 4
VOCAB, LENGTH, BATCH = 256, 64, 2
WARM_UP = 2


def model(seed: int = 0) -> GPT:
    """Return a GPT of 10M parameters."""
    torch.manual_seed(seed)
    return GPT(VOCAB, LENGTH, 3, 512, 8)


# -- ways of training ----------------------------------------------------------------------------

Step = Callable[[torch.Tensor], None]


def ddp(hook: str) -> Step:
    wrapped = DistributedDataParallel(model(), gradient_as_bucket_view=True)
    if hook == "fp16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True)

    def step(window: torch.Tensor) -> None:
        wrapped(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(mesh: Mesh, kind: str, stage: int) -> Step:
    path = bigtrain.parallelize(model(), mesh, compression=kind, zero=stage)
    optimizer = bigtrain.AdamW(path, lr=1e-3)

    def step(window: torch.Tensor) -> None:
        path.backward(path.model(window[:, :-1], window[:, 1:]))
        path.finish()
        optimizer.step(done=path.publish)
        path.publish()
        path.settle()

    return step


def ways(mesh: Mesh) -> dict[str, Step]:
    return {
        "DDP fp32": ddp(""),
        "DDP fp16 hook": ddp("fp16"),
        "ours, exact": ours(mesh, "none", 0),
        "ours, exact, ZeRO 1": ours(mesh, "none", 1),
        "ours, safe": ours(mesh, "safe", 0),
        "ours, safe, ZeRO 2": ours(mesh, "safe", 2),
    }


def sent() -> int:
    """Return the bytes that this node's card has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    return 0


def rank_main(folder: Path, rounds: int) -> None:
    """Be one rank: take steps by each way in turn, at each rate that the folder says."""
    torch.set_num_threads(1)
    mesh = bigtrain.init()
    steps = ways(mesh)
    draws = torch.Generator().manual_seed(mesh.rank)
    for rate in RATES:
        dist.barrier()
        if mesh.rank == 0:
            (folder / f"want-{rate}").touch()
        while not (folder / f"have-{rate}").exists():
            time.sleep(0.01)
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in steps}
        for _, (name, step) in itertools.product(range(WARM_UP + rounds), steps.items()):
            window = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=draws)
            dist.barrier()
            before, begin = sent(), time.perf_counter()
            step(window)
            seconds = time.perf_counter() - begin
            dist.barrier()
            found[name].append((seconds, sent() - before))
        if mesh.rank == 0:
            cut = {name: values[WARM_UP:] for name, values in found.items()}
            (folder / f"found-{rate}.json").write_text(json.dumps(cut))
    dist.barrier()
    bigtrain.leave()


def wire(rounds: int) -> None:
    from virtual_nodes import VirtualNodes, why_no_nodes

    if why := why_no_nodes():
        raise SystemExit(why)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nodes = VirtualNodes(folder / "nodes", NODES)
        try:
            ranks = [start(nodes, folder, rank, rounds) for rank in range(NODES)]
            for rate in RATES:
                while not (folder / f"want-{rate}").exists():
                    if any(rank.poll() for rank in ranks):
                        raise SystemExit("a rank has failed")
                    time.sleep(0.01)
                for node in nodes.names:
                    if rate:
                        nodes.shape(node, rate)
                    else:
                        nodes.run(node, "tc", "qdisc", "del", "dev", "eth0", "root")
                (folder / f"have-{rate}").touch()
            for rank in ranks:
                rank.wait(600)
            report(folder)
        finally:
            nodes.close()


def start(nodes: Any, folder: Path, rank: int, rounds: int) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        **{"RANK": str(rank), "WORLD_SIZE": str(NODES), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"GROUP_RANK": str(rank), "MASTER_ADDR": nodes.address("n1"), "MASTER_PORT": "29500"},
        **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    }
    words = [sys.executable, __file__, "rank", str(folder), str(rounds)]
    return subprocess.Popen([*nodes.inside(nodes.names[rank]), *words], env=env)


def report(folder: Path) -> None:
    numel = sum(p.numel() for p in model().parameters())
    ideal = 2 * (NODES - 1) / NODES * 4 * numel
    print(
        f"{numel:,} parameters, {NODES} ranks; bytes beside {ideal / 1e6:.1f} MB of an all-reduce"
    )
    for rate in RATES:
        found = json.loads((folder / f"found-{rate}.json").read_text())
        medians = {n: statistics.median(s for s, _ in values) for n, values in found.items()}
        count = len(found["DDP fp32"])
        print(f"\n{rate or 'not limited'}: median step of {count}, DDP's over it, bytes")
        for name, values in found.items():
            share = statistics.median(size for _, size in values) / ideal
            ratios = [medians[peer] / medians[name] for peer in ("DDP fp32", "DDP fp16 hook")]
            print(
                f"  {name:22} {medians[name] * 1e3:8.0f} ms   fp32 {ratios[0]:5.2f}   "
                f"fp16 hook {ratios[1]:5.2f}   bytes {share:.4f}"
            )


# -- losses --------------------------------------------------------------------------------------


def loss(steps: int, seeds: int) -> None:
    """Print the validation losses of runs that differ by their compression alone."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from harness import run_ranks

    gaps = []
    for seed in range(seeds):
        found = {}
        for kind in ("none", "safe"):
            with tempfile.TemporaryDirectory() as name:
                args = (kind, seed, steps)
                found[kind] = run_ranks(validate, 2, Path(name), args=args, timeout=7200)[0]
        gaps.append(found["safe"] - found["none"])
        print(f"seed {seed}: exact {found['none']:.4f}  safe {found['safe']:.4f}  {gaps[-1]:+.4f}")
    print(f"mean gap {statistics.mean(gaps):+.4f} nats after {steps} steps")


def validate(mesh: Mesh, kind: str, seed: int, steps: int) -> float:
    """Train, and return the loss on text that was not trained on."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in files)))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    torch.manual_seed(seed)
    net = GPT(VOCAB, LENGTH, 2, 128, 4)
    section = CompressionSection(kind=kind, least_numel=4096) if kind != "none" else "none"
    path = bigtrain.parallelize(net, mesh, compression=section, zero=1)
    optimizer = bigtrain.AdamW(path)
    draws = torch.Generator().manual_seed(1000 * seed + mesh.rank)

    def windows(source: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(source) - LENGTH - 1, (count, 1), generator=generator)
        return source[starts + torch.arange(LENGTH + 1)]

    for number in range(steps):
        window = windows(train, 8, draws)
        path.backward(net(window[:, :-1], window[:, 1:]))
        path.finish()
        norm = float(path.grad_norm())
        rate = 1e-3 * min(1.0, (number + 1) / 100) * (1 - 0.9 * number / steps)
        optimizer.step(rate, torch.tensor(max(1.0, norm)), path.publish)
        path.publish()
    path.settle()
    net.eval()
    fixed = torch.Generator().manual_seed(7)
    with torch.no_grad():
        some = (windows(held_out, 32, fixed) for _ in range(16))
        return statistics.mean(float(net(w[:, :-1], w[:, 1:])) for w in some)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["wire"]
    if verb == "rank":
        rank_main(Path(rest[0]), int(rest[1]))
    elif verb == "wire":
        wire(int(rest[0]) if rest else 5)
    else:
        loss(*(int(n) for n in rest) if rest else (1000, 3))
