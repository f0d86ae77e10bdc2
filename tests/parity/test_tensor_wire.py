"""What crosses the wire is what the docstrings say: recorded calls against closed forms.

Every rank records the collectives that it starts, and the standard formulas turn them into bytes
that it sends: of n ranks, all-reduce of b bytes 2(n-1)/n b, all-gather (n-1) times the own bytes,
all-to-all (n-1)/n b, a message b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import recorded_collectives
from torch import nn

from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.models import GPT
from bigtrain.tensor import (
    ColumnParallelLinear,
    ParallelAttention,
    ParallelMLP,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

pytestmark = pytest.mark.parity
BATCH, LENGTH, HIDDEN = 2, 8, 16
TOKENS = BATCH * LENGTH
FP32 = 4


def sent(calls: list[tuple[str, int, int]]) -> float:
    """Bytes that this rank sends for these calls."""
    factors: dict[str, Callable[[int], float]] = {
        "all_reduce": lambda n: 2 * (n - 1) / n,
        "all_gather_single": lambda n: n - 1,
        "all_gather_into_tensor": lambda n: n - 1,
        "all_to_all_single": lambda n: (n - 1) / n,
        "isend": lambda n: 1,
    }
    return sum(factors[name](n) * size for name, size, n in calls)


def traffic(run: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """Bytes sent forward and backward."""
    with recorded_collectives() as calls:
        y = run()
        forward = sent(calls)
        calls.clear()
        y.sum().backward()
        return forward, sent(calls)


def of_layers(mesh: Mesh) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """For each layer: bytes measured and bytes promised, each (forward, backward)."""
    tp, n = mesh.tp, mesh.tp.degree
    share = (n - 1) / n
    b = TOKENS * HIDDEN * FP32  # of the activations of the whole sequence
    found = {}

    def check(
        name: str, layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *promise: float
    ) -> None:
        found[name] = traffic(lambda: layer(x)), promise

    def given(sequence: bool, channels: int = HIDDEN) -> torch.Tensor:
        length = LENGTH // n if sequence else LENGTH
        return torch.randn(BATCH, length, channels, requires_grad=True)

    for gated in (False, True):
        mlp = ParallelMLP(HIDDEN, 64, tp, gated=gated)
        check(f"mlp gated={gated}", mlp, given(False), 2 * share * b, 2 * share * b)
        mlp = ParallelMLP(HIDDEN, 64, tp, gated=gated, sequence_parallel=True)
        check(f"mlp gated={gated} sequence", mlp, given(True), 2 * share * b, 3 * share * b)
    for kv in (8, 2):
        sharers = max(1, n // kv)
        kv_head = HIDDEN // 8 * (HIDDEN + 1) * FP32  # weight and bias of one head of k or v
        shared = 0.0
        if sharers == n:
            shared = 2 * 2 * share * kv_head
        elif sharers > 1:
            shared = 2 * (n - 1) * kv_head
        layer = ParallelAttention(HIDDEN, 8, tp, num_kv_heads=kv)
        name = f"attention kv={kv}"
        check(name, layer, given(False), 2 * share * b, 2 * share * b + shared)
        layer = ParallelAttention(HIDDEN, 8, tp, num_kv_heads=kv, sequence_parallel=True)
        backward = 3 * share * b + shared
        check(f"{name} sequence", layer, given(True), 2 * share * b, backward)

    column = ColumnParallelLinear(HIDDEN, 32, tp)
    check("column", column, given(False), 0, 2 * share * b)
    column = ColumnParallelLinear(HIDDEN, 32, tp, sequence_parallel=True)
    check("column sequence", column, given(True), share * b, 2 * share * b)
    frozen = ColumnParallelLinear(HIDDEN, 32, tp)
    check("column, input without gradient", frozen, given(False).detach(), 0, 0)

    row = RowParallelLinear(32, HIDDEN, tp)
    check("row", row, given(False, 32 // n), 2 * share * b, 0)
    row = RowParallelLinear(32, HIDDEN, tp, num_chunks=2)
    check("row in chunks", row, given(False, 32 // n), 2 * share * b, 0)
    row = RowParallelLinear(32, HIDDEN, tp, sequence_parallel=True)
    check("row sequence", row, given(False, 32 // n), share * b, share * b)
    tokens = torch.randint(0, 61, (BATCH, LENGTH))
    embed = VocabParallelEmbedding(61, HIDDEN, tp)
    check("embedding", embed, tokens, 2 * share * b, 0)
    embed = VocabParallelEmbedding(61, HIDDEN, tp, sequence_parallel=True)
    check("embedding sequence", embed, tokens, share * b, share * b)

    logits = torch.randn(BATCH, LENGTH, 64 // n, requires_grad=True)
    for smoothing, numbers in ((0.0, 3), (0.1, 4)):

        def loss(x: torch.Tensor, smoothing: float = smoothing) -> torch.Tensor:
            return vocab_parallel_cross_entropy(
                x, tokens, tp, vocab_size=64, label_smoothing=smoothing
            )

        check(f"loss smoothing={smoothing}", loss, logits, (n - 1) * numbers * FP32 * TOKENS, 0)
    return found


@pytest.mark.parametrize("degree", [2, 4])
def test_layers(degree: int, tmp_path: Any) -> None:
    for rank in run_ranks(of_layers, degree, tmp_path, layout=Layout(tp=degree)):
        for name, (measured, promised) in rank.items():
            assert measured == pytest.approx(promised), name


def of_whole_channels(mesh: Mesh) -> dict[str, tuple[float, float]]:
    column = ColumnParallelLinear(HIDDEN, 32, mesh.tp, gather_output=True)
    row = RowParallelLinear(32, HIDDEN, mesh.tp, input_is_parallel=False)
    return {
        "row": traffic(lambda: row(torch.randn(BATCH, LENGTH, 32, requires_grad=True))),
        "column": traffic(lambda: column(torch.randn(BATCH, LENGTH, HIDDEN, requires_grad=True))),
    }


def test_layers_with_whole_channels_outside(tmp_path: Any) -> None:
    """A column layer that gathers its output, a row layer that splits its input."""
    share, b, wide = 3 / 4, TOKENS * HIDDEN * FP32, TOKENS * 32 * FP32
    for found in run_ranks(of_whole_channels, 4, tmp_path, layout=Layout(tp=4)):
        assert found["row"] == pytest.approx((2 * share * b, share * wide))
        assert found["column"] == pytest.approx((share * wide, 2 * share * b))


def of_gpt(mesh: Mesh, sequence: bool, tie: bool) -> tuple[float, float]:
    torch.manual_seed(0)
    model = GPT(64, LENGTH, 2, HIDDEN, 8, tie_embeddings=tie)
    path = parallelize(model, mesh, sequence_parallel=sequence, bucket_mb=0.01)
    tokens = torch.randint(0, 64, (BATCH, LENGTH))
    with recorded_collectives() as calls:
        loss = model(tokens, tokens)
        forward = sent(calls)
        calls.clear()
        path.backward(loss)
        path.finish()
        path.publish()
        return forward, sent(calls)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])
def test_gpt_step(sequence: bool, tie: bool, tmp_path: Any) -> None:
    """A step of GPT with L layers, with activations of b bytes for the whole sequence.

    Without sequence parallelism forward has an all-reduce for the embedding and two a layer,
    backward two a layer and one for the head; 2(n-1)/n b each.

    With it, forward has a reduce-scatter for the embedding, all-gather, reduce-scatter, twice, in
    a layer, and an all-gather for the head; (n-1)/n b each. Backward: an all-gather for the
    embedding, one of [T, C] for the positions; for each of the two column layers of a block
    all-gather and reduce-scatter, for each of its two row layers an all-gather; two for the head.
    Gradients of what works on a part of the sequence are all-reduced: weight and bias of 2L + 1
    norms.

    The loss all-gathers three numbers a token, forward.
    """
    n, layers = 4, 2
    share, b = (n - 1) / n, TOKENS * HIDDEN * FP32
    loss = (n - 1) * 3 * FP32 * TOKENS
    if sequence:
        forward = share * b * (1 + 4 * layers + 1) + loss
        vectors = 2 * (2 * layers + 1)
        backward = (
            share * b * (1 + 6 * layers + 2)
            + share * LENGTH * HIDDEN * FP32
            + vectors * 2 * share * HIDDEN * FP32
        )
    else:
        forward = 2 * share * b * (1 + 2 * layers) + loss
        backward = 2 * share * b * (2 * layers + 1)
    for measured in run_ranks(of_gpt, n, tmp_path, args=(sequence, tie), layout=Layout(tp=n)):
        assert measured == pytest.approx((forward, backward))


def accumulating(mesh: Mesh) -> list[int]:
    """Numbers of dp collectives of a microbatch that is not the last, and of the last."""
    torch.manual_seed(0)
    model = GPT(64, LENGTH, 2, HIDDEN, 8)
    path = parallelize(model, mesh, sequence_parallel=True)
    tokens = torch.randint(0, 64, (BATCH, LENGTH))
    counts = []
    for last in (False, True):
        with recorded_collectives() as calls:
            path.backward(model(tokens, tokens), last=last)
            counts.append(sum(n == mesh.dp.degree for _, _, n in calls))
    path.finish()
    return counts


def test_accumulation_does_not_talk_over_dp(tmp_path: Any) -> None:
    """dp has 4 ranks and tp 2, so that their calls can be told apart."""
    for counts in run_ranks(accumulating, 8, tmp_path, layout=Layout(dp=4, tp=2)):
        assert counts == [0, 1]


def alone(mesh: Mesh) -> int:
    torch.manual_seed(0)
    axis = Axis.of(None)
    with recorded_collectives() as calls:
        model = nn.Sequential(ParallelMLP(HIDDEN, 64, axis, sequence_parallel=True))
        model(torch.randn(2, HIDDEN)).sum().backward()
        return len(calls)


def test_degree_one_is_silent(tmp_path: Any) -> None:
    assert run_ranks(alone, 2, tmp_path) == [0, 0]
