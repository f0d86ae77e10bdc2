"""Whole models under pipeline parallelism train as one process does, under every schedule.

Tolerances as for data and tensor parallelism, and for the same reasons: a batch that is cut into
microbatches and ranks adds the same fp32 numbers in another order. Errors are relative, in the
2-norm of a tensor: gradients of the first step below 5e-6; later gradients, and the way that
parameters have gone, below 1e-3, since AdamW magnifies the rounding of small gradients. A lost or
doubled contribution, or one of the wrong microbatch, shows as 1e-1 and more. Where one process adds
the same numbers in the same order, the result is the same bits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_models import (
    EPS,
    VOCAB,
    assemble,
    own_blocks,
    plain_run,
    relative_error,
    survey,
)
from pipeline_models import (
    BATCH,
    LENGTH,
    MODELS,
    Batch,
    Way,
    assert_gradients,
    batches_of,
    gpt,
    language_loss,
    named_gradients,
    odd_table,
    shares,
    shown,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from bigtrain.comm.buckets import Bucket
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import build_pipeline
from bigtrain.config.layout import Layout
from bigtrain.models import GPT
from bigtrain.models.build import Loss
from bigtrain.observe.replicas import find_divergence
from bigtrain.ops.dropout import Dropout, seed_dropout
from bigtrain.ops.later import Later
from bigtrain.optim import AdamW
from bigtrain.pipeline.layer import Layer
from bigtrain.pipeline.schedule import Table
from bigtrain.pipeline.validate import validate

STEPS = 5
BATCHES = batches_of(STEPS)
pytestmark = pytest.mark.parity


# -- the matrix -------------------------------------------------------------------------------

LAYERS = 6  # with embedding and head 8 units: enough for 4 ranks of 2 stages, or 2 of 3
SCHEDULES = ("gpipe", "1f1b", "interleaved/2", "interleaved/3", "zb_h1", "zb_v", "dualpipe_v")
NAMES = tuple(MODELS)


def name_of(way: Way) -> str:
    schedule = way.schedule if isinstance(way.schedule, str) else "file"
    sizes = "-".join(map(str, way.sizes))
    return f"{way.model}_{schedule.replace('/', '')}_{sizes}" + "_sequence" * way.sequence


def ways(
    num_ranks: int, sizes: tuple[tuple[int, ...], ...], first: int = 0, **more: Any
) -> Iterator[Way]:
    """Yield every schedule with these sizes of microbatches, and one model after the other."""
    number = first
    for schedule in (*SCHEDULES, "file"):
        for each in sizes:
            if schedule.startswith("interleaved") and len(each) % num_ranks:
                continue  # it runs multiples only
            deep = schedule == "interleaved/3" and num_ranks == 4
            layers = 10 if deep else LAYERS if num_ranks == 4 else 4
            table: str | Table = schedule
            if schedule == "file":
                with tempfile.TemporaryDirectory() as folder:
                    table = odd_table(num_ranks, len(each), Path(folder))
            yield Way(NAMES[number % len(NAMES)], layers, table, each, **more)
            number += 1


def some(num_ranks: int, *each: tuple[str, str, tuple[int, ...]], layers: int = LAYERS) -> Any:
    return [Way(model, layers, schedule, sizes) for model, schedule, sizes in each]


TWO, THREE = (3, 3), (2, 2, 2)  # of 6 samples, for 2 replicas
WORLDS: dict[str, tuple[Layout, list[Way], int | None]] = {
    "pp1": (Layout(), list(ways(1, ((5, 4, 3),))), None),
    # One microbatch, as many as ranks (uneven), more.
    "pp2": (Layout(pp=2), list(ways(2, ((12,), (7, 5), (2,) * 6, (5, 4, 3)))), None),
    # Fewer microbatches than ranks, as many (uneven), more.
    "pp4": (Layout(pp=4), list(ways(4, ((8, 4), (5, 1, 2, 4), (2, 2, 2, 1, 1, 1, 1, 2)))), None),
    "pp4-late": (
        Layout(pp=4),
        some(
            4,
            ("gpt-tied", "1f1b", (3, 3, 3, 3)),
            ("llama", "interleaved/2", (3, 3, 3, 3)),
            ("gpt", "zb_v", (3, 3, 3, 3)),
        ),
        1,
    ),
    "pp2-dp2": (Layout(pp=2, dp=2), list(ways(2, (TWO, THREE), 1)), None),
    "pp2-dp2-late": (
        Layout(pp=2, dp=2),
        some(2, ("gpt-tied", "zb_h1", THREE), ("llama-tied", "dualpipe_v", THREE)),
        2,
    ),
    "pp2-tp2": (
        Layout(pp=2, tp=2),
        [
            Way("gpt-tied", 4, "1f1b", (5, 4, 2, 1), sequence=True),
            Way("llama", 4, "interleaved/2", (3, 3, 3, 3), sequence=True),
            Way("llama-tied", 4, "zb_v", (5, 4, 3), sequence=True),
            Way("gpt", 4, "zb_h1", (4, 4, 4)),
            Way("llama-tied", 4, "gpipe", (6, 6)),
        ],
        None,
    ),
    "pp4-dp2": (
        Layout(pp=4, dp=2),
        some(4, ("gpt-tied", "1f1b", THREE), ("llama", "zb_v", THREE)),
        None,
    ),
    "pp4-tp2": (
        Layout(pp=4, tp=2),
        [
            Way("llama-tied", LAYERS, "zb_h1", (6, 6)),
            Way("gpt", LAYERS, "interleaved/2", (3, 3, 3, 3), sequence=True),
        ],
        None,
    ),
    "pp2-dp2-tp2": (
        Layout(pp=2, dp=2, tp=2),
        [
            Way("gpt-tied", LAYERS, "1f1b", THREE, sequence=True),
            Way("llama", LAYERS, "zb_v", THREE),
            Way("gpt", LAYERS, "interleaved/2", TWO),
            Way("llama-tied", LAYERS, "dualpipe_v", THREE, sequence=True),
        ],
        None,
    ),
    "pp8": (
        Layout(pp=8),
        some(8, ("gpt-tied", "zb_v", (3, 3, 3, 3)), ("gpt", "1f1b", (1,) * 12), layers=14),
        None,
    ),
}
_plain: dict[tuple[str, int], dict[str, Any]] = {}
_outcomes: dict[str, dict[str, Any]] = {}


def plain_of(model: str, layers: int) -> dict[str, Any]:
    if (model, layers) not in _plain:
        made = MODELS[model](layers)
        with torch.no_grad():
            logits = made.eval()(BATCHES[0][0][:3])
        plain = plain_run(made.train(), STEPS, batches=BATCHES)
        norms = [float(nn.utils.get_total_norm(grads.values())) for grads in plain["grads"]]
        _plain[model, layers] = {**plain, "logits": logits, "norms": norms}
    return _plain[model, layers]


@pytest.fixture
def outcomes(world: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all ways in one world, whose ranks are started once."""
    if world not in _outcomes:
        layout, each, delays = WORLDS[world]
        _outcomes[world] = survey(
            {name_of(way): partial(train, way=way, steps=STEPS) for way in each},
            layout.world_size,
            tmp_path_factory.mktemp(world),
            layout=layout,
            delay_seed=delays,
            timeout=100,
        )
    return _outcomes[world]


