"""bigtrain's tensor parallel layers beside DTensor, Megatron-core and DistributedDataParallel.

python benchmarks/tensor_parallel.py [--steps 30] [--ranks 2 4] [--batch 8]
    [--kinds ddp dtensor dtensor-shared megatron ours ours-sequence] [--python PATH]

Every kind trains the same GPT (14.4M parameters, fp32, 8 heads so that 4 ranks divide them) from
the same weights on the same batches, with torch AdamW(fused=True), the same clipping and one thread
per rank. All kinds live in the same ranks and take turns step by step, so that a drift of the
machine is the same for all: a ratio is the median of the ratios of steps taken side by side.

ddp             torch DistributedDataParallel with its defaults; a rank takes batch / ranks samples
dtensor         torch parallelize_module as its tutorial has it: Colwise and Rowwise linear layers,
                the embedding split over the vocabulary and tied to the head, loss_parallel(). Its
                attention has a linear layer each for q, k and v: the rows of the fused one do not
                split into blocks
dtensor-shared  the same, but q, k and v share one PrepareModuleInput, so that the gradient of their
                input is summed over the ranks once instead of three times
megatron        Megatron-core's ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding and
                vocab_parallel_cross_entropy, with defaults: the fused projection of q, k and v in
                its row order (heads, 3, head size), the all-reduce of input gradients beside the
                product for the weight. Its fused kernels and its sequence parallelism need CUDA.
                Left out where it is not installed; --python names a Python that has it
ours            bigtrain's tensor parallel layers
ours-chunks     the same, products of row layers in two chunks
ours-sequence   the same, activations between the layers split over the sequence
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

KINDS = ["ddp", "dtensor", "dtensor-shared", "megatron", "ours", "ours-chunks", "ours-sequence"]
SEQ_LEN, WARMUP = 128, 3
HIDDEN, HEADS, VOCAB = 384, 8, 256
LR, CLIP, SEED = 1e-4, 1.0, 1234


@dataclass
class Setup:
    """A model to train; `num_replicas` of ranks, by name, hold the same elements of a parameter.

    A rank trains on `rows` of every batch, inside of `context`.
    """

    model: nn.Module
    num_replicas: dict[str, int]
    rows: Any = ...
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


def full_model() -> Any:
    from bigtrain.models.gpt import GPT

    torch.manual_seed(SEED)
    return GPT(
        vocab_size=VOCAB, max_seq_len=SEQ_LEN, num_layers=8, hidden_size=HIDDEN, num_heads=HEADS
    )


def clip_grad_norm(grads: list[torch.Tensor], num_replicas: torch.Tensor) -> None:
    """Clip to the norm of the full gradients; `num_replicas` ranks hold the same elements."""
    squares = torch.stack(torch._foreach_norm(grads)).square() / num_replicas
    total = squares.sum()
    dist.all_reduce(total)
    torch._foreach_mul_(grads, torch.clamp(CLIP / (total.sqrt() + 1e-6), max=1.0))


def local(tensor: Any) -> torch.Tensor:
    """Return what this rank holds of a DTensor; another tensor is returned as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Runner:
    """Takes steps of one kind, and keeps their times and losses."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.params = dict(setup.model.named_parameters())
        replicas = [setup.num_replicas[name] for name in self.params]
        self.replicas = torch.tensor(replicas, dtype=torch.float32)
        # Four groups, because a fused update takes no mix of DTensors and plain tensors.
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for param in self.params.values():
            groups.setdefault((param.ndim >= 2, hasattr(param, "to_local")), []).append(param)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": group, "weight_decay": 0.1 if decay else 0.0}
                for (decay, _), group in groups.items()
            ],
            lr=LR,
            betas=(0.9, 0.95),
            fused=True,
        )
        self.times: list[float] = []
        self.losses: list[float] = []

    def step(self, windows: torch.Tensor) -> None:
        mine = windows[self.setup.rows]
        tokens, targets = mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
        dist.barrier()
        start = time.perf_counter()
        with self.setup.context():
            self.optimizer.zero_grad()
            loss = self.setup.model(tokens, targets)
            loss.backward()
        clip_grad_norm([local(param.grad) for param in self.params.values()], self.replicas)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.times.append(time.perf_counter() - start)


def ours(sequence: bool = False, num_chunks: int = 1) -> Setup:
    from bigtrain.comm.block import shards_of
    from bigtrain.tensor import apply_tensor_parallel

    model, group = full_model(), dist.group.WORLD
    apply_tensor_parallel(model, None, group, sequence_parallel=sequence, num_chunks=num_chunks)
    shards, ranks = shards_of(model), dist.get_world_size()
    names = [name for name, _ in model.named_parameters()]
    return Setup(
        model, {name: shards[name].num_replicas if name in shards else ranks for name in names}
    )


def ddp() -> Setup:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(full_model())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return Setup(
        model, {name: ranks for name, _ in model.named_parameters()}, slice(rank, None, ranks)
    )


class SplitAttention(nn.Module):
    """bigtrain's attention with a linear layer each for q, k and v; any number of the heads."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        weights, biases = whole.qkv.weight.chunk(3), whole.qkv.bias.chunk(3)
        with torch.no_grad():
            for linear, weight, bias in zip((self.q, self.k, self.v), weights, biases, strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
        self.proj = whole.proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (-1, HIDDEN // HEADS)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


def dtensor(shared: bool) -> Setup:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        loss_parallel,
        parallelize_module,
    )

    model = full_model()
    for block in model.blocks:
        block.attention = SplitAttention(block.attention)
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    whole = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
    plan = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate()),
        **({"blocks.*.attention": PrepareModuleInput(**whole)} if shared else {}),
        "blocks.*.attention.q": ColwiseParallel(),
        "blocks.*.attention.k": ColwiseParallel(),
        "blocks.*.attention.v": ColwiseParallel(),
        "blocks.*.attention.proj": RowwiseParallel(),
        "blocks.*.mlp.up": ColwiseParallel(),
        "blocks.*.mlp.down": RowwiseParallel(),
        "head": ColwiseParallel(use_local_output=False),
    }
    parallelize_module(model, mesh, plan)
    model.head.weight = model.token_embedding.weight  # parallelize_module made two of it
    model.register_forward_hook(lambda module, inputs, loss: loss.to_local())
    num_replicas = {
        name: 1 if any(p.is_shard() for p in getattr(param, "placements", ())) else ranks
        for name, param in model.named_parameters()
    }
    return Setup(model, num_replicas, context=loss_parallel)


