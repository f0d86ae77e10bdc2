"""The parts of pipeline parallelism, each for itself: cuts, absent tensors, the two backwards.

Products whose weight gradient comes later add the same numbers as torch's own, in another order:
relative errors below 2e-6 in the 2-norm.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from parity_models import relative_error
from pipeline_models import gpt, llama
from torch import nn
from torch.nn.utils import parametrizations

from bigtrain.comm.mesh import Mesh
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError
from bigtrain.ops.later import Later
from bigtrain.pipeline.absent import Absent
from bigtrain.pipeline.follow import Followed, follow
from bigtrain.pipeline.messages import Spec
from bigtrain.pipeline.split import LayerChain, balanced, bounds_at, prune
from bigtrain.pipeline.split_backward import backward, splitting
from bigtrain.tensor import ColumnParallelLinear, ParallelAttention, RowParallelLinear
from bigtrain.tensor.linear import SharedInput

CLOSE = 2e-6


# -- cuts -------------------------------------------------------------------------------------


def test_balanced_is_the_best_of_all_cuts() -> None:
    draw = random.Random(5)
    for _ in range(300):
        num = draw.randint(1, 8)
        stages = draw.randint(1, num)
        costs = [float(draw.choice((0, 1, 1, 2, 3, 7, 20))) for _ in range(num)]
        units = [f"u{index}" for index in range(num)]
        bounds = balanced(units, costs, stages)
        assert [start for start, _ in bounds] == [0, *(stop for _, stop in bounds[:-1])]
        assert bounds[-1][1] == num
        assert all(start < stop for start, stop in bounds)
        found = weight_of([costs[start:stop] for start, stop in bounds])
        cuts = itertools.combinations(range(1, num), stages - 1)
        every = [
            weight_of([costs[a:b] for a, b in itertools.pairwise((0, *cut, num))]) for cut in cuts
        ]
        assert found == min(every)


def weight_of(stages: list[list[float]]) -> tuple[float, float]:
    sums = [sum(stage) for stage in stages]
    return max(sums), sum(each**2 for each in sums)


def test_too_few_units_name_what_is_legal() -> None:
    with pytest.raises(BigtrainError, match=r"3 units cannot be cut into 4 stages") as caught:
        balanced(["a", "b", "c"], [1.0] * 3, 4)
    assert "at most 3 stages" in str(caught.value)
    assert "a, b, c" in str(caught.value)


UNITS = ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]


def test_bounds_begin_where_names_say() -> None:
    assert bounds_at(UNITS, ["blocks.1", "head"], 3) == [(0, 2), (2, 4), (4, 5)]
    assert bounds_at(UNITS, [], 1) == [(0, 5)]


@pytest.mark.parametrize(
    ("begins", "stages", "said"),
    [
        (["block.1"], 2, "did you mean 'blocks.1'?"),
        (["zzz"], 2, "no stage can begin at 'zzz'"),
        (["blocks.1"], 3, "give 2 names"),
        (["blocks.1", "blocks.2"], 2, "give 1 names"),
        (["blocks.2", "blocks.1"], 3, "in the model's order"),
        (["blocks.1", "blocks.1"], 3, "each once"),
        (["embed"], 2, "each stage but the first"),
    ],
)
def test_bounds_refuse(begins: list[str], stages: int, said: str) -> None:
    with pytest.raises(BigtrainError) as caught:
        bounds_at(UNITS, begins, stages)
    assert said in str(caught.value)


def test_prune_leaves_what_stays_and_what_is_around() -> None:
    model = llama(3)
    before = dict(model.named_parameters())
    prune(model, {"blocks.1"}, torch.bfloat16, torch.device("cpu"))
    assert {name for name, _ in model.named_parameters()} == {
        name for name in before if name.startswith("blocks.1.")
    }
    assert model.get_parameter("blocks.1.mlp.up.weight") is before["blocks.1.mlp.up.weight"]
    assert "table" in dict(model.named_buffers()), "all layers use it"
    gone = model.get_submodule("blocks.0.mlp.up").weight
    assert isinstance(gone, Absent)
    assert gone.shape == before["blocks.0.mlp.up.weight"].shape
    assert (gone.dtype, gone.device) == (torch.bfloat16, torch.device("cpu"))
    assert list(model.state_dict()) == [f"{n}" for n in before if n.startswith("blocks.1.")]


def test_prune_keeps_single_parameters() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
            self.norm = nn.BatchNorm1d(4)

    model = Root()
    prune(model, {"scale"}, torch.float32, torch.device("cpu"))
    assert [name for name, _ in model.named_parameters()] == ["scale"]
    assert not list(model.named_buffers())
    assert isinstance(model.shift, Absent)


def test_chain_is_what_the_model_computes() -> None:
    for model in (gpt(3, tie=True), llama(3)):
        chain = LayerChain(model)
        tokens = torch.arange(8)[None]
        for targets in (None, tokens):
            for cut in range(1, len(chain.units)):
                call = ((tokens,), {} if targets is None else {"targets": targets})
                first, second = chain.part(0, cut), chain.part(cut, len(chain.units))
                result = second(first(None, call), call)
                assert torch.equal(result, model(tokens, targets))


# -- absent tensors ---------------------------------------------------------------------------


def absent(*shape: int, dtype: torch.dtype = torch.float32) -> Absent:
    return Absent.of(shape, dtype, torch.device("cpu"))


OPERATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum with a real one": lambda x: x + torch.ones(3, 4),
    "real one first": lambda x: torch.ones(2, 3, 4) * x,
    "matmul": lambda x: torch.relu(x @ torch.ones(4, 5)),
    "softmax": lambda x: F.softmax(x.float() / 3, dim=-1, dtype=torch.float64),
    "views": lambda x: x.transpose(1, 2).reshape(2, -1).unflatten(1, (4, 3)),
    "index": lambda x: x[:, None, 1:, ..., 0],
    "index by a real one": lambda x: x[torch.tensor([1, 0, 1])],
    "cat": lambda x: torch.cat((x, torch.zeros(1, 3, 4), x[:1])),
    "stack": lambda x: torch.stack([x, x.neg()]),
    "where": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "to": lambda x: x.to(torch.float64).to(device=x.device).to(torch.zeros(1)),
    "new": lambda x: x.new_zeros(2, 2) + x.new_ones(2),
    "expand": lambda x: x.mean(-1, keepdim=True).expand_as(x),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "pooling": lambda x: F.adaptive_avg_pool1d(x, 2),
    "chunk": lambda x: x.chunk(2, -1)[1],
    "topk": lambda x: x.topk(2, -1)[1],
    "detach": lambda x: x.detach().clone().contiguous().requires_grad_(False),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_absent_knows_shape_dtype_and_device(name: str) -> None:
    wanted = OPERATIONS[name](torch.ones(2, 3, 4))
    got = OPERATIONS[name](absent(2, 3, 4))
    assert isinstance(got, Absent)
    assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)
    assert repr(got) == f"Absent(shape={tuple(wanted.shape)}, dtype={wanted.dtype})"


def test_absent_changes_itself_in_place() -> None:
    x = absent(2, 3)
    x.add_(1).mul_(torch.ones(3))
    x += 1
    x[0] = 5
    x.masked_fill_(torch.ones(2, 3, dtype=torch.bool), 0)
    assert isinstance(x, Absent)
    assert x.shape == (2, 3)


MISUSES: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if x.sum() > 0 else 2,
    "float": lambda x: float(x.sum()),
    "list": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: torch.ones(2, 3)[x > 0],
    "numpy": lambda x: x.numpy(),
    "in place": lambda x: torch.ones(2, 3).add_(x),
    "assigned": lambda x: torch.ones(2, 3).__setitem__(0, x[0]),
    "copied": lambda x: torch.ones(2, 3).copy_(x),
}


@pytest.mark.parametrize("name", list(MISUSES))
def test_absent_values_are_refused_with_the_place(name: str) -> None:
    with pytest.raises(BigtrainError) as caught:
        MISUSES[name](absent(2, 3))
    line = MISUSES[name].__code__.co_firstlineno
    assert caught.value.problem.where == f"{__file__}:{line}"
    assert "pipeline.split" in str(caught.value)


def test_real_tensor_is_never_changed_behind_its_back() -> None:
    """x += absent binds x anew at best; another name of the tensor must not be left out."""
    real = torch.ones(2, 3)
    with pytest.raises(BigtrainError):
        real += absent(2, 3)


# -- following a model ------------------------------------------------------------------------


def followed(model: nn.Module, *args: Any, inside: tuple[str, ...] = ()) -> Followed:
    with torch.no_grad():
        return follow(model, {"", *inside}, (args, {}), lambda: 0.0)


def needs(found: Followed) -> dict[str, set[str]]:
    """Return of which units each unit needs results; and the end."""
    names = [unit.name for unit in found.units]
    every = {unit.name: unit for unit in found.units} | {"end": found.end}
    return {
        name: {names[number] for number, _ in unit.needs} | set(unit.parameters)
        for name, unit in every.items()
    }


class Three(nn.Module):
    """Three linear layers, joined by `between(model, x)`."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self, x)


def residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    first = m.a(x)
    return m.c(m.b(first) + 1) + first


def in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    total += m.a(x)
    total.add_(m.b(x))
    return m.c(total)


def by_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    total[..., :2] = m.a(x)[..., :2]
    m.b(x)
    return m.c(total)


def through_a_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    part = total[..., :2]
    part.copy_(m.a(x)[..., :2])
    m.b(x)
    return m.c(total)


def by_out(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x)
    torch.add(m.a(x), 1, out=total)
    m.b(x)
    return m.c(total)


def with_parameter(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.c(m.b(m.a(x)) * m.scale)


def tied(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(m.c(m.b(m.a(x))), m.a.weight)


def in_a_dict(m: Any, x: torch.Tensor) -> torch.Tensor:
    kept = {"a": [m.a(x)]}
    kept["b"] = [m.b(x), *kept["a"]]
    return m.c(torch.stack(kept["b"]).sum(0))


@pytest.mark.parametrize(
    ("between", "wanted"),
    [
        (residual, {"a": set(), "b": {"a"}, "c": {"b"}, "end": {"c", "a"}}),
        (in_place, {"a": set(), "b": set(), "c": {"a", "b"}, "end": {"c"}}),
        (by_view, {"a": set(), "b": set(), "c": {"a"}, "end": {"c"}}),
        pytest.param(
            through_a_view,
            {"a": set(), "b": set(), "c": {"a"}, "end": {"c"}},
            marks=pytest.mark.xfail(strict=True, reason="the view is marked, its base is not"),
        ),
        (by_out, {"a": set(), "b": set(), "c": {"a"}, "end": {"c"}}),
        (with_parameter, {"a": set(), "b": {"a"}, "c": {"b", "scale"}, "end": {"c"}}),
        (tied, {"a": set(), "b": {"a"}, "c": {"b"}, "end": {"c", "a.weight"}}),
        (in_a_dict, {"a": set(), "b": set(), "c": {"a", "b"}, "end": {"c"}}),
    ],
)
def test_follow_finds_what_units_need(between: Any, wanted: dict[str, set[str]]) -> None:
    assert needs(followed(Three(between), torch.ones(2, 4))) == wanted


def test_follow_counts_calls_and_looks_inside() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    model.append(model[1])
    assert [u.name for u in followed(model, torch.ones(2, 4)).units] == ["0", "1", "1#2"]
    inside = followed(model, torch.ones(2, 4), inside=("0",))
    assert [u.name for u in inside.units] == ["0.0", "0.1", "1", "1#2"]
    assert [u.module for u in inside.units] == ["0.0", "0.1", "1", "1"]


# -- the two halves of backward ---------------------------------------------------------------


class Product(nn.Module):
    """A weight, a bias, and what is done with them."""

    def __init__(self, use: Callable[..., torch.Tensor], shape: tuple[int, ...] = (5, 4)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(shape[-1]))
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.use(x, self.weight, self.bias)


def shared_linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, w) @ w, w)


