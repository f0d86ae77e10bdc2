"""What users' models do that a pipeline could get wrong without a word."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from parity_models import relative_error, survey
from pipeline_models import batches_of, gpt, language_loss, plain_gradients, shown
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.errors import BigtrainError
from bigtrain.models.gpt import Block
from bigtrain.pipeline.run import Pipeline
from bigtrain.pipeline.schedule import SCHEDULES, make_table
from bigtrain.pipeline.table import Action, Table

pytestmark = pytest.mark.parity


def inputs(num: int = 4, rows: int = 3) -> list[torch.Tensor]:
    return [torch.randn(rows, 8, generator=torch.Generator().manual_seed(i)) for i in range(num)]


def square(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = model(batch).square().mean()
    return loss


def chain(*inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), *inner, nn.Linear(8, 8))


class Energy(nn.Module):
    """The gradient of an energy, taken in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            energy = torch.tanh(self.energy(x)).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


class Recomputed(nn.Module):
    """Such a unit, and one with products, both recomputed in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), Energy(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


class Between(nn.Module):
    """The model's own code changes in place what a unit returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        r = self.b(h.clone())
        h += r
        h.mul_(0.5)
        y: torch.Tensor = self.c(h)
        return y


class Named(nn.Module):
    """Identities: one tensor under two names. And a dtype that is asked of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.same, self.end = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x.to(self.a.weight.dtype))
        h = self.b(h.to(self.a.weight.dtype)) + h
        y: torch.Tensor = self.end(2 * h - self.same(h))
        return y


class Frozen(nn.Module):
    """A first stage that has nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.a.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return y


# Name: model, where the second stage begins.
MODELS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "gradient-in-forward": (lambda: chain(Energy()), "1"),
    "gradient-in-recompute": (lambda: chain(Recomputed()), "1"),
    "in-place-between": (Between, "c"),
    "in-place-begins": (lambda: chain(nn.ReLU(inplace=True)), "1"),
    "in-place-ends": (lambda: chain(nn.ReLU(inplace=True)), "2"),
    "in-place-automatic": (
        lambda: chain(*[m for _ in range(3) for m in (nn.ReLU(inplace=True), nn.Linear(8, 8))]),
        None,
    ),
    "two-names": (Named, "end"),
    "frozen-first": (Frozen, "b"),
    "no-parameters-last": (lambda: chain(nn.Tanh(), nn.Linear(8, 8), nn.Tanh()), "4"),
}


def built(mesh: Mesh, name: str, schedule: str | Table = "1f1b", **options: Any) -> Pipeline:
    make, begin = MODELS[name]
    torch.manual_seed(0)
    split = [begin] if begin and mesh.pp.degree > 1 and "virtual_stages" not in options else None
    if isinstance(schedule, str) and schedule in ("zb_v", "dualpipe_v"):
        split = None
    options = {"example": inputs(1)[0], "loss_of": square, "split": split, **options}
    return build_pipeline(make(), mesh, schedule=schedule, **options)


