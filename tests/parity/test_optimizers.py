"""Every optimizer against its update written out, of whole parameters and of parts of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optimizer_models as plain
import pytest
import torch
from harness import run_ranks
from optimizer_models import MATRICES, batch, net, plain_run
from parity_models import gpt, llama
from torch import nn

from bigtrain.comm.buckets import Bucket, Segment, Slot
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.comm.world import World
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import AdamwOptimizer, MuonOptimizer
from bigtrain.errors import BigtrainError
from bigtrain.optim import (
    LAMB,
    SGD,
    Adagrad,
    AdamW,
    Lion,
    Muon,
    Optimizer,
    build_optimizer,
    decay_kind,
    kinds_for,
    matrix_kinds,
)
from bigtrain.optim.muon import orthogonalize

pytestmark = pytest.mark.parity
ALONE = Mesh.build(Layout(), World(), torch.device("cpu"))

Make = Callable[..., Optimizer]
CASES: dict[str, tuple[Make, Callable[..., None], dict[str, Any]]] = {
    "lamb": (LAMB, plain.lamb, {"lr": 0.05, "weight_decay": 0.1}),
    "adagrad": (Adagrad, plain.adagrad, {"lr": 0.05, "weight_decay": 0.1}),
    "lion": (Lion, plain.lion, {"lr": 0.01, "weight_decay": 0.5}),
    "adamw": (AdamW, plain.adamw, {"lr": 0.05, "weight_decay": 0.3}),
    "muon": (
        partial(Muon, adamw_lr_ratio=0.5),
        plain.muon,
        {"lr": 0.05, "weight_decay": 0.3},
    ),
    "muon-keller": (
        partial(Muon, adamw_lr_ratio=0.5, scale="keller", nesterov=False),
        partial(plain.muon, scale="keller", nesterov=False),
        {"lr": 0.05, "weight_decay": 0.3},
    ),
}


def path_of(bucket_mb: float = 25.0, mesh: Mesh = ALONE, **options: Any) -> GradientPath:
    model = net()
    return parallelize(model, mesh, bucket_mb=bucket_mb, kind_of=matrix_kinds(model), **options)


def one_step(path: GradientPath, optimizer: Optimizer, tokens: torch.Tensor, **how: Any) -> None:
    path.backward(path.model(tokens))
    path.finish()
    optimizer.step(**how)
    path.publish()


# -- against the update written out ----------------------------------------------------------------


@pytest.mark.parametrize("bucket_mb", [0.0005, 0.002, 25.0])
@pytest.mark.parametrize("name", CASES)
def test_same_as_written_out(name: str, bucket_mb: float) -> None:
    """A divisor and a rate given with the step; weight decay of what has two dims.

    The divisor changes from step to step, since most updates do not see a constant one.
    """

    def divisor(step: int) -> float:
        return 1.0 + step % 3

    make, update, options = CASES[name]
    path = path_of(bucket_mb)
    optimizer = make(path, **(options | {"lr": 7.0}))
    for step in range(1, 6):
        by = torch.tensor(divisor(step))
        one_step(path, optimizer, batch(step), lr=options["lr"], grad_divisor=by)
    wanted = plain_run(update, options, 5, divisor)
    for parameter, p in path.model.named_parameters():
        torch.testing.assert_close(p.data, wanted[parameter], rtol=1e-4, atol=2e-6, msg=parameter)


def test_muon_is_torch_muon() -> None:
    """In bf16, which torch's always takes; both round alike."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 6, bias=False))
    theirs = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 6, bias=False))
    theirs.load_state_dict(model.state_dict())
    path = parallelize(model, ALONE, kind_of=matrix_kinds(model))
    ours = Muon(path, 0.02, weight_decay=0.1, scale="keller", precision="bf16")
    torchs = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1)
    for step in range(4):
        x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
        path.backward(model(x).square().mean())
        path.finish()
        ours.step()
        path.publish()
        theirs.zero_grad()
        theirs(x).square().mean().backward()
        torchs.step()
    for mine, other in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.data, other.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 30), (30, 6), (16, 16), (1, 9)])