class FusedAttention(nn.Module):
    """bigtrain's attention, where the rows of the fused projection are (heads, 3, head size)."""

    def __init__(self, qkv: nn.Module, proj: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj = qkv, proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, 3, HIDDEN // HEADS))
        q, k, v = heads.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))


class OutputOnly(nn.Module):
    """A layer of Megatron-core, which returns (output, bias left to add), as a torch layer."""

    def __init__(self, layer: nn.Module, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.shared = layer, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, weight=self.shared.weight)[0] if self.shared else self.layer(x)[0]


class MegatronLoss(nn.Module):
    """model(tokens, targets) is the mean loss of logits that are split over the vocabulary."""

    def __init__(self, model: nn.Module, cross_entropy: Any) -> None:
        super().__init__()
        self.model, self.cross_entropy = model, cross_entropy

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return self.cross_entropy(self.model(tokens), targets).mean()


def megatron() -> Setup:
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )

    ranks = dist.get_world_size()
    parallel_state.initialize_model_parallel(ranks, create_gloo_process_groups=False)
    config = ModelParallelConfig(tensor_model_parallel_size=ranks, use_cpu_initialization=True)

    def options(weight: torch.Tensor) -> dict[str, Any]:
        """Megatron-core splits the full weights that its init_method writes; biases are zero."""
        return {"config": config, "init_method": lambda full: full.copy_(weight.detach())}

    def column(linear: nn.Linear, weight: torch.Tensor) -> nn.Module:
        out, width = linear.weight.shape
        return OutputOnly(ColumnParallelLinear(width, out, **options(weight)))

    def row(linear: nn.Linear) -> nn.Module:
        out, width = linear.weight.shape
        flags = {"bias": True, "input_is_parallel": True, "skip_bias_add": False}
        return OutputOnly(RowParallelLinear(width, out, **flags, **options(linear.weight)))

    model = full_model()
    for block in model.blocks:
        qkv, mlp = block.attention.qkv, block.mlp
        by_head = qkv.weight.unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)
        block.attention = FusedAttention(column(qkv, by_head), row(block.attention.proj))
        mlp.up, mlp.down = column(mlp.up, mlp.up.weight), row(mlp.down)
    weight = model.token_embedding.weight
    model.token_embedding = VocabParallelEmbedding(VOCAB, HIDDEN, **options(weight))
    head = ColumnParallelLinear(
        HIDDEN, VOCAB, bias=False, skip_weight_param_allocation=True, **options(weight)
    )
    model.head = OutputOnly(head, model.token_embedding)
    model = MegatronLoss(model, vocab_parallel_cross_entropy)
    num_replicas = {
        name: 1 if getattr(param, "tensor_model_parallel", False) else ranks
        for name, param in model.named_parameters()
    }
    return Setup(model, num_replicas)


