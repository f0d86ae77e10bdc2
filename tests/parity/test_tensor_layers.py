"""Each parallel layer alone equals its plain torch counterpart in one process.

Every rank builds the plain layer from the same seed, runs both, and compares outputs, gradients of
inputs and gradients of its part of the parameters. Errors are relative, in the 2-norm of a tensor.
A sum that is split over ranks adds the same fp32 numbers in another order: below 5e-6. bf16 rounds
to 8 bits (4e-3) every number that crosses ranks: below 2e-2. A wrong part or a lost contribution
shows as 1e-1 and more. Some gradients are zero but for rounding (the bias of keys, to which softmax
is blind), so errors are never taken relative to less than a tenth of the largest gradient.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from parity_models import PlainAttention, PlainMLP, recorded_collectives, survey
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from bigtrain.comm.block import shards_of
from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError
from bigtrain.ops.dropout import Dropout, seed_dropout
from bigtrain.tensor import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    SharedInput,
    Style,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    apply_tensor_parallel,
    gather_channels,
    gather_sequence,
    reduce_sum,
    reduce_to_sequence,
    split_channels,
    split_sequence,
    sum_gradients,
    vocab_parallel_cross_entropy,
)

pytestmark = pytest.mark.parity
FP32, BF16 = 5e-6, 2e-2


# -- tools ------------------------------------------------------------------------------------


def same(
    got: torch.Tensor | None,
    wanted: torch.Tensor,
    what: str,
    most: float = FP32,
    floor: float = 1e-4,
) -> None:
    assert got is not None, f"{what} is missing"
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), what
    error = (got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=floor)
    assert error < most, f"{what}: {error}"


def own_part(
    full: torch.Tensor, dim: int, degree: int, rank: int, units: Sequence[int] = ()
) -> torch.Tensor:
    """What a rank should have of `full`, written down apart from bigtrain.tensor.split."""
    if not units:
        return full.tensor_split(degree, dim)[rank]
    size = full.shape[dim] // sum(units)
    parts = full.split([num * size for num in units], dim)
    cuts = [min(num, degree) for num in units]  # fewer heads than ranks: neighbours share one
    own = [p.tensor_split(n, dim)[rank * n // degree] for p, n in zip(parts, cuts, strict=True)]
    return torch.cat(own, dim)


def sequence_part(full: torch.Tensor, tp: Axis) -> torch.Tensor:
    return full.chunk(tp.degree, -2)[tp.rank]


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_()


def compare(
    layer: nn.Module,
    plain: nn.Module,
    tp: Axis,
    x: torch.Tensor,
    *,
    sequence: bool = False,
    most: float = FP32,
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda module, x: module(x),
) -> None:
    """Compare modules whose input and output are whole, or parts of the sequence."""
    part = partial(sequence_part, tp=tp) if sequence else lambda t: t
    whole, own = leaf(x), leaf(part(x))
    draws = torch.get_rng_state()
    wanted = call(plain, whole)
    torch.set_rng_state(draws)
    got = call(layer, own)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2)).to(wanted)
    wanted.backward(upstream)
    got.backward(part(upstream))
    same(got, part(wanted), "output", most)
    same(own.grad, part(whole.grad), "gradient of the input", most)
    compare_gradients(layer, plain, most)


def compare_gradients(layer: nn.Module, plain: nn.Module, most: float = FP32) -> None:
    shards = shards_of(layer)
    theirs = dict(plain.named_parameters())
    assert list(layer.state_dict()) == list(plain.state_dict())
    norms = [float(p.grad.norm()) for p in theirs.values() if p.grad is not None]
    floor = 0.1 * max(norms, default=0.0) + 1e-4
    for name, param in layer.named_parameters():
        wanted = theirs[name].grad
        if wanted is None:
            assert param.grad is None, name
        else:
            wanted = shards[name].take(wanted) if name in shards else wanted
            same(param.grad, wanted, f"gradient of {name}", most, floor)


# -- linear layers ----------------------------------------------------------------------------


def column(
    tp: Axis,
    lead: tuple[int, ...] = (3, 8),
    sizes: tuple[int, int] = (6, 16),
    *,
    bias: bool = True,
    gather: bool = False,
    sequence: bool = False,
    units: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
) -> None:
    torch.manual_seed(1)
    most = FP32 if dtype == torch.float32 else BF16
    plain = nn.Linear(*sizes, bias=bias).to(dtype)
    layer = ColumnParallelLinear(
        *sizes,
        tp,
        linear=copy.deepcopy(plain),
        gather_output=gather,
        sequence_parallel=sequence,
        units=units,
        share=len(units) == 1,
    )
    x = torch.randn(*lead, sizes[0]).to(dtype)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    upstream = torch.randn(tp.degree, *lead, sizes[1]).to(dtype)

    def loss(y: torch.Tensor, rank: int) -> torch.Tensor:
        """What this rank's output counts for; ranks that share units have losses of their own."""
        return (y * (upstream[0] if gather else mine(upstream[rank], -1, rank))).sum()

    def mine(full: torch.Tensor, dim: int, rank: int = tp.rank) -> torch.Tensor:
        return own_part(full, dim, tp.degree, rank, units)

    whole = x.detach().requires_grad_()
    wanted = plain(whole)
    if gather:
        loss(wanted, 0).backward()
    else:
        sum(loss(mine(wanted, -1, rank), rank) for rank in range(tp.degree)).backward()
    own = (sequence_part(x, tp) if sequence else x).detach().requires_grad_()
    got = layer(own)
    loss(got, tp.rank).backward()
    same(got, wanted if gather else mine(wanted, -1), "output", most)
    same(own.grad, sequence_part(whole.grad, tp) if sequence else whole.grad, "dX", most)
    same(layer.weight.grad, mine(plain.weight.grad, 0), "gradient of the weight", most)
    assert torch.equal(layer.shards["weight"].take(plain.weight), mine(plain.weight, 0))
    assert (layer.bias is not None) == bias
    if bias:
        same(layer.bias.grad, mine(plain.bias.grad, 0), "gradient of the bias", most)