def test_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    wanted = torch.randn(shape)
    x = orthogonalize(1e-3 * wanted)
    assert x.shape == shape
    values = torch.linalg.svdvals(x)
    assert values.max() < 1.3
    assert values.max() > 0.6
    assert values.min() > 0.6
    u, _, v = torch.linalg.svd(wanted, full_matrices=False)
    assert float((x * (u @ v)).sum() / (x.norm() * (u @ v).norm())) > 0.95
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*CASES, "sgd"])
def test_a_bad_divisor_changes_nothing(name: str, bad: float) -> None:
    make = SGD if name == "sgd" else CASES[name][0]
    path = path_of(0.002, dtype=torch.bfloat16)
    optimizer = make(path, lr=0.1)
    one_step(path, optimizer, batch(0))

    def everything() -> list[torch.Tensor]:
        mains = [s.main_params for s in path.segments()]
        moments = [flat for flats in optimizer.moments.values() for flat in flats]
        return [t.clone() for t in (*mains, *path.model.parameters(), *moments) if t is not None]

    before = everything()
    one_step(path, optimizer, batch(1), grad_divisor=torch.tensor(bad))
    for tensor, old in zip(everything(), before, strict=True):
        assert torch.equal(tensor, old)
    one_step(path, optimizer, batch(1), grad_divisor=torch.tensor(2.0))
    assert not all(map(torch.equal, everything(), before))


@pytest.mark.parametrize("name", [*CASES, "sgd"])
def test_low_precision_parameters_are_written_in_the_step(name: str) -> None:
    make = SGD if name == "sgd" else CASES[name][0]
    path = path_of(0.002, dtype=torch.bfloat16)
    optimizer = make(path, lr=0.1)
    path.backward(path.model(batch(0)))
    path.finish()
    before = [segment.low_params.clone() for segment in path.segments()]
    optimizer.step()  # no publish()
    for segment, old in zip(path.segments(), before, strict=True):
        assert torch.equal(segment.low_params, segment.main_params.bfloat16())
        assert not torch.equal(segment.low_params, old)


