"""Masked softmax: near fp64 in every library, rows with nothing allowed, numbers out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.ops import softmax as module
from bigtrain.ops.library import Library
from bigtrain.ops.softmax import masked_softmax

LOW = [torch.float32, torch.bfloat16, torch.float16]
# Of numbers up to 1, rounded once from fp32 (backward: from rounded y).
NEAR = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SHAPES = [(1, 1, 1, 1), (2, 3, 7, 7), (1, 2, 5, 33), (2, 1, 9, 4), (1, 1, 3, 256), (0, 2, 3, 4)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return (3 * torch.randn(shape, generator=draw)).to(device, dtype)


def compare(x: torch.Tensor, scale: float, **options: Any) -> torch.Tensor:
    """Forward and backward by the kernel, against the reference in fp64."""
    grad = drawn(tuple(x.shape), x.dtype, x.device).flip(-1)
    own, exact = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y = masked_softmax(own, scale, kernels="on", **options)
    wanted = masked_softmax(exact, scale, kernels="off", **options)
    (dx,) = torch.autograd.grad(y, own, grad)
    (wanted_dx,) = torch.autograd.grad(wanted, exact, grad.double())
    near = NEAR[x.dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=near, atol=near)
    # Errors of y are multiplied by dy, up to about 10.
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=10 * near, atol=10 * near)
    return y


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(
    library: Library, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = drawn(shape, dtype, device)
    compare(x, 1.0)
    compare(x, -0.7, causal=True)
    mask = (drawn(shape, torch.float32, device) > 0).roll(1, -1)
    compare(x, 0.5, mask=mask)
    compare(x, 0.5, mask=mask[:1, :1], causal=True)


@pytest.mark.parametrize("shape", [(1, 1, 2, 1100), (1, 1, 2, 5003)])
@pytest.mark.parametrize("dtype", LOW)
def test_long_rows(
    library: Library, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = drawn(shape, dtype, device)
    compare(x, 0.3, causal=True)
    compare(x, 0.3, mask=x > -1)


@pytest.mark.parametrize(
    "shape", [(7,), (5, 7), (1, 7), (5, 1), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7), (1, 1, 1, 1), ()]
)
def test_masks_are_broadcast(
    library: Library, device: torch.device, shape: tuple[int, ...]
) -> None:
    mask = drawn(shape, torch.float32, device) > -1
    compare(drawn((2, 3, 5, 7), torch.float32, device), 1.0, mask=mask)
    compare(drawn((2, 3, 5, 7), torch.float32, device), 1.0, mask=mask.expand(2, 3, 5, 7))


def test_strides(library: Library, device: torch.device) -> None:
    x = drawn((2, 5, 3, 8), torch.float32, device).transpose(1, 2)
    mask = (drawn((2, 3, 8, 5), torch.float32, device) > 0).transpose(2, 3)
    compare(x, 1.0, mask=mask)
    compare(torch.zeros(1 + 2 * 3 * 8, device=device)[1:].view(1, 2, 3, 8), 1.0)


@pytest.mark.parametrize("dtype", LOW)
def test_rows_with_nothing_allowed(
    library: Library, device: torch.device, dtype: torch.dtype
) -> None:
    x = drawn((1, 2, 6, 4), dtype, device)
    x[0, 0, 1] = -torch.inf
    mask = torch.ones(6, 4, dtype=torch.bool, device=device)
    mask[3] = False
    y = compare(x, 1.0, causal=True, mask=mask)  # queries 0 and 1 see no key
    assert not y[0, :, [0, 1, 3]].any()


def test_out_of_range(library: Library, device: torch.device) -> None:
    """NaN and +inf make a row NaN, but for those that are masked; huge and tiny numbers do not."""
    x = drawn((1, 1, 8, 40), torch.float32, device)
    x[..., 0, 3], x[..., 1, 30], x[..., 2, :] = torch.nan, torch.inf, 3e38
    x[..., 3, :20], x[..., 4, :], x[..., 5, :30] = -3e38, 1e-40, -torch.inf
    x[..., 6, 5] = x[..., 7, 39] = torch.nan
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[..., 6, 5] = mask[..., 7, 39] = False
    y = masked_softmax(x, 1.0, mask=mask, kernels="on")
    wanted = masked_softmax(x, 1.0, mask=mask, kernels="off")
    torch.testing.assert_close(y, wanted, equal_nan=True, rtol=2e-6, atol=1e-37)
    assert y[0, 0, :2].isnan().all()
    assert y[0, 0, 2:].isfinite().all()
    large = masked_softmax(torch.full((1, 1, 1, 5), 1e38, device=device), 0.3, kernels="on")
    assert torch.equal(large, torch.full_like(large, 0.2))


def test_gradients_and_registration() -> None:
    device = torch.device("cpu")
    x = drawn((1, 2, 4, 3), torch.float64, device).requires_grad_()
    mask = torch.tensor([True, False, True], device=device)
    assert torch.autograd.gradcheck(lambda x: module._SOFTMAX(x, 0.7, True, mask), x)
    assert torch.autograd.gradcheck(lambda x: masked_softmax(x, 0.7, causal=True, mask=mask), x)
    own = x.detach().float().requires_grad_()
    torch.library.opcheck(module._SOFTMAX.registered, (own, 0.7, True, mask))
    torch.library.opcheck(module._SOFTMAX.registered, (own, 0.7, False, None))
    y = own.detach()
    torch.library.opcheck(module._SOFTMAX_BACKWARD.registered, (y, y, 0.5))


def test_second_derivative_is_refused(library: Library, device: torch.device) -> None:
    x = drawn((1, 1, 2, 3), torch.float32, device).requires_grad_()
    y = masked_softmax(x, kernels="on").square().sum()
    with pytest.raises(BigtrainError, match="second derivatives through masked_softmax"):
        torch.autograd.grad(y, x, create_graph=True)


def test_threads(library: Library, device: torch.device) -> None:
    x = drawn((2, 2, 40, 130), torch.float32, device).requires_grad_()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = masked_softmax(x, causal=True, kernels="on")
            results.append(torch.stack((y, torch.autograd.grad(y.square().sum(), x)[0])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("shape", "mask", "says"),
    [
        ((2, 3, 4), None, "B, H, Q, K"),
        ((1, 2, 3, 4), torch.zeros(3, 4), "the mask is torch.float32"),
        ((1, 2, 3, 4), torch.zeros(4, 3, dtype=torch.bool), "broadcastable"),
        ((1, 2, 3, 4), torch.zeros(1, 1, 1, 3, 4, dtype=torch.bool), "broadcastable"),
    ],
)
def test_refusals(shape: tuple, mask: torch.Tensor | None, says: str) -> None:
    with pytest.raises(BigtrainError, match=says):
        masked_softmax(torch.zeros(shape), mask=mask)
