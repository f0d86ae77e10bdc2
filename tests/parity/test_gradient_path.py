"""What the gradient path does at its edges: control flow, item counts, buffers, misuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from parity_models import Branchy, gpt
from torch import nn

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError, CommError
from bigtrain.optim import SGD, AdamW

pytestmark = pytest.mark.parity
ALONE = Mesh.build(Layout(), World(), torch.device("cpu"))


def different_branches(mesh: Mesh) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Rank r chooses branch r only; record the order in which buckets are reduced."""
    torch.manual_seed(1)
    model = Branchy(num_branches=mesh.dp.degree)
    path = parallelize(model, mesh, bucket_mb=0.001)
    order: list[str] = []
    plain = path.sync.reduce

    def recorded(bucket: Bucket) -> None:
        order.append(bucket.slots[0].name)
        plain(bucket)

    path.sync.reduce = recorded  # type: ignore[method-assign]
    tokens = torch.full((2, 5), mesh.dp.rank)
    path.backward(model(tokens, tokens))
    path.finish()
    return order, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_ranks_with_different_control_flow_reduce_in_the_same_order(tmp_path: Path) -> None:
    ranks = run_ranks(different_branches, 4, tmp_path, delay_seed=5)
    assert len({tuple(order) for order, _ in ranks}) == 1
    torch.manual_seed(1)
    model = Branchy(num_branches=4)
    tokens = torch.arange(4).repeat_interleave(2)[:, None].expand(8, 5)
    model(tokens, tokens).backward()
    for name, p in model.named_parameters():
        wanted = torch.zeros_like(p) if p.grad is None else p.grad
        for _, grads in ranks:
            torch.testing.assert_close(grads[name], wanted, rtol=1e-5, atol=1e-7)


