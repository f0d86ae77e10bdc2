"""What benchmarks/zero.py compares: bigtrain's stages of ZeRO, and what a user would take instead.

Every engine trains the same GPT from the same weights with AdamW (fused where torch has it, no
weight decay) and clips the norm of the gradients to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

SEED, LR, CLIP, BETAS = 1234, 1e-4, 1.0, (0.9, 0.95)
SEQ_LEN = 128
SIZES = {
    "tiny": {"num_layers": 1, "hidden_size": 64, "num_heads": 1},
    "14M": {"num_layers": 8, "hidden_size": 384, "num_heads": 6},
    "101M": {"num_layers": 8, "hidden_size": 1024, "num_heads": 8},
}


class Engine(Protocol):
    """A model and what trains it, on this rank."""

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Take one step on this rank's samples; return their loss."""

    def settle(self) -> None:
        """Return when nothing of the last step is under way."""


def make_model(size: str) -> Any:
    from bigtrain.models.gpt import GPT

    torch.manual_seed(SEED)
    return GPT(vocab_size=256, max_seq_len=SEQ_LEN, **SIZES[size])


class Ours:
    """bigtrain: `zero` are keys of the config section; the model computes in `dtype`."""

    def __init__(
        self, size: str, dtype: torch.dtype = torch.float32, bucket_mb: float = 25.0, **zero: Any
    ) -> None:
        import bigtrain
        from bigtrain.config.layout import Layout
        from bigtrain.config.schema import ZeroSection
        from bigtrain.optim import AdamW

        mesh = bigtrain.Mesh.build(Layout(dp=dist.get_world_size()), _world(), torch.device("cpu"))
        self.model = make_model(size)
        self.section = ZeroSection(**zero)
        self.path = bigtrain.parallelize(
            self.model, mesh, zero=self.section, dtype=dtype, bucket_mb=bucket_mb
        )
        self.optimizer = AdamW(self.path, lr=LR, betas=BETAS, weight_decay=0.0)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.model(tokens, targets)
        self.path.backward(loss)
        self.path.finish()
        divisor = ((self.path.grad_norm() + 1e-6) / CLIP).clamp(min=1.0)
        self.optimizer.step(None, divisor, self.path.publish)
        self.path.publish()
        return loss.detach()

    def settle(self) -> None:
        self.path.settle()


def _world() -> Any:
    from bigtrain.comm.world import World

    rank, ranks = dist.get_rank(), dist.get_world_size()
    return World(rank, ranks, rank, ranks)


class Torch:
    """A loop by hand around a model that torch has wrapped."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return loss.detach()

    def settle(self) -> None:
        pass


ADAMW = {"lr": LR, "betas": BETAS, "weight_decay": 0.0, "fused": True}


def ddp(size: str) -> Torch:
    model = nn.parallel.DistributedDataParallel(make_model(size))
    return Torch(model, torch.optim.AdamW(model.parameters(), **ADAMW))


def zero_redundancy(size: str) -> Torch:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(make_model(size))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **ADAMW)
    return Torch(model, optimizer)


def fsdp2(size: str, reshard: bool, param_dtype: torch.dtype | None = None) -> Torch:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = make_model(size)
    options: dict[str, Any] = {
        "mesh": init_device_mesh("cpu", (dist.get_world_size(),)),
        "reshard_after_forward": reshard,
    }
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return Torch(model, torch.optim.AdamW(model.parameters(), **ADAMW))


class DeepSpeed:
    """DeepSpeed with its defaults, and torch's optimizer. Needs DS_ACCELERATOR=cpu."""

    def __init__(self, size: str, batch: int, stage: int, bf16: bool = False) -> None:
        import deepspeed

        model = make_model(size)
        ranks = dist.get_world_size()
        config = {
            "train_micro_batch_size_per_gpu": batch,
            "train_batch_size": batch * ranks,
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = self.engine(tokens, targets)
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def settle(self) -> None:
        pass


BF16 = torch.bfloat16
# name -> what it is, and what makes it of (size, samples per rank)
OURS: dict[str, Callable[..., Engine]] = {
    "ours-0": partial(Ours, stage=0),
    "ours-1": partial(Ours, stage=1),
    "ours-2": partial(Ours, stage=2),
    "ours-3": partial(Ours, stage=3),
    "ours-3-kept": partial(Ours, stage=3, reshard_after_forward=False),
    "ours-2-bf16": partial(Ours, dtype=BF16, stage=2),
    "ours-3-bf16": partial(Ours, dtype=BF16, stage=3),
    "ours-2-bf16-wire": partial(Ours, dtype=BF16, stage=2, reduce_dtype="bf16"),
}
TORCH: dict[str, Callable[..., Engine]] = {
    "ddp": ddp,
    "zro": zero_redundancy,
    "fsdp2-2": partial(fsdp2, reshard=False),
    "fsdp2-3": partial(fsdp2, reshard=True),
    "fsdp2-2-bf16": partial(fsdp2, reshard=False, param_dtype=BF16),
    "fsdp2-3-bf16": partial(fsdp2, reshard=True, param_dtype=BF16),
}
DEEPSPEED: dict[str, Callable[..., Engine]] = {
    "deepspeed-2": partial(DeepSpeed, stage=2),
    "deepspeed-3": partial(DeepSpeed, stage=3),
    "deepspeed-2-bf16": partial(DeepSpeed, stage=2, bf16=True),
}
KINDS = [*TORCH, *OURS, *DEEPSPEED]


def build(kind: str, size: str, batch: int) -> Engine:
    """Return the engine of that name."""
    if kind in DEEPSPEED:
        return DEEPSPEED[kind](size, batch)
    return {**OURS, **TORCH}[kind](size)
