"""The one place that composes: a single-device model and a mesh in, a gradient path out."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.comm.buckets import build_buckets, check_trainable
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.sync import Replicated
from bigtrain.optim import decay_kind


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float = 25.0,
) -> GradientPath:
    """Spread `model` over `mesh`, in place, and return the path that its gradients take.

    In this order: move it to the mesh's device; let it compute in `dtype` (fp32, or bf16 with fp32
    main parameters), frozen parameters and saved buffers included; choose the strategy of the
    data-parallel axis; put trainable parameters into flat buckets; make all replicas equal to the
    one of the first rank.

    Raises:
        BigtrainError: there is nothing to train, or a parameter that cannot be.
    """
    check_trainable(model)
    model.to(mesh.device)
    _cast_untrained(model, dtype)
    sync = Replicated(mesh.dp)
    buckets = build_buckets(model, bucket_mb=bucket_mb, dtype=dtype, kind_of=decay_kind)
    path = GradientPath(model, buckets, sync)
    path.equalize()
    return path


def _cast_untrained(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what buckets do not hold. Buffers that are not saved (tables) keep their precision."""
    saved = model.state_dict(keep_vars=True)
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    for tensor in (*(p for p in model.parameters() if not p.requires_grad), *buffers):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
