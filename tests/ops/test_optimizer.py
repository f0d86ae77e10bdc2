"""Updates of flat blocks: the same bits in every library, near torch's own, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch

from bigtrain.errors import BigtrainError
from bigtrain.ops.adagrad import adagrad_, adagrad_rows_
from bigtrain.ops.grad_norm import grad_norm, unscale_
from bigtrain.ops.lamb import lamb_, lamb_moments_, trust_ratios
from bigtrain.ops.library import Library
from bigtrain.ops.lion import lion_
from bigtrain.ops.optimizer import adamw_, sgd_

SIZES = [0, 1, 7, 64, 1000, 5003]
LOW = [None, torch.float32, torch.bfloat16, torch.float16]
FP16, BF16 = torch.float16, torch.bfloat16


def random(shape: Any, seed: int, device: torch.device, *, skip: int = 0) -> torch.Tensor:
    """Random numbers of many sizes; with `skip` they begin that many elements into their memory."""
    shape = torch.Size([shape] if isinstance(shape, int) else shape)
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randn(shape.numel() + skip, generator=draw)
    powers = torch.randint(-6, 4, sizes.shape, generator=draw).float()
    return (sizes * 10**powers).to(device)[skip:].view(shape)


def on_and_off(
    update: Callable[..., Any], tensors: dict[str, torch.Tensor | None], times: int = 2
) -> None:
    """Run `update(kernels=..., **copies)` with and without a kernel; all bits must be equal."""
    results = []
    for kernels in ("on", "off"):
        # Clones keep the misalignment of what they are cloned from.
        own = {name: None if t is None else like(t) for name, t in tensors.items()}
        returned = [update(kernels=kernels, number=n, **own) for n in range(1, times + 1)]
        results.append((own, returned))
    (ours, gave), (reference, wanted) = results
    for name, tensor in ours.items():
        assert same_bits(tensor, reference[name]), name
    for given, want in zip(gave, wanted, strict=True):
        assert same_bits(given, want)


def like(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that begins as far into its memory."""
    skip = tensor.storage_offset()
    memory = torch.empty(tensor.numel() + skip, dtype=tensor.dtype, device=tensor.device)
    copy = memory[skip:].view(tensor.shape)
    copy.copy_(tensor)
    return copy


