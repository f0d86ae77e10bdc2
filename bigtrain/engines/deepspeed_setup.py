"""Importing and starting DeepSpeed: quietly, and compiling nothing."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bigtrain.comm.mesh import Mesh
from bigtrain.engines.flat_optimizer import FlatOptimizer
from bigtrain.errors import BigtrainError

TESTED = "0.19.8"


def load_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for this kind of device, quietly, and compiling nothing.

    Raises:
        BigtrainError: it is not installed, or does not work.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    quiet = logging.getLogger("DeepSpeed")
    try:
        import deepspeed
    except ImportError as error:
        raise BigtrainError(
            f"engine.kind = deepspeed, but DeepSpeed cannot be imported: {error}",
            where="engine.kind",
            mend="pip install 'bigtrain[deepspeed]', or set engine.kind=native",
        ) from error
    quiet.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated")
    # It would be compiled at every first start, a minute or more, and is for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def prepare_world(mesh: Mesh) -> None:
    """DeepSpeed wants a process group even for one rank, and LOCAL_RANK."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.local_rank))
    if not dist.is_initialized():
        backend = "nccl" if mesh.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def initialize(
    deepspeed: Any, model: nn.Module, optimizer: FlatOptimizer, settings: dict[str, Any]
) -> Any:
    quiet = logging.getLogger("DeepSpeed")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # and prints how much memory there is
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    except (ValueError, AssertionError, NotImplementedError, KeyError, OSError) as error:
        raise BigtrainError(
            f"DeepSpeed {deepspeed.__version__} does not take this configuration: {error}",
            where="engine",
            why="zero and engine.config are passed on to it",
            mend=f"change them (bigtrain is tested with DeepSpeed {TESTED})",
        ) from error
    finally:
        quiet.setLevel(level)
    return engine
