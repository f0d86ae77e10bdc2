"""bigtrain's pipeline schedules beside those of torch, DeepSpeed and Megatron-core.

python benchmarks/pipeline_parallel.py [--schedule gpipe 1f1b interleaved ...]
    [--ranks 2 4] [--steps 12] [--microbatches 8]
    [--kinds ddp torch torch-tuned deepspeed megatron ours]

Every kind trains the same GPT (17.4M parameters, fp32, the head not tied to the embedding) from the
same weights on the same microbatches of 2 samples of 128 tokens, with torch AdamW(fused=True) over
what its rank holds, no clipping and one thread per rank. All kinds live in the same ranks and take
turns step by step, so that a drift of the machine is the same for all: a ratio is the median of the
ratios of steps taken side by side, with quartiles. A step has taken as long as its slowest rank.
The loss gap is the largest distance from one process without any parallelism, at any step.

ddp          torch DistributedDataParallel with its defaults: a rank takes microbatches / ranks of
             them and sums gradients over ranks after the last one (no_sync)
torch        torch.distributed.pipelining: PipelineStage around modules with as many blocks each,
             the schedule of that name with its defaults, outputs of the last stage not put together
torch-tuned  the same with one block moved from the last stage, which has the head and the loss,
             to the stage where that was fastest in a short trial before the measurement
deepspeed    PipelineModule (1F1B) with its default partition, by parameters; it steps the AdamW
megatron     Megatron-core's forward_backward_pipelining_without_interleaving; for interleaved its
             _with_interleaving, with the communication overlapped as its command line has it
ours         bigtrain's pipeline, cut automatically by counted cost (halves of blocks, too)
ours-equal   bigtrain's pipeline, cut into equal numbers of blocks

Schedules have the names of bigtrain; zb_h1 is torch's InterleavedZeroBubble with one stage a rank,
and zb_interleaved the same with two. interleaved, zb_v and dualpipe_v have two stages on every
rank. A kind that is not installed, or has no such schedule, is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

SEQ_LEN, MICROBATCH, WARMUP = 128, 2, 2
VOCAB, LAYERS, HIDDEN, HEADS = 4096, 8, 384, 6
LR, SEED, TIMEOUT = 1e-4, 1234, 1800

# Name: class in torch.distributed.pipelining, stages of a rank.
SCHEDULES = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "zb_h1": ("ScheduleInterleavedZeroBubble", 1),
    "zb_interleaved": ("ScheduleInterleavedZeroBubble", 2),
    "zb_v": ("ScheduleZBVZeroBubble", 2),
    "dualpipe_v": ("ScheduleDualPipeV", 2),
}
THERE_AND_BACK = ("zb_v", "dualpipe_v")  # the first and the last stage are on the same rank

# Name: what must be importable, schedules it has.
KINDS: dict[str, tuple[str, list[str]]] = {
    "ddp": ("torch", list(SCHEDULES)),
    "torch": ("torch", list(SCHEDULES)),
    "torch-tuned": ("torch", list(SCHEDULES)),
    "deepspeed": ("deepspeed", ["1f1b"]),
    "megatron": ("megatron.core", ["1f1b", "interleaved"]),
    "ours-equal": ("bigtrain.pipeline", [name for name in SCHEDULES if name != "zb_interleaved"]),
    "ours": ("bigtrain.pipeline", [name for name in SCHEDULES if name != "zb_interleaved"]),
}


@dataclass(frozen=True)
class Setup:
    """What is run: a schedule of so many microbatches, on so many ranks."""

    schedule: str
    microbatches: int
    rank: int
    ranks: int

    @property
    def chunks(self) -> int:
        return SCHEDULES[self.schedule][1]

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def my_stages(self) -> list[int]:
        """Return the stages of this rank: round the ranks, or there and back."""
        if self.schedule in THERE_AND_BACK:
            return [self.rank, self.stages - 1 - self.rank]
        return list(range(self.rank, self.stages, self.ranks))

    def equal_split(self) -> list[int]:
        """Return the number of blocks of each stage."""
        return [LAYERS // self.stages] * self.stages


class Kind:
    """One way to train; step(tokens, targets) takes a whole batch and returns its mean loss.

    The loss is wanted on the rank that computes the last layer; others may return None.
    """

    split: list[int] | list[float] | None = None  # blocks per stage, for the report

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float | None:
        raise NotImplementedError


def full_model() -> Any:
    from bigtrain.models.gpt import GPT

    torch.manual_seed(SEED)
    return GPT(VOCAB, SEQ_LEN, LAYERS, HIDDEN, HEADS, tie_embeddings=False)


def adamw(modules: list[nn.Module]) -> torch.optim.Optimizer:
    params = [param for module in modules for param in module.parameters()]
    groups = [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": 0.1},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Embedding(nn.Module):
    """The layers of a GPT before its blocks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.token, self.position = model.token_embedding, model.position_embedding

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.token(tokens) + self.position(torch.arange(tokens.shape[1]))


