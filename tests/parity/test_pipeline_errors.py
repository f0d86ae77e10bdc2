"""What is wrong with a pipeline is said by every rank, and at once.

A rank that fails in the middle of a schedule leaves others waiting for its messages; they must say
what it failed with within seconds, not that they waited in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import run_ranks
from parity_models import VOCAB, survey
from pipeline_models import (
    Way,
    batches_of,
    gpt,
    language_loss,
    named_gradients,
    odd_table,
    plain_gradients,
    ready,
    shares,
    shown,
)
from torch import nn

from bigtrain.comm.mesh import Mesh
from bigtrain.comm.p2p import Links
from bigtrain.compose import build_pipeline, parallelize
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError, CommError
from bigtrain.pipeline.layer import Layer

pytestmark = pytest.mark.parity


def batches(num: int = 3, size: int = 2, length: int = 8) -> list[Any]:
    return batches_of(num, size, length)


class Plain(nn.Module):
    """A model that lists no layers; `between(model, x)` is called in the middle of its layers."""

    def __init__(self, between: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
        self.head = nn.Linear(16, VOCAB)
        self.between = between

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for index, layer in enumerate(self.layers):
            if index == 2 and self.between is not None:
                x = self.between(self, x)
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), targets.flatten())


def said_by(mesh: Mesh, action: Callable[[Mesh], Any], stays: bool = False) -> str:
    """Return the error of `action` as text; if ranks can still talk, wait for the others."""
    said = "nothing was wrong"
    try:
        action(mesh)
    except CommError as error:
        said = f"it only says that it waited in vain: {error}"
    except BigtrainError as error:
        said = str(error)
    if stays:
        mesh_barrier(mesh)
    return said


# -- what is wrong before anything runs ----------------------------------------------------------


def small() -> nn.Module:
    return gpt(4)


def build(mesh: Mesh, model: Callable[[], nn.Module] = small, **options: Any) -> Any:
    given = {"example": batches()[0], "loss_of": language_loss} | options
    return build_pipeline(model(), mesh, **given)


def step(mesh: Mesh, num: int = 3, **options: Any) -> Any:
    return build(mesh, split=["blocks.2"], **options).step(batches(num), language_loss)


def interleaved(mesh: Mesh) -> None:
    pipeline = build(mesh, schedule="interleaved", virtual_stages=2)
    pipeline.step(batches(3), language_loss)


def from_file(mesh: Mesh, num_ranks: int, num_microbatches: int, folder: Path) -> None:
    own = folder / str(mesh.rank)
    own.mkdir(exist_ok=True)
    pipeline = build(mesh, schedule=odd_table(num_ranks, num_microbatches, own))
    pipeline.step(batches(3), language_loss)


def on_one_rank(mesh: Mesh) -> None:
    """Only the first rank, which decides, is given a split that does not exist."""
    build(mesh, split=["blocks.9"] if mesh.rank == 0 else ["blocks.2"])


def never_called(model: Any, batch: Any) -> torch.Tensor:
    return torch.zeros(())


REFUSED: dict[str, tuple[Callable[[Mesh], Any], tuple[str, ...]]] = {
    "few units": (
        partial(build, model=partial(gpt, 1), schedule="interleaved", virtual_stages=8),
        ("cannot be cut into 16 stages", "at most 4 stages"),
    ),
    "few modules": (
        partial(build, model=Plain, schedule="interleaved", virtual_stages=4),
        ("a model of 6 units cannot be cut into 8 stages", "at most 6 stages"),
    ),
    "unknown name": (
        partial(build, split=["block.2"]),
        ("no stage can begin at 'block.2'", "did you mean 'blocks.2"),
    ),
    "unknown module": (
        partial(build, model=Plain, split=["layer.2"]),
        ("no stage can begin at 'layer.2'", "did you mean 'layers.2'"),
    ),
    "wrong count": (
        partial(build, split=["blocks.1", "blocks.2"]),
        ("split names 2 places (blocks.1, blocks.2) for 2 stages", "give 1 names"),
    ),
    "wrong order": (
        partial(build, schedule="zb_v", split=["blocks.2", "blocks.1", "head"]),
        ("split names 3 places", "in the model's order"),
    ),
    "one rank": (on_one_rank, ("no stage can begin at 'blocks.9'",)),
    "uneven microbatches": (
        interleaved,
        ("interleaved cannot share 3 microbatches among 2 ranks", "give 2 or 4 microbatches"),
    ),
    "unknown schedule": (
        partial(build, schedule="1f1c"),
        ("'1f1c' is not a schedule", "did you mean 1f1b?"),
    ),
    "parallelize": (
        lambda mesh: parallelize(gpt(4), mesh),
        ("parallelize() with a mesh of pp=2", "use build_pipeline()"),
    ),
    "no batches": (partial(step, num=0), ("a step without batches", "at least one microbatch")),
    "no example": (
        partial(build, model=Plain, example=None),
        ("no example of how Plain is called", "pass example="),
    ),
    "no example to balance": (
        partial(build, example=None),
        ("no example of how GPT is called", "pass example="),
    ),
    "never called": (
        partial(build, model=Plain, loss_of=never_called),
        ("the loss function does not call Plain",),
    ),
}


# -- what goes wrong in a step -------------------------------------------------------------------


class Boxed(nn.Module):
    """Gives something that cannot travel."""

    def __init__(self, box: Any) -> None:
        super().__init__()
        self.linear, self.box = nn.Linear(4, 4), box

    def forward(self, x: torch.Tensor) -> Any:
        return self.linear(x), self.box


class Boxing(nn.Module):
    def __init__(self, box: Any) -> None:
        super().__init__()
        self.box, self.last = Boxed(box), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.finish(*self.box(x))

    def finish(self, x: torch.Tensor, box: Any) -> torch.Tensor:
        return self.last(x).sum()


class ListedBoxing(Boxing):
    def pipeline_layers(self) -> list[Layer]:
        return [Layer("box", self.box, ("box",), ("x",)), Layer("last", self.finish, ("last",))]


def sum_loss(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch)
    return loss


def object_travels(mesh: Mesh, make: Callable[[Any], nn.Module], box: Any) -> None:
    given = torch.ones(2, 4)
    pipeline = build_pipeline(make(box), mesh, split=["last"], example=given, loss_of=sum_loss)
    mesh_barrier(mesh)  # groups are made on both ranks
    pipeline.step([given, given, given], sum_loss)
    pipeline.path.finish()


class Dropping(nn.Module):
    """Drops what is zero, so that its shape is the data's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0][:, None] * self.weight


