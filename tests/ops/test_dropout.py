"""Dropout: the published generator, the same draws in every library and part, statistics."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.ops import dropout as module
from bigtrain.ops.dropout import Dropout, bias_dropout_residual, draws, philox, seed_dropout
from bigtrain.ops.library import Library

LOW = [torch.float32, torch.bfloat16, torch.float16]
NEAR = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # half a unit of the last
SEEDS = [2**63 - 1, -5, 1_234_567_890_123]
SHAPES = [(3,), (3, 1), (2, 7), (1, 64), (2, 3, 33), (3, 2, 5, 16), (1, 257), (0, 4), (2, 0)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=draw).to(device, dtype)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_published_vectors(number: int, words: tuple[int, ...]) -> None:
    """Of Random123, https://doi.org/10.1145/2063384.2063405."""
    full = torch.tensor([number])
    assert [int(word) for word in philox([full] * 4, [full] * 2)] == list(words)


def test_numbering(library: Library, device: torch.device) -> None:
    """Element e has word (e / 16) % 4 of counter (e / 64) * 16 + e % 16."""
    seeds = torch.tensor([41], device=device)
    words = draws(seeds, 1, 200)[0]
    for e in (0, 15, 16, 63, 64, 130, 199):
        counter = torch.tensor([e // 64 * 16 + e % 16, 0, 0, 0])
        word = philox(counter.split(1), torch.tensor([42, 0]).split(1))[e // 16 % 4]
        assert words[e] == int(word)
    kept = bias_dropout_residual(
        torch.ones(1, 200, device=device), None, None, 0.25, seeds, salt=1, kernels="on"
    )
    assert torch.equal(kept[0] != 0, words >= 2**30)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", ["", "bias", "residual", "bias residual"])
def test_forward_and_backward(
    library: Library, device: torch.device, shape: tuple[int, ...], dtype: torch.dtype, given: str
) -> None:
    if "bias" in given and len(shape) == 1:
        pytest.skip("no columns")
    inputs: list[Any] = [drawn(shape, dtype, device)]
    inputs.append(drawn(shape[-1:], dtype, device) if "bias" in given else None)
    inputs.append(drawn(shape, dtype, device).flip(0) if "residual" in given else None)
    grad = drawn(shape, dtype, device).flip(-1)
    results = []
    for kernels, wide in (("on", dtype), ("off", torch.float64)):
        own = [t if t is None else t.detach().to(wide).requires_grad_() for t in inputs]
        y = bias_dropout_residual(*own, 0.4, SEEDS[: shape[0]], salt=-7, kernels=kernels)
        leaves = [t for t in own if t is not None]
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(wide))])
    for ours, wanted in zip(*results, strict=True):
        assert ours.dtype == dtype
        terms = max(1.0, float(grad.numel()) if ours.shape != y.shape else 1.0) ** 0.5
        near = NEAR[dtype] * terms  # the bias has sums of rounded numbers
        torch.testing.assert_close(ours.double(), wanted, rtol=near, atol=near)


@pytest.mark.parametrize("shape", [(3, 12), (2, 6, 33), (1, 3, 4, 10), (2, 4, 64)])
def test_parts_draw_as_the_whole(
    library: Library, device: torch.device, shape: tuple[int, ...]
) -> None:
    x, residual = drawn(shape, torch.float32, device), drawn(shape, torch.float32, device).flip(0)
    bias, seeds = drawn(shape[-1:], torch.float32, device), SEEDS[: shape[0]]
    whole = bias_dropout_residual(x, bias, residual, 0.3, seeds, salt=3, kernels="off")
    for dim in range(1, len(shape)):
        for degree in (2, 3):
            if shape[dim] % degree:
                continue
            for kernels in ("on", "off"):
                pieces = []
                for rank in range(degree):
                    own = bias.chunk(degree)[rank] if dim == len(shape) - 1 else bias
                    parts = (x.chunk(degree, dim)[rank], own, residual.chunk(degree, dim)[rank])
                    at = (dim - len(shape) if rank else dim, rank, degree)
                    pieces.append(
                        bias_dropout_residual(*parts, 0.3, seeds, salt=3, part=at, kernels=kernels)
                    )
                torch.testing.assert_close(torch.cat(pieces, dim), whole, rtol=1e-6, atol=1e-6)


def test_begins_anywhere(library: Library, device: torch.device) -> None:
    """A row of a part begins at any place in a group of 64, in memory that is not aligned."""
    words = draws(torch.tensor([9]), 0, 5 * 130)[0]
    for offset, inner in pairwise((0, 1, 15, 16, 17, 63, 64, 65, 130)):
        memory = torch.ones(1 + 5 * inner, device=device)[1:].view(1, 5, inner)
        seeds = torch.tensor([9], device=device)
        numbers = (seeds, 0, 0.5, inner, 130 + inner, offset)
        y = module._DROPOUT(memory, None, None, *numbers)
        whole = draws(torch.tensor([9]), 0, 5 * (130 + inner)).view(5, -1)
        wanted = whole[:, offset : offset + inner] >= 2**31
        assert torch.equal(y[0].cpu() != 0, wanted)
    assert len(words.unique()) > 640