def row(
    tp: Axis,
    lead: tuple[int, ...] = (4, 8),
    sizes: tuple[int, int] = (16, 6),
    *,
    bias: bool = True,
    parallel: bool = True,
    sequence: bool = False,
    units: tuple[int, ...] = (),
    chunks: int = 1,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
) -> None:
    torch.manual_seed(1)
    most = FP32 if dtype == torch.float32 else BF16
    plain = nn.Linear(*sizes, bias=bias).to(dtype)
    layer = RowParallelLinear(
        *sizes,
        tp,
        linear=copy.deepcopy(plain),
        input_is_parallel=parallel,
        sequence_parallel=sequence,
        units=units,
        num_chunks=chunks,
    )
    x = torch.randn(*lead, sizes[0]).to(dtype)
    if strided:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    upstream = torch.randn(*lead, sizes[1]).to(dtype)

    def mine(full: torch.Tensor, dim: int) -> torch.Tensor:
        return own_part(full, dim, tp.degree, tp.rank, units)

    def part(full: torch.Tensor) -> torch.Tensor:
        return sequence_part(full, tp) if sequence else full

    whole = x.detach().requires_grad_()
    wanted = plain(whole)
    wanted.backward(upstream)
    own = (mine(x, -1) if parallel else x).detach().requires_grad_()
    got = layer(own)
    got.backward(part(upstream))
    same(got, part(wanted), "output", most)
    same(own.grad, mine(whole.grad, -1) if parallel else whole.grad, "dX", most)
    same(layer.weight.grad, mine(plain.weight.grad, 1), "gradient of the weight", most)
    assert torch.equal(layer.shards["weight"].take(plain.weight), mine(plain.weight, 1))
    assert (layer.bias is not None) == bias
    if bias:
        same(layer.bias.grad, plain.bias.grad, "gradient of the bias", most)


LINEAR: dict[str, Callable[[Axis], None]] = {
    "column": column,
    "column-no-bias": partial(column, bias=False),
    "column-1d": partial(column, lead=()),
    "column-2d": partial(column, lead=(5,)),
    "column-4d": partial(column, lead=(2, 3, 4)),
    "column-strided": partial(column, strided=True),
    "column-uneven": partial(column, sizes=(5, 13)),
    "column-sequence": partial(column, sequence=True),
    "column-sequence-no-bias": partial(column, sequence=True, bias=False),
    "column-sequence-uneven": partial(column, sequence=True, sizes=(5, 13)),
    "column-sequence-2d": partial(column, sequence=True, lead=(8,)),
    "column-sequence-4d": partial(column, sequence=True, lead=(2, 3, 8)),
    "column-fused": partial(column, units=(16, 8, 8), sizes=(6, 64)),
    "column-fused-sequence": partial(column, units=(8, 8, 8), sizes=(6, 48), sequence=True),
    "column-kv2": partial(column, units=(2,), sizes=(6, 8)),
    "column-kv1": partial(column, units=(1,), sizes=(6, 4)),
    "column-kv2-sequence": partial(column, units=(2,), sizes=(6, 8), sequence=True),
    "column-kv1-no-bias": partial(column, units=(1,), sizes=(6, 4), bias=False),
    "column-bf16": partial(column, dtype=torch.bfloat16),
    "column-bf16-sequence": partial(column, dtype=torch.bfloat16, sequence=True),
    "column-empty": partial(column, lead=(0,)),
    "column-empty-3d-sequence": partial(column, lead=(0, 8), sequence=True),
    "column-gather": partial(column, gather=True),
    "column-gather-1d": partial(column, gather=True, lead=()),
    "column-gather-uneven": partial(column, gather=True, sizes=(5, 13)),
    "column-gather-fused": partial(column, gather=True, units=(16, 8, 8), sizes=(6, 64)),
    "column-gather-sequence": partial(column, gather=True, sequence=True, bias=False, lead=(8,)),
    "column-gather-empty": partial(column, gather=True, lead=(0, 4)),
    "column-fewer-than-ranks": partial(column, sizes=(5, 3)),
    "column-fewer-than-ranks-sequence": partial(column, sizes=(5, 3), sequence=True),
    "column-fewer-than-ranks-gather": partial(column, sizes=(5, 3), gather=True),
    "row": row,
    "row-no-bias": partial(row, bias=False),
    "row-1d": partial(row, lead=()),
    "row-2d": partial(row, lead=(5,)),
    "row-4d": partial(row, lead=(2, 3, 4)),
    "row-strided": partial(row, strided=True),
    "row-uneven": partial(row, sizes=(13, 5)),
    "row-sequence": partial(row, sequence=True),
    "row-sequence-no-bias": partial(row, sequence=True, bias=False),
    "row-sequence-uneven": partial(row, sequence=True, sizes=(13, 5)),
    "row-sequence-2d": partial(row, sequence=True, lead=(8,)),
    "row-sequence-4d": partial(row, sequence=True, lead=(2, 3, 8)),
    "row-units": partial(row, units=(8,)),
    "row-fused-units": partial(row, units=(8, 16), sizes=(48, 6)),
    "row-chunks": partial(row, chunks=2),
    "row-chunks-uneven": partial(row, chunks=3, lead=(5, 3)),
    "row-chunks-more-than-rows": partial(row, chunks=9, lead=(2, 3)),
    "row-chunks-1d": partial(row, chunks=2, lead=()),
    "row-chunks-2d": partial(row, chunks=2, lead=(5,)),
    "row-chunks-sequence": partial(row, chunks=3, sequence=True),
    "row-chunks-empty": partial(row, chunks=2, lead=(0, 3)),
    "row-chunks-sequence-2d": partial(row, chunks=2, sequence=True, lead=(16,)),
    "row-bf16": partial(row, dtype=torch.bfloat16),
    "row-bf16-sequence": partial(row, dtype=torch.bfloat16, sequence=True),
    "row-empty": partial(row, lead=(0,)),
    "row-empty-3d-sequence": partial(row, lead=(0, 8), sequence=True),
    "row-whole-input": partial(row, parallel=False),
    "row-whole-input-1d": partial(row, parallel=False, lead=()),
    "row-whole-input-uneven": partial(row, parallel=False, sizes=(13, 5)),
    "row-whole-input-units": partial(row, parallel=False, units=(8,)),
    "row-whole-input-sequence": partial(row, parallel=False, sequence=True),
    "row-fewer-than-ranks": partial(row, sizes=(3, 5)),
    "row-fewer-than-ranks-sequence": partial(row, sizes=(3, 5), sequence=True),
}


# -- embedding and loss -----------------------------------------------------------------------