@pytest.mark.parametrize(
    ("world", "way"),
    [
        pytest.param(world, way, id=f"{world}-{name_of(way)}")
        for world, (_, each, _) in WORLDS.items()
        for way in each
    ],
)
def test_equals_one_process(world: str, way: Way, outcomes: dict[str, Any]) -> None:
    layout = WORLDS[world][0]
    ranks = shown(outcomes[name_of(way)])
    assert_same_training(ranks, plain_of(way.model, way.layers))
    table = way.table(layout.pp)
    peaks = validate(table).peak_in_flight
    for number, rank in enumerate(ranks):
        place = layout.coordinate(number)["pp"]
        assert rank["stages"] == list(table.stages_of(place))
        assert rank["peak"] == peaks[place]


def assert_same_training(ranks: list[dict[str, Any]], plain: dict[str, Any]) -> None:
    start = assemble(rank["start"] for rank in ranks)
    assert start.keys() == plain["start"].keys()
    for name, tensor in plain["start"].items():
        assert torch.equal(start[name], tensor), f"{name} does not start as in one process"
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(plain["losses"]), rtol=0, atol=3e-5)
    # All ranks of a pipeline know its loss; replicas have different data.
    assert len({(rank["dp"], *rank["losses"]) for rank in ranks}) == len({r["dp"] for r in ranks})
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
        assert torch.equal(rank["logits"], ranks[0]["logits"])
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["norms"][0] == pytest.approx(plain["norms"][0], rel=1e-5)
        assert rank["norms"] == pytest.approx(plain["norms"], rel=1e-3)
        assert rank["divergence"] == []
    shards = [rank["shards"] for rank in ranks]
    for step, wanted in enumerate(plain["grads"]):
        grads = [rank["grads"][step] for rank in ranks]
        assert_gradients(grads, wanted, 1e-3 if step else 5e-6, shards)
    params = assemble(rank["params"] for rank in ranks)  # copies equal bit for bit
    for name, param in plain["params"].items():
        begin = plain["start"][name]
        error = relative_error(params[name] - begin, param - begin, floor=1e-6)
        assert error < 1e-3, f"parameter {name}: {error}"