class Ragged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = Dropping(), nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(x)).mean()


def shape_of_the_data(mesh: Mesh) -> None:
    one, other = torch.tensor([1.0, 0, 3, 4]), torch.tensor([1.0, 0, 0, 4])
    pipeline = build_pipeline(Ragged(), mesh, split=["head"], example=one, loss_of=sum_loss)
    for _ in range(2):
        pipeline.step([one, one], sum_loss)
        pipeline.path.finish()
    pipeline.step([one, one, other, one], sum_loss)


def other_way(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Another order of modules where the data says so."""
    return x if model.same_way else model.layers[0](x)


def order_of_the_data(mesh: Mesh) -> None:
    model = Plain(other_way)
    model.same_way = True  # type: ignore[assignment]
    pipeline = build_pipeline(
        model, mesh, split=["layers.3"], example=batches()[0], loss_of=language_loss
    )
    pipeline.step(batches(), language_loss)
    pipeline.path.finish()
    model.same_way = False  # type: ignore[assignment]
    pipeline.step(batches(), language_loss)


def looks(model: Any, x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.sum().item() > 1e9 else x


LOOKS = f"{__file__}:{looks.__code__.co_firstlineno + 1}"


def values_looked_at(mesh: Mesh) -> None:
    """The model's own code looks at what the last rank has not got."""
    pipeline = build_pipeline(
        Plain(looks), mesh, split=["layers.3"], example=batches()[0], loss_of=language_loss
    )
    mesh_barrier(mesh)
    pipeline.step(batches(), language_loss)


REFUSED |= {
    "object": (
        partial(object_travels, make=ListedBoxing, box=object()),
        ("a stage gives the next one a object", "between stages travel tensors"),
    ),
    "function": (
        partial(object_travels, make=Boxing, box=lambda: 3),
        ("gives the next one a function", "between stages travel tensors"),
    ),
    "shape": (
        shape_of_the_data,
        ("stage 0 gives something else than for an earlier batch", "float32[3, 1]", "[2, 1]"),
    ),
    "order": (order_of_the_data, ("Plain: layers.0 is called where layers.2 came",)),
    "values": (values_looked_at, (LOOKS, "looks at the values of a tensor", "item")),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    ready()
    folder = tmp_path_factory.mktemp("refused")
    found = {}
    before = {key: case for key, (case, _) in REFUSED.items() if key not in IN_A_STEP}
    before |= {"other ranks": partial(from_file, num_ranks=4, num_microbatches=3, folder=folder)}
    before |= {"other count": partial(from_file, num_ranks=2, num_microbatches=4, folder=folder)}
    cases = {key: partial(said_by, action=case, stays=True) for key, case in before.items()}
    found |= survey(cases, 2, folder, layout=Layout(pp=2))
    for key in IN_A_STEP:  # after an error in a step ranks cannot talk any more
        case = partial(said_by, action=REFUSED[key][0])
        begin = time.monotonic()
        found |= survey({key: case}, 2, folder, layout=Layout(pp=2))
        assert time.monotonic() - begin < 10
    return found


IN_A_STEP = ("object", "function", "shape", "order", "values")
FROM_FILES = {
    "other ranks": ("the schedule odd-4-3 is for 4 ranks, but the mesh has pp=2", "use pp=4"),
    "other count": ("the schedule odd-2-4 is for 4 microbatches, not for 3",),
}


@pytest.mark.parametrize("key", [*REFUSED, *FROM_FILES])
def test_every_rank_says_what_is_wrong(key: str, refused: dict[str, Any]) -> None:
    wanted = FROM_FILES.get(key) or REFUSED[key][1]
    for said in shown(refused[key]):
        for text in wanted:
            assert text in said


# -- a rank fails in the middle ------------------------------------------------------------------


class Failing(nn.Module):
    """Fails at its `at`-th forward or backward."""

    def __init__(self, inner: nn.Module, how: str, at: int = 3) -> None:
        super().__init__()
        self.inner, self.how, self.left = inner, how, at

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "forward":
            self.count()
        y = self.inner(x)
        if self.how == "backward" and y.requires_grad:
            y.register_hook(lambda grad: self.count())
        return y

    def count(self) -> None:
        self.left -= 1
        if not self.left:
            raise self.error()

    @staticmethod
    def error() -> Exception:
        return ValueError("the cosmic ray")


class Refusing(Failing):
    @staticmethod
    def error() -> Exception:
        return BigtrainError("the cosmic ray", where="here.py:3", mend="dig a mine")


def failing(mesh: Mesh, kind: type[Failing], how: str, stage: int, schedule: str) -> Any:
    """Train with a layer that fails on one pipeline rank of the first replica."""
    way = Way("gpt", 7, schedule, (1,) * 6)
    model = gpt(7)
    num = way.table(mesh.pp.degree).num_stages
    split = [f"blocks.{index}" for index in range(0, 7, 7 // (num - 1))][: num - 1]
    pipeline = build_pipeline(model, mesh, split=split, **way.options)
    blocks = model.get_submodule("blocks")
    if mesh.dp.rank == 0:
        mine = [s for s in pipeline.stages if s.index == stage]
        for each in mine:
            name = next((u for u in each.units if u.startswith("blocks.")), "")
            if name:
                index = int(name.split(".")[1])
                norm = blocks[index].norm1 if hasattr(blocks[index], "norm1") else blocks[index]
                blocks[index].norm1 = kind(norm, how)
            else:
                model.token_embedding = kind(model.token_embedding, how)  # type: ignore[assignment]
    tokens, targets = batches_of(1, 12)[0]
    micros = [(tokens[part], targets[part]) for part in shares(way.sizes, mesh)]
    mesh_barrier(mesh)
    begin = time.monotonic()
    try:
        pipeline.step(micros, language_loss)
        pipeline.path.finish()
        pipeline.path.grad_norm()
        torch.distributed.barrier()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin
    return "nothing", "", time.monotonic() - begin


def mesh_barrier(mesh: Mesh) -> None:
    if mesh.world.group is not None:
        torch.distributed.barrier()


# Layout, schedule, stage that fails, when, and with what.
FAILURES = [
    (Layout(pp=4), "1f1b", 0, "forward", Failing),
    (Layout(pp=4), "1f1b", 2, "forward", Refusing),
    (Layout(pp=4), "1f1b", 3, "backward", Failing),
    (Layout(pp=4), "gpipe", 1, "backward", Failing),
    (Layout(pp=2), "zb_v", 3, "forward", Failing),
    (Layout(pp=2), "zb_h1", 0, "backward", Refusing),
    (Layout(pp=2, dp=2), "1f1b", 0, "backward", Failing),
    (Layout(pp=2, dp=2), "zb_v", 1, "forward", Failing),
    (Layout(pp=2, dp=2), "1f1b", 1, "forward", Refusing),
]


@pytest.mark.parametrize(
    ("layout", "schedule", "stage", "how", "kind"),
    [
        pytest.param(*each, id=f"{each[0]}-{each[1]}-{each[2]}-{each[3]}-{each[4].__name__}")
        for each in FAILURES
    ],
)
def test_every_rank_says_it_within_seconds(
    layout: Layout, schedule: str, stage: int, how: str, kind: type[Failing], tmp_path: Path
) -> None:
    case = partial(failing, kind=kind, how=how, stage=stage, schedule=schedule)
    ranks = run_ranks(case, layout.world_size, tmp_path, layout=layout, timeout=40)
    for name, said, seconds in ranks:
        assert "the cosmic ray" in said, (name, said)
        assert seconds < 5
    if kind is Refusing:
        for name, said, _ in ranks:
            assert name == "BigtrainError"
            assert said.startswith("here.py:3: the cosmic ray")
            assert "dig a mine" in said
    else:
        own = [name for name, _, _ in ranks if name == "ValueError"]
        others = {said for name, said, _ in ranks if name == "BigtrainError"}
        assert len(own) == 1
        assert len(others) == 1
        assert "failed: ValueError: the cosmic ray" in others.pop()


# -- what is not wrong, though it looks so --------------------------------------------------------


def loss_functions(mesh: Mesh) -> dict[str, Any]:
    """A loss function that catches everything still shows how the model is called."""

    def careful(model: Any, batch: Any) -> torch.Tensor:
        try:
            loss: torch.Tensor = model(*batch)
        except Exception:
            return torch.zeros(())
        return loss

    pipeline = build(mesh, loss_of=careful, split=["blocks.2"])
    loss = float(pipeline.step(batches(), careful))
    pipeline.path.finish()
    return {"loss": loss, "grads": named_gradients(pipeline.path)}


def test_loss_function_may_catch_errors(tmp_path: Path) -> None:
    wanted = plain_gradients(gpt(4), batches(), language_loss)
    ranks = run_ranks(loss_functions, 2, tmp_path, layout=Layout(pp=2))
    for rank in ranks:
        assert rank["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


def late_receiver(mesh: Mesh) -> None:
    """Let this rank, if it waits for results of the last one, come half a second late to them."""
    plain = Links.receive

    def receive(self: Links, into: torch.Tensor, source: int, what: str) -> Any:
        if what == "a result":
            time.sleep(0.5)
        return plain(self, into, source, what)

    if mesh.pp.rank == 0:
        Links.receive = receive  # type: ignore[method-assign]


def leaves_at_once(mesh: Mesh) -> float:
    """The last thing that a rank does is a step."""
    pipeline = build(mesh, split=["blocks.2"])
    late_receiver(mesh)
    return float(pipeline.step(batches(), language_loss))


def test_last_rank_may_end_after_a_step(tmp_path: Path) -> None:
    one, other = run_ranks(leaves_at_once, 2, tmp_path, layout=Layout(pp=2))
    assert one == other


def changes_results(mesh: Mesh) -> list[torch.Tensor]:
    """What step and forward return is the caller's, who may change it."""
    pipeline = build(mesh, split=["blocks.2"])
    late_receiver(mesh)
    loss = pipeline.step(batches(), language_loss)
    seen = loss.clone()
    loss.zero_()
    pipeline.path.finish()
    logits = pipeline.forward(batches()[0][0])
    copy = logits.clone()
    logits.zero_()
    mesh_barrier(mesh)
    return [seen, copy]


def test_results_may_be_changed_in_place(tmp_path: Path) -> None:
    ranks = run_ranks(changes_results, 2, tmp_path, layout=Layout(pp=2))
    for one, other in zip(*ranks, strict=True):
        assert torch.equal(one, other)
