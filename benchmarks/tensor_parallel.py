"""bigtrain's tensor parallel step beside DTensor, Megatron-core and torch DistributedDataParallel.

python benchmarks/tensor_parallel.py [--repeats 5] [--steps 12] [--ranks 2 4] [--batch 8]
    [--kinds ddp dtensor megatron ours ours-sequence] [--megatron-python PATH]

Every kind trains the same GPT (14.4M parameters, fp32, 8 heads so that 4 ranks divide them) from
the same weights on the same batches, with torch AdamW(fused=True), the same clipping and one thread
per rank, in processes of its own (started by torchrun), one kind after the other, `repeats` times
round. A row has the median over repeats of the ratio within one round, so that a drift of the
machine cancels. A loss gap is the largest over all steps and rounds.

ddp            torch DistributedDataParallel with its defaults; a rank takes batch / ranks samples
dtensor        torch parallelize_module: Colwise and Rowwise linear layers, the embedding split over
               the vocabulary and shared with the head, loss_parallel(). Its attention has three
               linear layers for q, k and v: the rows of the fused one do not split into blocks.
               They share one PrepareModuleInput, so that the gradient of their input is summed over
               the ranks once; with the three hooks of their own it would be thrice.
megatron       Megatron-core's ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding and
               vocab_parallel_cross_entropy, with defaults: the fused projection of q, k and v in
               its row order (heads, 3, head size), the all-reduce of input gradients beside the
               product for the weight. Its fused kernels and its sequence parallel mode need CUDA.
               Megatron-core may live in another environment, with the same torch: name its Python.
ours           bigtrain's tensor parallel layers
ours-sequence  the same, activations between the layers split over the sequence

Peak memory is that of a whole process, so it includes what each kind imports.
"""

from __future__ import annotations

import argparse
import contextlib
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
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

KINDS = ["ddp", "dtensor", "megatron", "ours", "ours-sequence"]
SEQ_LEN, WARMUP = 128, 3
HIDDEN, HEADS, VOCAB = 384, 8, 256
LR, CLIP, SEED = 1e-4, 1.0, 1234

Run = tuple[list[float], list[float]]


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


def train(
    model: nn.Module,
    num_replicas: dict[str, int],
    folder: Path,
    batch: int,
    steps: int,
    rows: slice = slice(None),
) -> Run:
    """Train on `rows` of every batch; `num_replicas` of ranks, by name, hold the same elements."""
    params = dict(model.named_parameters())
    replicas = torch.tensor([num_replicas[name] for name in params], dtype=torch.float32)
    # Four groups, because a fused update takes no mix of DTensors and plain tensors.
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for param in params.values():
        groups.setdefault((param.ndim >= 2, hasattr(param, "to_local")), []).append(param)
    optimizer = torch.optim.AdamW(
        [{"params": g, "weight_decay": 0.1 if decay else 0.0} for (decay, _), g in groups.items()],
        lr=LR,
        betas=(0.9, 0.95),
        fused=True,
    )
    text = np.load(folder / "train.npy", mmap_mode="r")
    draw = np.random.default_rng(SEED)
    times, losses = [], []
    for _ in range(steps):
        starts = draw.integers(0, len(text) - SEQ_LEN, batch)[rows]
        windows = torch.from_numpy(
            np.stack([text[s : s + SEQ_LEN + 1] for s in starts]).astype(np.int64)
        )
        tokens, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        clip_grad_norm([local(param.grad) for param in params.values()], replicas)
        optimizer.step()
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return times, losses


def run_ours(folder: Path, ranks: int, batch: int, steps: int, sequence: bool) -> Run:
    from bigtrain.comm.block import shards_of
    from bigtrain.tensor import apply_tensor_parallel

    model = full_model()
    apply_tensor_parallel(model, model.tensor_plan(), dist.group.WORLD, sequence_parallel=sequence)
    shards = shards_of(model)
    num_replicas = {
        name: shards[name].num_replicas if name in shards else ranks
        for name, _ in model.named_parameters()
    }
    return train(model, num_replicas, folder, batch, steps)


def run_ddp(folder: Path, ranks: int, batch: int, steps: int) -> Run:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(full_model())
    share, rank = batch // ranks, dist.get_rank()
    num_replicas = {name: ranks for name, _ in model.named_parameters()}
    rows = slice(rank * share, rank * share + share)
    times, losses = train(model, num_replicas, folder, batch, steps, rows)
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return times, (mean / ranks).tolist()


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


