"""What autograd keeps for backward under sequence parallelism: 1/n of it, counted in bytes.

Bytes are counted by hooks on what operations save: distinct storages, without parameters, and by
the module in whose forward a storage was saved first. (What a node keeps beside that is not seen;
layers here keep nothing else in forward.)

For B samples of T tokens, N = BT, C channels, H heads, a GPT block in fp32 saves in numbers:

    the two norms        their inputs, mean and 1/deviation of every token    2NC + 4N
    qkv and up           their inputs                                         2NC
    attention core       q, k, v; its output, which proj saves too; logsumexp 4NC + HN
    gelu and down        their inputs, each [N, 4C]                           8NC

The last two are split by heads and channels, so 1/n by tensor parallelism alone. The first two are
outside of it: whole on every rank, unless the sequence is split.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from harness import run_ranks
from torch import nn

from bigtrain.comm.mesh import Axis, Mesh
from bigtrain.config.layout import Layout
from bigtrain.models.gpt import Block
from bigtrain.models.llama import Block as LlamaBlock
from bigtrain.models.llama import rotary_table
from bigtrain.tensor import ParallelAttention, ParallelMLP, Style, apply_tensor_parallel

pytestmark = pytest.mark.parity
BATCH, LENGTH, HIDDEN, HEADS = 2, 64, 64, 8
TOKENS = BATCH * LENGTH
FP32 = 4
HEAD = Style("column", units=(HEADS,))
OUT = Style("row", units=(HEADS,))
GPT_PLAN = {
    "norm1": "sequence",
    "attention.qkv": Style("column", units=(HEADS,) * 3),
    "attention.proj": OUT,
    "norm2": "sequence",
    "mlp.up": "column",
    "mlp.down": "row",
}
LLAMA_PLAN = {
    "norm1": "sequence",
    "attention.q": HEAD,
    "attention.k": HEAD,
    "attention.v": HEAD,
    "attention.proj": OUT,
    "norm2": "sequence",
    "mlp.gate": "column",
    "mlp.up": "column",
    "mlp.down": "row",
}
OUTSIDE = ("norm1", "norm2", "attention.qkv", "attention.q", "mlp.up", "mlp.gate", "up", "q")


def saved_bytes(model: nn.Module, *inputs: torch.Tensor) -> Counter[str]:
    """Bytes saved for backward, by the name of the innermost module that saved them first."""
    inside: list[str] = [""]
    found: Counter[str] = Counter()
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = []  # so that no storage is freed, and its address used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)
            found[inside[-1]] += storage.nbytes()
        return tensor

    def leave(*_: Any) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        handles += [
            module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)),
            module.register_forward_hook(leave),
        ]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(*inputs)
    y.sum().backward()
    for handle in handles:
        handle.remove()
    return found


def outside(found: Counter[str]) -> int:
    return sum(size for name, size in found.items() if name in OUTSIDE)


def hidden(axis: Axis, sequence: bool) -> torch.Tensor:
    length = LENGTH // axis.degree if sequence else LENGTH
    return torch.randn(BATCH, length, HIDDEN, requires_grad=True)


def of_blocks(mesh: Mesh) -> dict[str, Counter[str]]:
    found = {}
    table = rotary_table(LENGTH, HIDDEN // HEADS, 10000.0)
    for sequence in (False, True):
        where = "sequence" if sequence else "whole"
        options: dict[str, Any] = {"sequence_parallel": sequence}
        x = hidden(mesh.tp, sequence)
        gpt = apply_tensor_parallel(Block(HIDDEN, HEADS, 0.0), GPT_PLAN, mesh.tp, **options)
        found[f"gpt {where}"] = saved_bytes(gpt, x)
        llama = LlamaBlock(HIDDEN, HEADS, HEADS, 4 * HIDDEN, 1e-5)
        llama = apply_tensor_parallel(llama, LLAMA_PLAN, mesh.tp, **options)
        found[f"llama {where}"] = saved_bytes(llama, x, table)
        mlp = ParallelMLP(HIDDEN, 4 * HIDDEN, mesh.tp, **options)
        found[f"mlp {where}"] = saved_bytes(mlp, x)
        attention = ParallelAttention(HIDDEN, HEADS, mesh.tp, **options)
        found[f"attention {where}"] = saved_bytes(attention, x)
    return found


def gpt_promise(n: int, sequence: bool) -> tuple[float, float]:
    """Bytes saved outside, and altogether."""
    out = (4 * TOKENS * HIDDEN + 4 * TOKENS) * FP32
    core = (12 * TOKENS * HIDDEN + HEADS * TOKENS) * FP32 / n
    out = out / n if sequence else out
    return out, out + core


@pytest.mark.parametrize("degree", [2, 4, 8])
def test_saved_for_backward(degree: int, tmp_path: Any) -> None:
    one = run_ranks(of_blocks, 1, tmp_path, layout=Layout())[0]
    plain = saved_bytes(Block(HIDDEN, HEADS, 0.0), hidden(Axis.of(None), False))
    out, total = gpt_promise(1, False)
    assert outside(plain) == pytest.approx(out, rel=0.05), plain
    assert plain.total() == pytest.approx(total, rel=0.05), plain
    for rank in run_ranks(of_blocks, degree, tmp_path, layout=Layout(tp=degree)):
        for where in ("whole", "sequence"):
            found = rank[f"gpt {where}"]
            out, total = gpt_promise(degree, where == "sequence")
            assert outside(found) == pytest.approx(out, rel=0.05), found
            assert found.total() == pytest.approx(total, rel=0.05), found
        for kind in ("gpt", "llama", "mlp", "attention"):
            split, whole = rank[f"{kind} sequence"], one[f"{kind} whole"]
            assert outside(split) == pytest.approx(outside(whole) / degree, rel=0.05), kind
            assert outside(rank[f"{kind} whole"]) == pytest.approx(outside(whole), rel=0.05), kind
        # Beside the table of rotations, nothing of a block is whole on a rank.
        for kind in ("gpt", "mlp", "attention"):
            share = one[f"{kind} whole"].total() / degree
            assert rank[f"{kind} sequence"].total() == pytest.approx(share, rel=0.05), kind
