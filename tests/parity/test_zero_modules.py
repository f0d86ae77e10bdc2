"""Any module trains under ZeRO 3 as in one process, whatever way it uses its parameters.

Two ranks with data of their own, a bucket for each parameter, SGD: losses and parameters differ
from those of plain torch by the order of fp32 sums, 1e-5 after some steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from parity_models import survey
from pipeline_models import shown
from torch import nn
from torch.utils.checkpoint import checkpoint
from zero_models import peak_whole, sharded_bytes, whole_parameters

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.schema import ZeroSection
from bigtrain.optim import SGD

pytestmark = pytest.mark.parity
STEPS, RANKS, WIDTH = 5, 2, 16
BUCKET_MB = 1e-5  # less than any parameter


class Net(nn.Module):
    """forward(x [4, 3, WIDTH], choice: a number of this rank's sample) gives a scalar."""

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        raise NotImplementedError


def linear(width: int = WIDTH) -> nn.Linear:
    return nn.Linear(WIDTH, width)


def score(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean() + x.mean()


class Twice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (linear() for _ in range(5))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.a, self.d, self.e, self.b, self.a):
            x = torch.tanh(layer(x))
        return score(x)


class Orders(Net):
    """Each rank goes through all modules in another order in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(6))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        for number in torch.randperm(6, generator=torch.Generator().manual_seed(choice)).tolist():
            x = torch.tanh(self.layers[number](x))
        return score(x)


class Branches(Net):
    """Data decide which modules run: each rank has another one, and in some steps none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), linear()
        self.branches = nn.ModuleList(linear() for _ in range(3))
        self.never = linear()

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = self.first(x)
        if choice % 4 < 3:
            x = x + torch.tanh(self.branches[choice % 4](x))
        return score(self.last(x))


class Sometimes(Net):
    """A module that no rank uses in the first steps, and all use later; another one not then."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        return score(self.b(x) if choice >= 4 else self.c(x))


class Attends(Net):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(WIDTH, 2, batch_first=True, kdim=8, vdim=4)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        z, weights = self.apart(y, x[..., :8], x[..., :4])
        return score(self.layer(y + z)) + weights.square().sum()


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 8, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(WIDTH, 8, batch_first=True)
        self.cell = nn.LSTMCell(8, 8)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x, (h, c) = self.lstm(x)
        y, _ = self.gru(x)
        state = None
        for step in range(y.shape[1]):
            state = self.cell(y[:, step], state)
        return score(state[0]) + score(h) + score(c)


class ReadOut(Net):
    """Logits by the embedding's weight, which the parent takes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        ids = (x[..., 0] * 100).long() % 9
        y = self.c(self.b(torch.tanh(self.a(self.embedding(ids)))))
        return F.cross_entropy(F.linear(y, self.embedding.weight).flatten(0, 1), ids.flatten())


class Keeps(Net):
    """A view of a module's weight is taken before other modules run, and used after."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = linear()
        self.layers = nn.ModuleList(linear() for _ in range(5))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        weight = self.kept.weight.t()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return score(x @ weight + self.kept.bias)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)
        self.child = linear()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.child(x @ self.weight)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class OtherMethod(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = Lookup()
        self.layers = nn.ModuleList(linear() for _ in range(4))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = self.table.encode(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return score(self.table.decode(x))


class Repeats(Net):
    """Activation checkpointing: of a module, of a function over some, one inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear() for _ in range(6))

    def part(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.layers[1](x))
        return checkpoint(lambda x: torch.tanh(self.layers[2](x)), x, use_reentrant=False)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = checkpoint(self.layers[0], x, use_reentrant=False)
        x = checkpoint(self.part, x, use_reentrant=False)
        for layer in self.layers[3:]:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return score(x)