# -- the same bits ----------------------------------------------------------------------------


def same_bits(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Are all losses, gradients and parameters of two trainings equal bit for bit?"""
    mine, theirs = (
        {
            "params": assemble(rank["params"] for rank in ranks),
            "losses": {"losses": torch.tensor(ranks[0]["losses"])},
            **{
                step: {name: t for rank in ranks for name, t in rank["grads"][step].items()}
                for step in range(len(ranks[0]["grads"]))
            },
        }
        for ranks in (one, other)
    )
    assert all(mine[key].keys() == theirs[key].keys() for key in mine)
    return all(
        torch.equal(t, theirs[key][n]) for key, each in mine.items() for n, t in each.items()
    )


SIZES = (3, 3, 3, 3)
BITS = {
    1: ("1f1b", "interleaved/2", "zb_h1"),
    2: SCHEDULES,
    4: ("gpipe", "1f1b", "interleaved/2", "zb_h1", "zb_v", "dualpipe_v"),
}


def test_same_bits_as_accumulation_in_one_process(tmp_path: Path) -> None:
    """Each gradient is the sum over microbatches in their order, wherever its stage is."""
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for degree, schedules in BITS.items():
        results = survey(
            {
                f"{model} {degree} {schedule.replace('/', ' ')}": partial(
                    train, way=Way(model, LAYERS, schedule, SIZES), steps=3
                )
                for model in ("gpt", "llama")
                for schedule in schedules
            },
            degree,
            tmp_path,
            layout=Layout(pp=degree),
        )
        for name, outcome in results.items():
            model, _, schedule = name.split(" ", 2)
            found[model, degree, schedule] = shown(outcome)
    one = {model: found[model, 1, "1f1b"] for model in ("gpt", "llama")}
    other = [key for key, ranks in found.items() if not same_bits(one[key[0]], ranks)]
    assert other == []


def test_twice_the_same_bits(tmp_path: Path) -> None:
    case = partial(train, way=Way("gpt-tied", 4, "zb_v", SIZES), steps=3)
    one, other = (
        shown(survey({"it": case}, 2, folder, layout=Layout(pp=2), delay_seed=seed)["it"])
        for seed, folder in enumerate((tmp_path / "one", tmp_path / "other"))
        if not folder.mkdir()
    )
    assert same_bits(one, other)


# -- dropout, activation checkpointing, padding, precision ---------------------------------------


class Repeated(nn.Module):
    """A residual branch with dropout, whose inner forward is repeated in backward."""

    def __init__(self, repeat: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.inner, self.outer = Dropout(0.2), Dropout(0.2)
        self.repeat = repeat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.repeat and torch.is_grad_enabled():
            y: torch.Tensor = checkpoint(self.branch, x, use_reentrant=False)
            return y
        return self.branch(x)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.outer(self.down(self.inner(torch.tanh(self.up(x)))))


class RepeatedGPT(GPT):
    """A GPT with such blocks."""

    def __init__(self) -> None:
        super().__init__(VOCAB, LENGTH, 1, 16, 4, dropout=0.2)
        self.blocks = nn.ModuleList(Repeated(True) for _ in range(6))

    def pipeline_layers(self) -> list[Layer]:
        blocks, self.blocks = self.blocks, nn.ModuleList()
        first, last = super().pipeline_layers()
        self.blocks = blocks
        middle = [(f"blocks.{index}", block) for index, block in enumerate(blocks)]
        return [first, *(Layer(name, block, (name,)) for name, block in middle), last]


def dropping(repeat: bool) -> nn.Module:
    torch.manual_seed(8)
    return RepeatedGPT() if repeat else gpt(4, tie=True, dropout=0.2)


def plain_dropping(repeated: bool) -> nn.Module:
    """The same in one process, where nothing is repeated."""
    model = dropping(repeated)
    for module in model.modules():
        if isinstance(module, Repeated):
            module.repeat = False
    return model


def seeds_of(step: int) -> list[int]:
    return [1000 * step + sample for sample in range(BATCH)]


def train_dropping(
    mesh: Mesh,
    repeat: bool,
    schedule: str,
    sizes: tuple[int, ...],
    split: list[str] | None,
) -> dict[str, Any]:
    """Train through `run`, with seeds for samples, as the Trainer does."""
    model = dropping(repeat)
    way = Way("", len(model.blocks), schedule, sizes)
    split = split or way.split(way.table(mesh.pp.degree).num_stages)
    pipeline = build_pipeline(model, mesh, split=split, **way.options)
    path = pipeline.path
    optimizer = AdamW(path.segments(), lr=1e-2, eps=EPS)
    parts, losses, grads = shares(sizes, mesh), [], []
    size = sum(sizes)
    for step, (tokens, targets) in enumerate(BATCHES):
        seeds = [seeds_of(step)[part] for part in parts]
        seen: dict[int, float] = {}

        def loss_of(
            model: Any, micro: int, batch: Any, seen: dict[int, float] = seen
        ) -> torch.Tensor:
            loss = model(*batch) * (sizes[micro] / size)
            seen[micro] = loss.item()
            return loss

        def prepare(stage: int, micro: int, forward: bool, seeds: Any = seeds) -> None:
            seed_dropout(model, seeds[micro], recompute=not forward)

        batches = [(tokens[part], targets[part]) for part in parts]
        pipeline.run(batches, loss_of, prepare=prepare)
        path.finish()
        grads.append(named_gradients(path))
        optimizer.step()
        path.publish()
        losses.append(sum(seen.values()))
    return {"losses": losses, "grads": grads, "params": own_blocks(path), "last": pipeline.has_last}


# Is the model repeated, schedule, sizes of microbatches, split.
DROPPING: dict[str, dict[str, tuple[bool, str, tuple[int, ...], list[str] | None]]] = {
    "pp1": {
        "1f1b": (False, "1f1b", (5, 4, 3), None),
        "repeated": (True, "zb_v", (5, 4, 3), None),
    },
    "pp2": {
        "1f1b": (False, "1f1b", (5, 4, 3), None),
        "inside-a-block": (False, "1f1b", (5, 4, 3), ["blocks.1.mlp"]),
        "interleaved": (False, "interleaved/2", (2, 3, 3, 4), None),
        "zb_v": (False, "zb_v", (5, 4, 3), None),
        "repeated-1f1b": (True, "1f1b", (5, 4, 3), None),
        "repeated-zb_h1": (True, "zb_h1", (5, 4, 3), None),
        "repeated-zb_v": (True, "zb_v", (2,) * 6, None),
        "repeated-interleaved": (True, "interleaved/2", (3, 3, 3, 3), None),
    },
}
_dropped: dict[str, Any] = {}


@pytest.mark.parametrize(
    ("world", "key"),
    [(world, key) for world, each in DROPPING.items() for key in each],
)
def test_dropout_draws_as_in_one_process(
    world: str, key: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if world not in _dropped:
        degree = int(world[2:])
        cases = {
            name: partial(
                train_dropping, repeat=repeated, schedule=schedule, sizes=sizes, split=split
            )
            for name, (repeated, schedule, sizes, split) in DROPPING[world].items()
        }
        folder = tmp_path_factory.mktemp(world)
        _dropped[world] = survey(cases, degree, folder, layout=Layout(pp=degree))
    repeated = DROPPING[world][key][0]
    if repeated not in _dropped:
        model = plain_dropping(repeated)
        steps = iter(range(STEPS))
        model.register_forward_pre_hook(lambda m, args: seed_dropout(m, seeds_of(next(steps))))
        _dropped[repeated] = plain_run(model, STEPS, batches=BATCHES)
    plain, ranks = _dropped[repeated], shown(_dropped[world][key])
    for rank in ranks:
        if rank["last"]:
            assert rank["losses"] == pytest.approx(plain["losses"], abs=3e-5)
    for step, wanted in enumerate(plain["grads"]):
        assert_gradients([rank["grads"][step] for rank in ranks], wanted, 1e-3 if step else 5e-6)
    params = assemble(rank["params"] for rank in ranks)
    for name, param in plain["params"].items():
        begin = plain["start"][name]
        assert relative_error(params[name] - begin, param - begin, floor=1e-6) < 1e-3, name


def padded_batch() -> Batch:
    """A batch with ever more padding, up to samples of nothing else."""
    tokens, targets = (t.clone() for t in BATCHES[0])
    for sample in range(BATCH):
        targets[sample, max(0, LENGTH - sample) :] = -100
    targets[6:9] = -100
    return tokens, targets


def padded_step(mesh: Mesh, schedule: str) -> dict[str, Any]:
    """Microbatches count as much as they have targets; one of them has none at all."""
    way = Way("gpt-tied", 4, schedule, (3, 3, 3, 3))
    split = way.split(way.table(2).num_stages)
    pipeline = build_pipeline(gpt(4, tie=True), mesh, split=split, **way.options)
    tokens, targets = padded_batch()
    parts = shares(way.sizes, mesh)
    counts = [int((targets[part] != -100).sum()) for part in parts]
    assert 0 in counts

    def loss_of(model: Any, batch: Batch) -> torch.Tensor:
        return Loss((model(*batch), int((batch[1] != -100).sum())), "it").mean

    weights = [count / sum(counts) for count in counts]
    loss = pipeline.step([(tokens[p], targets[p]) for p in parts], loss_of, weights)
    pipeline.path.finish()
    return {"loss": float(loss), "grads": named_gradients(pipeline.path)}


def bf16_losses(mesh: Mesh, schedule: str) -> dict[str, Any]:
    way = Way("gpt-tied", 4, schedule, (3, 3, 3, 3))
    model = gpt(4, tie=True)
    split = way.split(way.table(2).num_stages)
    pipeline = build_pipeline(model, mesh, split=split, dtype=torch.bfloat16, **way.options)
    optimizer = AdamW(pipeline.path.segments(), lr=1e-2, eps=EPS)
    tokens, targets = BATCHES[0]
    losses = []
    for _ in range(10):
        micros = [(tokens[part], targets[part]) for part in shares(way.sizes, mesh)]
        losses.append(float(pipeline.step(micros, language_loss)))
        pipeline.path.finish()
        optimizer.step()
        pipeline.path.publish()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return {"losses": losses, "diverged": find_divergence(own_blocks(pipeline.path), mesh.world)}


def changed_copy(mesh: Mesh) -> list[str]:
    """What find_divergence says when the last stage's copy of the embedding has changed a bit."""
    model = gpt(4, tie=True)
    pipeline = build_pipeline(model, mesh, split=["blocks.2"])
    if mesh.pp.rank:
        with torch.no_grad():
            model.get_parameter("head.weight")[3] += 1e-6
    return find_divergence(own_blocks(pipeline.path), mesh.world)


# -- what is not training ----------------------------------------------------------------------


def evaluated(mesh: Mesh, schedule: str) -> dict[str, Any]:
    """Evaluate and call forward, before, between and after steps of training."""
    way = Way("llama-tied", 4, schedule, (3, 3, 3, 3))
    model = MODELS[way.model](way.layers)
    split = way.split(way.table(2).num_stages)
    pipeline = build_pipeline(model, mesh, split=split, **way.options)
    tokens, targets = BATCHES[0]
    parts = shares(way.sizes, mesh)
    found: dict[str, Any] = {"losses": [], "logits": [], "last": pipeline.has_last}
    for size in (1, 4, 3):  # any number of batches, of any size
        losses: list[float] = []

        def keep(model: Any, micro: int, batch: Batch, losses: list[float] = losses) -> None:
            assert not torch.is_grad_enabled()
            losses.append(float(model(*batch)))

        begins = range(0, BATCH, size)
        pipeline.evaluate([(tokens[i : i + size], targets[i : i + size]) for i in begins], keep)
        found["losses"].append(losses)
        for length in (5, 1, LENGTH, 2 * LENGTH):
            given = tokens.repeat(1, 2)[:size, :length]
            logits = pipeline.forward(given)
            assert not logits.requires_grad
            found["logits"].append(logits)
        pipeline.step([(tokens[part], targets[part]) for part in parts], language_loss)
        pipeline.path.finish()
        found["grads"] = named_gradients(pipeline.path)
    pipeline.evaluate([], keep)
    return found


def order_of_sync(mesh: Mesh, schedule: str) -> dict[str, Any]:
    """Note when buckets are handed over, between the actions of a step."""
    way = Way("gpt-tied", 6, schedule, (2, 2, 2))
    split = way.split(way.table(2).num_stages)
    pipeline = build_pipeline(gpt(6, tie=True), mesh, split=split, bucket_mb=0.005, **way.options)
    events: list[tuple[str, int]] = []
    plain = pipeline.path.sync.reduce
    pipeline.trace = []

    def reduce(bucket: Bucket) -> None:
        assert pipeline.trace is not None
        events.append(("reduce", bucket.index))
        actions.append(len(pipeline.trace))
        plain(bucket)

    actions: list[int] = []
    pipeline.path.sync.reduce = reduce  # type: ignore[method-assign]
    tokens, targets = BATCHES[0]
    micros = [(tokens[part], targets[part]) for part in shares(way.sizes, mesh)]
    pipeline.step(micros, language_loss)
    pipeline.path.finish()
    return {
        "buckets": [bucket for _, bucket in events],
        "done before": actions,  # how many actions were over when each left
        "actions": len(pipeline.trace),
        "num_buckets": len(pipeline.path.buckets),
        "place": (mesh.pp.rank, mesh.dp.rank),
        "times": all(start <= stop for _, start, stop in pipeline.trace),
    }


def weights_come_later(mesh: Mesh, schedule: str) -> dict[str, Any]:
    """Note in which kind of action the gradients of weights are brought to the buckets."""
    way = Way("llama", 4, schedule, (3, 3, 3, 3))
    split = way.split(way.table(2).num_stages)
    pipeline = build_pipeline(MODELS["llama"](4), mesh, split=split, **way.options)
    found = {"now": 0, "later": 0, "in": "now"}
    add, compute = pipeline.path.add, Later.compute

    def counted(*args: Any) -> None:
        found[found["in"]] += 1
        add(*args)

    def later(self: Later, *args: Any) -> None:
        found["in"] = "later"
        compute(self, *args)
        found["in"] = "now"

    pipeline.path.add = counted  # type: ignore[method-assign]
    Later.compute = later  # type: ignore[method-assign]
    tokens, targets = BATCHES[0]
    try:
        micros = [(tokens[part], targets[part]) for part in shares(way.sizes, mesh)]
        pipeline.step(micros, language_loss)
    finally:
        Later.compute = compute  # type: ignore[method-assign]
    pipeline.path.finish()
    find_divergence([], mesh.world)  # nobody leaves before the others
    products = [name for name in named_gradients(pipeline.path) if "embed" not in name]
    return found | {"products": sum("norm" not in name for name in products)}


BESIDE: dict[str, tuple[Layout, dict[str, Callable[[Mesh], Any]]]] = {
    "pp2": (
        Layout(pp=2),
        {
            **{f"bf16 {s}": partial(bf16_losses, schedule=s) for s in ("1f1b", "zb_v")},
            **{f"padded {s}": partial(padded_step, schedule=s) for s in ("1f1b", "zb_h1", "zb_v")},
            **{f"evaluated {s}": partial(evaluated, schedule=s) for s in ("1f1b", "zb_v")},
            "changed": changed_copy,
            **{f"later {s}": partial(weights_come_later, schedule=s) for s in ("1f1b", "zb_h1")},
        },
    ),
    "pp2-dp2": (
        Layout(pp=2, dp=2),
        {f"sync {s}": partial(order_of_sync, schedule=s) for s in ("1f1b", "zb_h1", "zb_v")},
    ),
}


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Any]]:
    done: dict[str, Any] = {}

    def outcome(world: str, key: str) -> list[Any]:
        if world not in done:
            layout, cases = BESIDE[world]
            folder = tmp_path_factory.mktemp(world)
            done[world] = survey(cases, layout.world_size, folder, layout=layout)
        return shown(done[world][key])

    return outcome


