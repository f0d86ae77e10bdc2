"""The one place that composes: a single-device model and a mesh in, a gradient path out."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.comm.buckets import build_buckets
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.sync import Replicated
from bigtrain.optim import decay_kind


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float = 8.0,
) -> GradientPath:
    """Spread `model` over `mesh`, in place, and return the path that its gradients take.

    In this order: move it to the mesh's device, put its parameters into flat buckets (computing in
    `dtype` afterwards, fp32 or bf16, with fp32 main parameters), choose the strategy of the
    data-parallel axis, and make all replicas equal to the one of rank 0.
    """
    model.to(mesh.device)
    for param in model.parameters():
        if not param.requires_grad and param.is_floating_point():
            param.data = param.data.to(dtype)
    buckets = build_buckets(model, bucket_mb=bucket_mb, dtype=dtype, kind_of=decay_kind)
    path = GradientPath(model, buckets, Replicated(mesh.dp))
    path.equalize()
    return path