def layers_of(model: Any) -> list[nn.Module]:
    """Return the embedding, the blocks, and the norm with the head."""
    return [Embedding(model), *model.blocks, nn.Sequential(model.norm, model.head)]


def stage_of(index: int, split: list[int]) -> nn.Sequential:
    """Return stage `index` of a model of which each stage has `split` blocks."""
    layers = layers_of(full_model())
    start = 1 + sum(split[:index])
    first = 0 if index == 0 else start
    stop = start + split[index] + (index == len(split) - 1)
    return nn.Sequential(*layers[first:stop])


class Plain(Kind):
    """One process without any parallelism: what the losses are compared with."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.model = setup, full_model()
        self.optimizer = adamw([self.model])

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        total, parts = 0.0, self.setup.microbatches
        for inputs, labels in zip(tokens.chunk(parts), targets.chunk(parts), strict=True):
            loss = self.model(inputs, labels) / parts
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total


class DDP(Kind):
    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = nn.parallel.DistributedDataParallel(full_model())
        self.optimizer = adamw([self.model])

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        parts, mine = self.setup.microbatches, slice(self.setup.rank, None, self.setup.ranks)
        pairs = list(zip(tokens.chunk(parts), targets.chunk(parts), strict=True))[mine]
        total = 0.0
        for number, (inputs, labels) in enumerate(pairs, start=1):
            last = number == len(pairs)
            with contextlib.nullcontext() if last else self.model.no_sync():
                loss = self.model(inputs, labels) / len(pairs)
                loss.backward()
            total += loss.item()
        self.optimizer.step()
        return total  # of this rank's samples; the report takes the mean over ranks


class Torch(Kind):
    def __init__(self, setup: Setup, split: list[int] | None = None) -> None:
        from torch.distributed import pipelining

        self.setup, self.split = setup, split or setup.equal_split()
        name = SCHEDULES[setup.schedule][0]
        modules = [stage_of(index, self.split) for index in setup.my_stages()]
        stages = [
            pipelining.PipelineStage(module, index, setup.stages, torch.device("cpu"))
            for module, index in zip(modules, setup.my_stages(), strict=True)
        ]
        self.optimizer = adamw(modules)
        self.schedule = getattr(pipelining, name)(
            stages[0] if name in ("ScheduleGPipe", "Schedule1F1B") else stages,
            setup.microbatches,
            loss_fn=loss_of,
        )

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float | None:
        self.optimizer.zero_grad()
        mine, losses = self.setup.my_stages(), []
        args = (tokens,) if 0 in mine else ()
        wanted = {"target": targets, "losses": losses} if self.setup.stages - 1 in mine else {}
        self.schedule.step(*args, **wanted, return_outputs=False)
        self.optimizer.step()
        return torch.stack(losses).mean().item() if losses else None


def torch_tuned(setup: Setup) -> Kind:
    """Return torch's pipeline with one block moved from the last stage to the best other one."""
    batch = Batches(setup.microbatches).next()
    best: tuple[float, list[int]] = (float("inf"), [])
    for stage in range(setup.stages - 1):
        split = setup.equal_split()
        split[stage] += 1
        split[-1] -= 1
        best = min(best, (trial_seconds(Torch(setup, split), batch), split))
    return Torch(setup, best[1])