def test_buckets_leave_during_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets but those with unready parameters are handed over before backward returns."""
    model = gpt()
    path = parallelize(model, ALONE, bucket_mb=0.02)
    during: list[int] = []
    plain = path.sync.reduce

    def recorded(bucket: Bucket) -> None:
        if path._in_backward:
            during.append(bucket.index)
        plain(bucket)

    monkeypatch.setattr(path.sync, "reduce", recorded)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    path.backward(model(tokens, tokens))
    assert during == list(range(len(path.buckets)))
    assert len(path.buckets) > 5


def test_accumulation_does_not_communicate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt()
    path = parallelize(model, ALONE, bucket_mb=0.02)
    reduced: list[int] = []
    monkeypatch.setattr(path.sync, "reduce", lambda bucket: reduced.append(bucket.index))
    tokens = torch.zeros(2, 8, dtype=torch.long)
    path.backward(model(tokens, tokens), last=False)
    path.backward(model(tokens, tokens), last=False)
    assert reduced == []
    path.backward(model(tokens, tokens))
    assert len(reduced) == len(path.buckets)


def odd_buffers(mesh: Mesh) -> dict[str, torch.Tensor]:
    """Buffers that are no plain dense tensors, of several dtypes, replaced by the forward."""
    model = nn.Linear(2, 1)
    base = torch.arange(12.0).view(4, 3) + 100 * mesh.rank
    model.register_buffer("strided", base[:, ::2])
    model.register_buffer(
        "order", torch.randperm(5, generator=torch.Generator().manual_seed(mesh.rank))
    )
    model.register_buffer("flag", torch.tensor(mesh.rank == 0))
    path = parallelize(model, mesh)
    first = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.strided = model.strided + mesh.rank + 1  # a new tensor, differing by rank
    path.backward(model(torch.ones(1, 2)).sum())
    path.finish()
    path.publish()
    gaps = base[:, 1].clone()
    return {**first, "later": model.strided.clone(), "gaps": gaps - 100 * mesh.rank}


def test_buffers_of_any_kind_are_those_of_the_first_rank(tmp_path: Path) -> None:
    first, second = run_ranks(odd_buffers, 2, tmp_path)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    assert torch.equal(first["later"], torch.tensor([[1.0, 3], [4, 6], [7, 9], [10, 12]]))


def test_abandon_forgets_the_step() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = parallelize(model, ALONE)
    before = model[1].running_mean.clone()
    path.backward(model(torch.randn(5, 3)).sum() * float("nan"), last=False)
    assert not torch.equal(model[1].running_mean, before)
    path.abandon()
    assert torch.equal(model[1].running_mean, before)
    path.backward(model(torch.randn(5, 3)).square().sum())
    path.finish()
    assert path.grad_norm().isfinite()


def batch_norm_run(mesh: Mesh) -> dict[str, torch.Tensor]:
    torch.manual_seed(mesh.rank)  # different buffers and parameters on every rank
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model[0].weight.requires_grad_(False)
    path = parallelize(model, mesh)
    optimizer = SGD(path.segments(), lr=0.1)
    for _ in range(3):
        path.backward(model(torch.randn(6, 4)).square().mean())
        path.finish()
        optimizer.step()
        path.publish()
    return {name: t.clone() for name, t in model.state_dict().items()}


def test_buffers_and_frozen_parameters_stay_equal(tmp_path: Path) -> None:
    states = run_ranks(batch_norm_run, 3, tmp_path, delay_seed=1)
    for name, tensor in states[0].items():
        for state in states[1:]:
            assert torch.equal(state[name], tensor), name


def test_frozen_parameters_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    path = parallelize(model, ALONE)
    path.backward(model(torch.ones(2, 4)).sum())
    path.finish()
    AdamW(path.segments()).step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[1].weight, torch.zeros_like(model[1].weight))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_equals_torch(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    ours, plain = nn.Linear(5, 3), nn.Linear(5, 3)
    plain.load_state_dict(ours.state_dict())
    path = parallelize(ours, ALONE)
    optimizer = SGD(path.segments(), 0.1, momentum, nesterov, weight_decay=0.01)
    theirs = torch.optim.SGD(
        [{"params": [plain.weight], "weight_decay": 0.01}, {"params": [plain.bias]}],
        lr=0.1,
        momentum=momentum,
        nesterov=nesterov,
    )
    for step in range(4):
        x = torch.full((2, 5), float(step + 1))
        path.backward(ours(x).square().mean())
        path.finish()
        optimizer.step(grad_divisor=torch.tensor(4.0))
        path.publish()
        theirs.zero_grad()
        (plain(x).square().mean() / 4).backward()
        theirs.step()
    torch.testing.assert_close(ours.weight, plain.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.bias, plain.bias, rtol=1e-5, atol=1e-6)


def test_norm_is_that_of_all_parameters() -> None:
    model = gpt()
    path = parallelize(model, ALONE, bucket_mb=0.02)
    tokens = torch.arange(16).view(2, 8)
    path.backward(model(tokens, tokens))
    path.finish()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(path.grad_norm(), wanted)


def test_backward_without_the_path_is_refused() -> None:
    model = gpt()
    parallelize(model, ALONE)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(BigtrainError, match="outside of the gradient path"):
        model(tokens, tokens).backward()


def test_misuse_is_explained() -> None:
    model = gpt()
    path = parallelize(model, ALONE)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(BigtrainError, match="finish"):
        path.finish()
    path.backward(model(tokens, tokens))
    with pytest.raises(BigtrainError, match="last=False"):
        path.backward(model(tokens, tokens))
    path.finish()
    path.publish()
    path.backward(model(tokens, tokens))  # the next step begins
    path.finish()


def test_nothing_to_train_is_refused() -> None:
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(BigtrainError, match="no trainable parameter"):
        parallelize(model, ALONE)


def test_layout_of_another_world_is_refused() -> None:
    with pytest.raises(BigtrainError, match=r"for 2 ranks .* but 1 joined"):
        Mesh.build(Layout(dp=2), World(), torch.device("cpu"))


def dies_in_backward(mesh: Mesh) -> str:
    model = gpt()
    path = parallelize(model, mesh, bucket_mb=0.02)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    path.backward(model(tokens, tokens))
    path.finish()
    if mesh.rank == 1:
        dist.destroy_process_group()
        return "left"
    try:
        path.backward(model(tokens, tokens))
        path.finish()
    except CommError as error:
        return str(error)
    return "no error"


def test_a_lost_rank_is_an_error_that_names_the_collective(tmp_path: Path) -> None:
    text = run_ranks(dies_in_backward, 2, tmp_path, timeout=20)[0]
    assert "all_reduce of gradient bucket" in text
    assert "axis dp (ranks 0, 1) failed on rank 0" in text


def test_grad_is_visible_between_finish_and_the_next_step() -> None:
    model = nn.Linear(3, 1)
    path = parallelize(model, ALONE)
    assert model.weight.grad is None
    path.backward(model(torch.ones(1, 3)).sum())
    path.finish()
    assert torch.equal(model.weight.grad, torch.ones(1, 3))
    assert model.weight.grad.untyped_storage().data_ptr() == (
        path.buckets[0].main_grads.untyped_storage().data_ptr()
    )


def long_norm(mesh: Mesh) -> float:
    torch.manual_seed(0)
    model = nn.Linear(1500, 1300)
    path = parallelize(model, mesh)
    path.backward((model.weight * torch.randn(1300, 1500)).sum() + model.bias.sum())
    path.finish()
    wanted = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm()
    return float(path.grad_norm().double() / wanted) - 1.0


def test_the_norm_of_many_elements_is_exact(tmp_path: Path) -> None:
    """One fp32 sum over two million squares is off by 3e-5, and by another error if it is cut."""
    assert abs(run_ranks(long_norm, 1, tmp_path)[0]) < 1e-6
