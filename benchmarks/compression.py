"""Seconds, bytes and losses of compressed training, beside what a user would take instead.

    python benchmarks/compression.py wire [ROUNDS [NODES]] [RATE...] [WAY...] [PICTURE]
    python benchmarks/compression.py collective [ROUNDS [NODES]] [RATE...]
    python benchmarks/compression.py loss WIDTH STEPS SEEDS KIND... [PICTURE]   two ranks, curves

`wire` and `collective` make network namespaces on this machine (root, iproute2), four if not said,
and limit what each may send. In every node one rank trains a GPT of 10M parameters, or adds up 10M
elements, with nothing to compute, by each way (those with a name that begins so, or all) in
turn, three steps at a time, since updates of one may travel while the next computes; bytes are
those of the network card. A variance is refreshed each 256th step, as it is after the first 2000.
`loss` trains a GPT on the text of Python's standard library.
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
from dataclasses import dataclass
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

RATES = ("1gbit", "300mbit", "100mbit", "unlimited")
PEERS = {
    "wire": ("DDP fp32", "DDP fp16 hook"),
    "collective": ("all_reduce fp32", "all_reduce fp16"),
}
DRAWN = {
    "DDP fp32": "#6e1423",
    "DDP fp16 hook": "#dd7684",
    "PowerSGD, rank 4": "#e79a5b",
    "1-bit Adam, op chain": "#8a5fb0",
    "ours, 1-bit Adam": "#b9a3d0",
    "ours, safe": "#9fd3a8",
    "ours, default": "#57a867",
    "ours, max": "#1d5f2b",
}
VOCAB, LENGTH, BATCH = 256, 64, 2
WARM_UP = 1  # rounds
STEPS = 3  # of one way, one after the other
EVALUATIONS = 8
ELEMENTS = 10 * 1002 * 1002


def model(seed: int = 0) -> GPT:
    """Return a GPT of 10M parameters."""
    torch.manual_seed(seed)
    return GPT(VOCAB, LENGTH, 3, 512, 8)


# -- ways of training ----------------------------------------------------------------------------

Step = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Way:
    """A way of training: a step, and what is waited for after the last one."""

    step: Step
    settle: Callable[[], None] = lambda: None


def stepping(wrapped: DistributedDataParallel) -> Way:
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, fused=True)

    def step(window: torch.Tensor) -> None:
        wrapped(window[:, :-1], window[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Way(step)


def ddp(hook: str) -> Way:
    wrapped = DistributedDataParallel(model(), gradient_as_bucket_view=True)
    if hook == "fp16":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    return stepping(wrapped)


def powersgd() -> Way:
    """Rank 4, in one bucket: with several, this hook has aborted over gloo."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    wrapped = DistributedDataParallel(model(), bucket_cap_mb=1000)
    state = powerSGD_hook.PowerSGDState(
        None, matrix_approximation_rank=4, start_powerSGD_iter=2, warm_start=True
    )
    wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return stepping(wrapped)