BUILDERS: dict[str, Callable[[], Setup]] = {
    "ddp": ddp,
    "dtensor": partial(dtensor, shared=False),
    "dtensor-shared": partial(dtensor, shared=True),
    "megatron": megatron,
    "ours": ours,
    "ours-chunks": partial(ours, num_chunks=2),
    "ours-sequence": partial(ours, sequence=True),
}


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    runners = {kind: Runner(BUILDERS[kind]()) for kind in options.kinds}
    text = np.load(options.folder / "train.npy", mmap_mode="r")
    draw = np.random.default_rng(SEED)
    for step in range(options.steps):
        starts = draw.integers(0, len(text) - SEQ_LEN, options.batch)
        rows = np.stack([text[start : start + SEQ_LEN + 1] for start in starts])
        windows = torch.from_numpy(rows.astype(np.int64))
        for kind in options.kinds if step % 2 else reversed(options.kinds):
            runners[kind].step(windows)
    records = {}
    for kind, runner in runners.items():
        mean = torch.tensor(runner.losses, dtype=torch.float64)
        dist.all_reduce(mean)  # of ddp, whose ranks have seen different samples
        records[kind] = {
            "times": runner.times,
            "losses": (mean / dist.get_world_size()).tolist(),
        }
    (options.folder / f"{dist.get_rank()}.json").write_text(json.dumps(records))
    dist.barrier()
    os._exit(0)


def measure(folder: Path, ranks: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what each rank has recorded."""
    command = [options.python, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__, "--worker", "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--batch", str(options.batch)]
    command += ["--kinds", *options.kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(command, env=environment, timeout=1800, stderr=subprocess.PIPE)
    if result.returncode:
        sys.exit(f"{ranks} ranks failed:\n{result.stderr.decode()[-4000:]}")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def megatron_version(python: str) -> str | None:
    """Return the versions of Megatron-core and torch there, or None if it cannot be imported."""
    code = "import torch, megatron.core as m, megatron.core.tensor_parallel; "
    code += "print(f'Megatron-core {m.__version__} with torch {torch.__version__}')"
    with contextlib.suppress(OSError):
        result = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
        if result.returncode == 0:
            return result.stdout.strip().split("\n")[-1]
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=8, help="samples of 128 bytes, over all ranks")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--python", default=sys.executable, metavar="PATH")
    parser.add_argument("--worker", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    if options.steps <= WARMUP:
        parser.error(f"--steps must be more than the {WARMUP} steps of warming up")
    for ranks in options.ranks:
        if options.batch % ranks or HEADS % ranks:
            parser.error(f"{ranks} ranks must divide the {HEADS} heads and --batch {options.batch}")
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    if "megatron" in options.kinds:
        version = megatron_version(options.python)
        if version is None:
            options.kinds = [kind for kind in options.kinds if kind != "megatron"]
            version = f"no row for megatron: {options.python} cannot import Megatron-core"
        print(version)
    print(
        "\n| ranks | kind | ms a step | tokens/s, ours / kind | tokens/s, kind / ddp | loss gap |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        np.save(folder / "train.npy", np.frombuffer(text, dtype=np.uint8))
        for ranks in options.ranks:
            show(ranks, measure(folder, ranks, options))


def show(ranks: int, records: list[dict[str, Any]]) -> None:
    # A step has taken as long as its slowest rank.
    times = {
        kind: [
            max(step) for step in zip(*(r[kind]["times"][WARMUP:] for r in records), strict=True)
        ]
        for kind in records[0]
    }

    def ratio(kind: str, other: str) -> str:
        if kind not in times or other not in times:
            return "-"
        ratios = [b / a for a, b in zip(times[kind], times[other], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        return f"**{statistics.median(ratios):.3f}** ({low:.2f} to {high:.2f})"

    for kind, steps in times.items():
        gap = "-"
        if "ddp" in times:
            losses = zip(records[0][kind]["losses"], records[0]["ddp"]["losses"], strict=True)
            gap = f"{max(abs(a - b) for a, b in losses):.1e}"
        milliseconds = 1000 * statistics.median(steps)
        print(
            f"| {ranks} | {kind} | {milliseconds:.0f} | {ratio('ours', kind)} "
            f"| {ratio(kind, 'ddp')} | {gap} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