class Doubles(nn.Module):
    """Changes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.mul_(2))


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(linear(), nn.ReLU(inplace=True), linear(), nn.SiLU(inplace=True)),
            *(linear(), Doubles(), nn.ELU(inplace=True), linear()),
        )

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        y = self.layers(x)
        y += 1.0
        return score(y.mul_(0.5))


class Shares(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (linear() for _ in range(4))
        self.d.weight = self.a.weight
        self.c.bias = self.a.bias

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = torch.tanh(layer(x))
        return score(x)


class Nested(nn.Module):
    """Own parameters, used before, between and after those of its children."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.shift = nn.Parameter(torch.zeros(()))
        self.children_ = nn.ModuleList(Nested(depth - 1) for _ in range(2)) if depth else linear()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.scale
        if isinstance(self.children_, nn.ModuleList):
            for child in self.children_:
                x = child(x) + self.shift
        else:
            x = self.children_(x)
        return torch.tanh(x * self.scale + self.shift)


class Nest(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Nested(2)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        return score(self.inner(x))


@dataclasses.dataclass
class Answer:
    hidden: torch.Tensor
    note: str = ""


class Box:
    """Nothing that anybody could look into."""

    def __init__(self, content: torch.Tensor) -> None:
        self.content = content


class Returns(nn.Module):
    def __init__(self, wrap: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.wrap = linear(), wrap
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.wrap(torch.tanh(self.inner(x)) @ self.weight)


class Structures(Net):
    """Modules whose results are tuples, dicts, dataclasses, objects, or are left somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.left: list[torch.Tensor] = []
        self.a = Returns(lambda x: (x, None, [x + 1]))
        self.b = Returns(lambda x: {"x": x, "more": {"y": 2 * x}})
        self.c = Returns(lambda x: Answer(x))
        self.d = Returns(lambda x: Box(x))
        self.e = Returns(self.left.append)
        self.layers = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x, _, (y,) = self.a(x)
        b = self.b(x + y)
        x = self.c(b["x"] + b["more"]["y"]).hidden
        x = self.d(x).content
        self.left.clear()
        self.e(x)
        x = self.left.pop()
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return score(x)


class Penalty(Net):
    """The loss has a term of all parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.tanh(layer(x))
        return score(x) + 0.1 * torch.stack([p.square().sum() for p in self.parameters()]).sum()


class Parametrized(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(linear())
        self.b = nn.utils.parametrizations.orthogonal(linear())
        self.c = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = torch.tanh(self.a(x))
        return score(self.c(x, self.b(x)))


class Lists(Net):
    """ParameterList and ParameterDict, indexed by data."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(WIDTH, WIDTH) * 0.2 for _ in range(4))
        self.named = nn.ParameterDict({"scale": torch.rand(WIDTH), "shift": torch.rand(WIDTH)})
        self.table = nn.Embedding(7, WIDTH, sparse=True)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        for number in range(3):
            x = torch.tanh(x @ self.weights[(choice + number) % 4])
        x = x * self.named["scale"] + self.named["shift"]
        return score(x + self.table(torch.tensor([choice % 7, 1, 1])))


class Partly(Net):
    """Parts without gradients: frozen parameters, no_grad inside, a result that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.teacher, self.idle, self.a, self.b = (linear() for _ in range(5))
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        with torch.no_grad():
            goal = self.teacher(x)
        self.idle(x)
        x = self.b(self.frozen(torch.tanh(self.a(x))))
        return (x - goal).square().mean()


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return grad @ weight.T, x.flatten(0, -2).T @ grad.flatten(0, -2)


class OwnFunction(Net):
    """A function of its own for autograd, called by the parent and by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.2)
        self.table = Lookup()
        self.layers = nn.ModuleList(linear() for _ in range(4))

    def forward(self, x: torch.Tensor, choice: int) -> torch.Tensor:
        x = Square.apply(Square.apply(x, self.weight), self.table.weight)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return score(self.table.encode(x))


NETS: dict[str, type[Net]] = {
    **{"twice": Twice, "orders": Orders, "branches": Branches, "sometimes": Sometimes},
    **{"attends": Attends, "recurrent": Recurrent, "read-out": ReadOut, "keeps": Keeps},
    **{"other-method": OtherMethod, "repeats": Repeats, "in-place": InPlace, "shares": Shares},
    **{"nest": Nest, "structures": Structures, "penalty": Penalty, "lists": Lists},
    **{"parametrized": Parametrized, "partly": Partly, "own-function": OwnFunction},
}
ZEROS = {
    "3": {"stage": 3},
    "3-agreed": {"stage": 3, "order": "agreed"},
    "3-whole": {"stage": 3, "reshard_after_forward": False},
    "3-prefetch3": {"stage": 3, "prefetch": 3},
}
# Data decide how often a parameter is used: what is learned in one step is wrong in the next.
ONLY_ASKED = {"orders": ("3-agreed", "3-whole")}


# -- training ---------------------------------------------------------------------------------


def make(name: str) -> Net:
    torch.manual_seed(5)
    return NETS[name]()


def batch(step: int, micro: int, rank: int) -> tuple[torch.Tensor, int]:
    number = (step * 2 + micro) * RANKS + rank
    draw = torch.Generator().manual_seed(number)
    return torch.randn(4, 3, WIDTH, generator=draw), number


def plain(name: str, micros: int) -> dict[str, Any]:
    """Train with nothing but torch."""
    model = make(name)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        for param in trained:  # what takes no part in a step has a zero gradient, not none
            param.grad = torch.zeros_like(param)
        for micro in range(micros):
            for rank in range(RANKS):
                loss = model(*batch(step, micro, rank)) / micros / RANKS
                loss.backward()
                losses.append(loss.item() * micros * RANKS)
        optimizer.step()
    return {
        "losses": losses,
        "params": {name: p.detach() for name, p in model.named_parameters()},
    }


def train(mesh: Mesh, name: str, zero: dict[str, Any], micros: int) -> dict[str, Any]:
    model = make(name)
    path = parallelize(model, mesh, bucket_mb=BUCKET_MB, zero=ZeroSection(**zero))
    optimizer = SGD(path, lr=0.05, momentum=0.9, weight_decay=0.0)
    losses, left = [], []
    for step in range(STEPS):
        for micro in range(micros):
            loss = model(*batch(step, micro, mesh.rank))
            path.backward(loss / micros, last=micro == micros - 1)
            losses.append(loss.item())
        path.finish()
        optimizer.step(None, None, path.publish)
        path.publish()
        left.append(sharded_bytes(path))
    peak = peak_whole(path)
    return {"losses": losses, "left": left, "peak": peak, "params": whole_parameters(path)}


def agree(ranks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    losses = torch.tensor([rank["losses"] for rank in ranks]).T.flatten()
    torch.testing.assert_close(losses, torch.tensor(wanted["losses"]), rtol=1e-5, atol=1e-5)
    for rank in ranks:
        assert rank["params"].keys() == wanted["params"].keys()
        for name, param in wanted["params"].items():
            torch.testing.assert_close(rank["params"][name], param, rtol=1e-5, atol=1e-5, msg=name)


_outcomes: dict[str, dict[str, Any]] = {}


@pytest.fixture
def outcomes(zero: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if zero not in _outcomes:
        cases = {
            name: partial(train, name=name, zero=ZEROS[zero], micros=1 + number % 2)
            for number, name in enumerate(NETS)
            if zero in ONLY_ASKED.get(name, (zero,))
        }
        folder = tmp_path_factory.mktemp(zero)
        _outcomes[zero] = survey(cases, RANKS, folder, timeout=30)
    return _outcomes[zero]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("zero", ZEROS)
def test_trains_as_in_one_process(zero: str, name: str, outcomes: dict[str, Any]) -> None:
    if zero not in ONLY_ASKED.get(name, (zero,)):
        pytest.skip("data decide how often a parameter is used")
    ranks = shown(outcomes[name])
    agree(ranks, plain(name, 1 + list(NETS).index(name) % 2))
    for rank in ranks:
        assert rank["left"] == [0] * STEPS


def late(mesh: Mesh) -> dict[str, Any]:
    return {name: train(mesh, name, ZEROS["3"], 2) for name in ("twice", "branches", "read-out")}


def test_whoever_comes_late(tmp_path: Path) -> None:
    ranks = run_ranks(late, RANKS, tmp_path, delay_seed=4)
    for name in ranks[0]:
        agree([rank[name] for rank in ranks], plain(name, 2))
