"""The one place that composes: a single-device model and a mesh in, what trains it out."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeGuard, get_args

import torch
from torch import nn

from bigtrain.comm.block import Shard, shards_of
from bigtrain.comm.buckets import Wanted, build_buckets, check_trainable
from bigtrain.comm.collectives import all_gather_object, together
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.comm.p2p import Links
from bigtrain.comm.sync import GradientSync
from bigtrain.comm.transport import over_mpi
from bigtrain.config.check_compression import PUBLISHED, idle_keys, refused_with_zero
from bigtrain.config.schema import CompressionKind, CompressionSection, ZeroSection
from bigtrain.errors import BigtrainError
from bigtrain.onebit.kinds import packing_wire, published
from bigtrain.ops.dropout import number_dropout
from bigtrain.optim import WHOLE_KINDS, KindOf, decay_kind, known_kind
from bigtrain.pipeline.run import Pipeline
from bigtrain.pipeline.schedule import make_table, placement_of
from bigtrain.pipeline.split import (
    Bounds,
    Chain,
    make_stages,
    prune,
    tensors_of,
)
from bigtrain.pipeline.stage import whole
from bigtrain.pipeline.table import Table
from bigtrain.pipeline.units import chain_of, choose_cuts
from bigtrain.pipeline.validate import validate
from bigtrain.tensor import Plan, apply_tensor_parallel
from bigtrain.tensor.apply import broadcast_replicated
from bigtrain.tensor.plan import match_plan
from bigtrain.zero.share import Sharings, as_it_is
from bigtrain.zero.state import state_memory
from bigtrain.zero.wire import make_wire

log = logging.getLogger(__name__)

FROZEN = "frozen"


def _as_it_is(sync: GradientSync) -> GradientSync:
    return sync


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    tensor_plan: Plan | None = None,
    sequence_parallel: bool = False,
    tp_chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float = 25.0,
    zero: int | ZeroSection = 0,
    compression: str | CompressionSection = "none",
    kind_of: KindOf = decay_kind,
) -> GradientPath:
    """Spread `model` over `mesh`, in place, and return the path that its gradients take.

    In this order: split its layers over the tensor-parallel axis, by `tensor_plan` or the plan
    that it brings along, unless it is made of parallel layers already; move it to the mesh's
    device; let it compute in `dtype` (fp32, or bf16, fp16 with fp32 main parameters), frozen
    parameters and saved buffers included; choose the strategy of the data-parallel axis; put
    trainable parameters into flat buckets; make all replicas equal to the one of the first rank.

    Raises:
        BigtrainError: there is nothing to train, or a parameter that cannot be; a plan is missing
            or does not fit; layers are split over other ranks than the mesh says; the mesh has a
            pipeline axis, which is `build_pipeline`'s.
    """
    if mesh.pp.degree > 1:
        raise BigtrainError(
            f"parallelize() with a mesh of pp={mesh.pp.degree}",
            why="a model that is cut into stages has no forward of its own",
            mend="use build_pipeline(), and the step() of what it returns",
        )
    pipeline = build_pipeline(
        model,
        mesh,
        tensor_plan=tensor_plan,
        sequence_parallel=sequence_parallel,
        tp_chunks=tp_chunks,
        dtype=dtype,
        bucket_mb=bucket_mb,
        zero=zero,
        compression=compression,
        kind_of=kind_of,
    )
    return pipeline.path


def build_pipeline(
    model: nn.Module,
    mesh: Mesh,
    *,
    schedule: str | Table = "1f1b",
    virtual_stages: int = 1,
    split: Sequence[str] | None = None,
    cost: str = "counted",
    example: Any = None,
    loss_of: Callable[[Any, Any], Any] | None = None,
    tensor_plan: Plan | None = None,
    sequence_parallel: bool = False,
    tp_chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    bucket_mb: float = 25.0,
    zero: int | ZeroSection = 0,
    compression: str | CompressionSection = "none",
    kind_of: KindOf = decay_kind,
    around: Callable[[GradientSync], GradientSync] = _as_it_is,
) -> Pipeline:
    """Spread `model` over `mesh`, in place, its pipeline axis included; return what runs it.

    As `parallelize`; after tensor parallelism the model is cut into stages, of which this rank
    keeps its own. With a pipeline degree of 1 there is one stage, the whole model.

    schedule: a name (see `bigtrain schedule`), or a table for a fixed number of microbatches.
    virtual_stages: stages per rank, where the schedule leaves that open.
    split: where stages but the first begin, by the names of units: the layers that the model lists
        (`pipeline_layers()`), or any modules of it. None: stages of about equal cost.
    cost: "counted" (operations, from shapes alone) or "measured" (time on the first rank's CPU).
    zero: what data-parallel ranks share out, a stage or all about it (see docs/zero.md).
    compression: how gradients and updates travel, a kind or all about it (see docs/compression.md).
    around: makes of the strategy of the data-parallel axis another one that uses it.
    kind_of(name, parameter): what the optimizer does with it; `decay_kind`, or `kinds_for` of one.
    example, loss_of: a batch (of one microbatch) and the loss function that will be used. Needed
        to find the units of a model that lists no layers, and to balance; all ranks give the same.

    Raises:
        BigtrainError: as `parallelize`; a schedule or a split that does not fit the model.
    """
    check_trainable(model)
    number_dropout(model)
    if isinstance(schedule, Table):
        placement = schedule.placement
    else:
        placement = placement_of(schedule, mesh.pp.degree, virtual_stages)
    _check_table(schedule, mesh)
    chain: Chain | None = None
    bounds: Bounds = []
    if len(placement) > 1:
        chosen = together(
            # The first rank alone, since times would differ from rank to rank.
            lambda: (
                mesh.world.rank == 0
                and choose_cuts(model, len(placement), split or None, cost, example, loss_of)
            ),
            mesh.world,
            "cutting the model into stages",
        )
        chain, bounds = chain_of(model, all_gather_object(chosen, mesh.world, "agreement")[0])
    _split_layers(model, mesh, tensor_plan, sequence_parallel, tp_chunks)
    cut = _cut(model, mesh, chain, bounds, placement, dtype)
    model.to(mesh.device)
    _cast_untrained(model, dtype)
    section = zero if isinstance(zero, ZeroSection) else _zero_section(zero)
    packed = _compression_section(compression)
    path = _path(model, mesh, cut, dtype, bucket_mb, section, packed, kind_of, around)
    stages = [whole(model)]
    if chain is not None:
        here = [stage for stage, rank in enumerate(placement) if rank == mesh.pp.rank]
        stages = make_stages(chain, bounds, here, cut.stage_parameters)
    links = Links(mesh, mesh.pp)
    table_for = _tables(schedule, mesh.pp.degree, virtual_stages)
    every = sum(math.prod(cut.shards[n].shape) for t, n in cut.names.items() if _is_param(t))
    return Pipeline(path, stages, mesh.pp, links, table_for, placement, every)


def _zero_section(stage: int) -> ZeroSection:
    if stage not in (0, 1, 2, 3):
        raise BigtrainError(
            f"zero={stage!r} is no stage",
            why="0 copies everything; 1 shares optimizer state, 2 gradients too, 3 parameters too",
            mend="use 0, 1, 2 or 3, or a ZeroSection",
        )
    return ZeroSection(stage=stage)  # type: ignore[arg-type]


def _path(
    model: nn.Module,
    mesh: Mesh,
    cut: _Cut,
    dtype: torch.dtype,
    bucket_mb: float,
    zero: ZeroSection,
    compression: CompressionSection,
    kind_of: KindOf,
    around: Callable[[GradientSync], GradientSync],
) -> GradientPath:
    """Put what this rank trains into buckets, equal on all ranks that hold it."""
    holders = {cut.holders[n] for t, n in cut.names.items() if _is_param(t)}
    sharings = _sharings(mesh, zero, compression, holders)
    own = {*model.parameters(), *model.buffers()}
    names = {tensor: name for tensor, name in cut.names.items() if tensor in own}
    wanted = [
        Wanted(
            name,
            p,
            known_kind(name, p, kind_of) if p.requires_grad else FROZEN,
            cut.shards[name],
            sharings.of(cut.holders[name], p, cut.shards[name]),
            cut.stages_of(p),
        )
        for p, name in names.items()
        if _is_param(p) and (p.requires_grad or (zero.stage == 3 and p.is_floating_point()))
    ]
    # Buckets leave in the reverse of this order: last what stages share, which comes last in
    # backward, and before it what goes exactly beside compressed ones, which would cut these up.
    wanted.sort(key=lambda w: (len(cut.holders[w.name]) == 1, w.sharing.in_few_bits))
    memory = state_memory(zero.offload, zero.offload_dir, mesh.device)
    buckets = build_buckets(
        wanted, bucket_mb=bucket_mb, dtype=dtype, new_state=memory, uncut=WHOLE_KINDS
    )
    return GradientPath(
        model,
        buckets,
        around(sharings.sync()),
        cut.shards,
        (mesh.tp, mesh.pp),
        mesh.tp,
        names=names,
        axis_of=lambda name: sharings.axis_of(cut.holders[name]),
        device=mesh.device,
    )


def _compression_section(kind: str | CompressionSection) -> CompressionSection:
    if isinstance(kind, CompressionSection):
        return kind
    kinds = get_args(CompressionKind)
    if kind not in kinds:
        raise BigtrainError(
            f"compression={kind!r} is no kind",
            why="safe sends gradients in 4 bits and updates in 8, none all as it is; docs/"
            "compression.md has a table of the others",
            mend=f"use {', '.join(kinds)}, or a CompressionSection",
        )
    return CompressionSection(kind=kind)  # type: ignore[arg-type]


def _sharings(
    mesh: Mesh,
    zero: ZeroSection,
    compression: CompressionSection,
    holders: Set[tuple[int, ...]],
) -> Sharings:
    """Return how parameters are shared out, and by what they travel."""
    plain = make_wire(zero.reduce_dtype)
    if compression.kind != "none":
        _check_nodes(mesh, compression)
    if compression.kind == "none" or mesh.dp.degree in (1, compression.node_degree):
        return Sharings(mesh, zero, holders, plain)  # there is no way across

    _refuse(compression, zero)

    def compresses(param: torch.Tensor, shard: Shard) -> bool:
        # What several ranks hold beside data-parallel ones must stay equal there, bit for bit.
        large = len(shard.shape) > 1 and math.prod(shard.shape) >= compression.least_numel
        return large and shard.num_replicas == 1

    if compression.kind in PUBLISHED:
        strategy = partial(published, section=compression)
        return Sharings(mesh, zero, holders, plain, compresses, replicated=strategy)
    senders = mesh.dp.degree // compression.node_degree
    wire = packing_wire(plain, make_wire("bf16"), compression, senders)
    # Somebody must own what all others get by deltas.
    owned = zero if zero.stage else zero.model_copy(update={"stage": 1})
    carried = over_mpi if compression.transport == "mpi" else as_it_is
    sharings = Sharings(mesh, owned, holders, wire, compresses, compression.node_degree, carried)
    _warn_of_nodes(mesh, sharings.nodes.node)
    return sharings


def _check_nodes(mesh: Mesh, compression: CompressionSection) -> None:
    degree, dp = compression.node_degree, mesh.dp.degree
    if dp % degree:
        raise BigtrainError(
            f"compression.node_degree={degree} does not divide dp={dp}",
            why="nodes have the same number of data-parallel ranks",
            mend="use the number of them on one machine, or 1",
        )


def _warn_of_nodes(mesh: Mesh, node: Axis) -> None:
    """Say once if what goes exactly inside a node goes from machine to machine."""
    if node.degree == 1:
        return
    good = all_gather_object(mesh.on_one_machine(node), mesh.world, "what is on one machine")
    if mesh.rank == 0 and not all(good):
        log.warning(
            "compression.node_degree = %d: the data-parallel ranks of a node are on several "
            "machines, so that uncompressed gradients go between these (e.g. those of rank %d); "
            "set it to the number of data-parallel ranks on one machine",
            node.degree,
            good.index(False),
        )


def _refuse(compression: CompressionSection, zero: ZeroSection) -> None:
    """Refuse, for loops of one's own, what a config is refused for."""
    for problem in (*idle_keys(compression), *refused_with_zero(compression, zero)):
        raise BigtrainError(problem.what, why=problem.why, mend=problem.mend)


def _is_param(tensor: torch.Tensor) -> TypeGuard[nn.Parameter]:
    return isinstance(tensor, nn.Parameter)


def _check_table(schedule: str | Table, mesh: Mesh) -> None:
    if isinstance(schedule, str):
        return
    validate(schedule)
    if schedule.num_ranks != mesh.pp.degree:
        raise BigtrainError(
            f"the schedule {schedule.name} is for {schedule.num_ranks} ranks, "
            f"but the mesh has pp={mesh.pp.degree}",
            why="a table has one row for each pipeline rank",
            mend=f"use pp={schedule.num_ranks}, or another table",
        )


def _tables(schedule: str | Table, num_ranks: int, virtual: int) -> Callable[[int], Table]:
    """Return what makes the table for a number of microbatches."""

    def table_for(num_microbatches: int) -> Table:
        if isinstance(schedule, str):
            return make_table(schedule, num_ranks, num_microbatches, virtual)
        if schedule.num_microbatches != num_microbatches:
            raise BigtrainError(
                f"the schedule {schedule.name} is for {schedule.num_microbatches} microbatches, "
                f"not for {num_microbatches}",
                why="a table from a file has its microbatches written out",
                mend="change the microbatch size, or the table",
            )
        return schedule

    return table_for


def _split_layers(
    model: nn.Module,
    mesh: Mesh,
    tensor_plan: Plan | None,
    sequence_parallel: bool,
    tp_chunks: int,
) -> None:
    """Split the layers of `model` over the tensor-parallel axis."""
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


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A model of which only the stages of this rank are left.

    All is about the full model: the name of each parameter and buffer, which pipeline ranks hold
    it, and what this rank's is of the full tensor (if it has it); the parameters of each stage.
    """

    names: Mapping[torch.Tensor, str]
    holders: Mapping[str, tuple[int, ...]]
    shards: Mapping[str, Shard]
    stage_parameters: Sequence[Sequence[nn.Parameter]]
    stages: Mapping[torch.Tensor, tuple[int, ...]]

    def stages_of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Return the stages on this rank that use a parameter."""
        return self.stages.get(tensor, (0,))


def _cut(
    model: nn.Module,
    mesh: Mesh,
    chain: Chain | None,
    bounds: Bounds,
    placement: Sequence[int],
    dtype: torch.dtype,
) -> _Cut:
    every = (*model.named_parameters(), *model.named_buffers())  # one name for tied ones
    names = {tensor: name for name, tensor in every}
    shards = _all_shards(model, mesh.tp)
    if chain is None:
        return _Cut(names, dict.fromkeys(names.values(), (0,)), shards, [], {})
    owned = [chain.owned(*each) for each in bounds]
    tensors = [tensors_of(model, each) for each in owned]
    known = {tensor for each in tensors for tensor in each}
    # A parameter that no unit uses belongs to the last stage, so that it is saved and decayed.
    unused = [t for t in names if t not in known and isinstance(t, nn.Parameter)]
    owned[-1] |= {names[t] for t in unused}
    tensors[-1] += unused
    # A buffer around the units stays on all ranks.
    holders = dict.fromkeys(names.values(), tuple(range(mesh.pp.degree)))
    found: dict[str, set[int]] = {}
    for rank, mine in zip(placement, tensors, strict=True):
        for tensor in mine:
            found.setdefault(names[tensor], set()).add(rank)
    holders |= {name: tuple(sorted(ranks)) for name, ranks in found.items()}
    for name in names.values():
        shards[name] = _held(shards[name], holders[name], mesh.pp.rank)
    here = [mine for rank, mine in zip(placement, owned, strict=True) if rank == mesh.pp.rank]
    prune(model, set().union(*here), dtype, mesh.device)
    trained = [[t for t in mine if _is_param(t) and t.requires_grad] for mine in tensors]
    stages: dict[torch.Tensor, tuple[int, ...]] = {}
    for stage, (rank, mine) in enumerate(zip(placement, tensors, strict=True)):
        for tensor in mine if rank == mesh.pp.rank else ():
            stages[tensor] = (*stages.get(tensor, ()), stage)
    return _Cut(names, holders, shards, trained, stages)


def _held(shard: Shard, holders: tuple[int, ...], rank: int) -> Shard:
    """Return the shard of what the pipeline ranks `holders` hold alike."""
    number = holders.index(rank) if rank in holders else 0
    return dataclasses.replace(
        shard,
        replica=shard.replica * len(holders) + number,
        num_replicas=shard.num_replicas * len(holders),
        stages=holders,
    )


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