Beside = Callable[[str, str], list[Any]]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_bf16_follows_fp32(schedule: str, beside: Beside) -> None:
    """bf16 has 8 bits of mantissa, so losses of about 4 agree within a few hundredths."""
    ranks = beside("pp2", f"bf16 {schedule}")
    model, exact = gpt(4, tie=True), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(*BATCHES[0])
        loss.backward()
        optimizer.step()
        exact.append(loss.item())
    assert exact[-1] < 0.9 * exact[0]
    for rank in ranks:
        assert rank["diverged"] == []
        assert rank["losses"] == pytest.approx(exact, rel=0.05, abs=0.06)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "zb_v"])
def test_padding_counts_as_in_one_batch(schedule: str, beside: Beside) -> None:
    ranks = beside("pp2", f"padded {schedule}")
    model = gpt(4, tie=True)
    loss = model(*padded_batch())
    loss.backward()
    for rank in ranks:
        assert rank["loss"] == pytest.approx(loss.item(), abs=1e-5)
    wanted = {name: param.grad for name, param in model.named_parameters()}
    assert_gradients([rank["grads"] for rank in ranks], wanted)


def test_changed_copy_of_a_tied_weight_is_seen(beside: Beside) -> None:
    for said in beside("pp2", "changed"):
        assert said == ["token_embedding.weight on rank 1 and rank 0"]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_evaluation_and_forward(schedule: str, beside: Beside) -> None:
    ranks = beside("pp2", f"evaluated {schedule}")
    assert sum(rank["last"] for rank in ranks) == 1
    model = MODELS["llama-tied"](4)
    tokens, targets = BATCHES[0]
    model(tokens, targets).backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    with torch.no_grad():
        for rank in ranks:
            for place, size in enumerate((1, 4, 3)):
                begins = range(0, BATCH, size)
                wanted = [float(model(tokens[i : i + size], targets[i : i + size])) for i in begins]
                losses = rank["losses"][place]
                assert losses == (pytest.approx(wanted, abs=1e-5) if rank["last"] else [])
                for number, length in enumerate((5, 1, LENGTH, 2 * LENGTH)):
                    logits = rank["logits"][4 * place + number]
                    given = tokens.repeat(1, 2)[:size, :length]
                    torch.testing.assert_close(logits, model(given), rtol=1e-5, atol=1e-5)
                    assert torch.equal(logits, ranks[0]["logits"][4 * place + number])
    assert_gradients([rank["grads"] for rank in ranks], grads)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "zb_v"])
def test_buckets_leave_while_backward_runs(schedule: str, beside: Beside) -> None:
    ranks = {rank["place"]: rank for rank in beside("pp2-dp2", f"sync {schedule}")}
    for (stage, _), rank in ranks.items():
        assert rank["times"]
        assert rank["buckets"] == list(range(rank["num_buckets"])), "each once, in order"
        assert rank["num_buckets"] > 2
        # The first leaves while actions are still running; `done before` counts finished ones.
        assert rank["done before"][0] < rank["actions"]
        assert rank["buckets"] == ranks[stage, 0]["buckets"]
        assert rank["done before"] == ranks[stage, 0]["done before"]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_weights_wait_where_the_table_says_so(schedule: str, beside: Beside) -> None:
    """Of 4 microbatches and every weight of a product, all gradients come in W, or none."""
    for rank in beside("pp2", f"later {schedule}"):
        assert rank["products"] > 10
        expected = 4 * rank["products"] if schedule == "zb_h1" else 0
        assert rank["later"] == expected
        assert not (expected and rank["now"])
