"""The one place that composes: a single-device model and a mesh in, a gradient path out."""

from __future__ import annotations

import torch
from torch import nn

from bigtrain.comm.block import Shard, shards_of
from bigtrain.comm.buckets import build_buckets, check_trainable
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.comm.sync import Replicated
from bigtrain.errors import BigtrainError
from bigtrain.optim import decay_kind
from bigtrain.tensor import Plan, apply_tensor_parallel
from bigtrain.tensor.apply import broadcast_replicated
from bigtrain.tensor.plan import match_plan


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    tensor_plan: Plan | None = None,
    sequence_parallel: bool = False,
    tp_chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float = 25.0,
) -> GradientPath:
    """Spread `model` over `mesh`, in place, and return the path that its gradients take.

    In this order: split its layers over the tensor-parallel axis, by `tensor_plan` or the plan
    that it brings along, unless it is made of parallel layers already; move it to the mesh's
    device; let it compute in `dtype` (fp32, or bf16 with fp32 main parameters), frozen parameters
    and saved buffers included; choose the strategy of the data-parallel axis; put trainable
    parameters into flat buckets; make all replicas equal to the one of the first rank.

    Raises:
        BigtrainError: there is nothing to train, or a parameter that cannot be; a plan is missing
            or does not fit; layers are split over other ranks than the mesh says.
    """
    check_trainable(model)
    if shards_of(model):
        _refuse_second_plan(tensor_plan, sequence_parallel)
        _check_groups(model, mesh.tp)
        broadcast_replicated(model.to(mesh.device), mesh.tp)
    elif mesh.tp.degree > 1:
        apply_tensor_parallel(
            model,
            tensor_plan,
            mesh.tp,
            sequence_parallel=sequence_parallel,
            num_chunks=tp_chunks,
            device=mesh.device,
        )
    elif tensor_plan is not None:
        match_plan(model, tensor_plan)  # a plan that is wrong is told of at any degree
    model.to(mesh.device)
    _cast_untrained(model, dtype)
    shards = _all_shards(model, mesh.tp)
    buckets = build_buckets(
        model, bucket_mb=bucket_mb, dtype=dtype, kind_of=decay_kind, shards=shards
    )
    path = GradientPath(model, buckets, Replicated(mesh.dp), shards, (mesh.tp,))
    path.equalize()
    return path


def _refuse_second_plan(plan: Plan | None, sequence_parallel: bool) -> None:
    if plan is not None or sequence_parallel:
        raise BigtrainError(
            "a plan or sequence_parallel for a model that is made of parallel layers already",
            why="how its layers are split was said when they were built",
            mend="leave out tensor_plan and sequence_parallel here; layers take sequence_parallel",
        )


def _check_groups(model: nn.Module, tp: Axis) -> None:
    """Refuse layers that are split over other ranks than the tensor-parallel ones."""
    for name, module in model.named_modules():
        axis = getattr(module, "axis", None)
        if isinstance(axis, Axis) and axis.ranks != tp.ranks:
            raise BigtrainError(
                f"{name} is split over ranks {axis.ranks}, but the mesh's tensor-parallel ranks "
                f"are {tp.ranks}",
                why="what is split over tp is not averaged over dp, and the other way round",
                mend="build the layers with mesh.tp, of a mesh whose layout has that tp degree",
            )


def _all_shards(model: nn.Module, tp: Axis) -> dict[str, Shard]:
    """Return what each parameter and buffer is of its full tensor; most are all of it."""
    split = shards_of(model)
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return {
        name: split.get(name) or Shard.whole(tensor.shape, tp.rank, tp.degree)
        for name, tensor in tensors
    }


def _cast_untrained(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what buckets do not hold. Buffers that are not saved (tables) keep their precision."""
    saved = model.state_dict(keep_vars=True)
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    for tensor in (*(p for p in model.parameters() if not p.requires_grad), *buffers):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