def test_far_counters(library: Library, device: torch.device) -> None:
    """Places beyond 2^36 in a sample use the upper half of the counter."""
    place = 2**40 + 3
    x = torch.ones(1, 1, 70, device=device)
    seeds = torch.tensor([77], device=device)
    y = module._DROPOUT.run(x, None, None, seeds, 0, 0.5, 70, 2**41, place)
    for i in (0, 13, 69):
        e = place + i
        counter = e // 64 * 16 + e % 16
        halves = torch.tensor([counter & 0xFFFFFFFF, counter >> 32, 0, 0]).split(1)
        word = philox(halves, torch.tensor([77, 0]).split(1))[e // 16 % 4]
        assert bool(y[0, 0, i]) == (int(word) >= 2**31)


def test_statistics() -> None:
    """Mean and variance of draws, and correlations between samples, layers, calls, neighbours."""
    n, p = 200_000, 0.3
    module_ = Dropout(p)
    module_.sample_seeds = [11, 12]
    masks = []
    for layer in (0, 1):
        module_.layer, module_._calls = layer, 0
        for _ in (0, 1):
            masks.extend((module_(torch.ones(2, n)) != 0).double().unbind())
    values = torch.stack(masks)
    deviation = (p * (1 - p) / n) ** 0.5
    assert ((values.mean(1) - (1 - p)).abs() < 5 * deviation).all()
    assert torch.allclose(values.var(1), torch.tensor(p * (1 - p)).double(), rtol=0.02)
    between = torch.corrcoef(torch.cat((values, values.roll(1, 1), values.roll(16, 1))))
    off = between - torch.eye(len(between), dtype=torch.float64)
    assert off.abs().max() < 5 / n**0.5
    words = draws(torch.tensor([3]), 0, n).double() / 2**32
    assert abs(float(words.mean()) - 0.5) < 5 / (12 * n) ** 0.5
    assert abs(float(words.var()) - 1 / 12) < 1e-3


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_all_and_nothing(library: Library, device: torch.device, kernels: Any) -> None:
    x = drawn((2, 100), torch.float32, device)
    assert torch.equal(bias_dropout_residual(x, None, None, 0.0, [1, 2], kernels=kernels), x)
    assert torch.equal(bias_dropout_residual(x, None, x, 1.0, [1, 2], kernels=kernels), x)


def test_not_finite(library: Library, device: torch.device) -> None:
    """What is dropped is zero, whatever it was."""
    x = torch.full((1, 100), torch.nan, device=device)
    x[:, ::2], x[:, ::3] = torch.inf, 1e-40
    for residual in (None, x):
        pair = [
            bias_dropout_residual(x, None, residual, 0.5, [5], kernels=kernels)
            for kernels in ("on", "off")
        ]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-45, equal_nan=True)


def test_gradients_and_registration() -> None:
    device = torch.device("cpu")
    seeds = torch.tensor([4, 5], device=device)
    x, residual = (drawn((2, 3, 4), torch.float64, device).requires_grad_() for _ in range(2))
    bias = drawn((4,), torch.float64, device).requires_grad_()
    rest = (seeds, 7, 0.3, 12, 24, 12)
    assert torch.autograd.gradcheck(lambda *t: module._DROPOUT(*t, *rest), (x, bias, residual))
    assert torch.autograd.gradgradcheck(lambda *t: module._DROPOUT(*t, *rest), (x, bias, residual))
    low = [t.detach().float().requires_grad_() for t in (x, bias, residual)]
    torch.library.opcheck(module._DROPOUT.registered, (*low, *rest))
    torch.library.opcheck(module._DROPOUT.registered, (low[0], None, None, *rest))


def test_threads(library: Library, device: torch.device) -> None:
    x = drawn((3, 100, 101), torch.float32, device)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            part = (2, 1, 2)
            results.append(
                bias_dropout_residual(x, x[0, 0], x, 0.1, SEEDS, part=part, kernels="on")
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_module_with_residual(library: Library, device: torch.device) -> None:
    x, residual = drawn((3, 40), torch.float32, device), drawn((3, 40), torch.float32, device) + 1
    for seeds in (SEEDS, None):
        drop = Dropout(0.3)
        results = []
        for fused in (True, False):
            torch.manual_seed(0)
            if seeds:
                seed_dropout(drop, seeds)
            results.append(drop(x, residual) if fused else residual + drop(x))
        torch.testing.assert_close(*results)
    seed_dropout(drop, SEEDS)
    assert drop(x.bfloat16(), residual).dtype == torch.float32  # as torch adds them
    drop.eval()
    assert torch.equal(drop(x, residual), residual + x)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"p": 1.5}, "p is 1.5"),
        ({"seeds": [1]}, "1 seeds for x"),
        ({"seeds": torch.tensor([1.0, 2.0])}, "seeds is torch.float32"),
        ({"bias": torch.zeros(3)}, "a bias"),
        ({"bias": torch.zeros(4).double()}, "bias is torch.float64"),
        ({"residual": torch.zeros(2, 3)}, "a residual"),
        ({"part": (0, 0, 2)}, "along dim 0"),
        ({"part": (1, 2, 2)}, "part 2 of 2"),
    ],
)
def test_refusals(options: dict, says: str) -> None:
    given: dict = {"bias": None, "residual": None, "p": 0.5, "seeds": [1, 2], **options}
    with pytest.raises(BigtrainError, match=says):
        bias_dropout_residual(torch.zeros(2, 4), **given)