def embedding(
    tp: Axis,
    shape: tuple[int, ...] = (3, 8),
    num: int = 61,
    *,
    padding: int | None = None,
    sequence: bool = False,
    dtype: torch.dtype = torch.float32,
    ids: torch.dtype = torch.int64,
) -> None:
    torch.manual_seed(1)
    plain = nn.Embedding(num, 6, padding_idx=padding)
    torch.manual_seed(1)
    layer = VocabParallelEmbedding(num, 6, tp, padding_idx=padding, sequence_parallel=sequence)
    own = own_part(plain.weight, 0, tp.degree, tp.rank)
    assert torch.equal(layer.weight, own)
    assert torch.equal(layer.shards["weight"].take(plain.weight), own)
    plain, layer = plain.to(dtype), layer.to(dtype)
    tokens = torch.randint(0, num, shape).to(ids)
    if padding is not None and tokens.numel():
        tokens.view(-1)[::3] = padding % num
    upstream = torch.randn(*shape, 6).to(dtype)
    wanted, got = plain(tokens), layer(tokens)
    wanted.backward(upstream)
    got.backward(sequence_part(upstream, tp) if sequence else upstream)
    exact = sequence_part(wanted, tp) if sequence else wanted
    assert torch.equal(got, exact)  # one number and zeros are added
    same(layer.weight.grad, own_part(plain.weight.grad, 0, tp.degree, tp.rank), "gradient")


def cross_entropy(
    tp: Axis,
    shape: tuple[int, ...] = (3, 5),
    vocab: int = 16,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    ignored: int = -100,
    all_ignored: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    as_module: bool = False,
    closed: slice = slice(0, 0),
) -> None:
    """`closed`: words whose logit is -inf, as a mask over an enlarged vocabulary has."""
    torch.manual_seed(1)
    values = (torch.randn(*shape, vocab) * scale).to(dtype)
    values[..., closed] = -torch.inf
    targets = torch.randint(0, vocab - (closed.stop - closed.start), shape)
    targets = targets + (closed.stop if closed.start == 0 else 0)
    hidden = torch.zeros(shape, dtype=torch.bool)
    if ignored != -100 or all_ignored:
        hidden = torch.rand(shape) < 0.4 if not all_ignored else ~hidden
    targets = targets.masked_fill(hidden, ignored)
    whole = leaf(values)
    wide = whole.float()
    wanted = F.cross_entropy(
        wide.reshape(-1, vocab),
        targets.reshape(-1),
        label_smoothing=smoothing,
        ignore_index=ignored,
        reduction="none",
    ).view(shape)
    wanted = wanted + z_loss * torch.logsumexp(wide, -1).square() * (targets != ignored)
    if reduction != "none":
        wanted = wanted.sum()
    if reduction == "mean":
        wanted = wanted / (targets != ignored).sum()
    own = leaf(own_part(values, -1, tp.degree, tp.rank))
    options: dict[str, Any] = {
        "vocab_size": vocab,
        "label_smoothing": smoothing,
        "z_loss": z_loss,
        "ignore_index": ignored,
        "reduction": reduction,
    }
    if as_module:
        got = VocabParallelCrossEntropy(tp, **options)(own, targets)
    else:
        got = vocab_parallel_cross_entropy(own, targets, tp, **options)
    assert got.dtype == torch.float32
    if all_ignored or not values.numel():
        assert torch.equal(got.isnan(), wanted.isnan())  # the mean over nothing, as in torch
        return
    upstream = torch.randn(wanted.shape)
    wanted.backward(upstream)
    got.backward(upstream)
    same(got, wanted, "loss")
    most = FP32 if dtype == torch.float32 else BF16
    same(own.grad, own_part(whole.grad, -1, tp.degree, tp.rank), "gradient of the logits", most)


def cross_entropy_is_that_of_torch(tp: Axis) -> None:
    """The reference of the other checks, where torch has the options itself."""
    torch.manual_seed(1)
    values, targets = torch.randn(10, 16), torch.randint(0, 16, (10,))
    targets[3] = targets[7] = 5
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum", "none"):
            wanted = F.cross_entropy(
                values, targets, ignore_index=5, label_smoothing=smoothing, reduction=reduction
            )
            got = vocab_parallel_cross_entropy(
                own_part(values, -1, tp.degree, tp.rank),
                targets,
                tp,
                vocab_size=16,
                ignore_index=5,
                label_smoothing=smoothing,
                reduction=reduction,
            )
            same(got, wanted, f"{smoothing} {reduction}")


def cross_entropy_is_the_same_bits(tp: Axis) -> None:
    torch.manual_seed(1)
    values = torch.randn(50, 61) * 5
    loss = vocab_parallel_cross_entropy(
        own_part(values, -1, tp.degree, tp.rank),
        torch.randint(0, 61, (50,)),
        tp,
        vocab_size=61,
        label_smoothing=0.1,
        z_loss=1e-3,
        reduction="none",
    )
    assert_same_bits(loss, tp)


def assert_same_bits(tensor: torch.Tensor, tp: Axis) -> None:
    everyone: list[Any] = [None] * tp.degree
    if tp.degree > 1:
        dist.all_gather_object(everyone, tensor.detach().numpy().tobytes(), group=tp.group)
        assert len(set(everyone)) == 1


VOCABULARY: dict[str, Callable[[Axis], None]] = {
    "embedding": embedding,
    "embedding-even": partial(embedding, num=64),
    "embedding-1d": partial(embedding, shape=(7,)),
    "embedding-0d": partial(embedding, shape=()),
    "embedding-3d": partial(embedding, shape=(2, 3, 4)),
    "embedding-int32": partial(embedding, ids=torch.int32),
    "embedding-bf16": partial(embedding, dtype=torch.bfloat16),
    "embedding-padding-first": partial(embedding, padding=0),
    "embedding-padding-inside": partial(embedding, padding=33),
    "embedding-padding-last": partial(embedding, padding=-1),
    "embedding-sequence": partial(embedding, sequence=True),
    "embedding-sequence-1d": partial(embedding, shape=(8,), sequence=True),
    "embedding-empty": partial(embedding, shape=(0,)),
    "embedding-empty-sequence": partial(embedding, shape=(0, 8), sequence=True),
    "embedding-fewer-than-ranks": partial(embedding, num=3),
    "embedding-fewer-than-ranks-sequence": partial(embedding, num=3, sequence=True),
    "loss": cross_entropy,
    "loss-1d": partial(cross_entropy, shape=(7,)),
    "loss-0d": partial(cross_entropy, shape=()),
    "loss-uneven": partial(cross_entropy, vocab=13),
    "loss-fewer-than-ranks": partial(cross_entropy, vocab=3),
    "loss-fewer-than-ranks-smoothing": partial(cross_entropy, vocab=3, smoothing=0.1, z_loss=0.1),
    "loss-sum": partial(cross_entropy, reduction="sum"),
    "loss-none": partial(cross_entropy, reduction="none"),
    "loss-smoothing": partial(cross_entropy, smoothing=0.1),
    "loss-smoothing-uneven-none": partial(cross_entropy, smoothing=0.3, vocab=13, reduction="none"),
    "loss-z": partial(cross_entropy, z_loss=0.1),
    "loss-z-smoothing-ignore": partial(cross_entropy, z_loss=0.1, smoothing=0.1, ignored=-1),
    "loss-ignore": partial(cross_entropy, ignored=-7),
    "loss-ignore-a-word": partial(cross_entropy, ignored=5),
    "loss-ignore-all": partial(cross_entropy, all_ignored=True),
    "loss-ignore-all-sum": partial(cross_entropy, all_ignored=True, reduction="sum"),
    "loss-bf16": partial(cross_entropy, dtype=torch.bfloat16),
    "loss-large": partial(cross_entropy, scale=300.0),
    "loss-empty": partial(cross_entropy, shape=(0,)),
    "loss-module": partial(cross_entropy, as_module=True, z_loss=0.1, vocab=13),
    "loss-as-torch": cross_entropy_is_that_of_torch,
    "loss-same-bits": cross_entropy_is_the_same_bits,
    "loss-closed-words": partial(cross_entropy, closed=slice(15, 16)),
    "loss-closed-ranks": partial(cross_entropy, closed=slice(8, 16)),
    "loss-closed-first-rank": partial(cross_entropy, closed=slice(0, 8)),
}