def gradients(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    return {
        slot.name: slot.view(bucket.main_grads).clone()
        for bucket in pipeline.path.buckets
        for slot in bucket.slots
    }


def one(mesh: Mesh, name: str, schedule: str) -> tuple[float, dict[str, torch.Tensor]]:
    pipeline = built(mesh, name, schedule)
    pipeline.step(inputs(), square)
    pipeline.path.abandon()  # a second step must not see the first one
    loss = pipeline.step(inputs(), square)
    pipeline.path.finish()
    return float(loss), gradients(pipeline)


def test_models(tmp_path: Path) -> None:
    cases = {
        f"{name}-{schedule}": partial(one, name=name, schedule=schedule)
        for name in MODELS
        for schedule in ("1f1b", "zb_h1")
        # Inside of the inner gradient the products are torch's own, which checkpointing refuses.
        if (name, schedule) != ("gradient-in-recompute", "zb_h1")
    }
    results = survey(cases, 2, tmp_path, layout=Layout(pp=2), timeout=60)
    for case, result in results.items():
        name = case.rsplit("-", 1)[0]
        torch.manual_seed(0)
        wanted = plain_gradients(MODELS[name][0](), inputs(), square)
        ranks = shown(result)
        assert ranks[0][0] == ranks[1][0] == pytest.approx(wanted["loss"], rel=1e-6), case
        got = {**ranks[0][1], **ranks[1][1]}
        trained = {n for n, g in wanted["grads"].items() if g is not None}
        assert got.keys() == trained, case
        for parameter, grad in got.items():
            assert relative_error(grad, wanted["grads"][parameter], 1e-6) < 5e-6, (case, parameter)


def one_microbatch(mesh: Mesh, schedule: str) -> list[float]:
    virtual = 2 if schedule == "interleaved" else 1
    pipeline = build_pipeline(
        gpt(4),
        mesh,
        schedule=schedule,
        virtual_stages=virtual,
        example=batches_of(1)[0],
        loss_of=language_loss,
    )
    number = 2 if schedule == "interleaved" else 1
    losses = []
    for tokens, targets in batches_of(2):
        parts = list(zip(tokens.chunk(number), targets.chunk(number), strict=True))
        losses.append(float(pipeline.step(parts, language_loss)))
        pipeline.path.finish()
    return losses


def test_one_microbatch_under_every_schedule(tmp_path: Path) -> None:
    cases = {name: partial(one_microbatch, schedule=name) for name in SCHEDULES}
    wanted = [float(language_loss(gpt(4), batch).detach()) for batch in batches_of(2)]
    for name, result in survey(cases, 2, tmp_path, layout=Layout(pp=2)).items():
        for losses in shown(result):
            assert losses == pytest.approx(wanted, rel=1e-6), name


def one_after_the_other(mesh: Mesh) -> float:
    """A table in which a backward comes right after its forward, on every rank."""
    rows = [[Action(k, rank, m) for m in range(4) for k in "FB"] for rank in range(2)]
    table = Table("slow", (0, 1), 4, tuple(map(tuple, rows)))
    return float(built(mesh, "two-names", table).step(inputs(), square))


def test_forward_then_backward_at_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wanted = plain_gradients(Named(), inputs(), square)["loss"]
    losses = run_ranks(one_after_the_other, 2, tmp_path, layout=Layout(pp=2))
    assert losses == pytest.approx([wanted, wanted], rel=1e-6)


@dataclasses.dataclass
class Packed:
    """A batch that torch's pytrees do not know."""

    x: torch.Tensor


def lengths(mesh: Mesh, wrap: Callable[[torch.Tensor], Any]) -> float:
    """Batches of several lengths, in objects of the user's."""
    batches = [wrap(inputs(1, rows)[0]) for rows in (3, 5, 2, 5)]

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        return square(model, batch["x"] if isinstance(batch, UserDict) else batch.x)

    pipeline = built(mesh, "two-names", example=batches[0], loss_of=loss_of)
    first = float(pipeline.step(batches, loss_of))
    pipeline.path.finish()
    again = float(pipeline.step(batches, loss_of))
    assert first == again
    return first


def test_lengths_change_inside_of_any_batch(tmp_path: Path) -> None:
    cases = {
        "dataclass": partial(lengths, wrap=Packed),
        "mapping": partial(lengths, wrap=lambda x: UserDict(x=x)),
    }
    torch.manual_seed(0)
    model = Named()
    wanted = [square(model, inputs(1, rows)[0]).item() for rows in (3, 5, 2, 5)]
    for name, result in survey(cases, 2, tmp_path, layout=Layout(pp=2)).items():
        assert shown(result) == pytest.approx([sum(wanted) / 4] * 2, rel=1e-6), name


def bf16(mesh: Mesh) -> float:
    pipeline = built(mesh, "two-names", dtype=torch.bfloat16)
    return float(pipeline.step([x.bfloat16() for x in inputs()], square))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        h = self.a(x)
        return {"out": self.b(h), "rows": len(x), "none": None, "both": (h, h + 1)}


def several(mesh: Mesh) -> dict[str, Any]:
    torch.manual_seed(0)
    pipeline = build_pipeline(
        Several(),
        mesh,
        split=["b"] if mesh.pp.degree > 1 else None,
        example=inputs(1)[0],
        loss_of=lambda model, batch: model(batch)["out"].sum(),
    )
    found: dict[str, Any] = pipeline.forward(inputs(1)[0])
    return found


def test_dtypes_and_results_of_any_kind(tmp_path: Path) -> None:
    results = survey({"bf16": bf16, "several": several}, 2, tmp_path, layout=Layout(pp=2))
    torch.manual_seed(0)
    wanted = square(Named(), inputs()[0]).item()
    for loss in shown(results["bf16"]):
        assert 0.2 * wanted < loss < 5 * wanted
    torch.manual_seed(0)
    plain = Several()(inputs(1)[0])
    for found in shown(results["several"]):
        assert (found["rows"], found["none"]) == (3, None)
        assert torch.equal(found["out"], plain["out"])
        assert torch.equal(found["both"][1], plain["both"][1])


class Tied(nn.Module):
    """A frozen weight that two stages use."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.b(self.a(x @ self.table) @ self.table)
        return y


def frozen_tied(mesh: Mesh) -> torch.Tensor:
    torch.manual_seed(mesh.rank)  # ranks build different weights
    pipeline = build_pipeline(Tied(), mesh, split=["b"], example=inputs(1)[0], loss_of=square)
    return dict(pipeline.path.model.named_parameters())["table"].clone()


def test_frozen_weights_of_two_stages_are_equal(tmp_path: Path) -> None:
    first, second = run_ranks(frozen_tied, 2, tmp_path, layout=Layout(pp=2))
    assert torch.equal(first, second)


def checkpointed(mesh: Mesh, schedule: str) -> tuple[float, int]:
    """torch's wrappers around the blocks of a model that lists its layers."""
    model = gpt(4)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    tokens, targets = batches_of(1)[0]
    pipeline = build_pipeline(
        model, mesh, schedule=schedule, example=(tokens[:2], targets[:2]), loss_of=language_loss
    )
    parts = list(zip(tokens.chunk(4), targets.chunk(4), strict=True))
    loss = pipeline.step(parts, language_loss)
    pipeline.path.finish()
    return float(loss), float(pipeline.path.grad_norm())


def test_checkpoint_wrappers(tmp_path: Path) -> None:
    cases = {name: partial(checkpointed, schedule=name) for name in ("1f1b", "zb_v")}
    model = gpt(4)
    language_loss(model, batches_of(1)[0]).backward()
    norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    wanted = (float(language_loss(model, batches_of(1)[0]).detach()), norm)
    for name, result in survey(cases, 2, tmp_path, layout=Layout(pp=2)).items():
        for found in shown(result):
            assert found == pytest.approx(wanted, rel=1e-5), name


def refused(mesh: Mesh, what: str) -> str:
    torch.manual_seed(0)
    try:
        if what == "twice":
            pipeline = built(mesh, "two-names")
            pipeline.step(inputs(), lambda model, x: (model(x) + model(2 * x)).square().mean())
        elif what == "weights":
            pipeline = built(mesh, "two-names")
            dist.barrier()  # nobody leaves while others still connect
            pipeline.step(inputs(), square, weights=[0.5])
        elif what == "table":
            rows = [list(row) for row in make_table("1f1b", 2, 2).rows]
            rows[1].pop()
            built(mesh, "two-names", Table("mine", (0, 1), 2, tuple(map(tuple, rows))))
    except BigtrainError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "text"),
    [("twice", "a second time"), ("weights", "1 weights for 4"), ("table", "is missing")],
)
def test_refusals(what: str, text: str, tmp_path: Path) -> None:
    for told in run_ranks(refused, 2, tmp_path, layout=Layout(pp=2), args=(what,)):
        assert text in told


def failed_then_good(mesh: Mesh) -> tuple[float, float]:
    pipeline = built(mesh, "two-names")

    def failing(model: Any, x: torch.Tensor) -> torch.Tensor:
        if torch.equal(x, inputs()[3]):
            raise ValueError("bad sample")
        return square(model, x)

    with pytest.raises(ValueError, match="bad sample"):
        pipeline.step(inputs(), failing)
    pipeline.step(inputs(), square)
    pipeline.path.finish()
    after = float(pipeline.path.grad_norm())
    fresh = built(mesh, "two-names")
    fresh.step(inputs(), square)
    fresh.path.finish()
    return after, float(fresh.path.grad_norm())


def test_a_failed_step_leaves_nothing(tmp_path: Path) -> None:
    after, fresh = run_ranks(failed_then_good, 1, tmp_path)[0]
    assert after == fresh
