"""SwiGLU and GELU: every library against fp64, and what callers can rely on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bigtrain.errors import BigtrainError
from bigtrain.ops import activations
from bigtrain.ops.activations import bias_gelu, swiglu
from bigtrain.ops.library import Library

SHAPES = [(0, 7), (1, 1), (1, 7), (7, 33), (37, 192), (3, 1000), (2, 4097)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["swiglu", "gelu_tanh", "gelu_none"]


def draw(seed: int, *shape: int) -> torch.Tensor:
    """Numbers of many sizes: from tiny to where the functions are straight lines."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 3


def call(name: str, x: torch.Tensor, other: torch.Tensor | None, kernels: Any) -> torch.Tensor:
    if name == "swiglu":
        assert other is not None
        return swiglu(x, other, kernels=kernels)
    return bias_gelu(x, other, name.removeprefix("gelu_"), kernels=kernels)  # type: ignore[arg-type]


def second(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the second argument, up or bias."""
    return shape if name == "swiglu" else shape[-1:]


def run(
    name: str,
    x: torch.Tensor,
    other: torch.Tensor | None,
    dout: torch.Tensor,
    *,
    exact: bool = False,
) -> list[torch.Tensor]:
    """The output and the gradients; `exact`: in fp64, of the same numbers."""
    tensors = [t.detach() for t in (x, other) if t is not None]
    if exact:
        tensors, dout = [t.double() for t in tensors], dout.double()
    for tensor in tensors:
        tensor.requires_grad_()
    y = call(name, tensors[0], tensors[1] if other is not None else None, "off" if exact else "on")
    return [y.detach(), *torch.autograd.grad(y, tensors, dout)]


def compare(
    ours: list[torch.Tensor], exact: list[torch.Tensor], dtype: torch.dtype, rows: int
) -> None:
    """Each is rounded once to dtype; before that in fp32, a few times for each of the rows."""
    eps = torch.finfo(dtype).eps
    for tensor, wanted in zip(ours, exact, strict=True):
        assert tensor.dtype == dtype
        error, size = (tensor.double() - wanted).abs(), wanted.abs()
        added = rows if tensor.ndim == 1 else 1
        bound = eps * size + 2e-6 * (size + max(added, 1) ** 0.5 * 10)
        assert bool((error <= bound).all()), f"{(error / bound).max()} of the bound"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(
    library: Library, device: torch.device, dtype: torch.dtype, name: str
) -> None:
    for shape in SHAPES:
        if library.target == "emulated" and torch.Size(shape).numel() > 9000:
            continue
        for skip in (0, 1):

            def one(seed: int, size: tuple[int, ...], skip: int = skip) -> torch.Tensor:
                flat = draw(seed, skip + torch.Size(size).numel()).to(device, dtype)
                return flat[skip:].view(size)

            x, dout, other = one(1, shape), one(2, shape), one(3, second(name, shape))
            given = [(x, other)] + [(x, None)] * (name != "swiglu")
            for pair in given:
                ours = run(name, *pair, dout)
                compare(ours, run(name, *pair, dout, exact=True), dtype, shape[0])


def test_halves_of_one_tensor(library: Library, device: torch.device) -> None:
    """Rows that are further apart than they are long go to the kernel as they are."""
    for shape in ((5, 66), (2, 3, 64), (1, 40), (4, 1, 32)):
        both = draw(1, *shape).to(device).requires_grad_()
        dout = draw(2, *shape[:-1], shape[-1] // 2).to(device)
        gate, up = both.chunk(2, -1)
        for tensor in (gate, up):
            assert activations._rows(tensor)[0].data_ptr() == tensor.data_ptr()
        y = swiglu(gate, up, kernels="on")
        wide = both.detach().double().requires_grad_()
        exact = swiglu(*wide.chunk(2, -1), kernels="off")
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        (grad,) = torch.autograd.grad(y, both, dout)
        (wanted,) = torch.autograd.grad(exact, wide, dout.double())
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "permuted", "one_dim"])
def test_layouts(library: Library, device: torch.device, name: str, layout: str) -> None:
    x = {
        "transposed": draw(1, 40, 9).T,
        "strided": draw(1, 9, 80)[:, ::2],
        "expanded": draw(1, 40).expand(9, 40),
        "permuted": draw(1, 3, 4, 40).transpose(0, 1),
        "one_dim": draw(1, 40),
    }[layout].to(device)
    other = draw(2, *second(name, tuple(x.shape))).to(device)
    dout = draw(3, 1).to(device).expand(x.shape)
    compare(run(name, x, other, dout), run(name, x, other, dout, exact=True), x.dtype, 9)


@pytest.mark.parametrize("name", NAMES)
def test_huge_and_tiny(library: Library, device: torch.device, name: str) -> None:
    """Where squares and cubes overflow, the functions are straight lines."""
    x = torch.tensor([1e30, -1e30, 3e38, -3e38, 100.0, -100.0, 1e-40, -1e-40, 0.0], device=device)
    other = torch.ones_like(x) if name == "swiglu" else None
    ours = run(name, x, other, torch.ones_like(x))
    line = x.clamp(min=0)
    torch.testing.assert_close(ours[0][:6], line[:6], rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(ours[1][:6], (x[:6] > 0).float(), rtol=0, atol=1e-40)
    torch.testing.assert_close(ours[0][6:], x[6:] / 2, rtol=1e-6, atol=3e-45)
    torch.testing.assert_close(ours[1][6:], torch.full_like(x[6:], 0.5))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_alone(
    library: Library, device: torch.device, name: str, bad: float
) -> None:
    x, dout = draw(1, 5, 70).to(device), draw(2, 5, 70).to(device)
    other = draw(3, *second(name, (5, 70))).to(device)
    good = run(name, x, other, dout)
    x[2, 65] = bad
    spoilt = run(name, x, other, dout)
    same = torch.ones_like(x, dtype=torch.bool)
    same[2, 65] = False
    assert torch.equal(spoilt[0][same], good[0][same])
    assert torch.equal(spoilt[1][same], good[1][same])
    assert not spoilt[0][2, 65].isfinite()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_any_number_of_threads(
    library: Library, device: torch.device, name: str, threads: Callable[[int], None]
) -> None:
    shape = (150, 40) if library.target == "emulated" else (999, 193)
    x, dout = draw(1, *shape).to(device), draw(2, *shape).to(device)
    other = draw(3, *second(name, shape)).to(device)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(name, x, other, dout))
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, tensor) for tensor in others)


# -- autograd and torch.library --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_formula_and_second_derivatives(name: str) -> None:
    """The formula of the backward pass, in fp64 where no kernel works."""
    x = draw(1, 3, 5).double().requires_grad_()
    other = draw(2, *second(name, (3, 5))).double().requires_grad_()

    def function(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if name == "swiglu":
            return activations._SWIGLU(x, other)
        return activations._BIAS_GELU(x, other, name == "gelu_tanh")

    assert torch.autograd.gradcheck(function, (x, other))
    assert torch.autograd.gradgradcheck(function, (x, other))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_of_kernels(library: Library, device: torch.device, name: str) -> None:
    results = []
    for kernels, dtype in (("on", torch.float32), ("off", torch.float64)):
        x = draw(1, 3, 9).to(device, dtype).requires_grad_()
        other = draw(2, *second(name, (3, 9))).to(device, dtype).requires_grad_()
        y = call(name, x, other, kernels)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, other]))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)


def test_gradients_that_nobody_wants(library: Library, device: torch.device) -> None:
    x, bias, dout = draw(1, 6, 33), draw(2, 33), draw(3, 6, 33)
    x, bias, dout = x.to(device), bias.to(device), dout.to(device)
    both = run("gelu_tanh", x, bias, dout)
    y = bias_gelu(x, bias.clone().requires_grad_(), kernels="on")
    y.backward(dout)
    y = bias_gelu(x.clone().requires_grad_(), bias, kernels="on")
    assert torch.equal(
        torch.autograd.grad(y, [y.grad_fn.next_functions[0][0].variable], dout)[0], both[1]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_torch_library(library: Library, device: torch.device, dtype: torch.dtype) -> None:
    if library.target == "emulated":
        pytest.skip("what torch.library sees is the same")
    x, other, bias = (
        draw(s, *size).to(device, dtype) for s, size in enumerate([(4, 9), (4, 9), (9,)])
    )
    ops = torch.ops.bigtrain
    torch.library.opcheck(ops.swiglu_backward.default, (other, x, other))
    torch.library.opcheck(ops.bias_gelu_backward.default, (other, x, bias, True, True))
    torch.library.opcheck(ops.bias_gelu_backward.default, (other, x, None, False, False))
    x, other, bias = (t.requires_grad_() for t in (x, other, bias))
    torch.library.opcheck(ops.swiglu.default, (x, other))
    torch.library.opcheck(ops.bias_gelu.default, (x, bias, True))
    torch.library.opcheck(ops.bias_gelu.default, (x, None, False))


@pytest.mark.parametrize("name", NAMES)
def test_compiled(library: Library, device: torch.device, name: str) -> None:
    if library.target == "emulated":
        pytest.skip("what torch.compile sees is the same")
    x, other = draw(1, 4, 40).to(device), draw(2, *second(name, (4, 40))).to(device)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    results = []
    for function in (call, compiled):
        tensors = [t.clone().requires_grad_() for t in (x, other)]
        y = function(name, *tensors, "auto")
        results.append([y.detach(), *torch.autograd.grad(y.sum(), tensors)])
    for eager, other_way in zip(*results, strict=True):
        torch.testing.assert_close(other_way, eager)


@pytest.mark.parametrize("kernels", ["auto", "on", "off"])
def test_autocast_is_as_torch_has_it(kernels: Any) -> None:
    x, up, bias = draw(1, 4, 40).bfloat16(), draw(2, 4, 40), draw(3, 40)
    with torch.autocast("cpu"):
        torch.testing.assert_close(swiglu(x, up, kernels=kernels), F.silu(x) * up)
        y = bias_gelu(x, bias, kernels=kernels)
        torch.testing.assert_close(y, F.gelu(x + bias, approximate="tanh"))


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "args", "text"),
    [
        (swiglu, (torch.zeros(3, 4), torch.zeros(4)), "gate is \\(3, 4\\), up is \\(4,\\)"),
        (swiglu, (torch.zeros(3).half(), torch.zeros(3)), "up is torch.float32"),
        (swiglu, (torch.zeros(3), torch.zeros(3, device="meta")), "up is on meta"),
        (swiglu, (torch.zeros(3).int(), torch.zeros(3).int()), "gate is torch.int32"),
        (swiglu, (torch.zeros(()), torch.zeros(())), "pass a floating tensor"),
        (bias_gelu, (torch.zeros(3, 4), torch.zeros(3)), "bias is \\(3,\\), the rows of x have 4"),
        (bias_gelu, (torch.zeros(3, 4), torch.zeros(4).half()), "bias is torch.float16"),
        (bias_gelu, (torch.zeros(3, 4), None, "erf"), "approximate='erf'"),
        (bias_gelu, (torch.zeros(3, 4), None, "none", "maybe"), "kernels='maybe'"),
    ],
)
def test_bad_arguments(function: Callable[..., Any], args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(BigtrainError, match=text):
        function(*args)