# What makes the module, the shape of its input, and how many gradients come later.
SPLIT: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear of a vector": (lambda: nn.Linear(5, 4), (5,), 2),
    "linear of a matrix": (lambda: nn.Linear(5, 4), (3, 5), 2),
    "linear of 3 dims": (lambda: nn.Linear(5, 4), (2, 3, 5), 2),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), (2, 3, 5), 1),
    "linear, by name": (
        lambda: Product(lambda x, w, b: F.linear(weight=w, input=x, bias=None), (4, 5)),
        (3, 5),
        1,
    ),
    "linear of nothing": (lambda: nn.Linear(5, 4), (0, 5), 2),
    "torch.matmul": (lambda: Product(lambda x, w, b: torch.matmul(x, w) + b), (2, 3, 5), 1),
    "x.matmul": (lambda: Product(lambda x, w, b: x.matmul(w)), (3, 5), 1),
    "matmul of a vector": (lambda: Product(lambda x, w, b: torch.matmul(x, w)), (5,), 1),
    "torch.mm": (lambda: Product(lambda x, w, b: torch.mm(x, w)), (3, 5), 1),
    "x.mm": (lambda: Product(lambda x, w, b: x.mm(w)), (3, 5), 1),
    "@": (lambda: Product(lambda x, w, b: x @ w), (2, 3, 5), 1),
    "@, weight first": (lambda: Product(lambda x, w, b: w @ x, (4, 5)), (5, 3), 0),
    "@, weight transposed": (lambda: Product(lambda x, w, b: x @ w.T, (4, 5)), (3, 5), 0),
    "@, weight of 3 dims": (lambda: Product(lambda x, w, b: x @ w, (2, 5, 4)), (2, 3, 5), 0),
    "@, weight of 1 dim": (lambda: Product(lambda x, w, b: x @ w, (5,)), (3, 5), 0),
    "addmm": (lambda: Product(lambda x, w, b: torch.addmm(b, x, w)), (3, 5), 2),
    "addmm, by name": (lambda: Product(lambda x, w, b: torch.addmm(b, mat1=x, mat2=w)), (3, 5), 2),
    "addmm, scaled": (
        lambda: Product(lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=3)),
        (3, 5),
        0,
    ),
    "addmm, of no parameter": (
        lambda: Product(lambda x, w, b: torch.addmm(x[:, :4], x, w)),
        (3, 5),
        0,
    ),
    "twice the same weight": (lambda: Product(shared_linear, (4, 5)), (3, 5), 3),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9), 2),
    "conv1d, all options": (
        lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        (2, 4, 9),
        1,
    ),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6), 2),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, dilation=(1, 2)), (2, 4, 7, 7), 2),
    "conv2d, 1 x 1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 3, 3), 2),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=1), (2, 2, 4, 5, 3), 2),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (2, 4, 5, 5), 0),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 5), 0),
    "conv2d, circular": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        (2, 4, 5, 5),
        2,
    ),
    "conv2d, one sample": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5), 0),
    "conv2d, by name": (
        lambda: Product(
            lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, stride=2, padding=1), (4, 2, 3, 4)
        ),
        (2, 2, 5, 6),
        2,
    ),
    "conv transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), 0),
    "weight is computed": (
        lambda: parametrizations.weight_norm(nn.Linear(5, 4)),
        (3, 5),
        0,
    ),
    "bilinear": (lambda: Product(lambda x, w, b: F.bilinear(x, x, w), (3, 5, 5)), (2, 5), 0),
}