def test_segments_alone_will_do() -> None:
    """Where nothing is communicated, as it always was."""
    for make in (AdamW, SGD, Adagrad, Lion, Muon):
        path, other = path_of(0.002), path_of(0.002)
        for each, source in ((path, path), (other, other.segments())):
            one_step(each, make(source, lr=0.1), batch(0))
        for mine, theirs in zip(path.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_done_names_each_bucket_once_its_segments_are_updated() -> None:
    path = path_of(0.002)
    optimizer = LAMB(path, lr=0.1)
    path.backward(path.model(batch(0)))
    path.finish()
    start = [bucket.main_params.clone() for bucket in path.buckets]
    seen: list[int] = []

    def done(bucket: Bucket) -> None:
        seen.append(bucket.index)
        for other, old in zip(path.buckets, start, strict=True):
            slots = [slot for slot in other.slots if slot.name != "conv.bias"]
            moved = [not torch.equal(s.view(other.main_params), s.view(old)) for s in slots]
            assert all(moved) if other.index in seen else not any(moved)

    optimizer.step(done=done)
    assert seen == [bucket.index for bucket in reversed(path.buckets)]
    assert len(seen) > 2


# -- a rank may own only a part --------------------------------------------------------------------


class PartOf(GradientPath):
    """Some of a path's elements, as one of two owners has them; owners are threads."""

    def __init__(
        self, path: GradientPath, number: int, meet: threading.Barrier, said: list
    ) -> None:
        self.path, self.number, self.meet, self.said = path, number, meet, said
        self.device, self.sync, self.buckets = path.device, path.sync, path.buckets

    @property
    def slots(self) -> list[Slot]:
        return self.path.slots

    def segments(self) -> list[Segment]:
        mine = []
        for segment in self.path.segments():
            cut = segment.start + (segment.stop - segment.start) * 3 // 7  # inside of a row
            ends = {"stop": cut} if self.number == 0 else {"start": cut}
            mine.append(dataclasses.replace(segment, **ends))
        return [segment for segment in mine if segment.start < segment.stop]

    def sum_over_parts(self, values: torch.Tensor) -> torch.Tensor:
        self.said.append(values)
        self.meet.wait(10)
        return self.said[-1] + self.said[-2]


def test_trust_ratios_are_of_whole_parameters() -> None:
    path, whole = path_of(0.004), path_of(0.004)
    meet, said = threading.Barrier(2), []
    parts = [LAMB(PartOf(path, number, meet, said), lr=0.05) for number in (0, 1)]
    alone = LAMB(whole, lr=0.05)
    for step in range(3):
        path.backward(path.model(batch(step)))
        path.finish()
        threads = [threading.Thread(target=part.step) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        path.publish()
        one_step(whole, alone, batch(step))
    assert len(said) == 6  # one collective a step
    for mine, wanted in zip(path.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-7)


def test_a_segment_of_padding_alone() -> None:
    """An owner's block may hold no element of any parameter."""
    path = path_of()
    slot = next(s for s in path.slots if s.name == "conv.bias")  # 12 elements, 4 of padding
    segment = next(s for s in path.segments() if s.start <= slot.start < s.stop)
    padding = dataclasses.replace(segment, start=slot.stop, stop=slot.stop + 4)

    class Padding(PartOf):
        def segments(self) -> list[Segment]:
            return [padding]

        def sum_over_parts(self, values: torch.Tensor) -> torch.Tensor:
            assert not values.any()
            return values

    before = segment.bucket.main_params.clone()
    path.backward(path.model(batch(0)))
    path.finish()
    LAMB(Padding(path, 0, threading.Barrier(1), []), lr=0.1).step()
    assert torch.equal(segment.bucket.main_params, before)


# -- which parameters are matrices -----------------------------------------------------------------


def matrices(model: nn.Module, **options: Any) -> set[str]:
    kind_of = matrix_kinds(model, **options)
    return {name for name, p in model.named_parameters() if kind_of(name, p) == "matrix"}


def test_hidden_matrices_are_muons() -> None:
    assert matrices(net()) == set(MATRICES)
    assert matrices(net(), exclude=["conv.*"]) == {"up.weight", "down.weight", "head.weight"}
    for model in (gpt(), gpt(tie=False), llama(), llama(tie=True)):
        found = matrices(model)
        hidden = {name for name, p in model.named_parameters() if "blocks." in name and p.ndim > 1}
        assert found == hidden


def test_what_is_tied_to_an_embedding_is_none() -> None:
    """By whatever name, and an embedding whose name says nothing."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 6, bias=False)
            self.table = nn.Embedding(6, 4)
            self.table.weight = self.out.weight
            self.inner = nn.Linear(4, 4)

    model = Tied()
    assert next(name for name, _ in model.named_parameters()) == "out.weight"
    assert matrices(model) == {"inner.weight"}
    assert matrix_kinds(model)("table.weight", model.table.weight) == "decay"


def test_kinds_follow_the_config() -> None:
    model = net()
    assert kinds_for(AdamwOptimizer(), model) is decay_kind
    kind_of = kinds_for(MuonOptimizer(kind="muon", exclude=["up*"]), model)
    kinds = {name: kind_of(name, p) for name, p in model.named_parameters()}
    assert kinds["up.weight"] == kinds["embed.weight"] == "decay"
    assert kinds["head.weight"] == kinds["conv.weight"] == "matrix"
    assert kinds["norm.weight"] == kinds["up.bias"] == "no_decay"


def test_moments_are_where_they_are_needed() -> None:
    path = path_of(0.002)
    moments = Muon(path).moments
    for index, segment in enumerate(path.segments()):
        there = {name for name, flats in moments.items() if flats[index] is not None}
        wanted = {"momentum"} if segment.kind == "matrix" else {"exp_avg", "exp_avg_sq"}
        assert there == wanted
    blocks = [block.name for name, flats in moments.items() for block in path.blocks(name, flats)]
    assert sorted(blocks) == sorted(
        f"{moment}{name}"
        for name, _ in path.model.named_parameters()
        for moment in (["momentum"] if name in MATRICES else ["exp_avg", "exp_avg_sq"])
    )


def test_muon_refuses_a_part_of_a_matrix() -> None:
    path = path_of()
    cut = [
        dataclasses.replace(segment, stop=segment.stop - 16)
        if segment.kind == "matrix"
        else segment
        for segment in path.segments()
    ]
    with pytest.raises(BigtrainError, match=r"only a part of conv.weight"):
        Muon(cut)


def test_muon_refuses_a_path_without_matrices() -> None:
    with pytest.raises(BigtrainError, match="none of the parameters is a matrix"):
        Muon(parallelize(net(), ALONE))


def muon_on_split_layers(mesh: Mesh) -> str:
    model = gpt()
    path = parallelize(model, mesh, kind_of=matrix_kinds(model))
    try:
        Muon(path)
    except BigtrainError as error:
        return str(error)
    return ""


def test_muon_refuses_split_layers(tmp_path: Path) -> None:
    for text in run_ranks(muon_on_split_layers, 2, tmp_path, layout=Layout(tp=2)):
        assert "only a part of blocks." in text


# -- from the config ------------------------------------------------------------------------------


def test_keys_of_a_section_are_arguments_of_its_class() -> None:
    """So that none is forgotten on the way."""
    section = MuonOptimizer(
        kind="muon", lr=0.3, momentum=0.1, nesterov=False, weight_decay=0.7, scale="keller",
        num_iterations=3, precision="bf16", adamw_lr_ratio=0.2, betas=[0.1, 0.2], eps=0.5,
    )  # fmt: skip
    optimizer = build_optimizer(path_of(), section)
    assert isinstance(optimizer, Muon)
    assert optimizer.betas == (0.1, 0.2)
    for key, value in section.model_dump(exclude={"kind", "exclude", "betas"}).items():
        assert getattr(optimizer, key) == value, key