def trial_seconds(kind: Kind, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the time of the faster of two steps after a first one; the same on all ranks."""
    times = []
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        kind.step(*batch)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times[1:], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.min().item()


class DeepSpeed(Kind):
    def __init__(self, setup: Setup) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed
        from deepspeed.pipe import PipelineModule

        # Compiled for minutes at the first use, for an all-reduce that a pipeline never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        pipe = PipelineModule(layers_of(full_model()), num_stages=setup.ranks, loss_fn=loss_of)
        bounds = [
            min(max(int(part) - 1, 0), LAYERS) for part in pipe.parts
        ]  # no embedding, no head
        self.split = [stop - start for start, stop in itertools.pairwise(bounds)]
        config = {
            "train_micro_batch_size_per_gpu": MICROBATCH,
            "gradient_accumulation_steps": setup.microbatches,
            "gradient_clipping": 0.0,  # by default it clips to 1
            "steps_per_print": 10**9,
        }
        self.engine, *_ = deepspeed.initialize(model=pipe, optimizer=adamw([pipe]), config=config)
        self.setup = setup

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        parts = self.setup.microbatches
        pairs = zip(tokens.chunk(parts), targets.chunk(parts), strict=True)
        return self.engine.train_batch(iter(pairs)).item()


class MegatronStage(nn.Module):
    """A stage as Megatron-core's schedules want it: its input is set before it is called."""

    def __init__(self, index: int, setup: Setup, config: Any) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.layers, self.config = stage_of(index, setup.equal_split()), config
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = index // setup.ranks if setup.chunks > 1 else None
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.input,) = tensors

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens if self.input is None else self.input)