class Delivered:
    """Where a Later brings gradients to; sums them up as buckets do."""

    def __init__(self) -> None:
        self.total: dict[nn.Parameter, torch.Tensor] = {}
        self.count = 0

    def __call__(self, param: nn.Parameter, grad: Any) -> None:
        self.count += 1
        value = grad if isinstance(grad, torch.Tensor) else grad.compute()
        assert value.shape == param.shape
        self.total[param] = self.total.get(param, 0) + value

    def gradient(self, param: nn.Parameter) -> torch.Tensor | None:
        """Return all of it, with what came the usual way."""
        found = [g for g in (param.grad, self.total.get(param)) if g is not None]
        return sum(found[1:], found[0]) if found else None


def plainly(
    model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return what the model gives, the gradient of its input, and that of its output."""
    given = x.detach().clone().requires_grad_(x.requires_grad)
    out = model(given)
    torch.manual_seed(1)
    grad = torch.randn_like(out)
    out.backward(grad)
    return out.detach(), given.grad, grad


@pytest.mark.parametrize("when", ["later", "at once"])
@pytest.mark.parametrize("name", SPLIT)
def test_split_backward_gives_torchs_gradients(name: str, when: str) -> None:
    torch.manual_seed(0)
    make, shape, deferred = SPLIT[name]
    model, x = make(), torch.randn(shape)
    for needs_grad in (True, False):
        x.requires_grad_(needs_grad)
        model.zero_grad()
        out, by_input, grad = plainly(model, x)
        wanted = {name: param.grad for name, param in model.named_parameters()}
        model.zero_grad()
        delivered = Delivered()
        later = Later(delivered)
        given = x.detach().clone().requires_grad_(needs_grad)
        with splitting(later):
            got = model(given)
            later.open = when == "later"
            backward([got], [grad], later)
        assert relative_error(got.detach(), out, floor=1e-6) < CLOSE
        if needs_grad:
            assert given.grad is not None
            assert by_input is not None
            assert relative_error(given.grad, by_input, floor=1e-6) < CLOSE
        if when == "later":
            assert delivered.count == 0
        later.compute()
        assert delivered.count == deferred
        for name, param in model.named_parameters():
            mine, theirs = delivered.gradient(param), wanted[name]
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert relative_error(mine, theirs, floor=1e-6) < CLOSE, name
        later.compute()
        assert delivered.count == deferred, "it is forgotten"


def test_hooked_parameters_are_not_left() -> None:
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    seen: list[torch.Tensor] = []
    model.weight.register_hook(lambda grad: seen.append(grad) or grad * 2)
    delivered = Delivered()
    later = Later(delivered)
    with splitting(later):
        out = model(x)
        later.open = True
        backward([out], [torch.ones_like(out)], later)
    later.compute()
    assert delivered.count == 0
    assert len(seen) == 1
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, 2 * torch.ones(4, 3) @ x)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_get_none(frozen: str) -> None:
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    model.get_parameter(frozen).requires_grad_(False)
    delivered = Delivered()
    later = Later(delivered)
    with splitting(later):
        out = model(x)
        later.open = True
        backward([out], [torch.ones_like(out)], later)
    later.compute()
    assert delivered.gradient(model.get_parameter(frozen)) is None
    if frozen == "weight":
        torch.testing.assert_close(delivered.gradient(model.bias), torch.full((4,), 3.0))
    else:
        torch.testing.assert_close(delivered.gradient(model.weight), torch.ones(4, 3) @ x)


def test_autocast_is_torchs_own() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.backward(torch.ones_like(out))
    wanted = model.weight.grad
    model.zero_grad()
    delivered = Delivered()
    later = Later(delivered)
    with splitting(later):
        with torch.autocast("cpu", torch.bfloat16):
            again = model(x)
        later.open = True
        backward([again], [torch.ones_like(again)], later)
    later.compute()
    assert torch.equal(again, out)
    assert torch.equal(delivered.gradient(model.weight), wanted)


def test_without_gradients_nothing_is_replaced() -> None:
    model, x = nn.Linear(5, 4), torch.randn(3, 5)
    with splitting(Later(Delivered())), torch.no_grad():
        assert torch.equal(model(x), F.linear(x, model.weight, model.bias))


def test_backward_of_several_roots() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(5, 4), torch.randn(3, 5, requires_grad=True)
    delivered = Delivered()
    later = Later(delivered)
    with splitting(later):
        one, two = model(x), model(2 * x)
        later.open = True
        backward([one, two], [torch.ones_like(one), torch.ones_like(two)], later)
    later.compute()
    assert delivered.count == 4
    torch.testing.assert_close(delivered.total[model.weight], 3 * torch.ones(4, 3) @ x)
    torch.testing.assert_close(delivered.total[model.bias], torch.full((4,), 6.0))


# -- parallel layers leave their weight gradients, too ------------------------------------------


def column(mesh: Mesh, **options: Any) -> nn.Module:
    return ColumnParallelLinear(8, 6, mesh.tp, **options)


def row(mesh: Mesh, **options: Any) -> nn.Module:
    return RowParallelLinear(8, 6, mesh.tp, input_is_parallel=False, **options)


class Both(nn.Module):
    """Two column layers that share their input, and a row layer."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        shared = SharedInput(self)
        options = {"sequence_parallel": sequence}
        self.one = ColumnParallelLinear(8, 6, mesh.tp, shared_input=shared, **options)
        self.two = ColumnParallelLinear(8, 6, mesh.tp, shared_input=shared, bias=False, **options)
        self.down = RowParallelLinear(6, 8, mesh.tp, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.one(x)) * self.two(x))