# -- attention and MLP ------------------------------------------------------------------------


def attention(
    tp: Axis,
    *,
    kv: int | None = None,
    bias: bool = True,
    sequence: bool = False,
    chunks: int = 1,
    dropout: float = 0.0,
    seeded: bool = False,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    recompute: bool = False,
    copied: bool = False,
    used: bool = False,
) -> None:
    def build() -> ParallelAttention:
        return ParallelAttention(
            32,
            8,
            tp,
            num_kv_heads=kv,
            bias=bias,
            dropout=dropout,
            sequence_parallel=sequence,
            num_chunks=chunks,
        )

    drop = (Dropout if seeded else nn.Dropout)(dropout) if dropout else None
    twins(
        tp,
        build,
        lambda: PlainAttention(32, 8, kv, bias, drop),
        (batch, 8, 32),
        sequence=sequence,
        seeded=seeded,
        dtype=dtype,
        autocast=autocast,
        recompute=recompute,
        copied=copied,
        used=used,
    )


def mlp(
    tp: Axis,
    *,
    shape: tuple[int, ...] = (2, 8, 6),
    inner: int = 16,
    activation: str = "gelu",
    gated: bool = False,
    bias: bool = True,
    sequence: bool = False,
    chunks: int = 1,
    dropout: float = 0.0,
    seeded: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: bool = False,
    recompute: bool = False,
    copied: bool = False,
    used: bool = False,
) -> None:
    functions = {
        "gelu": F.gelu,
        "relu": F.relu,
        "silu": F.silu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
    }
    drop = (Dropout if seeded else nn.Dropout)(dropout) if dropout else None

    def build() -> ParallelMLP:
        return ParallelMLP(
            6,
            inner,
            tp,
            activation=activation,
            gated=gated,
            bias=bias,
            dropout=dropout,
            sequence_parallel=sequence,
            num_chunks=chunks,
        )

    twins(
        tp,
        build,
        lambda: PlainMLP(6, inner, functions[activation], gated, bias, drop),
        shape,
        sequence=sequence,
        seeded=seeded,
        dtype=dtype,
        autocast=autocast,
        recompute=recompute,
        copied=copied,
        used=used,
    )


def twins(
    tp: Axis,
    build: Callable[[], nn.Module],
    build_plain: Callable[[], nn.Module],
    shape: tuple[int, ...],
    *,
    sequence: bool,
    seeded: bool,
    dtype: torch.dtype,
    autocast: bool,
    recompute: bool,
    copied: bool,
    used: bool,
) -> None:
    """Build both from one seed, and compare them, called in the given way.

    used: after a step of training; copied: what is compared is a deep copy.
    """
    torch.manual_seed(4)
    layer = build()
    torch.manual_seed(4)
    plain = build_plain()
    shards = shards_of(layer)
    for name, param in layer.named_parameters():
        assert torch.equal(param, shards[name].take(plain.get_parameter(name))), name
    layer, plain = layer.to(dtype), plain.to(dtype)
    x = torch.randn(shape).to(dtype)
    if used:
        layer(sequence_part(x, tp) if sequence else x).sum().backward()
        layer.zero_grad()
    if copied:
        layer = copy.deepcopy(layer)

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if seeded:
            seed_dropout(module, [10 + i for i in range(len(x))])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return checkpoint(module, x, use_reentrant=False) if recompute else module(x)

    most = BF16 if autocast or dtype == torch.bfloat16 else FP32
    compare(layer, plain, tp, x, sequence=sequence, most=most, call=call)


def dropout_on_sequence(tp: Axis, seeded: bool) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(Dropout(0.4) if seeded else nn.Dropout(0.4))
    split = apply_tensor_parallel(
        copy.deepcopy(plain), {"0": "sequence"}, tp, sequence_parallel=True
    )

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if seeded:
            seed_dropout(module, [3, 4, 5])
        return module(x)

    x = torch.randn(3, 8, 5)
    compare(split, plain, tp, x, sequence=True, call=call)
    compare(split.eval(), plain.eval(), tp, x, sequence=True, call=call)