def run_dtensor(folder: Path, ranks: int, batch: int, steps: int) -> Run:
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
    mesh = init_device_mesh("cpu", (ranks,))
    whole = {"input_layouts": Replicate(), "desired_input_layouts": Replicate()}
    plan = {
        "token_embedding": RowwiseParallel(input_layouts=Replicate()),
        "blocks.*.attention": PrepareModuleInput(**whole),
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
    with loss_parallel():
        return train(model, num_replicas, folder, batch, steps)


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


def run_megatron(folder: Path, ranks: int, batch: int, steps: int) -> Run:
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )

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
    return train(model, num_replicas, folder, batch, steps)


def worker(kind: str, folder: Path, batch: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    arguments = (folder, dist.get_world_size(), batch, steps)
    if kind.startswith("ours"):
        times, losses = run_ours(*arguments, sequence=kind == "ours-sequence")
    else:
        peers = {"ddp": run_ddp, "dtensor": run_dtensor, "megatron": run_megatron}
        times, losses = peers[kind](*arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record = {"seconds": statistics.median(times[WARMUP:]), "peak_mb": peak, "losses": losses}
    (folder / f"{kind}-{dist.get_rank()}.json").write_text(json.dumps(record))
    dist.barrier()
    os._exit(0)


def measure(kind: str, python: str, folder: Path, ranks: int, options: Any) -> dict[str, Any]:
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), __file__]
    command += ["--worker", kind, "--folder", str(folder)]
    command += ["--steps", str(options.steps), "--batch", str(options.batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if kind == "megatron":  # bigtrain need not be installed there
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    result = subprocess.run(command, env=environment, timeout=600, stderr=subprocess.PIPE)
    if result.returncode:
        sys.exit(f"{kind} on {ranks} ranks failed:\n{result.stderr.decode()[-4000:]}")
    records = [json.loads((folder / f"{kind}-{r}.json").read_text()) for r in range(ranks)]
    return {
        "seconds": max(record["seconds"] for record in records),
        "peak_mb": max(record["peak_mb"] for record in records),
        "losses": records[0]["losses"],
    }


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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, default=8, help="samples of 128 bytes, over all ranks")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--megatron-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--worker")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder, options.batch, options.steps)
        return
    if options.steps <= WARMUP:
        parser.error(f"--steps must be more than the {WARMUP} steps of warming up")
    for ranks in options.ranks:
        if options.batch % ranks or HEADS % ranks:
            parser.error(f"{ranks} ranks must divide the {HEADS} heads and --batch {options.batch}")
    kinds = [kind for kind in KINDS if kind in options.kinds]
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {platform.machine()}")
    if "megatron" in kinds:
        version = megatron_version(options.megatron_python)
        if version is None:
            kinds.remove("megatron")
            version = f"no row for megatron: {options.megatron_python} cannot import Megatron-core"
        print(version)
    print()
    print(
        "| ranks | kind | tokens/s, ours / kind | tokens/s, kind / ddp | peak memory | loss gap |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("*.py")))
        np.save(folder / "train.npy", np.frombuffer(text, dtype=np.uint8))
        for ranks in options.ranks:
            compare(folder, ranks, kinds, options)


def ratio(rounds: list[dict[str, Any]], kind: str, other: str) -> str:
    """Return tokens/s of `kind` over that of `other`: the median of the rounds, and their range."""
    if kind not in rounds[0] or other not in rounds[0]:
        return "-"
    values = [r[other]["seconds"] / r[kind]["seconds"] for r in rounds]
    return f"**{statistics.median(values):.3f}** ({min(values):.2f} to {max(values):.2f})"


def compare(folder: Path, ranks: int, kinds: list[str], options: Any) -> None:
    rounds = []
    for index in range(options.repeats):
        order = list(reversed(kinds)) if index % 2 else kinds
        pythons = dict.fromkeys(order, sys.executable)
        pythons["megatron"] = options.megatron_python
        rounds.append({k: measure(k, pythons[k], folder, ranks, options) for k in order})
    for kind in kinds:
        seconds = statistics.median(r[kind]["seconds"] for r in rounds)
        peak = statistics.median(r[kind]["peak_mb"] for r in rounds)
        gap = "-"
        if "ddp" in kinds:
            gaps = [
                abs(a - b)
                for r in rounds
                for a, b in zip(r[kind]["losses"], r["ddp"]["losses"], strict=True)
            ]
            gap = f"{max(gaps):.1e}"
        print(
            f"| {ranks} | {kind} | {ratio(rounds, 'ours', kind)} | {ratio(rounds, kind, 'ddp')}; "
            f"{options.batch * SEQ_LEN / seconds:,.0f} | {peak:.0f} MB | {gap} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