def attention(mesh: Mesh, sequence: bool) -> nn.Module:
    return ParallelAttention(8, 4, mesh.tp, sequence_parallel=sequence)


PARALLEL: dict[str, tuple[Callable[[Mesh], nn.Module], int]] = {
    "column": (column, 2),
    "column, no bias": (partial(column, bias=False), 1),
    "column, gathered": (partial(column, gather_output=True), 2),
    "row": (row, 2),
    "row, in chunks": (partial(row, num_chunks=2), 2),
    "shared": (partial(Both, sequence=False), 5),
    "shared, sequence": (partial(Both, sequence=True), 5),
    "attention": (partial(attention, sequence=False), 8),
    "attention, sequence": (partial(attention, sequence=True), 8),
}


def parallel_layers(mesh: Mesh) -> dict[str, tuple[float, int, int]]:
    """Return for each layer the largest error, and how many gradients came before and after."""
    found = {}
    for name, (make, _) in PARALLEL.items():
        torch.manual_seed(3)
        model = make(mesh)
        torch.manual_seed(4 + mesh.rank * name.endswith("sequence"))
        x = torch.randn(2, 4, 8, requires_grad=True)
        out, by_input, grad = plainly(model, x)
        wanted = {param: param.grad for param in model.parameters()}
        model.zero_grad()
        delivered = Delivered()
        later = Later(delivered)
        with splitting(later):
            got = model(x)
            later.open = True
            backward([got], [grad], later)
        before = delivered.count
        later.compute()
        pairs = [(got.detach(), out), (x.grad, by_input)]
        pairs += [(delivered.gradient(param), own) for param, own in wanted.items()]
        errors = [relative_error(mine, theirs, 1e-6) for mine, theirs in pairs]
        found[name] = (max(errors), before, delivered.count)
    return found