def dropout_on_columns(tp: Axis, seeded: bool) -> None:
    torch.manual_seed(3)
    kind = Dropout if seeded else nn.Dropout
    plain = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), kind(0.4), nn.Linear(16, 5))
    split = apply_tensor_parallel(
        copy.deepcopy(plain), {"0": "column", "2": "column", "3": "row"}, tp
    )

    def call(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if seeded:
            seed_dropout(module, [3, 4, 5])
        return module(x)

    compare(split, plain, tp, torch.randn(3, 8, 5), call=call)


def attention_with_rotation_and_mask(tp: Axis) -> None:
    """Masks of booleans and of numbers, with and without dropout inside, equal plain attention."""
    torch.manual_seed(4)
    layer = ParallelAttention(32, 8, tp, causal=False)
    torch.manual_seed(4)
    plain = PlainAttention(32, 8)
    x = torch.randn(2, 6, 32)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        wanted = plain(x)
        same(layer(x, mask=causal), wanted, "boolean mask")
        numbers = torch.zeros(6, 6).masked_fill(~causal, -torch.inf)
        same(layer(x, mask=numbers), wanted, "additive mask")
        same(layer(x, lambda t: -t, causal), wanted, "q and k turned alike")
        assert not torch.allclose(layer(x), wanted)  # not causal without a mask
        layer.dropout.p = 1e-12  # the path that writes attention out
        same(layer(x, mask=causal), wanted, "boolean mask, with dropout")
        same(layer(x, mask=numbers), wanted, "additive mask, with dropout")


BLOCKS: dict[str, Callable[[Axis], None]] = {
    "attention": attention,
    "attention-no-bias": partial(attention, bias=False),
    "attention-kv4": partial(attention, kv=4),
    "attention-kv2": partial(attention, kv=2),
    "attention-kv1": partial(attention, kv=1),
    "attention-sequence": partial(attention, sequence=True),
    "attention-kv2-sequence": partial(attention, kv=2, sequence=True),
    "attention-chunks": partial(attention, chunks=2),
    "attention-chunks-sequence": partial(attention, chunks=2, sequence=True),
    "attention-empty": partial(attention, batch=0),
    "attention-empty-sequence": partial(attention, batch=0, sequence=True),
    "attention-bf16": partial(attention, dtype=torch.bfloat16),
    "attention-autocast": partial(attention, autocast=True),
    "attention-autocast-kv1-sequence": partial(attention, autocast=True, kv=1, sequence=True),
    "attention-recompute": partial(attention, recompute=True),
    "attention-recompute-sequence": partial(attention, recompute=True, kv=2, sequence=True),
    "attention-copied": partial(attention, copied=True, kv=2),
    "attention-copied-used": partial(attention, copied=True, used=True, kv=2),
    "attention-copied-used-sequence": partial(attention, copied=True, used=True, sequence=True),
    "attention-dropout": partial(attention, dropout=0.3),
    "attention-dropout-kv2-seeded": partial(attention, dropout=0.3, kv=2, seeded=True),
    "attention-dropout-sequence": partial(attention, dropout=0.3, sequence=True, seeded=True),
    "attention-dropout-recompute": partial(attention, dropout=0.3, recompute=True),
    "attention-mask": attention_with_rotation_and_mask,
    "mlp": mlp,
    "mlp-2d": partial(mlp, shape=(5, 6)),
    "mlp-1d": partial(mlp, shape=(6,)),
    "mlp-relu": partial(mlp, activation="relu"),
    "mlp-tanh-no-bias": partial(mlp, activation="gelu_tanh", bias=False),
    "mlp-gated": partial(mlp, gated=True, activation="silu", bias=False),
    "mlp-uneven": partial(mlp, inner=13, gated=True),
    "mlp-sequence": partial(mlp, sequence=True),
    "mlp-gated-sequence": partial(mlp, sequence=True, gated=True, inner=13),
    "mlp-chunks-sequence": partial(mlp, sequence=True, chunks=2),
    "mlp-empty": partial(mlp, shape=(0, 6)),
    "mlp-bf16": partial(mlp, dtype=torch.bfloat16, sequence=True),
    "mlp-autocast": partial(mlp, autocast=True, gated=True),
    "mlp-autocast-sequence": partial(mlp, autocast=True, sequence=True),
    "mlp-recompute": partial(mlp, recompute=True, gated=True),
    "mlp-recompute-sequence-autocast": partial(mlp, recompute=True, sequence=True, autocast=True),
    "mlp-copied-used": partial(mlp, copied=True, used=True, gated=True),
    "mlp-copied-used-sequence": partial(mlp, copied=True, used=True, sequence=True),
    "mlp-dropout": partial(mlp, dropout=0.3),
    "mlp-dropout-seeded": partial(mlp, dropout=0.3, seeded=True, gated=True),
    "mlp-dropout-sequence": partial(mlp, dropout=0.3, sequence=True),
    "mlp-dropout-recompute": partial(mlp, dropout=0.3, recompute=True),
    "dropout-sequence": partial(dropout_on_sequence, seeded=False),
    "dropout-sequence-seeded": partial(dropout_on_sequence, seeded=True),
    "dropout-columns": partial(dropout_on_columns, seeded=False),
    "dropout-columns-seeded": partial(dropout_on_columns, seeded=True),
}


# -- how layers are used ----------------------------------------------------------------------


class Siblings(nn.Module):
    """Three layers, and whatever is to be done with them in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()

    def forward(self, do: Callable[..., Any]) -> Any:
        return do(*self.layers)


def siblings(tp: Axis, sequence: bool = False) -> tuple[Siblings, Siblings]:
    """Three column layers that share their input, and the plain layers that they are parts of."""
    torch.manual_seed(6)
    split, plain = Siblings(), Siblings()
    entrance = SharedInput(split)
    split.layers.extend(
        ColumnParallelLinear(6, 8, tp, sequence_parallel=sequence, shared_input=entrance)
        for _ in range(3)
    )
    torch.manual_seed(6)
    plain.layers.extend(nn.Linear(6, 8) for _ in range(3))
    return split, plain


def shared_input(tp: Axis, sequence: bool) -> None:
    """Three siblings take x in with one sum of its gradient, and are as three plain layers."""
    split, plain = siblings(tp, sequence)
    x = torch.randn(2, 8, 6)
    whole, own = leaf(x), leaf(sequence_part(x, tp) if sequence else x)
    upstream = torch.randn(3, 2, 8, 8)
    for each, up in zip(plain.layers, upstream, strict=True):
        each(whole).backward(up)
    with recorded_collectives() as calls:
        outputs = split(lambda *layers: [layer(own) for layer in layers])
        forward = [name for name, _, _ in calls]
        torch.autograd.backward(outputs, [own_part(up, -1, tp.degree, tp.rank) for up in upstream])
        backward = [name for name, _, _ in calls[len(forward) :]]
    if tp.degree > 1 and sequence:
        # A gather, or a sum in parts, is a message to every other rank.
        assert [len(forward), len(backward)] == [tp.degree - 1, 2 * (tp.degree - 1)]
    elif tp.degree > 1:
        assert [forward, backward] == [[], ["all_reduce"]]
    same(own.grad, sequence_part(whole.grad, tp) if sequence else whole.grad, "dX")
    for layer, each in zip(split.layers, plain.layers, strict=True):
        same(layer.weight.grad, layer.shards["weight"].take(each.weight.grad), "weight")
        same(layer.bias.grad, layer.shards["bias"].take(each.bias.grad), "bias")


def shared_input_in_other_ways(tp: Axis) -> None:
    """Siblings fed different, changed or the same tensors, in any order, some not at all."""
    split, plain = siblings(tp)
    torch.manual_seed(9)
    x, memory = torch.randn(2, 6), torch.randn(3, 6)

    def use(x: torch.Tensor, m: torch.Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Any:
        return (
            q(x).square().sum()  # cross-attention: another tensor for q than for k and v
            + k(m).square().sum()
            + v(m).sin().sum()
            + q(x).sin().sum()  # the same layer twice with the same tensor
            + v(x).sin().sum()
        )

    ours, theirs = (leaf(x), leaf(memory)), (leaf(x), leaf(memory))
    plain(partial(use, *theirs)).backward()
    split(partial(use, *ours)).backward()
    for got, wanted in zip(ours, theirs, strict=True):
        same(got.grad, wanted.grad, "gradient of an input")
    for layer, each in zip(split.layers, plain.layers, strict=True):
        same(layer.weight.grad, layer.shards["weight"].take(each.weight.grad), "weight")
        same(layer.bias.grad, layer.shards["bias"].take(each.bias.grad), "bias")

    def change(q: nn.Module, k: nn.Module, v: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            q(x)
            x.mul_(2.0)  # the same tensor, but no longer what it was
            return k(x), v(x)

    for mode in (torch.no_grad, torch.inference_mode, nullcontext):
        x = torch.randn(2, 6)
        with mode():
            got, other = split(change)
        with torch.no_grad():
            same(got, own_part(plain.layers[1](x), -1, tp.degree, tp.rank), "changed input")
            same(other, own_part(plain.layers[2](x), -1, tp.degree, tp.rank), "and the third")


def shared_input_lets_go(tp: Axis) -> None:
    """After forward and backward nothing keeps the input, also where not all siblings took it."""
    split, _ = siblings(tp)
    x, memory = torch.randn(2, 6), torch.randn(3, 6)
    kept = [weakref.ref(x), weakref.ref(memory)]

    def attend(x: torch.Tensor, m: torch.Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Any:
        return q(x).sum() + k(m).sum() + v(m).sum()

    split(partial(attend, x, memory)).backward()
    del x, memory
    gc.collect()
    assert [each() for each in kept] == [None, None]


def copy_of_a_chain(tp: Axis) -> None:
    """Column layers of one parent that are fed one after the other can be copied after a step."""
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    plan = {"0": "column_gather", "2": "column_gather"}
    split = apply_tensor_parallel(copy.deepcopy(plain), plan, tp)
    split(torch.randn(2, 6)).sum()
    compare(copy.deepcopy(split), plain, tp, torch.randn(2, 6))


def leftover_gradients(tp: Axis) -> None:
    """What one backward pass computed for a sibling does not show in the next."""
    split = siblings(tp)[0]
    layers, x = split.layers, torch.randn(2, 6, requires_grad=True)
    first, second, _ = split(lambda *layers: [layer(x) for layer in layers])
    torch.autograd.grad(first.sum(), layers[0].bias, retain_graph=True)
    second.sum().backward()
    assert layers[0].weight.grad is None or not layers[0].weight.grad.any()


def only_one_takes_part(tp: Axis) -> None:
    """Keys that are detached have no gradient, and nobody waits for one."""
    layer = ParallelAttention(32, 8, tp, num_kv_heads=2)
    inner = layer.k.forward
    layer.k.forward = lambda x: inner(x).detach()
    layer(torch.randn(2, 4, 32)).sum().backward()
    assert layer.k.weight.grad is None
    assert layer.q.weight.grad is not None


def masks_leave_it_causal(tp: Axis) -> None:
    torch.manual_seed(4)
    layer = ParallelAttention(32, 8, tp, num_kv_heads=2)
    x = torch.randn(2, 6, 32)
    later = x.clone()
    later[:, -1] += 1.0
    seen = torch.ones(6, 6, dtype=torch.bool)
    for mask in (None, seen, torch.zeros(6, 6), seen.expand(2, 1, 6, 6)):
        assert torch.equal(layer(x, mask=mask)[:, :-1], layer(later, mask=mask)[:, :-1])
    with pytest.raises(BigtrainError, match="mask"):
        layer(x, mask=seen.expand(2, 8, 6, 6))


def dropout_under_checkpointing(tp: Axis) -> None:
    """What is recomputed drops what was dropped."""
    torch.manual_seed(4)
    layer = ParallelMLP(6, 16, tp, dropout=0.5)
    x, grads = torch.randn(2, 5, 6), []
    for again in (False, True):
        seed_dropout(layer, [11, 12])
        layer.zero_grad()
        y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        y.square().sum().backward()
        grads.append(layer.down.weight.grad.clone())
    assert torch.equal(*grads)
    seed_dropout(layer, [11, 12])
    twice = checkpoint(lambda x: layer(layer(x)), x.requires_grad_(), use_reentrant=False)
    with pytest.raises(BigtrainError, match="recomputed"):
        twice.sum().backward()


def dropout_of_torch_stays_its_own(tp: Axis) -> None:
    """A plan makes no other function of it, whether samples are seeded or not."""
    for seeded in (False, True):
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 6))
        split = copy.deepcopy(plain)
        apply_tensor_parallel(split, {"0": "column", "1": "column", "2": "row"}, tp)
        x, results = torch.randn(4, 6), []
        for module in (plain, split):
            if seeded:
                seed_dropout(module, [1, 2, 3, 4])
            torch.manual_seed(9)
            results.append(module(x))
        same(results[1], results[0], f"seeded={seeded}")


def twice_through_one_graph(tp: Axis) -> None:
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    split = apply_tensor_parallel(copy.deepcopy(plain), {"0": "column", "2": "row"}, tp)
    x = torch.randn(2, 6)
    for module in (plain, split):
        y = module(x)
        y.sum().backward(retain_graph=True)
        y.square().sum().backward()
    compare_gradients(split, plain)


def frozen(tp: Axis, sequence: bool) -> None:
    """Parameters without gradients, one kind after the other, and inputs without."""
    for names in (["up.weight"], ["down.weight", "down.bias"], ["up.bias"], ["gate.weight"]):
        torch.manual_seed(4)
        layer = ParallelMLP(6, 16, tp, gated=True, sequence_parallel=sequence)
        torch.manual_seed(4)
        plain = PlainMLP(6, 16, gated=True)
        for name in names:
            layer.get_parameter(name).requires_grad_(False)
            plain.get_parameter(name).requires_grad_(False)
        x = torch.randn(2, 8, 6)
        compare(layer, plain, tp, x, sequence=sequence)
        layer.zero_grad()
        plain.zero_grad()
        plain(x).square().sum().backward()
        layer(sequence_part(x, tp) if sequence else x).square().sum().backward()
        compare_gradients(layer, plain)
    layer.requires_grad_(False)
    assert not layer(sequence_part(x, tp) if sequence else x).requires_grad


def frozen_from_outside(tp: Axis) -> None:
    """A split layer is as frozen as the one that it was made of."""
    plain = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Embedding(9, 6))
    plain[0].weight.requires_grad_(False)
    plain[1].bias.requires_grad_(False)
    plain[2].weight.requires_grad_(False)
    plain[1].eval()
    needs = {name: p.requires_grad for name, p in plain.named_parameters()}
    split = apply_tensor_parallel(plain, {"0": "column", "1": "row", "2": "vocab"}, tp)
    assert {name: p.requires_grad for name, p in split.named_parameters()} == needs
    assert [module.training for module in split] == [True, False, True]


def without_gradients(tp: Axis) -> None:
    torch.manual_seed(4)
    layer = ParallelAttention(32, 8, tp, num_kv_heads=2)
    embed = VocabParallelEmbedding(61, 32, tp)
    torch.manual_seed(4)
    plain, table = PlainAttention(32, 8, 2), nn.Embedding(61, 32)
    tokens = torch.randint(0, 61, (2, 8))
    with torch.no_grad():
        wanted = plain(table(tokens))
        same(layer(embed(tokens)), wanted, "no_grad")
    with torch.inference_mode():
        got = layer(embed(tokens))
        same(got, wanted, "inference_mode")
        logits, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
        vocab_parallel_cross_entropy(logits, targets, tp, vocab_size=3 * tp.degree)
    assert got.is_inference()
    layer.train()
    compare(layer, plain, tp, table(tokens).detach())  # and training goes on


def groups(tp: Axis) -> None:
    """A process group, a DeviceMesh, an Axis or None say which ranks; all give the same."""
    torch.manual_seed(4)
    plain = PlainMLP(6, 16)
    x = torch.randn(2, 6)
    given: list[Any] = [tp, None]
    if tp.degree > 1:
        given += [
            dist.group.WORLD,
            tp.group,
            dist.new_group(),
            init_device_mesh("cpu", (tp.degree,)),
        ]
    for group in given:
        torch.manual_seed(4)
        layer = ParallelMLP(6, 16, group)
        axis = layer.up.axis
        assert (axis.degree, axis.rank) == ((1, 0) if group is None else (tp.degree, tp.rank))
        compare(layer, plain, axis, x)
        plain.zero_grad()


def half_groups(tp: Axis) -> None:
    """Two halves of the ranks work apart, each from the weights of its own first rank."""
    if tp.degree == 1:
        return
    half = tp.degree // 2
    pairs = [dist.new_group(list(range(half))), dist.new_group(list(range(half, tp.degree)))]
    mine = pairs[tp.rank // half]
    torch.manual_seed(40 + tp.rank)
    layer = ParallelMLP(6, 16, mine, gated=True)
    torch.manual_seed(40 + tp.rank // half * half)
    plain = PlainMLP(6, 16, gated=True)
    torch.manual_seed(8)
    compare(layer, plain, layer.up.axis, torch.randn(2, 6))


def starts_from_the_first_rank(tp: Axis) -> None:
    torch.manual_seed(50 + tp.rank)  # every rank draws other weights
    layers = [
        ColumnParallelLinear(6, 8, tp),
        RowParallelLinear(8, 6, tp),
        VocabParallelEmbedding(9, 6, tp),
    ]
    torch.manual_seed(50)
    plain = [nn.Linear(6, 8), nn.Linear(8, 6), nn.Embedding(9, 6)]
    for layer, each in zip(layers, plain, strict=True):
        for name, param in layer.named_parameters():
            assert torch.equal(param, layer.shards[name].take(each.get_parameter(name)))


def double_backward(tp: Axis, penalty_only: bool) -> None:
    """A gradient of a gradient is refused; it would lack what other ranks have."""
    layers: list[Callable[[torch.Tensor], torch.Tensor]] = [
        ColumnParallelLinear(6, 8, tp),
        RowParallelLinear(6 * tp.degree, 8, tp),
        ParallelMLP(6, 16, tp),
        ParallelMLP(6, 16, tp, sequence_parallel=True),
        lambda x: vocab_parallel_cross_entropy(
            x, torch.zeros(8, dtype=torch.long), tp, vocab_size=6 * tp.degree
        ),
    ]

    def train_with_penalty(layer: Callable[[torch.Tensor], torch.Tensor]) -> None:
        x = torch.randn(8, 6, requires_grad=True)
        value = layer(x).sum() if penalty_only else layer(x).square().sum()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (value + grad.square().sum()).backward()

    for layer in layers:
        with pytest.raises((RuntimeError, BigtrainError)):
            train_with_penalty(layer)


def state_and_face(tp: Axis) -> None:
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (ColumnParallelLinear(6, 8, tp), nn.Linear(6, 8)),
        (ColumnParallelLinear(6, 8, tp, bias=False), nn.Linear(6, 8, bias=False)),
        (RowParallelLinear(6, 8, tp), nn.Linear(6, 8)),
        (VocabParallelEmbedding(61, 6, tp), nn.Embedding(61, 6)),
        (VocabParallelCrossEntropy(tp), nn.CrossEntropyLoss()),
        (ParallelAttention(32, 8, tp, num_kv_heads=2), PlainAttention(32, 8, 2)),
        (ParallelMLP(6, 16, tp, gated=True, dropout=0.1), PlainMLP(6, 16, gated=True)),
    ]
    for layer, plain in pairs:
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert f"rank {tp.rank} of {tp.degree}" in repr(layer)
        layer.load_state_dict(layer.state_dict())
    assert "in_features=6, out_features=8" in repr(pairs[0][0])
    assert "61, 6" in repr(pairs[3][0])


def regions(tp: Axis) -> None:
    """Each border function and its gradient, against what it says."""
    n, rank = tp.degree, tp.rank
    torch.manual_seed(2)
    xs, ups = torch.randn(n, 2, 8, 6), torch.randn(n, 2, 8, 6)
    layers = [ColumnParallelLinear(1, 6, tp), ColumnParallelLinear(1, 13, tp)]

    def check(function: Callable, x: torch.Tensor, up: torch.Tensor, y: Any, dx: Any) -> None:
        x = leaf(x)
        got = function(x)
        got.backward(up)
        same(got, y, "output")
        same(x.grad, dx, "gradient")

    part = partial(sequence_part, tp=tp)
    check(partial(reduce_sum, group=tp), xs[rank], ups[0], xs.sum(0), ups[0])
    scatter = partial(reduce_to_sequence, group=tp)
    check(scatter, xs[rank], part(ups[0]), part(xs.sum(0)), ups[0])
    check(partial(split_sequence, group=tp), xs[0], part(ups[0]), part(xs[0]), ups[0])
    check(partial(gather_sequence, group=tp), part(xs[0]), ups[0], xs[0], part(ups[0]))
    for layer, size in zip(layers, (6, 13), strict=True):
        x, up = torch.randn(2, 3, size), torch.randn(2, 3, size)
        own = partial(own_part, dim=-1, degree=n, rank=rank)
        options = {"group": tp, "shards": layer.channels}
        check(partial(split_channels, **options), x, own(up), own(x), up)
        check(partial(gather_channels, **options), own(x), up, x, own(up))


def summed_gradients(tp: Axis) -> None:
    """A norm on sequence shards has the gradient of the whole; of a copy too, and only once."""
    torch.manual_seed(2)
    plain = nn.Sequential(nn.LayerNorm(6))
    split = copy.deepcopy(plain)
    sum_gradients(split[0], tp)
    sum_gradients(split[0], tp)  # a norm that two plans name
    x = torch.randn(2, 8, 6)
    compare(split, plain, tp, x, sequence=True)
    plain.zero_grad()
    copied = copy.deepcopy(split)
    copied.zero_grad()
    compare(copied, plain, tp, x, sequence=True)


def vocabulary_chain(tp: Axis, sequence: bool) -> None:
    """Tied embedding and head, cross entropy, norm between; uneven, and fewer words than ranks."""
    for vocab in (61, 3):
        torch.manual_seed(2)
        plain = nn.ModuleDict(
            {
                "embed": nn.Embedding(vocab, 6),
                "norm": nn.LayerNorm(6),
                "head": nn.Linear(6, vocab, bias=False),
                "loss": nn.CrossEntropyLoss(label_smoothing=0.1),
            }
        )
        plain["head"].weight = plain["embed"].weight
        plan = {"embed": "vocab", "norm": "sequence", "head": "vocab", "loss": "vocab"}
        split = apply_tensor_parallel(copy.deepcopy(plain), plan, tp, sequence_parallel=sequence)
        assert split["head"].weight is split["embed"].weight
        tokens, targets = torch.randint(0, vocab, (2, 2, 8))
        losses = []
        for model in (plain, split):
            logits = model["head"](model["norm"](model["embed"](tokens)))
            losses.append(model["loss"](logits.flatten(0, 1), targets.flatten()))
            losses[-1].backward()
        same(losses[1], losses[0], "loss")
        compare_gradients(split, plain)


def shared_module(tp: Axis) -> None:
    """A block that a model runs several times under several names is split once."""
    torch.manual_seed(2)
    block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    plain = nn.Sequential(block, block)
    split = apply_tensor_parallel(copy.deepcopy(plain), {"*.0": "column", "*.2": "row"}, tp)
    compare(split, plain, tp, torch.randn(2, 6))


def kv_units_of_a_plan(tp: Axis) -> None:
    """Fewer key-value heads than ranks, frozen or not, by a plan."""
    torch.manual_seed(2)
    plain = PlainAttention(32, 8, 2)
    plain.k.weight.requires_grad_(False)
    kv = Style("column", units=(2,), share=True)
    plan = {
        "q": Style("column", units=(8,)),
        "k": kv,
        "v": kv,
        "proj": Style("row", units=(8,)),
    }
    split = apply_tensor_parallel(copy.deepcopy(plain), plan, tp)
    compare(split, plain, tp, torch.randn(2, 8, 32))


USES: dict[str, Callable[[Axis], None]] = {
    "shared-input": partial(shared_input, sequence=False),
    "shared-input-sequence": partial(shared_input, sequence=True),
    "shared-input-in-other-ways": shared_input_in_other_ways,
    "shared-input-lets-go": shared_input_lets_go,
    "shared-input-copy-of-a-chain": copy_of_a_chain,
    "shared-input-leftovers": leftover_gradients,
    "only-one-takes-part": only_one_takes_part,
    "masks-leave-it-causal": masks_leave_it_causal,
    "dropout-under-checkpointing": dropout_under_checkpointing,
    "dropout-of-torch-stays-its-own": dropout_of_torch_stays_its_own,
    "twice-through-one-graph": twice_through_one_graph,
    "frozen": partial(frozen, sequence=False),
    "frozen-sequence": partial(frozen, sequence=True),
    "frozen-from-outside": frozen_from_outside,
    "without-gradients": without_gradients,
    "groups": groups,
    "half-groups": half_groups,
    "starts-from-the-first-rank": starts_from_the_first_rank,
    "double-backward": partial(double_backward, penalty_only=False),
    "double-backward-of-a-linear-function": partial(double_backward, penalty_only=True),
    "state-and-face": state_and_face,
    "regions": regions,
    "summed-gradients": summed_gradients,
    "vocabulary-chain": partial(vocabulary_chain, sequence=False),
    "vocabulary-chain-sequence": partial(vocabulary_chain, sequence=True),
    "shared-module": shared_module,
    "kv-units-of-a-plan": kv_units_of_a_plan,
}

CHECKS = {**LINEAR, **VOCABULARY, **BLOCKS, **USES}
# On 8 ranks, where collectives take longer, what differs there: heads that ranks share, channels
# and words that do not divide, nothing at all on some ranks; and one of each kind.
ON_EIGHT = {
    name: check
    for name, check in CHECKS.items()
    if any(word in name for word in ("kv", "fewer", "uneven", "closed", "seeded", "regions"))
    or name in ("column", "row", "row-sequence", "embedding", "loss-smoothing", "mlp-sequence")
    or name in ("shared-input", "frozen-sequence", "half-groups", "groups", "state-and-face")
}
BY_DEGREE = {1: CHECKS, 2: CHECKS, 4: CHECKS, 8: ON_EIGHT}
_outcomes: dict[int, dict[str, Any]] = {}


@pytest.fixture
def outcomes(degree: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all checks on `degree` ranks, which run once."""
    if degree not in _outcomes:
        folder = tmp_path_factory.mktemp(f"layers-{degree}")
        on_mesh = {name: partial(_on_tp, check) for name, check in BY_DEGREE[degree].items()}
        delays = 1 if degree == 2 else None
        _outcomes[degree] = survey(
            on_mesh, degree, folder, layout=Layout(tp=degree), delay_seed=delays
        )
    return _outcomes[degree]


def _on_tp(check: Callable[[Axis], None], mesh: Mesh) -> None:
    check(mesh.tp)


@pytest.mark.parametrize(
    ("name", "degree"), [(name, degree) for degree in BY_DEGREE for name in BY_DEGREE[degree]]
)
def test_equals_plain_torch(name: str, degree: int, outcomes: dict[str, Any]) -> None:
    if isinstance(outcomes[name], str):
        pytest.fail(outcomes[name], pytrace=False)
