"""Cross entropy: as torch computes it in fp64, in parts as in one, out of range, in place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bigtrain.errors import BigtrainError
from bigtrain.models.loss import NextTokenLoss
from bigtrain.ops import cross_entropy as module
from bigtrain.ops.cross_entropy import cross_entropy, cross_entropy_grad, cross_entropy_parts
from bigtrain.ops.library import Library

LOW = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (5, 33), (4, 256), (2, 1030), (2, 2100), (9, 64)]
# Gradients are at most 1, rounded once from fp32.
NEAR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def drawn(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, factor: float = 4.0
) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(shape))
    logits = (factor * torch.randn(shape, generator=draw)).to(device, dtype)
    targets = torch.randint(0, shape[1], shape[:1], generator=draw).to(device)
    return logits, targets


def exact(logits: torch.Tensor, targets: torch.Tensor, z_loss: float, **options: Any) -> Any:
    x = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(x, targets, reduction="none", **options)
    loss = loss + z_loss * x.logsumexp(-1).square() * (targets != -100)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
def test_forward_and_backward(
    library: Library,
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    smoothing: float,
    z_loss: float,
) -> None:
    logits, targets = drawn(shape, dtype, device)
    if len(targets) > 2:
        targets[1] = -100
    options = {"label_smoothing": smoothing}
    wanted, wanted_grad = exact(logits, targets, z_loss, **options)
    x = logits.requires_grad_()
    losses = cross_entropy(x, targets, reduction="none", z_loss=z_loss, kernels="on", **options)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    assert (losses.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2 * NEAR[dtype], atol=NEAR[dtype])


def test_real_vocabulary(library: Library, device: torch.device) -> None:
    logits, targets = drawn((2, 50257), torch.float32, device)
    wanted, wanted_grad = exact(logits, targets, 0.0)
    x = logits.requires_grad_()
    losses = cross_entropy(x, targets, reduction="none", kernels="on")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kernels", ["on", "off"])
def test_as_torch(library: Library, device: torch.device, kernels: Any, reduction: str) -> None:
    logits, targets = drawn((6, 11), torch.float32, device)
    targets[2] = 3
    options: dict = {"ignore_index": 3, "label_smoothing": 0.2, "reduction": reduction}
    ours = cross_entropy(logits, targets, kernels=kernels, **options)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, **options))
    ours = cross_entropy(logits.view(2, 3, 11), targets.view(2, 3), kernels=kernels, **options)
    torch.testing.assert_close(
        ours.flatten(), F.cross_entropy(logits, targets, **options).flatten()
    )
    ours = cross_entropy(logits[0], targets[0], kernels=kernels, **options)
    torch.testing.assert_close(ours, F.cross_entropy(logits[0], targets[0], **options))


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_nothing_that_counts(library: Library, device: torch.device, kernels: Any) -> None:
    logits, targets = drawn((3, 5), torch.float32, device)
    assert cross_entropy(logits, torch.full_like(targets, -100), kernels=kernels).isnan()
    assert cross_entropy(logits[:0], targets[:0], kernels=kernels).isnan()
    assert cross_entropy(logits[:0], targets[:0], reduction="sum", kernels=kernels) == 0


@pytest.mark.parametrize("way", ["rows apart", "misaligned", "transposed", "one row"])
@pytest.mark.parametrize("dtype", LOW)
def test_strides(library: Library, device: torch.device, dtype: torch.dtype, way: str) -> None:
    logits, targets = drawn((5, 40), dtype, device)
    if way == "rows apart":
        x = logits[:, 3:29]
    elif way == "misaligned":
        x = torch.empty(1 + 5 * 40, dtype=dtype, device=device)[1:].view(5, 40).copy_(logits)
    elif way == "transposed":
        x = logits.t().contiguous().t()
    else:
        x = logits[:1].expand(5, 40)
    targets %= x.shape[1]
    wanted, wanted_grad = exact(x, targets, 0.0)
    x = x.detach().requires_grad_()
    losses = cross_entropy(x, targets, reduction="none", kernels="on")
    (grad,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=2 * NEAR[dtype], atol=NEAR[dtype])


@pytest.mark.parametrize("cuts", [[0, 20, 33], [0, 0, 7, 33], [0, 1, 2, 33, 33]])
def test_parts_are_the_whole(library: Library, device: torch.device, cuts: list[int]) -> None:
    logits, targets = drawn((6, 33), torch.float32, device)
    logits[1, :7] = -torch.inf  # a part of this row has no sum
    whole = cross_entropy_parts(logits, targets, with_sum=True, kernels="on")
    pieces = []
    for start, stop in pairwise(cuts):
        own = logits[:, start:stop]
        mine = (targets >= start) & (targets < stop)
        local = torch.where(mine, targets - start, -1)
        pieces.append((own, local, cross_entropy_parts(own, local, with_sum=True, kernels="on")))
    parts = [part for _, _, part in pieces]
    most = torch.stack([part.most for part in parts]).amax(0)
    total = sum(part.total * (part.most - most).exp() for part in parts)
    assert torch.equal(most, whole.most)
    torch.testing.assert_close(total, whole.total, rtol=1e-6, atol=0.0)
    assert torch.equal(sum(part.wanted for part in parts), whole.wanted)
    assert torch.allclose(sum(part.sum for part in parts), whole.sum, rtol=1e-5)
    options: dict = {"z_loss": 1e-2, "uniform": 0.1 / 33, "hit": 0.9, "kernels": "on"}
    log_sum, scale = whole.most + whole.total.log(), torch.rand(6, device=device)
    grad = cross_entropy_grad(logits, targets, log_sum, scale, **options)
    grads = [cross_entropy_grad(x, aim, log_sum, scale, **options) for x, aim, _ in pieces]
    torch.testing.assert_close(torch.cat(grads, 1), grad, rtol=1e-6, atol=1e-8)


def test_out_of_range(library: Library, device: torch.device) -> None:
    """NaN and +inf make a loss NaN, as in torch; -inf, huge and tiny logits do not."""
    logits, _ = drawn((8, 50), torch.float32, device)
    targets = torch.full((8,), 45, device=device)
    logits[0, 3], logits[1, 30], logits[2], logits[3, :20] = torch.nan, torch.inf, 3e38, -3e38
    logits[4, :40], logits[5], logits[6], logits[7, 45] = -torch.inf, -torch.inf, 1e-40, -torch.inf
    x = logits.requires_grad_()
    losses = cross_entropy(x, targets, reduction="none", kernels="on")
    torch.testing.assert_close(
        losses, F.cross_entropy(x, targets, reduction="none"), equal_nan=True
    )
    rows = [3, 4, 6]  # backward knows the log of the sum, which at 3e38 has no digits for a log(50)
    (grad,) = torch.autograd.grad(losses[rows].sum(), x)
    wanted = F.cross_entropy(x, targets, reduction="none")[rows].sum()
    torch.testing.assert_close(grad[rows], torch.autograd.grad(wanted, x)[0][rows])
    nothing = cross_entropy_parts(logits[5:6].detach(), targets[5:6], kernels="on")
    assert (nothing.most, nothing.total) == (module.LOWEST, 0)


def test_no_columns(library: Library, device: torch.device) -> None:
    empty, targets = torch.zeros(3, 0, device=device), torch.full((3,), -1, device=device)
    parts = cross_entropy_parts(empty, targets, with_sum=True, kernels="on")
    reference = cross_entropy_parts(empty, targets, with_sum=True, kernels="off")
    for ours, wanted in zip(parts, reference, strict=True):
        assert torch.equal(ours, wanted)
    ones = torch.ones(3, device=device)
    assert cross_entropy_grad(empty, targets, ones, ones, kernels="on").shape == (3, 0)


@pytest.mark.parametrize("dtype", LOW)
def test_in_place(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    leaf, targets = drawn((5, 37), dtype, device)
    leaf.requires_grad_()
    wanted = torch.autograd.grad(cross_entropy(leaf, targets, kernels="on"), leaf)[0]
    logits = leaf * 1.0
    loss = cross_entropy(logits, targets, inplace_backward=True, kernels="on")
    seen: list[torch.Tensor] = []
    logits.register_hook(seen.append)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, wanted)
    assert seen[0].data_ptr() == logits.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out(library: Library, device: torch.device) -> None:
    logits, targets = drawn((4, 21), torch.float32, device)
    log_sum, scale = logits.logsumexp(-1), torch.rand(4, device=device)
    for kernels in ("on", "off"):
        wanted = cross_entropy_grad(logits, targets, log_sum, scale, kernels=kernels)
        for own in (logits.clone(), logits.t().contiguous().t()):
            out = cross_entropy_grad(own, targets, log_sum, scale, out=own, kernels=kernels)
            assert out is own
            assert torch.equal(own, wanted)
        wide = torch.zeros(4, 30, device=device)
        cross_entropy_grad(logits, targets, log_sum, scale, out=wide[:, 4:25], kernels=kernels)
        assert torch.equal(wide[:, 4:25], wanted)
        assert not wide[:, :4].any()


def test_gradients_and_registration() -> None:
    device = torch.device("cpu")
    x, targets = drawn((4, 5), torch.float64, device, factor=1.0)
    x.requires_grad_()
    targets[1] = -100
    args = (-100, 0.1, 1e-2, False)
    assert torch.autograd.gradcheck(lambda x: module._CROSS_ENTROPY(x, targets, *args)[0], x)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets, z_loss=0.1), x)
    own = x.detach().float().requires_grad_()
    torch.library.opcheck(module._CROSS_ENTROPY.registered, (own, targets, *args))
    for with_sum in (True, False):
        torch.library.opcheck(module._PARTS.registered, (own.detach(), targets, with_sum))
    numbers = torch.rand(4, device=device)
    grad = (own.detach(), targets, numbers, numbers, 0.1, 0.1, 0.9)
    torch.library.opcheck(module._GRAD.registered, grad)


def test_second_derivative_is_refused(library: Library, device: torch.device) -> None:
    x, targets = drawn((4, 5), torch.float32, device)
    loss = cross_entropy(x.requires_grad_(), targets, kernels="on")
    with pytest.raises(BigtrainError, match="second derivatives through cross_entropy"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_threads(library: Library, device: torch.device) -> None:
    x, targets = drawn((90, 300), torch.float32, device)
    x.requires_grad_()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            losses = cross_entropy(x, targets, reduction="none", kernels="on")
            results.append((losses, torch.autograd.grad(losses.sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_next_token_loss(library: Library, device: torch.device) -> None:
    logits, targets = drawn((6, 9), torch.bfloat16, device)
    loss = NextTokenLoss(kernels="on")(logits.view(2, 3, 9), targets.view(2, 3))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.float(), targets))


@pytest.mark.parametrize(
    ("logits", "targets", "options", "says"),
    [
        ((3, 5), [0, 5, 1], {}, "target 5 is outside of the vocabulary of 5"),
        ((3, 5), [0, -1, 1], {}, "target -1"),
        ((3, 5), [0, 1], {}, "do not fit together"),
        ((3, 0), [0, 1, 2], {}, "do not fit together"),
        ((3, 5), [0.0, 1.0, 2.0], {}, "targets is torch.float32"),
        ((3, 5), [0, 1, 2], {"reduction": "max"}, "reduction is 'max'"),
        ((3, 5), [0, 1, 2], {"label_smoothing": 1.5}, "label_smoothing is 1.5"),
    ],
)
def test_refusals(logits: tuple, targets: list, options: dict, says: str) -> None:
    with pytest.raises(BigtrainError, match=says):
        cross_entropy(torch.zeros(logits), torch.tensor(targets), **options)


def test_refusals_of_the_gradient() -> None:
    x, targets, numbers = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    with pytest.raises(BigtrainError, match="scale is"):
        cross_entropy_grad(x, targets, numbers, numbers[:1])
    with pytest.raises(BigtrainError, match="out is"):
        cross_entropy_grad(x, targets, numbers, numbers, out=x.bfloat16())