@pytest.mark.parity
def test_parallel_layers_leave_their_gradients(tmp_path: Path) -> None:
    for rank in run_ranks(parallel_layers, 2, tmp_path, layout=Layout(tp=2)):
        for name, (_, deferred) in PARALLEL.items():
            error, before, after = rank[name]
            assert error < CLOSE, name
            assert (before, after) == (0, deferred), name


# -- messages ---------------------------------------------------------------------------------


def test_spec_builds_what_it_was_made_of() -> None:
    one, two = torch.ones(2, 3), torch.arange(4)
    message = ({"a": [one, None, 3.5], "b": (two, "text", torch.float16)}, True)
    spec = Spec.of(message)
    assert [(each.shape, each.dtype) for each in spec.tensors] == [
        ((2, 3), torch.float32),
        ((4,), torch.int64),
    ]
    again = spec.build([one, two])
    assert again[0]["a"][0] is one
    assert again[0]["b"] == (two, "text", torch.float16)
    assert again[0]["a"][1:] == [None, 3.5]
    assert again[1] is True


@pytest.mark.parametrize(
    "other",
    [
        (torch.ones(2, 4), 3),
        (torch.ones(2, 3).double(), 3),
        (torch.ones(2, 3, requires_grad=True), 3),
        (torch.ones(2, 3), 4),
        (torch.ones(2, 3), None),
        [torch.ones(2, 3), 3],
        (torch.ones(2, 3), 3, 3),
        (torch.ones(2, 3), torch.ones(1)),
    ],
)
def test_spec_refuses_what_was_not_agreed(other: Any) -> None:
    agreed = Spec.of((torch.ones(2, 3), 3))
    agreed.check(Spec.of((torch.zeros(2, 3), 3)), 1)
    with pytest.raises(BigtrainError, match="stage 1 gives something else"):
        agreed.check(Spec.of(other), 1)


def test_spec_refuses_what_cannot_travel() -> None:
    with pytest.raises(BigtrainError, match="gives the next one a function"):
        Spec.of((torch.ones(1), lambda: 3))
