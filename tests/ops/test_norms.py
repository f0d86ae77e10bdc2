"""LayerNorm and RMSNorm: every library against fp64, and what callers can rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.errors import BigtrainError
from bigtrain.ops import norms
from bigtrain.ops.library import Library
from bigtrain.ops.norms import LayerNorm, RMSNorm, layer_norm, rms_norm

SHAPES = [(0, 7), (1, 1), (1, 7), (7, 33), (5, 192), (67, 40), (3, 1000), (2, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, skip: int = 0
) -> dict[str, torch.Tensor]:
    """x, residual, weight, bias and two gradients; `skip` elements behind an aligned address."""

    def one(seed: int, *size: int, around: float = 0.0) -> torch.Tensor:
        count = torch.Size(size).numel()
        return (draw(seed, skip + count) + around).to(device, dtype)[skip:].view(size)

    cols = shape[-1]
    tensors = {"weight": one(2, cols, around=1.0), "bias": one(3, cols)}
    for seed, name in enumerate(("x", "residual", "dy", "dsum"), 4):
        tensors[name] = one(seed, *shape)
    return tensors


def run(
    kind: str, given: dict[str, torch.Tensor], *, residual: bool, kernels: str, wide: bool = False
) -> dict[str, torch.Tensor]:
    """All outputs and gradients; `wide`: in fp64, of the same numbers."""
    tensors = {name: t.detach().double() if wide else t.detach() for name, t in given.items()}
    names = ["x", "weight"]
    names += ["residual"] * residual + ["bias"] * (kind == "layer_norm")
    for name in names:
        tensors[name].requires_grad_()
    args = [tensors["x"], tensors["weight"]] + [tensors["bias"]] * (kind == "layer_norm")
    more = tensors["residual"] if residual else None
    out = getattr(norms, kind)(*args, residual=more, kernels=kernels)
    outputs = out if residual else (out,)
    grads = torch.autograd.grad(
        outputs, [tensors[name] for name in names], [tensors["dy"], tensors["dsum"]][: len(outputs)]
    )
    found = dict(zip(("y", "sum"), outputs, strict=False))
    found |= {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: tensor.detach() for name, tensor in found.items()}


def compare(
    ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], dtype: torch.dtype, rows: int
) -> None:
    """A result is rounded once to dtype; what is added over rows also has fp32 errors of each."""
    eps = torch.finfo(dtype).eps
    for name, tensor in ours.items():
        assert tensor.dtype == dtype, name
        error = (tensor.double() - exact[name]).abs()
        size = exact[name].abs()
        # A few roundings in fp32 on the way, of numbers as large as the largest of the row.
        slack = 1e-5 * (max(rows, 1) ** 0.5 if name in ("dweight", "dbias") else 1.0)
        bound = eps * size + slack * (1.0 + size)
        assert bool((error <= bound).all()), f"{name}: {(error / bound).max()} of the bound"


def small(library: Library, shape: tuple[int, ...]) -> bool:
    return library.target != "emulated" or torch.Size(shape).numel() <= 10_000


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(
    library: Library, device: torch.device, dtype: torch.dtype, kind: str, residual: bool
) -> None:
    for shape in SHAPES:
        if not small(library, shape):
            continue
        for skip in (0, 1):
            given = inputs(shape, dtype, device, skip=skip)
            ours = run(kind, given, residual=residual, kernels="on")
            if residual:  # the sum, rounded, is what is normalised
                assert torch.equal(ours["sum"], given["x"] + given["residual"])
                total = (given["x"] + given["residual"]).double()
                given = {name: t.double() for name, t in given.items()}
                given["residual"] = total - given["x"]
            exact = run(kind, given, residual=residual, kernels="off", wide=True)
            compare(ours, exact, dtype, shape[0])


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_long_rows(library: Library, device: torch.device, kind: str) -> None:
    """Longer than what a block of threads holds in registers, and than what a stack could hold."""
    given = inputs((2, 9_003 if library.target == "emulated" else 50_000), torch.float32, device)
    ours = run(kind, given, residual=True, kernels="on")
    compare(ours, run(kind, given, residual=True, kernels="off", wide=True), torch.float32, 2)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("size", [1e30, 1e38, 1e-20, 1e-40])
def test_huge_and_tiny(library: Library, device: torch.device, kind: str, size: float) -> None:
    """Squares may overflow or vanish; what is normalised does not."""
    x = (draw(1, 3, 50).clamp(-1, 1) * size).to(device)
    weight = torch.ones(50, device=device)
    args = [x, weight] + [weight] * (kind == "layer_norm")
    y = getattr(norms, kind)(*args, kernels="on")
    exact = getattr(norms, kind)(*(a.double() for a in args), kernels="off")
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", [0.0, 1e4, -3e5])
@pytest.mark.parametrize("mean", [0.0, 1e4, -1e6])
def test_large_mean(library: Library, device: torch.device, mean: float, first: float) -> None:
    """The spread does not cancel, whatever comes first in the row."""
    x = draw(1, 4, 500).add_(mean)
    x[:, 0] += first
    x = x.to(device)
    y, total = layer_norm(x, None, None, residual=torch.zeros_like(x), kernels="on")
    exact = F.layer_norm(x.double(), (500,))
    assert torch.equal(total, x)
    # The mean is a number of fp32: what is subtracted is off by half of its last bit.
    off = abs(mean) * 2**-24 / x.double().std(-1).min()
    assert (y.double() - exact).abs().max() <= 1e-5 * exact.abs().max() + 2 * off


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_rows_stay_alone(library: Library, device: torch.device, kind: str, bad: float) -> None:
    given = inputs((5, 70), torch.float32, device)
    good = run(kind, given, residual=False, kernels="on")
    given["x"] = given["x"].clone()
    given["x"][2, 65] = bad
    spoilt = run(kind, given, residual=False, kernels="on")
    others = [0, 1, 3, 4]
    for name in ("y", "dx"):
        assert torch.equal(spoilt[name][others], good[name][others])
        assert not spoilt[name][2].isfinite().all()
    assert spoilt["dweight"].isnan().any()


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_gradients_that_nobody_wants(library: Library, device: torch.device, kind: str) -> None:
    given = inputs((6, 33), torch.float32, device)
    exact = run(kind, given, residual=True, kernels="off", wide=True)
    x, weight, residual = (given[n].clone() for n in ("x", "weight", "residual"))
    args = [given["bias"]] * (kind == "layer_norm")
    op = getattr(norms, kind)

    x.requires_grad_()
    y, total = op(x, weight, *args, residual=residual, kernels="on")
    (dx,) = torch.autograd.grad([y, total], [x], [given["dy"], given["dsum"]])
    torch.testing.assert_close(dx.double(), exact["dx"], rtol=1e-5, atol=1e-5)

    y, total = op(x, weight, *args, residual=residual, kernels="on")  # only through the sum
    (dx,) = torch.autograd.grad(total, x, given["dsum"])
    assert torch.equal(dx, given["dsum"])

    weight.requires_grad_()
    y = op(x.detach(), weight, *args, kernels="on")  # only the weight
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    (dweight,) = torch.autograd.grad(y, weight, given["dy"])
    reference = op(*wide, *(a.double() for a in args), kernels="off")
    (wanted,) = torch.autograd.grad(reference, wide[1], given["dy"].double())
    torch.testing.assert_close(dweight.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "three_dims", "one_dim"])
def test_layouts(library: Library, device: torch.device, layout: str) -> None:
    x = {
        "transposed": draw(1, 40, 9).T,
        "strided": draw(1, 9, 80)[:, ::2],
        "expanded": draw(1, 40).expand(9, 40),
        "three_dims": draw(1, 3, 4, 40),
        "one_dim": draw(1, 40),
    }[layout].to(device)
    weight = torch.ones(40, device=device)
    y = layer_norm(x.requires_grad_(), weight, weight, kernels="on")
    torch.testing.assert_close(y, F.layer_norm(x, (40,), weight, weight))
    (dx,) = torch.autograd.grad(y.sum(), x)  # of a sum: an expanded gradient
    assert dx.shape == x.shape


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm"])
def test_same_bits_on_any_number_of_threads(
    library: Library, device: torch.device, kind: str, threads: Callable[[int], None]
) -> None:
    given = inputs((150, 40) if library.target == "emulated" else (999, 193), torch.float32, device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(kind, given, residual=True, kernels="on"))
    for name, tensor in results[0].items():
        assert all(torch.equal(tensor, other[name]) for other in results[1:]), name


# -- autograd and torch.library --------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
def test_formula_and_second_derivatives(rms: bool) -> None:
    """The formula of the backward pass, in fp64 where no kernel works."""
    x, r = (draw(s, 3, 5).double().requires_grad_() for s in (1, 2))
    weight, bias = (draw(s, 5).double().requires_grad_() for s in (3, 4))

    def one(*args: torch.Tensor) -> torch.Tensor:
        return norms._NORM(*args, rms, 1e-5)[0]

    def two(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return norms._ADD_NORM(*args, rms, 1e-5)[:2]

    for function, args in ((one, (x, weight, bias)), (two, (x, r, weight, bias))):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


def test_second_derivatives_of_kernels(library: Library, device: torch.device) -> None:
    given = inputs((3, 9), torch.float32, device)
    results = []
    for kernels, dtype in (("on", torch.float32), ("off", torch.float64)):
        x, weight = (given[n].to(dtype).requires_grad_() for n in ("x", "weight"))
        (dx,) = torch.autograd.grad(
            rms_norm(x, weight, kernels=kernels).pow(3).sum(), x, create_graph=True
        )
        results.append(torch.autograd.grad(dx.square().sum(), [x, weight]))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_library(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    if library.target == "emulated":
        pytest.skip("what torch.library sees is the same")
    given = inputs((4, 9), dtype, device)
    x, r, weight, bias = (given[n].requires_grad_() for n in ("x", "residual", "weight", "bias"))
    ops = torch.ops.bigtrain
    torch.library.opcheck(ops.norm.default, (x, weight, bias, False, 1e-5))
    torch.library.opcheck(ops.norm.default, (x, None, None, True, 1e-5))
    torch.library.opcheck(ops.add_norm.default, (x, r, weight, None, True, 1e-5))
    _, stats = norms._NORM(x.detach(), None, None, False, 1e-5)
    dy = given["dy"]
    for wanted in (False, True):
        args = (
            dy,
            x.detach(),
            weight.detach(),
            stats,
            dy if wanted else None,
            False,
            wanted,
            wanted,
        )
        torch.library.opcheck(ops.norm_backward.default, args)


def test_compiled(library: Library, device: torch.device) -> None:
    if library.target == "emulated":
        pytest.skip("what torch.compile sees is the same")
    given = inputs((4, 40), torch.float32, device)

    def function(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y, total = rms_norm(x, weight, residual=residual)
        return (y * total).sum()

    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        tensors = [given[n].clone().requires_grad_() for n in ("x", "weight", "residual")]
        value = call(*tensors)
        results.append([value.detach(), *torch.autograd.grad(value, tensors)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("kernels", ["auto", "on", "off"])
def test_autocast_is_as_torch_has_it(kernels: norms.Kernels) -> None:
    x, weight = draw(1, 4, 40).bfloat16(), torch.ones(40)
    with torch.autocast("cpu"):
        y = layer_norm(x, weight, weight, kernels=kernels)
        assert torch.equal(y, F.layer_norm(x, (40,), weight, weight))
        assert y.dtype == F.layer_norm(x, (40,), weight, weight).dtype


# -- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [40, (5, 8)])
@pytest.mark.parametrize("affine", [True, False])
def test_modules_are_those_of_torch(
    library: Library, device: torch.device, shape: Any, affine: bool
) -> None:
    x = draw(1, 3, 5, 8).to(device) if isinstance(shape, tuple) else draw(1, 3, 40).to(device)
    for own, torchs in ((LayerNorm, nn.LayerNorm), (RMSNorm, nn.RMSNorm)):
        ours, theirs = (
            kind(shape, elementwise_affine=affine, device=device) for kind in (own, torchs)
        )
        assert isinstance(ours, torchs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x))
        with pytest.raises(BigtrainError, match="the module normalises over"):
            ours(x[..., :3])


def test_rms_norm_without_an_eps() -> None:
    x = draw(1, 3, 40).bfloat16() * 1e-3
    torch.testing.assert_close(RMSNorm(40, dtype=x.dtype)(x), nn.RMSNorm(40, dtype=x.dtype)(x))


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(())}, "pass floating"),
        ({"weight": torch.zeros(5)}, "weight is \\(5,\\), the rows of x have 4"),
        ({"bias": torch.zeros(3, 4)}, "bias is \\(3, 4\\)"),
        ({"weight": torch.zeros(4).half()}, "weight is torch.float16"),
        ({"residual": torch.zeros(3, 1)}, "residual is \\(3, 1\\), x is \\(3, 4\\)"),
        ({"residual": torch.zeros(3, 4, device="meta")}, "residual is on meta"),
        ({"kernels": "maybe"}, "kernels='maybe'"),
    ],
)
def test_bad_arguments(change: dict, text: str) -> None:
    good = {"x": torch.zeros(3, 4), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    with pytest.raises(BigtrainError, match=text):
        layer_norm(**(good | change))
