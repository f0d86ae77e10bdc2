"""Data parallel training equals one process: losses, every gradient, parameters after 5 steps.

Errors are relative, in the 2-norm of a tensor. The sum over ranks adds the same fp32 numbers as one
process in another order, so gradients of the first step differ by rounding (below 5e-6). AdamW
divides by the root of the second moment, which magnifies the rounding of small gradients, and later
steps start from there: below 1e-3 for their gradients and for the way that parameters have gone. A
wrong mean, a lost or a doubled contribution shows as 1e-1 and more.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_models import BATCH, EPS, MODELS, global_batches, gpt, plain_run, relative_error
from torch import nn

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.optim import AdamW

STEPS = 5
pytestmark = pytest.mark.parity


def train(mesh: Mesh, name: str, num_micro: int, bucket_mb: float, dtype: torch.dtype) -> dict:
    """Train on this rank's share of the batches; return what a test compares."""
    model = MODELS[name]()
    if mesh.rank:  # replicas start different; parallelize must make them equal
        nn.init.normal_(next(model.parameters()))
    path = parallelize(model, mesh, bucket_mb=bucket_mb, dtype=dtype)
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    losses, grads = [], []
    size = BATCH // mesh.dp.degree // num_micro
    for tokens, targets in global_batches(STEPS):
        total = 0.0
        for micro in range(num_micro):
            start = (micro * mesh.dp.degree + mesh.dp.rank) * size
            part = slice(start, start + size)
            loss = model(tokens[part], targets[part]) / num_micro
            path.backward(loss, last=micro == num_micro - 1)
            total += loss.item()
        path.finish()
        if dtype == torch.float32:
            grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        path.publish()
        losses.append(total)
    params = {
        slot.name: slot.view(bucket.main_params).clone()
        for bucket in path.buckets
        for slot in bucket.slots
    }
    return {"losses": losses, "grads": grads, "params": params}


def digest(params: dict[str, torch.Tensor]) -> str:
    content = b"".join(params[name].numpy().tobytes() for name in sorted(params))
    return hashlib.sha256(content).hexdigest()


def assert_same_training(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(plain["losses"]), rtol=0, atol=1e-5)
    for rank in ranks:
        for step, wanted in enumerate(plain["grads"]):
            for name, grad in wanted.items():
                error = relative_error(rank["grads"][step][name], grad, floor=1e-4)
                assert error < (1e-3 if step else 5e-6), f"gradient of {name}, step {step}: {error}"
        for name, param in plain["params"].items():
            start = plain["start"][name]
            error = relative_error(rank["params"][name] - start, param - start, floor=1e-6)
            assert error < 1e-3, f"parameter {name}: {error}"
    digests = {digest(rank["params"]) for rank in ranks}
    assert len(digests) == 1, "replicas must be equal bit for bit"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("world_size", "num_micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1), (8, 1)]
)
def test_equals_one_process(name: str, world_size: int, num_micro: int, tmp_path: Path) -> None:
    plain = plain_run(MODELS[name](), STEPS)
    ranks = run_ranks(
        train,
        world_size,
        tmp_path,
        args=(name, num_micro, 0.02, torch.float32),  # 5000 elements a bucket: many buckets
        delay_seed=world_size,
    )
    assert_same_training(ranks, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt-tied", "llama"])
def test_two_ranks_equal_two_microbatches_bit_for_bit(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Both add the same two gradients; the sum of two numbers does not depend on their order."""
    two = run_ranks(train, 2, tmp_path, args=(name, 1, 0.02, dtype))
    one = run_ranks(train, 1, tmp_path, args=(name, 2, 0.02, dtype))
    for rank in two:
        assert digest(rank["params"]) == digest(one[0]["params"])


def test_twice_the_same_bits(tmp_path: Path) -> None:
    arguments = ("gpt-tied", 1, 0.02, torch.float32)
    runs = [run_ranks(train, 4, tmp_path, args=arguments, delay_seed=seed) for seed in (1, 2)]
    assert digest(runs[0][0]["params"]) == digest(runs[1][0]["params"])


def test_bucket_size_does_not_matter(tmp_path: Path) -> None:
    digests = {
        digest(run_ranks(train, 2, tmp_path, args=("llama", 1, mb, torch.float32))[0]["params"])
        for mb in (0.0001, 0.02, 100.0)
    }
    assert len(digests) == 1


def bf16_losses(mesh: Mesh) -> list[float]:
    model = gpt()
    path = parallelize(model, mesh, dtype=torch.bfloat16)
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    tokens, targets = global_batches(1)[0]
    losses = []
    for _ in range(30):
        loss = model(tokens, targets)
        path.backward(loss)
        path.finish()
        optimizer.step()
        path.publish()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {bucket.main_params.dtype for bucket in path.buckets} == {torch.float32}
    return losses


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    """bf16 has 8 bits of mantissa, so losses of about 4 agree within a few hundredths."""
    losses = run_ranks(bf16_losses, 1, tmp_path)[0]
    model, exact = gpt(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    tokens, targets = global_batches(1)[0]
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        exact.append(loss.item())
    assert exact[-1] < 0.6 * exact[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(exact), rtol=0.05, atol=0.06)