def same_bits(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if isinstance(one, tuple):
        return all(map(same_bits, one, other))
    same = (one == other) | (one.isnan() & other.isnan())
    zeros = torch.signbit(one) == torch.signbit(other)
    return bool((same & (zeros | one.isnan())).all())


def block_of(n: int, low: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    skip = n % 2  # odd sizes begin in the middle of a word
    low_too = partial(random, n, device=device, skip=skip)
    return {
        "main": random(n, 1, device, skip=skip),
        "grad": low_too(2) if low is None else low_too(2).to(low),
        "param": None if low is None else low_too(1).to(low),
        "divisor": None if low is None else torch.tensor(3.7, device=device),
    }


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_adamw_bits(
    library: Library, device: torch.device, n: int, low: torch.dtype | None
) -> None:
    moments = {"exp_avg": random(n, 3, device), "exp_avg_sq": random(n, 4, device).abs()}
    on_and_off(
        lambda number, **all: adamw_(step=number, lr=1e-2, weight_decay=0.1, **all),
        block_of(n, low, device) | moments,
    )


@pytest.mark.parametrize("momentum", ["none", "plain", "nesterov"])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("n", [0, 7, 1000])
def test_sgd_bits(
    library: Library, device: torch.device, n: int, low: torch.dtype | None, momentum: str
) -> None:
    buffer = None if momentum == "none" else random(n, 3, device)
    on_and_off(
        lambda number, **all: sgd_(
            lr=0.1, momentum=0.9, nesterov=momentum == "nesterov", weight_decay=0.01, **all
        ),
        block_of(n, low, device) | {"momentum_buffer": buffer},
    )


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_lion_bits(library: Library, device: torch.device, n: int, low: torch.dtype | None) -> None:
    on_and_off(
        lambda number, **all: lion_(lr=1e-2, betas=(0.9, 0.97), weight_decay=0.1, **all),
        block_of(n, low, device) | {"exp_avg": random(n, 3, device)},
    )


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_adagrad_bits(
    library: Library, device: torch.device, n: int, low: torch.dtype | None
) -> None:
    on_and_off(
        lambda number, **all: adagrad_(lr=1e-2, weight_decay=0.1, **all),
        block_of(n, low, device) | {"sum_sq": random(n, 3, device).abs()},
    )


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("size", [0, 1, 7, 64, 200])
def test_adagrad_rows_bits(
    library: Library, device: torch.device, size: int, low: torch.dtype | None, per_row: bool
) -> None:
    rows = torch.tensor([0, 2, 3, 10], device=device)
    grad = random((4, size), 2, device)
    tensors = {
        "main": random((11, size), 1, device),
        "rows": rows,
        "grad": grad if low is None else grad.to(low),
        "sums": random(11 if per_row else (11, size), 3, device).abs(),
        "param": None if low is None else random((11, size), 1, device).to(low),
        "divisor": None if low is None else torch.tensor(0.3, device=device),
    }
    on_and_off(lambda number, **all: adagrad_rows_(lr=0.1, weight_decay=0.01, **all), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_norm_bits(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    sizes = [0, 1, 7, 1023, 1024, 1025, 70_001]
    tensors = {str(n): random(n, n, device, skip=n % 2).to(dtype) for n in sizes}
    divisor = torch.tensor(1.3, device=device)
    on_and_off(
        lambda number, kernels, **all: grad_norm(list(all.values()), kernels=kernels), tensors
    )
    on_and_off(
        lambda number, kernels, **all: unscale_(list(all.values()), divisor, kernels=kernels),
        tensors,
    )


@pytest.mark.parametrize("offsets", [[0, 1000], [0, 3, 3, 20, 900], [16, 500], [0], [0, 0]])
@pytest.mark.parametrize("low", LOW, ids=str)
def test_lamb(
    library: Library, device: torch.device, low: torch.dtype | None, offsets: list[int]
) -> None:
    """Sums may be in another order, so parameters agree to a few ulp, moments to the bit."""
    n, bounds = 1000, torch.tensor(offsets, device=device)
    start = block_of(n, low, device) | {
        "exp_avg": random(n, 3, device),
        "exp_avg_sq": random(n, 4, device).abs(),
    }
    results = []
    for kernels in ("on", "off"):
        own = {name: None if t is None else like(t) for name, t in start.items()}
        for step in (1, 2):
            lamb_(offsets=bounds, step=step, lr=1e-2, weight_decay=0.1, kernels=kernels, **own)
        results.append(own)
    ours, reference = results
    assert same_bits(ours["exp_avg"], reference["exp_avg"])
    assert same_bits(ours["exp_avg_sq"], reference["exp_avg_sq"])
    torch.testing.assert_close(ours["main"], reference["main"], rtol=1e-6, atol=0)
    padding = torch.ones(n, dtype=torch.bool, device=device)
    padding[offsets[0] : offsets[-1]] = False
    for name in ("main",) if low is None else ("main", "param"):
        assert same_bits(ours[name][padding], start[name][padding]), f"{name}: padding moved"


def test_adamw_is_torch_adamw(library: Library, device: torch.device) -> None:
    param = torch.nn.Parameter(random(777, 1, device))
    torch_adamw = torch.optim.AdamW([param], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    main, m, v = param.detach().clone(), *torch.zeros(2, 777, device=device)
    for step in range(1, 6):
        grad = random(777, step, device)
        param.grad = grad.clone()
        torch_adamw.step()
        adamw_(main, grad, m, v, step=step, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    torch.testing.assert_close(main, param.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_torch_sgd(library: Library, device: torch.device, nesterov: bool) -> None:
    param = torch.nn.Parameter(random(777, 1, device))
    torch_sgd = torch.optim.SGD([param], 0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    main, buffer = param.detach().clone(), torch.zeros(777, device=device)
    for step in range(5):
        grad = random(777, step, device)
        param.grad = grad.clone()
        torch_sgd.step()
        sgd_(main, grad, buffer, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.1)
    torch.testing.assert_close(main, param.detach(), rtol=1e-5, atol=1e-4)  # of numbers up to 3e3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adagrad_is_torch_adagrad(
    library: Library, device: torch.device, weight_decay: float
) -> None:
    param = torch.nn.Parameter(random(777, 1, device))
    torch_adagrad = torch.optim.Adagrad([param], 0.1, weight_decay=weight_decay)
    main, sums = param.detach().clone(), torch.zeros(777, device=device)
    for step in range(5):
        grad = random(777, step, device)
        param.grad = grad.clone()
        torch_adagrad.step()
        adagrad_(main, grad, sums, lr=0.1, weight_decay=weight_decay)
    torch.testing.assert_close(main, param.detach(), rtol=1e-5, atol=1e-6)


def test_lion_in_fp64(library: Library, device: torch.device) -> None:
    """The published update; element 0 has no gradient and no momentum, so it only decays."""
    main, m = random(777, 1, device), torch.zeros(777, device=device)
    wanted, m64 = main.double(), m.double()
    for step in range(5):
        grad = random(777, 10 + step, device)
        grad[0] = 0.0
        lion_(main, grad, m, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        c = 0.9 * m64 + 0.1 * grad.double()
        wanted = wanted - 0.01 * (c.sign() + 0.1 * wanted)
        m64 = 0.99 * m64 + 0.01 * grad.double()
    torch.testing.assert_close(main.double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(m.double(), m64, rtol=1e-5, atol=1e-5)  # of numbers up to 3e3


def test_adagrad_rows_is_torch_adagrad(library: Library, device: torch.device) -> None:
    """Of every element; rows that are not named stay."""
    param = torch.nn.Parameter(random((6, 5), 1, device))
    torch_adagrad = torch.optim.Adagrad([param], 0.1)
    main, sums = param.detach().clone(), torch.zeros(6, 5, device=device)
    rows = torch.tensor([1, 4], device=device)
    for step in range(4):
        grad = random((2, 5), step, device)
        param.grad = torch.zeros_like(param)
        param.grad[rows] = grad
        torch_adagrad.step()
        adagrad_rows_(main, rows, grad, sums, lr=0.1)
    torch.testing.assert_close(main, param.detach(), rtol=1e-5, atol=1e-6)


def test_lamb_in_fp64(library: Library, device: torch.device) -> None:
    """The published update, tensor by tensor, in fp64."""
    offsets = [0, 100, 107, 400]
    main, grad = random(400, 1, device), random(400, 2, device)
    m, v = torch.zeros(2, 400, device=device)
    wanted, m64, v64 = main.double(), m.double(), v.double()
    for step in range(1, 4):
        lamb_(
            *(main, grad, m, v, torch.tensor(offsets, device=device)),
            step=step, lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.01,
        )  # fmt: skip
        m64 = 0.9 * m64 + 0.1 * grad.double()
        v64 = 0.99 * v64 + 0.01 * grad.double() ** 2
        u = (m64 / (1 - 0.9**step)) / ((v64 / (1 - 0.99**step)).sqrt() + 1e-6) + 0.01 * wanted
        for a, b in pairwise(offsets):
            wanted[a:b] -= 0.01 * wanted[a:b].norm() / u[a:b].norm() * u[a:b]
    torch.testing.assert_close(main.double(), wanted, rtol=1e-5, atol=1e-7)


def test_trust_ratio_of_zeros() -> None:
    norms = torch.tensor([[0.0, 4.0], [4.0, 0.0], [9.0, 4.0]], dtype=torch.float64)
    assert trust_ratios(norms).tolist() == [1.0, 1.0, 1.5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_divisor_changes_nothing(library: Library, device: torch.device, bad: float) -> None:
    divisor = torch.tensor(bad, device=device)
    for kernels in ("on", "off"):
        main, grad, m, v = (random(50, seed, device) for seed in range(4))
        param, rows = main.to(BF16), torch.arange(5, device=device)
        table, offsets = main.view(5, 10), torch.tensor([0, 50], device=device)
        before = [t.clone() for t in (main, m, v, param)]
        shared = {"param": param, "divisor": divisor, "kernels": kernels}
        adamw_(main, grad, m, v, step=1, lr=1.0, **shared)
        sgd_(main, grad, m, lr=1.0, momentum=0.9, **shared)
        lamb_(main, grad, m, v, offsets, step=1, lr=1.0, **shared)
        adagrad_rows_(table, rows, grad.view(5, 10), v.view(5, 10), lr=1.0, **shared)
        adagrad_(main, grad, v, lr=1.0, **shared)
        lion_(main, grad, m, lr=1.0, **shared)
        for tensor, old in zip((main, m, v, param), before, strict=True):
            assert same_bits(tensor, old)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_norm_against_fp64(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    tensors = [random(n, n, device).to(dtype) for n in (1, 100_000, 33)]
    exact = sum(float(t.double().square().sum()) for t in tensors)
    squares, bad = grad_norm(tensors)
    assert float(squares) == pytest.approx(exact, rel=1e-14)
    assert float(bad) == 0


def test_norm_sees_what_is_not_finite(library: Library, device: torch.device) -> None:
    x = torch.full((3000,), 1e30, device=device)
    assert float(grad_norm([x]).squares) == pytest.approx(3e63, rel=1e-6)  # no overflow in fp32
    x[7], x[2999], x[1500] = float("nan"), float("inf"), -float("inf")
    squares, bad = grad_norm([x, x[:5]])
    assert not squares.isfinite()
    assert float(bad) == 3
    tiny = torch.full((10,), 1e-40, device=device)  # denormals are numbers too
    assert float(grad_norm([tiny]).squares) == pytest.approx(1e-79, rel=1e-4)


def test_denormals_infinities_and_signed_zeros(library: Library, device: torch.device) -> None:
    special = [0.0, -0.0, 1e-40, -1e-45, 3e38, float("inf"), -float("inf"), float("nan"), 65520.0]
    x = torch.tensor(special, device=device)
    for low in (torch.float32, BF16, FP16):
        tensors = {"main": x, "grad": x.flip(0).to(low), "param": x.to(low), "exp_avg": x * 0.5}
        on_and_off(
            lambda number, **all: adamw_(step=number, lr=1e-3, **all),
            tensors | {"exp_avg_sq": x.abs()},
        )
        on_and_off(lambda number, **all: lion_(lr=1e-3, weight_decay=0.1, **all), tensors)
        del tensors["exp_avg"]
        on_and_off(
            lambda number, **all: adagrad_(lr=1e-3, weight_decay=0.1, **all),
            tensors | {"sum_sq": x.abs()},
        )


def test_threads_do_not_matter(library: Library, device: torch.device) -> None:
    x = random(300_000, 1, device)
    offsets = torch.tensor([0, 100_001, 300_000], device=device)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        main, m, v = x.clone(), x * 0, x * 0
        norms = lamb_moments_(
            main, x, m, v, offsets, step=1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
        )
        results.append((*grad_norm([x]), norms))
    torch.set_num_threads(1)
    assert same_bits(*results)


# -- what is refused -------------------------------------------------------------------------------


def good() -> dict[str, Any]:
    return {name: torch.zeros(8) for name in ("main", "grad", "exp_avg", "exp_avg_sq")}


WHOLE = torch.zeros(16)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grad": torch.zeros(9)}, "grad has 9 elements, not 8"),
        ({"exp_avg": torch.zeros(16)[::2]}, "exp_avg is not contiguous"),
        ({"main": torch.zeros(8, dtype=torch.float64)}, "main is torch.float64"),
        ({"exp_avg_sq": torch.zeros(8, dtype=BF16)}, "exp_avg_sq is torch.bfloat16"),
        ({"grad": torch.zeros(8, dtype=torch.int32)}, "float32 or bfloat16 or float16"),
        ({"param": torch.zeros(8, device="meta")}, "param is on meta"),
        ({"divisor": torch.zeros(2)}, "divisor has 2 elements"),
        ({"divisor": torch.zeros((), dtype=torch.float64)}, "divisor is torch.float64"),
        ({"main": WHOLE[:8], "grad": WHOLE[7:15]}, "main and grad share memory"),
        ({"kernels": "yes"}, "kernels='yes'"),
    ],
)
def test_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BigtrainError, match="adamw_: ") as error:
        adamw_(**(good() | changed), step=1, lr=0.1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, 1], "strictly increase"),
        ([3, 2], "strictly increase"),
        ([-1, 2], "from -1"),
        ([0, 5], "to 5"),
    ],
)
def test_refused_rows(rows: list[int], message: str) -> None:
    with pytest.raises(BigtrainError, match=message):
        adagrad_rows_(
            torch.zeros(5, 3), torch.tensor(rows), torch.zeros(2, 3), torch.zeros(5), lr=0.1
        )


@pytest.mark.parametrize("offsets", [[0, 9], [4, 2], [-1, 8], []])
def test_refused_offsets(offsets: list[int]) -> None:
    with pytest.raises(BigtrainError, match="offsets"):
        lamb_(**good(), offsets=torch.tensor(offsets, dtype=torch.int64), step=1, lr=0.1)


# -- torch.library ---------------------------------------------------------------------------------


def test_opcheck() -> None:
    ops = torch.ops.bigtrain
    main, grad, m, v = (torch.rand(20) for _ in range(4))
    param, divisor, offsets = main.to(BF16), torch.tensor(2.0), torch.tensor([0, 5, 20])
    table, rows = torch.rand(4, 5), torch.tensor([0, 3])
    few = {"test_utils": ("test_schema", "test_faketensor", "test_autograd_registration")}
    torch.library.opcheck(ops.adamw_, (main, param, grad, m, v, divisor, *[0.5] * 7), **few)
    torch.library.opcheck(ops.sgd_, (main, param, grad, None, None, 0.1, 0.9, 0.0, True), **few)
    torch.library.opcheck(ops.lion_, (main, param, grad, m, divisor, *[0.5] * 6), **few)
    torch.library.opcheck(ops.adagrad_, (main, None, grad, v, None, 0.1, 1e-10, 0.0), **few)
    torch.library.opcheck(ops.lamb_moments_, (main, grad, m, v, None, offsets, *[0.5] * 7), **few)
    ratios = torch.ones(2)
    torch.library.opcheck(
        ops.lamb_apply_, (main, param, m, v, divisor, offsets, ratios, *[0.5] * 5), **few
    )
    arguments = (table, None, rows, table[:2].clone(), torch.rand(4), None, True, 0.1, 0.1, 0.0)
    torch.library.opcheck(ops.adagrad_rows_, arguments, **few)
    torch.library.opcheck(ops.grad_norm, ([main, m], divisor), **few)
    torch.library.opcheck(ops.unscale_, ([main, m], divisor), **few)