class OneBitAdam:
    """1-bit Adam in its compressed stage (https://arxiv.org/abs/2102.02888), two-phase, as it was
    offered so far: a chain of torch's operations after backward, with one scale for all."""

    def __init__(self) -> None:
        self.net = model()
        self.params = list(self.net.parameters())
        ranks = dist.get_world_size()
        n = sum(p.numel() for p in self.params)
        self.size = -(-n // (8 * ranks)) * 8 * ranks
        zeros = [torch.zeros(self.size) for _ in range(3)]
        self.mean, self.variance, self.error = zeros
        self.variance += 1e-4
        self.owner_error = torch.zeros(self.size // ranks)

    def step(self, window: torch.Tensor) -> None:
        self.net(window[:, :-1], window[:, 1:]).backward()
        flat = torch.cat([p.grad.flatten() for p in self.params if p.grad is not None])
        flat = torch.nn.functional.pad(flat, (0, self.size - len(flat)))
        self.mean = self.reduce(0.9 * self.mean + 0.1 * flat)
        update = 1e-3 * self.mean / (self.variance.sqrt() + 1e-8)
        with torch.no_grad():
            start = 0
            for p in self.params:
                p -= update[start : start + p.numel()].view(p.shape)
                start += p.numel()
                p.grad = None

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        ranks = dist.get_world_size()
        bits, scale, self.error = self.pack(x + self.error)
        rows = torch.empty_like(bits)
        dist.all_to_all_single(rows, bits)
        scales = [torch.empty(1) for _ in range(ranks)]
        dist.all_gather(scales, scale)
        signs = self.unpack(rows).view(ranks, -1)
        own = (signs * torch.stack(scales)).sum(0) / ranks + self.owner_error
        bits, scale, self.owner_error = self.pack(own)
        every = [torch.empty_like(bits) for _ in range(ranks)]
        dist.all_gather(every, bits)
        dist.all_gather(scales, scale)
        return torch.cat([self.unpack(b) * s for b, s in zip(every, scales, strict=True)])

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scale = x.norm() / len(x) ** 0.5
        positive = x >= 0
        error = x - scale * (2.0 * positive - 1.0)
        shifts = torch.arange(8, dtype=torch.uint8)
        bits = (positive.view(-1, 8).to(torch.uint8) << shifts).sum(1, dtype=torch.uint8)
        return bits, scale[None], error

    def unpack(self, bits: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(8, dtype=torch.uint8)
        return ((bits[:, None] >> shifts) & 1).flatten().float() * 2 - 1


def ours(mesh: Mesh, kind: str, stage: int, when: str = "always") -> Way:
    section: Any = {"kind": kind}
    if kind in ("default", "max"):
        section |= {"when": when, "refresh_every": 256}  # what the distance grows to by itself
    compression = CompressionSection(**section)
    path = bigtrain.parallelize(model(), mesh, compression=compression, zero=stage)
    optimizer = bigtrain.AdamW(path, lr=1e-3)

    def step(window: torch.Tensor) -> None:
        path.backward(path.model(window[:, :-1], window[:, 1:]))
        path.finish()
        optimizer.step(done=path.publish)
        path.publish()

    if kind in ("default", "max", "onebit"):
        begin(path, step, mesh.rank)
    return Way(step, path.settle)


def begin(path: Any, step: Step, rank: int) -> None:
    """Train until the warm-up is over, while links are fast; its end is found by itself."""
    draws = torch.Generator().manual_seed(rank)
    for _ in range(200):
        if path.progress["phase"] in ("compressed", "off"):
            break
        step(torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=draws))
    if rank == 0:
        print(f"after its warm-up: {path.progress['phase']}", flush=True)


def ways(mesh: Mesh, wanted: list[str]) -> dict[str, Way]:
    """Return those whose names begin with one of these words; all, if there are none."""
    every: dict[str, Callable[[], Way]] = {
        "DDP fp32": lambda: ddp(""),
        "DDP fp16 hook": lambda: ddp("fp16"),
        "PowerSGD, rank 4": lambda: powersgd(),
        "1-bit Adam, op chain": lambda: Way(OneBitAdam().step),
        "ours, 1-bit Adam": lambda: ours(mesh, "onebit", 0),
        "ours, exact": lambda: ours(mesh, "none", 0),
        "ours, safe": lambda: ours(mesh, "safe", 0),
        "ours, default": lambda: ours(mesh, "default", 0),
        "ours, default, ZeRO 2": lambda: ours(mesh, "default", 2),
        "ours, max": lambda: ours(mesh, "max", 0),
        "ours, max, ZeRO 1": lambda: ours(mesh, "max", 1),
        "ours, default if it pays": lambda: ours(mesh, "default", 0, "pays"),
    }
    named = {n: make for n, make in every.items() if not wanted or n.startswith(tuple(wanted))}
    return {name: make() for name, make in named.items()}


def collectives(mesh: Mesh) -> dict[str, Way]:
    """Ways to add up 10M elements and bring the result to all, with nothing to compute."""
    flat = torch.randn(ELEMENTS)

    def halves(_: torch.Tensor) -> None:
        half = flat.half()
        dist.all_reduce(half)
        flat.copy_(half)
        flat.normal_()

    def whole(_: torch.Tensor) -> None:
        dist.all_reduce(flat)

    return {
        "all_reduce fp32": Way(whole),
        "all_reduce fp16": Way(halves),
        **{f"ours, {kind}": one_bucket(mesh, kind) for kind in ("safe", "default", "max")},
    }


def one_bucket(mesh: Mesh, kind: str) -> Way:
    net = torch.nn.ModuleList(torch.nn.Linear(1002, 1002, bias=False) for _ in range(10))
    section: Any = {"kind": kind, **({"refresh_every": 0} if kind != "safe" else {})}
    path = bigtrain.parallelize(net, mesh, compression=CompressionSection(**section), bucket_mb=4.0)
    bigtrain.AdamW(path)
    for bucket in path.buckets:
        bucket.open_grads().normal_()
    if kind != "safe":
        path.sync.ledger.switch.begin("compressed")  # type: ignore[union-attr]

    def step(_: torch.Tensor) -> None:
        for bucket in path.buckets:
            bucket.collected = False
            path.sync.reduce(bucket)
        path.sync.finish()
        for bucket in path.buckets:
            path.sync.publish(bucket)
        path.sync.settle()

    return Way(step)


def sent() -> int:
    """Return the bytes that this node's card has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("eth0:"):
            return int(line.split(":")[1].split()[8])
    return 0


def rank_main(folder: Path, what: str, rounds: int, rates: list[str], wanted: list[str]) -> None:
    """Be one rank: take steps by each way in turn, at each rate that the folder says."""
    torch.set_num_threads(1)
    mesh = bigtrain.init()
    steps = ways(mesh, wanted) if what == "wire" else collectives(mesh)
    draws = torch.Generator().manual_seed(mesh.rank)
    for rate in rates:
        dist.barrier()
        if mesh.rank == 0:
            (folder / f"want-{rate}").touch()
        while not (folder / f"have-{rate}").exists():
            time.sleep(0.01)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for _, (name, way) in itertools.product(range(WARM_UP + rounds), steps.items()):
            windows = torch.randint(VOCAB, (STEPS, BATCH, LENGTH + 1), generator=draws)
            dist.barrier()
            before, begin = sent(), time.perf_counter()
            for window in windows:
                way.step(window)
            way.settle()
            seconds = time.perf_counter() - begin
            dist.barrier()
            found[name].append((seconds / STEPS, (sent() - before) / STEPS))
        if mesh.rank == 0:
            cut = {name: values[WARM_UP:] for name, values in found.items()}
            (folder / f"found-{rate}.json").write_text(json.dumps(cut))
    dist.barrier()
    bigtrain.leave()


def between_nodes(what: str, words: list[str], picture: str = "") -> None:
    from virtual_nodes import VirtualNodes, why_no_nodes

    if why := why_no_nodes():
        raise SystemExit(why)
    numbers = [int(word) for word in words if word.isdigit()]
    rounds, num_nodes = numbers + [5, 4][len(numbers) :]
    rates = [word for word in words if word in RATES] or list(RATES)
    wanted = [word for word in words if not word.isdigit() and word not in RATES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        nodes = VirtualNodes(folder / "nodes", num_nodes)
        try:
            order = [what, str(rounds), "/".join(rates), "/".join(wanted)]
            ranks = [start(nodes, folder, rank, order) for rank in range(num_nodes)]
            for rate in rates:
                while not (folder / f"want-{rate}").exists():
                    if any(rank.poll() for rank in ranks):
                        raise SystemExit("a rank has failed")
                    time.sleep(0.01)
                for node in nodes.names:
                    if rate != "unlimited":
                        nodes.shape(node, rate)
                    else:
                        nodes.run(node, "tc", "qdisc", "del", "dev", "eth0", "root")
                (folder / f"have-{rate}").touch()
            for rank in ranks:
                rank.wait(1800)
            report(folder, what, num_nodes, rates)
            if picture:
                draw_wire(folder, picture)
        finally:
            nodes.close()


def start(nodes: Any, folder: Path, rank: int, order: list[str]) -> subprocess.Popen[bytes]:
    env = {
        **os.environ,
        **{"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        "WORLD_SIZE": str(len(nodes.names)),
        **{"GROUP_RANK": str(rank), "MASTER_ADDR": nodes.address("n1"), "MASTER_PORT": "29500"},
        **{"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"},
    }
    words = [sys.executable, __file__, "rank", str(folder), *order]
    return subprocess.Popen([*nodes.inside(nodes.names[rank]), *words], env=env)


def report(folder: Path, what: str, ranks: int, rates: list[str]) -> None:
    numel = sum(p.numel() for p in model().parameters()) if what == "wire" else ELEMENTS
    peers = PEERS[what]
    ideal = 2 * (ranks - 1) / ranks * 4 * numel
    print(f"{numel:,} elements, {ranks} ranks; bytes beside {ideal / 1e6:.1f} MB of an all-reduce")
    for rate in rates:
        found = json.loads((folder / f"found-{rate}.json").read_text())
        medians = {n: statistics.median(s for s, _ in values) for n, values in found.items()}
        count = len(found[peers[0]])
        print(f"\n{rate}: a step, median of {count} x {STEPS}; peers over it; bytes")
        for name, values in found.items():
            share = statistics.median(size for _, size in values) / ideal
            ratios = [medians[peer] / medians[name] for peer in peers]
            print(
                f"  {name:24} {medians[name] * 1e3:8.0f} ms   {ratios[0]:6.2f}   "
                f"{ratios[1]:6.2f}   bytes {share:.4f}"
            )


def draw_wire(folder: Path, picture: str) -> None:
    """Draw the time of a step against what a link may send."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    mbits = {"100mbit": 100, "300mbit": 300, "1gbit": 1000}
    found = {rate: json.loads((folder / f"found-{rate}.json").read_text()) for rate in mbits}
    for name, color in DRAWN.items():
        seconds = [statistics.median(s for s, _ in found[rate][name]) for rate in mbits]
        axes.plot(list(mbits.values()), seconds, "o-", color=color, label=name, linewidth=2)
    axes.set(xscale="log", yscale="log", xlabel="Mbit/s of a node", ylabel="seconds of a step")
    axes.set_xticks(list(mbits.values()), [str(value) for value in mbits.values()])
    axes.set_yticks(ticks := [0.25, 0.5, 1, 2, 5], [str(value) for value in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks([], minor=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture)


# -- losses --------------------------------------------------------------------------------------


def loss(width: int, steps: int, seeds: int, kinds: list[str], picture: str = "") -> None:
    """Print the validation losses of runs that differ by their compression alone.

    `policy` is default with messages that lose nothing: the variance as default has it.
    """
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
    from harness import run_ranks

    found: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
    for seed, kind in itertools.product(range(seeds), kinds):
        with tempfile.TemporaryDirectory() as name:
            args = (width, kind, seed, steps)
            curve, began, numel = run_ranks(validate, 2, Path(name), args=args, timeout=36000)[0]
        found[kind].append(curve)
        print(
            f"{numel:,} parameters, seed {seed}, {kind}: compressed from step {began} on; ", end=""
        )
        print(" ".join(f"{value:.4f}" for value in curve), flush=True)
    for kind, curves in found.items():
        print(f"{kind}: mean {statistics.mean(curve[-1] for curve in curves):.4f}")
    if picture:
        draw_loss(found, steps, picture)


def draw_loss(found: dict[str, list[list[float]]], steps: int, picture: str) -> None:
    """Draw the mean validation loss of each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for kind, curves in found.items():
        mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
        where = [(number + 1) * steps // EVALUATIONS for number in range(len(mean))]
        axes.plot(where, mean, "o-", label=kind, linewidth=2)
    axes.set(xlabel="step", ylabel="validation loss, nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(picture)


def validate(
    mesh: Mesh, width: int, kind: str, seed: int, steps: int
) -> tuple[list[float], int | None, int]:
    """Train; return losses on text that was not trained on, and when compression began."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = torch.tensor(list(b"".join(path.read_bytes() for path in files)))
    train, held_out = text[: -len(text) // 10], text[-len(text) // 10 :]
    torch.manual_seed(seed)
    net = GPT(VOCAB, LENGTH, 3, width, 8)
    shares = kind not in ("onebit", "zero_one")
    path = bigtrain.parallelize(net, mesh, compression=section_of(kind), zero=int(shares))
    if kind == "policy":
        from parity_codecs import Lossless

        path.sync.ledger.up = path.sync.ledger.down = Lossless()  # type: ignore[union-attr]
    optimizer, curve, began = bigtrain.AdamW(path), [], None
    draws = torch.Generator().manual_seed(1000 * seed + mesh.rank)

    def windows(source: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
        starts = torch.randint(len(source) - LENGTH - 1, (count, 1), generator=generator)
        return source[starts + torch.arange(LENGTH + 1)]

    for number in range(steps):
        window = windows(train, BATCH, draws)
        path.backward(net(window[:, :-1], window[:, 1:]))
        path.finish()
        norm = float(path.grad_norm())
        rate = 1e-3 * min(1.0, (number + 1) / 100) * (1 - 0.9 * number / steps)
        optimizer.step(rate, torch.tensor(max(1.0, norm)), path.publish)
        path.publish()
        if began is None and path.progress and path.progress["phase"] == "compressed":
            began = number + 1
        if (number + 1) % max(1, steps // EVALUATIONS) == 0:
            path.settle()
            curve.append(evaluate(net, windows, held_out))
    return curve, began, sum(p.numel() for p in net.parameters())


def section_of(kind: str) -> CompressionSection:
    if kind in ("default", "max", "policy"):
        real: Any = "default" if kind == "policy" else kind
        return CompressionSection(kind=real, least_numel=4096, when="always")
    return CompressionSection(**({} if kind == "none" else {"kind": kind, "least_numel": 4096}))


@torch.no_grad()
def evaluate(net: GPT, windows: Callable[..., torch.Tensor], held_out: torch.Tensor) -> float:
    fixed = torch.Generator().manual_seed(7)
    some = (windows(held_out, 32, fixed) for _ in range(16))
    return statistics.mean(float(net(w[:, :-1], w[:, 1:])) for w in some)


if __name__ == "__main__":
    verb, *rest = sys.argv[1:] or ["wire"]
    drawing = rest.pop() if rest and rest[-1].endswith(".png") else ""
    if verb == "rank":
        words = [[word for word in several.split("/") if word] for several in rest[3:]]
        rank_main(Path(rest[0]), rest[1], int(rest[2]), *words)
    elif verb in ("wire", "collective"):
        between_nodes(verb, rest, drawing)
    else:
        width, steps, seeds = (int(n) for n in rest[:3])
        loss(width, steps, seeds, rest[3:], drawing)
