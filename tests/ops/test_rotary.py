"""Rotary embedding: near fp64 in every library, any strides, there and back, in place."""

from __future__ import annotations

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.models.llama import rotary_table
from bigtrain.ops import rotary as module
from bigtrain.ops.library import Library
from bigtrain.ops.rotary import rotary

LOW = [torch.float32, torch.bfloat16, torch.float16]
# Rounded once from fp32: half a unit in the last place of numbers up to about 6.
NEAR = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SHAPES = [(2, 5, 3, 2), (1, 1, 1, 6), (2, 7, 3, 66), (1, 33, 2, 64), (2, 3, 5, 128), (0, 4, 2, 8)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(device, dtype)


def table_for(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return rotary_table(shape[1] + 3, shape[3], 1e4).to(device)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(
    library: Library, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = drawn(shape, dtype, device).requires_grad_()
    table = table_for(shape, device)
    grad = drawn(shape, dtype, device).flip(0)
    y = rotary(x, table, kernels="on")
    (dx,) = torch.autograd.grad(y, x, grad)
    exact = x.detach().double().requires_grad_()
    wanted = rotary(exact, table.double(), kernels="off")
    (wanted_dx,) = torch.autograd.grad(wanted, exact, grad.double())
    near = NEAR[dtype]
    torch.testing.assert_close(y.double(), wanted, rtol=near, atol=near)
    torch.testing.assert_close(dx.double(), wanted_dx, rtol=near, atol=near)
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("way", ["heads", "slice", "misaligned", "stepped", "expanded"])
def test_strides(library: Library, device: torch.device, way: str, dtype: torch.dtype) -> None:
    shape = (2, 6, 3, 16)
    table = table_for(shape, device)
    whole = drawn((2, 6, 9, 16), dtype, device)
    if way == "heads":
        x = whole[:, :, :3].contiguous().transpose(1, 2)
    elif way == "slice":  # queries among queries, keys and values
        x = whole[:, :, 3:6]
    elif way == "misaligned":
        x = torch.empty(2 * 6 * 3 * 16 + 1, dtype=dtype, device=device)[1:].view(shape)
        x.copy_(whole[:, :, :3])
    elif way == "stepped":
        x = drawn((2, 6, 3, 32), dtype, device)[..., ::2]
    else:
        x = whole[:1, :, :3].expand(2, 6, 3, 16)
    seq_dim = 2 if way == "heads" else 1
    y = rotary(x, table, seq_dim=seq_dim, kernels="on")
    wanted = rotary(x, table, seq_dim=seq_dim, kernels="off")
    torch.testing.assert_close(y, wanted, rtol=NEAR[dtype], atol=NEAR[dtype])
    if way == "heads":
        assert y.stride() == x.stride()


def test_there_and_back(library: Library, device: torch.device) -> None:
    x = drawn((2, 9, 3, 24), torch.float32, device)
    table = table_for(x.shape, device)
    there = module._ROTARY(x, table, 1, 1.0)
    torch.testing.assert_close(module._ROTARY(there, table, 1, -1.0), x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_in_place(library: Library, device: torch.device, kernels: str) -> None:
    leaf = drawn((2, 6, 3, 10), torch.float32, device).requires_grad_()
    table = table_for(leaf.shape, device)
    wanted = rotary(leaf, table, kernels="off")
    x = leaf * 1.0
    saved = x.sin()  # needs x as it was
    version = x._version
    y = rotary(x, table, inplace=True, kernels=kernels)
    assert y.data_ptr() == x.data_ptr()
    assert x._version > version
    torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-6)
    (dx,) = torch.autograd.grad(x.square().sum(), leaf, retain_graph=True)
    torch.testing.assert_close(dx, 2 * leaf, rtol=1e-5, atol=1e-5)  # turning keeps lengths
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with pytest.raises(RuntimeError, match="leaf"):
        rotary(leaf, table, inplace=True, kernels=kernels)


def test_gradients_and_registration() -> None:
    device = torch.device("cpu")
    x = drawn((2, 3, 2, 6), torch.float64, device).requires_grad_()
    table = table_for(x.shape, device)
    assert torch.autograd.gradcheck(lambda x: module._ROTARY(x, table, 1, 1.0), x)
    assert torch.autograd.gradgradcheck(lambda x: module._ROTARY(x, table, 1, 1.0), x)
    for args in ((x.float().detach().requires_grad_(), table, 1, 1.0), (x, table, 1, -1.0)):
        torch.library.opcheck(module._ROTARY.registered, args)


def test_threads(library: Library, device: torch.device) -> None:
    x = drawn((2, 70, 4, 64), torch.float32, device)
    table = table_for(x.shape, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(rotary(x, table, kernels="on"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_not_finite(library: Library, device: torch.device) -> None:
    x = torch.zeros(1, 1, 1, 8, device=device)
    x[..., 0], x[..., 1], x[..., 2] = torch.nan, torch.inf, 1e-40
    table = table_for((1, 9, 1, 8), device)[:, 8:]
    y = rotary(x, table, kernels="on")
    wanted = rotary(x, table, kernels="off")
    torch.testing.assert_close(y, wanted, equal_nan=True, rtol=1e-5, atol=1e-45)


@pytest.mark.parametrize(
    ("shape", "table", "options", "says"),
    [
        ((2, 3, 8), (2, 9, 4), {}, "x is"),
        ((2, 3, 1, 7), (2, 9, 3), {}, "even D"),
        ((2, 10, 1, 8), (2, 9, 4), {}, "10 positions"),
        ((2, 3, 1, 8), (2, 9, 8), {}, "of 8 channels"),
        ((2, 3, 1, 8), (2, 9, 4), {"seq_dim": 0}, "seq_dim=0"),
        ((2, 3, 1, 8), (2, 9, 4), {"kernels": "maybe"}, "auto, on or off"),
    ],
)
def test_refusals(shape: tuple, table: tuple, options: dict, says: str) -> None:
    with pytest.raises(BigtrainError, match=says):
        rotary(torch.zeros(shape), torch.zeros(table), **options)