def megatron_step(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]], stage: nn.Module) -> Any:
    tokens, targets = next(pairs)

    def loss_func(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = loss_of(logits, targets)
        return loss, loss.detach().clone()  # the first is divided in place

    return stage(tokens), loss_func


class TorchOnCpu(types.ModuleType):
    """torch for modules that make tensors on "cuda" or torch.cuda.current_device()."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(current_device=lambda: "cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **{**kwargs, "device": "cpu"})


class Megatron(Kind):
    def __init__(self, setup: Setup) -> None:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import p2p_communication, schedules
        from megatron.core.transformer import TransformerConfig

        schedules.torch = p2p_communication.torch = TorchOnCpu()
        interleaved = setup.chunks > 1
        chunks = setup.chunks if interleaved else None
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=setup.ranks,
            virtual_pipeline_model_parallel_size=chunks,
            create_gloo_process_groups=False,
        )
        config = TransformerConfig(
            num_layers=LAYERS,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            pipeline_model_parallel_size=setup.ranks,
            virtual_pipeline_model_parallel_size=chunks,
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=interleaved,
            batch_p2p_comm=not interleaved,
            batch_p2p_sync=False,
            use_cpu_initialization=True,
        )
        self.setup, self.split = setup, setup.equal_split()
        self.models = [MegatronStage(index, setup, config) for index in setup.my_stages()]
        self.optimizer = adamw(self.models)
        self.run = schedules.get_forward_backward_func()

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float | None:
        self.optimizer.zero_grad()
        parts = self.setup.microbatches
        pairs = list(zip(tokens.chunk(parts), targets.chunk(parts), strict=True))
        iterators = [iter(pairs) for _ in self.models]
        losses = self.run(
            forward_step_func=megatron_step,
            data_iterator=iterators if self.setup.chunks > 1 else iterators[0],
            model=self.models if self.setup.chunks > 1 else self.models[0],
            num_microbatches=parts,
            seq_length=MICROBATCH,  # it has activations as (sequence, samples, hidden size)
            micro_batch_size=SEQ_LEN,
        )
        self.optimizer.step()
        return torch.stack(losses).mean().item() if losses else None


class Ours(Kind):
    """bigtrain's pipeline, cut automatically; or with equal numbers of blocks, as the peers."""

    def __init__(self, setup: Setup, equal: bool = False) -> None:
        from bigtrain.comm.mesh import Mesh
        from bigtrain.comm.world import World
        from bigtrain.compose import build_pipeline
        from bigtrain.config.layout import Layout
        from bigtrain.optim import AdamW

        me = World(setup.rank, setup.ranks, setup.rank, setup.ranks)
        mesh = Mesh.build(Layout(pp=setup.ranks), me, torch.device("cpu"))
        starts = list(itertools.accumulate(setup.equal_split()))[:-1]
        example = torch.zeros(MICROBATCH, SEQ_LEN, dtype=torch.long)
        self.setup = setup
        self.pipeline = build_pipeline(
            full_model(),
            mesh,
            schedule=setup.schedule,
            virtual_stages=setup.chunks,
            split=[f"blocks.{start}" for start in starts] if equal else None,
            example=(example, example),
            loss_of=self.loss_of,
        )
        self.split = setup.equal_split() if equal else self.found_split(setup)
        self.optimizer = AdamW(
            self.pipeline.path.segments(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1
        )

    def found_split(self, setup: Setup) -> list[float]:
        """Return the number of blocks of each stage, which halves of blocks may be in."""
        mine = {
            stage.index: sum(unit.startswith("blocks") for unit in stage.units) / 2
            for stage in self.pipeline.stages
        }
        everyone: list[Any] = [None] * setup.ranks
        dist.all_gather_object(everyone, mine)
        return [
            count for _, count in sorted({k: v for one in everyone for k, v in one.items()}.items())
        ]

    @staticmethod
    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        return model(*batch)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float | None:
        parts, path = self.setup.microbatches, self.pipeline.path
        pairs = list(zip(tokens.chunk(parts), targets.chunk(parts), strict=True))
        losses: list[torch.Tensor] = []  # on the rank of the last stage

        def part_of_loss(model: Any, number: int, batch: Any) -> torch.Tensor:
            loss = self.loss_of(model, batch) / parts
            losses.append(loss.detach())
            return loss

        self.pipeline.run(pairs, part_of_loss)
        path.finish()
        self.optimizer.step()
        path.publish()
        return sum(loss.item() for loss in losses) if losses else None


BUILDERS: dict[str, Callable[[Setup], Kind]] = {
    "plain": Plain,
    "ddp": DDP,
    "torch": Torch,
    "torch-tuned": torch_tuned,
    "deepspeed": DeepSpeed,
    "megatron": Megatron,
    "ours-equal": functools.partial(Ours, equal=True),
    "ours": Ours,
}


class Batches:
    """Real text, two characters a token, the same on all ranks."""

    def __init__(self, microbatches: int) -> None:
        paths = sorted(Path(os.__file__).parent.glob("*.py"))
        text = np.frombuffer(b"".join(path.read_bytes() for path in paths), dtype=np.uint8)
        pairs = text[: len(text) // 2 * 2].reshape(-1, 2).astype(np.int64) % 64
        self.tokens = pairs[:, 0] * 64 + pairs[:, 1]
        self.draw, self.samples = np.random.default_rng(SEED), microbatches * MICROBATCH

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        starts = self.draw.integers(0, len(self.tokens) - SEQ_LEN, self.samples)
        rows = np.stack([self.tokens[start : start + SEQ_LEN + 1] for start in starts])
        windows = torch.from_numpy(rows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def take_steps(setup: Setup, kinds: list[str], steps: int) -> dict[str, Any]:
    running = {name: BUILDERS[name](setup) for name in kinds}
    records: dict[str, Any] = {
        name: {"times": [], "losses": [], "split": kind.split} for name, kind in running.items()
    }
    batches = Batches(setup.microbatches)
    for step in range(steps):
        tokens, targets = batches.next()
        for name in kinds if step % 2 else reversed(kinds):
            dist.barrier()
            start = time.perf_counter()
            loss = running[name].step(tokens, targets)
            records[name]["times"].append(time.perf_counter() - start)
            records[name]["losses"].append(loss)
    return records


def worker(setup: Setup, kinds: list[str], steps: int, port: int, folder: Path) -> None:
    log = os.open(folder / f"{setup.rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = {"RANK": setup.rank, "LOCAL_RANK": setup.rank, "WORLD_SIZE": setup.ranks}
    place |= {"LOCAL_WORLD_SIZE": setup.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=setup.rank,
            world_size=setup.ranks,
            timeout=timedelta(seconds=120),
        )
        records = take_steps(setup, kinds, steps)
        (folder / f"{setup.rank}.json").write_text(json.dumps(records))
        dist.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def measure(setup: Setup, kinds: list[str], steps: int) -> list[dict[str, Any]]:
    """Return what each rank has recorded."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # an address that only has to look right
        folder, port = Path(name), held.getsockname()[1]
        context = multiprocessing.get_context("fork")
        setups = [Setup(**{**vars(setup), "rank": rank}) for rank in range(setup.ranks)]
        processes = [
            context.Process(target=worker, args=(each, kinds, steps, port, folder))
            for each in setups
        ]
        wait_for(processes)
        if any(process.exitcode for process in processes):
            logs = [(folder / f"{rank}.log").read_text()[-3000:] for rank in range(setup.ranks)]
            sys.exit(f"{setup.ranks} ranks failed at {setup.schedule}:\n" + "\n".join(logs))
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(setup.ranks)]


def wait_for(processes: list[Any]) -> None:
    """Run processes to their ends; when one fails, or time is up, end the others."""
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes):
        time.sleep(0.2)
        if any(process.exitcode for process in processes) or time.monotonic() > end:
            time.sleep(2)  # for the others to tell why
            for process in processes:
                process.kill()
                process.join()


def show(setup: Setup, records: list[dict[str, Any]], plain: list[float]) -> None:
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
        low, middle, high = statistics.quantiles(ratios, n=4)
        return f"**{middle:.3f}** ({low:.2f} to {high:.2f})"

    for kind, seconds in times.items():
        losses = [[loss for loss in step if loss is not None] for step in all_losses(records, kind)]
        gap = max(abs(statistics.mean(s) - p) for s, p in zip(losses, plain, strict=True))
        split = records[0][kind]["split"]
        milliseconds = 1000 * statistics.median(seconds)
        print(
            f"| {setup.schedule} | {setup.ranks} | {kind} | {milliseconds:.0f} "
            f"| {ratio(kind, 'torch')} | {ratio(kind, 'ddp')} | {ratio('ours', kind)} "
            f"| {' '.join(map(str, split)) if split else '-'} "
            f"| {gap:.1e}{'' if gap <= 1e-5 else ' **too large**'} |",
            flush=True,
        )


def all_losses(records: list[dict[str, Any]], kind: str) -> Iterator[tuple[float | None, ...]]:
    """Yield for every step the losses that the ranks returned."""
    return zip(*(record[kind]["losses"] for record in records), strict=True)


def installed(kinds: list[str]) -> list[str]:
    """Return the kinds that can be imported, and print about the others."""
    found = []
    for kind in kinds:
        module = KINDS[kind][0]
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            print(f"no rows for {kind}: {sys.executable} cannot import {module}")
        else:
            found.append(kind)
    return found


def print_versions(kinds: list[str]) -> None:
    cores = os.cpu_count()
    print(f"Python {platform.python_version()}, {cores} cores, {platform.machine()}", end="")
    packages = {"torch": "torch", "deepspeed": "deepspeed", "megatron": "megatron-core"}
    for kind, package in packages.items():
        print(f", {package} {version(package)}" if kind in kinds else "", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    if options.steps < WARMUP + 2:
        parser.error(f"--steps must be at least {WARMUP + 2}, of which {WARMUP} warm up")
    for ranks in options.ranks:
        if LAYERS % (2 * ranks) or options.microbatches % ranks:
            parser.error(f"2 * {ranks} must divide {LAYERS} layers, {ranks} must --microbatches")
    os.environ.update({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    kinds = installed(options.kinds)
    print_versions(kinds)
    plain = measure(Setup("1f1b", options.microbatches, 0, 1), ["plain"], options.steps)
    print("\nRatios are of tokens/s; blocks are those of each stage in turn.\n")
    print("| schedule | ranks | kind | ms | / torch | / ddp | ours / it | blocks | loss gap |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for ranks in options.ranks:
        for schedule in options.schedule:
            setup = Setup(schedule, options.microbatches, 0, ranks)
            able = [kind for kind in kinds if schedule in KINDS[kind][1]]
            show(setup, measure(setup, able, options.steps), plain[0]["plain"]["losses"])


if __name__ == "__main__":
    main()
