"""1-bit Adam and LAMB, 0/1 Adam: beside references of a few lines, composed, resumed, broken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from parity_codecs import Lossless
from parity_models import gpt, recorded_collectives
from test_compressed_momentum import BETAS
from test_compressed_training import UNTIED, config_of
from test_tensor_wire import sent

from bigtrain.comm.collectives import all_gather_object
from bigtrain.comm.gradient import GradientPath
from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.config.layout import Layout
from bigtrain.config.schema import CompressionSection, Config
from bigtrain.errors import BigtrainError, CommError
from bigtrain.onebit.codec import Signs
from bigtrain.onebit.published import MeanMomentum
from bigtrain.onebit.two_phase import TwoPhase
from bigtrain.optim import SGD, AdamW, OneBitLAMB
from bigtrain.trainer import Trainer

pytestmark = pytest.mark.parity
LAMB = {"kind": "lamb", "lr": 0.03, "betas": BETAS}
ONEBIT = {"kind": "onebit", "block": 64, "least_numel": 100}
ZERO_ONE = {"kind": "zero_one", "block": 64, "least_numel": 100}
BOTH = {"onebit": ONEBIT, "zero_one": ZERO_ONE, "zero_one, 1": {**ZERO_ONE, "local_steps": 1}}


def ledger_of(path: Any) -> MeanMomentum:
    assert isinstance(path, GradientPath)
    ledger = path.sync.ledger
    assert isinstance(ledger, MeanMomentum)
    return ledger


def at_once(path: Any) -> None:
    """Compress from the next step on."""
    ledger_of(path).switch.begin("compressed")


# -- two phases --------------------------------------------------------------------------------


def signs_of(x: torch.Tensor, block: int) -> torch.Tensor:
    """Return x in one bit, as long as the root of the mean square of its block."""
    out = torch.empty_like(x)
    for start in range(0, x.numel(), block):
        part = x[start : start + block]
        scale = part.double().square().mean().sqrt().bfloat16().float()
        out[start : start + block] = torch.where(part >= 0, scale, -scale)
    return out


def beside_a_reference(mesh: Mesh, numel: int) -> list[float]:
    """Return how far sums of some steps are from those of the paper's algorithm."""
    phases, ranks, block = TwoPhase(mesh.dp, Signs(64)), mesh.dp.degree, 64
    part = phases.part(numel)
    errors = torch.zeros(ranks, ranks, part)
    owners = torch.zeros(ranks, part)
    far = []
    for step in range(5):
        draws = torch.Generator().manual_seed(step)
        inputs = torch.randn(ranks, numel, generator=draws)
        got = phases.start(7, inputs[mesh.dp.rank]).wait()
        rows = torch.nn.functional.pad(inputs, (0, ranks * part - numel))
        z = rows.view(ranks, ranks, part) + errors
        q = torch.stack([torch.stack([signs_of(r, block) for r in rank]) for rank in z])
        errors = z - q
        sums = q.sum(0) + owners
        answer = torch.stack([signs_of(row, block) for row in sums])
        owners = sums - answer
        wanted = answer.view(-1)[:numel]
        far.append(float((got - wanted).abs().max() / wanted.abs().max()))
    lost = phases.take_errors(7, numel, got.device)
    wanted = (errors.sum(0) + owners).view(-1)[:numel]
    far.append(float((lost - wanted).abs().max()))
    return far


@pytest.mark.parametrize("numel", [1, 64, 1000, 3072])
def test_two_phases_are_those_of_the_paper(numel: int, tmp_path: Path) -> None:
    for far in run_ranks(beside_a_reference, 3, tmp_path, args=(numel,), delay_seed=numel):
        assert max(far) < 1e-4


def broken(mesh: Mesh) -> str:
    """One rank has taken a step more than the others."""
    phases = TwoPhase(mesh.dp, Signs(64))
    if mesh.rank == 1:
        phases._turns["momentum", 0] = 1
    try:
        phases.start(0, torch.ones(100)).wait()
    except CommError as error:
        return str(error)
    return ""


def test_a_message_of_another_step_is_seen(tmp_path: Path) -> None:
    for told in run_ranks(broken, 2, tmp_path):
        assert "of bucket 0" in told
        assert "is not momentum" in told


# -- algorithms --------------------------------------------------------------------------------


def main_params(path: Any) -> torch.Tensor:
    flats = [slot.view(bucket.main_params) for bucket in path.buckets for slot in bucket.slots]
    return torch.cat([flat.flatten() for flat in flats])


def mean_path(mesh: Mesh, section: dict[str, Any], lossless: bool) -> tuple[Any, AdamW]:
    compression = CompressionSection.model_validate(section)
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 30, bias=False)
    path = parallelize(model, mesh, compression=compression)
    if lossless:
        ledger_of(path).phases.signs = Lossless()  # type: ignore[assignment]
    return path, AdamW(path, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def take_step(path: Any, optimizer: Any, mesh: Mesh, step: int, rate: float) -> None:
    x, y = batch_of(step, mesh.dp.rank)
    path.backward((path.model(x) - y).square().mean())
    path.finish()
    optimizer.step(rate, torch.tensor(1.0 + 0.1 * (step % 3)))
    path.publish()


def batch_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 40, generator=draws)
    return x, x[:, :30] * 2 + 0.1 * torch.randn(8, 30, generator=draws)


def rates(steps: int) -> list[float]:
    return [0.01 * min(1.0, (s + 1) / 4) * (1 - 0.5 * s / steps) for s in range(steps)]


STEPS, FREEZE = 60, 6


def adam(mesh: Mesh, section: dict[str, Any]) -> list[torch.Tensor]:
    """Return main parameters after each step, where nothing is lost."""
    path, optimizer = mean_path(mesh, section, lossless=True)
    found = []
    for step, rate in enumerate(rates(STEPS)):
        if step == FREEZE and section["kind"] == "onebit":
            at_once(path)
        take_step(path, optimizer, mesh, step, rate)
        found.append(main_params(path).clone())
    return found


class Reference:
    """Adam of several workers in one process, after the papers: frozen variance, local steps."""

    def __init__(self, workers: int, local: int | None) -> None:
        torch.manual_seed(0)
        start = torch.nn.Linear(40, 30, bias=False).weight.detach().double()
        self.x = [start.clone() for _ in range(workers)]
        self.m = [torch.zeros_like(start) for _ in range(workers)]
        self.u = [torch.zeros_like(start) for _ in range(workers)]
        self.v, self.anchor = torch.zeros_like(start), start.clone()
        self.local, self.t, self.since, self.sum_rates = local, 0, 0, 0.0
        self.refreshes, self.next_refresh, self.last = 0, 0, 0.0

    def gradient(self, worker: int, step: int) -> torch.Tensor:
        x, y = (t.double() for t in batch_of(step, worker))
        left = x @ self.x[worker].T - y
        return 2 * left.T @ x / left.numel() / (1.0 + 0.1 * (step % 3))

    def moved(self, x: torch.Tensor, m: torch.Tensor, rate: float) -> torch.Tensor:
        """Return AdamW's step from x."""
        first, second = m / (1 - 0.9**self.t), self.v / (1 - 0.95**self.t)
        return x * (1 - rate * 0.1) - rate * first / (second.sqrt() + 1e-8)

    def step(self, step: int, rate: float) -> None:
        self.t += 1
        rising, self.last = rate > self.last, rate
        grads = [self.gradient(worker, step) for worker in range(len(self.x))]
        mean = sum(grads) / len(grads)
        self.m = [0.9 * m + 0.1 * g for m, g in zip(self.m, grads, strict=True)]
        if self.local is None:
            if step < FREEZE:
                self.v = 0.95 * self.v + 0.05 * mean**2
            self.m = [sum(self.m) / len(self.m)] * len(self.x)  # type: ignore[list-item]
            self.x = [self.moved(x, m, rate) for x, m in zip(self.x, self.m, strict=True)]
            return
        distance = min(2 ** (self.refreshes // 16), 256)
        refresh = step >= self.next_refresh
        if refresh:
            keep = max(0.95**distance, 0.95)
            self.v = keep * self.v + (1 - keep) * mean**2
        self.since += 1
        self.sum_rates += rate
        self.u = [u + rate * m for u, m in zip(self.u, self.m, strict=True)]
        if refresh or self.since >= (1 if rising else min(self.local, distance)):
            common = sum(self.u) / len(self.u) / self.sum_rates
            self.anchor = self.moved(self.anchor, common, self.sum_rates)  # type: ignore[arg-type]
            self.x = [self.anchor.clone() for _ in self.x]
            self.m = [common.clone() for _ in self.x]  # type: ignore[union-attr]
            self.u = [torch.zeros_like(u) for u in self.u]
            self.since, self.sum_rates = 0, 0.0
        else:
            self.x = [self.moved(x, m, rate) for x, m in zip(self.x, self.m, strict=True)]
        if refresh:
            self.refreshes += 1
            self.next_refresh = step + min(2 ** (self.refreshes // 16), 256)


@pytest.mark.parametrize("name", BOTH)
def test_without_loss_it_is_what_the_papers_say(name: str, tmp_path: Path) -> None:
    section = {**BOTH[name], "local_steps": 3} if name == "zero_one" else BOTH[name]
    found = run_ranks(adam, 3, tmp_path, args=(section,))
    local = None if name == "onebit" else section.get("local_steps")
    reference, apart = Reference(3, local), 0
    for step, rate in enumerate(rates(STEPS)):
        reference.step(step, rate)
        for rank, x in enumerate(reference.x):
            torch.testing.assert_close(
                found[rank][step].double(), x.flatten(), rtol=1e-3, atol=2e-5
            )
        alike = torch.equal(found[0][step], found[1][step])
        assert alike == torch.equal(reference.x[0], reference.x[1])
        apart += not alike
    assert (apart > 10) == (name == "zero_one")


def lamb(mesh: Mesh) -> list[torch.Tensor]:
    """Return main parameters of 1-bit LAMB after each step, where nothing is lost."""
    path, _ = mean_path(mesh, ONEBIT, lossless=True)
    optimizer = OneBitLAMB(path, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for step, rate in enumerate(rates(STEPS)):
        if step == FREEZE:
            at_once(path)
        take_step(path, optimizer, mesh, step, rate)
        if step == 30:  # as where a run saves: what is fresh begins anew, and the factor goes on
            path.consolidate()
        found.append(main_params(path).clone())
    return found


def test_without_loss_lamb_is_what_the_paper_says(tmp_path: Path) -> None:
    found = run_ranks(lamb, 2, tmp_path)[0]
    torch.manual_seed(0)
    x = torch.nn.Linear(40, 30, bias=False).weight.detach().double()
    m, v, trust, factor, factors = torch.zeros_like(x), torch.zeros_like(x), 0.0, 1.0, []
    for step, rate in enumerate(rates(STEPS)):
        gradient = torch.zeros_like(x)
        for a, b in (batch_of(step, worker) for worker in range(2)):
            left = a.double() @ x.T - b.double()
            gradient += left.T @ a.double() / left.numel() / (1.0 + 0.1 * (step % 3))
        before, m = m, 0.9 * m + 0.1 * gradient
        if step < FREEZE:
            v = fresh = 0.95 * v + 0.05 * gradient**2
        first, second = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.95 ** (step + 1))
        direction = first / (second.sqrt() + 1e-6) + 0.1 * x
        if step < FREEZE:
            ratio = float(x.norm() / direction.norm())
            trust = 0.9 * trust + 0.1 * ratio if step else ratio
        else:
            fresh = v / factor**2 if step == 31 else fresh
            again = (m - 0.9 * before) / (1 - 0.9)
            fresh = 0.95 * fresh + 0.05 * again**2
            over = float(((v.sqrt() + 1e-6) / (fresh.sqrt() + 1e-6)).max())
            factor = min(max(min(max(over, 0.9 * factor), 1.1 * factor), 0.5), 4.0)
            factors.append(factor)
            ratio = trust * factor
        x = x - rate * ratio * direction
        # A few elements are held to what a mean beside their variance can be.
        assert (found[step].double() - x.flatten()).norm() < 2e-4 * x.norm(), step
    assert max(factors) > 1.3, "nothing to follow"


# -- training ----------------------------------------------------------------------------------


def curve(
    mesh: Mesh, config: Config, steps: int = 40, exact: int = 12, lossless: bool = False
) -> dict[str, Any]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    if lossless:
        ledger_of(trainer.path).phases.signs = Lossless()  # type: ignore[assignment]
    losses = []
    for step in range(steps):
        if step == exact and config.compression.kind == "onebit":
            at_once(trainer.path)
        losses.append(trainer.train_step().loss)
    trainer.path.consolidate()  # type: ignore[union-attr]
    trainer.check_replicas()
    return {"losses": losses, "validation": trainer.evaluate()}


def without_loss(mesh: Mesh, config: Config) -> dict[str, Any]:
    return curve(mesh, config, lossless=True)


LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "dp3, onebit": (Layout(dp=3), {"compression": ONEBIT, "train": {"global_batch": 12}}),
    "dp2 x tp2, onebit": (Layout(dp=2, tp=2), {"compression": ONEBIT}),
    "pp2 x dp2, onebit": (Layout(pp=2, dp=2), {"compression": ONEBIT, "model": UNTIED}),
    "dp2, LAMB": (
        Layout(dp=2),
        {"compression": ONEBIT, "optimizer": LAMB},
    ),
    "dp2, bf16": (Layout(dp=2), {"compression": ONEBIT, "train": {"precision": "bf16"}}),
    "dp4, zero_one": (Layout(dp=4), {"compression": ZERO_ONE}),
    "pp2 x dp2 x tp2, zero_one": (
        Layout(pp=2, dp=2, tp=2),
        {"compression": {**ZERO_ONE, "local_steps": 4}, "model": UNTIED},
    ),
    "dp2, zero_one, bf16": (
        Layout(dp=2),
        {"compression": ZERO_ONE, "train": {"precision": "bf16"}},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_curve_beside_the_one_without_loss(name: str, tmp_path: Path) -> None:
    layout, sections = LAYOUTS[name]
    config = config_of(tmp_path, **{"optimizer": {"lr": 0.004, "betas": BETAS}, **sections})
    ranks = run_ranks(curve, layout.world_size, tmp_path, args=(config,), layout=layout)
    wanted = run_ranks(without_loss, layout.dp, tmp_path, args=(config,))[0]
    for rank in ranks:
        assert rank == ranks[0]
        tolerance = 0.25 if "LAMB" in name else 0.12  # its steps are longer
        assert rank["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
        assert rank["losses"][14:] != wanted["losses"][14:], "nothing was compressed"
    assert ranks[0]["losses"][-1] < 0.8 * ranks[0]["losses"][0]


def test_a_warm_up_ends_by_itself(tmp_path: Path) -> None:
    [phases, other] = run_ranks(phases_of, 2, tmp_path)
    assert phases == other
    assert phases[59] == "exact"
    assert phases[-1] == "compressed"


def phases_of(mesh: Mesh) -> list[str]:
    """Gradients are mostly noise, so that their squares are soon what they will be."""
    path, optimizer = mean_path(mesh, ONEBIT, lossless=False)
    found = []
    for step in range(120):
        draws = torch.Generator().manual_seed(step * 7 + mesh.rank)
        path.backward((path.model.weight * torch.randn(30, 40, generator=draws)).mean())
        path.finish()
        optimizer.step(0.01 * min(1.0, (step + 1) / 20))
        path.publish()
        assert path.progress is not None
        found.append(path.progress["phase"])
    return found


# -- between exchanges -------------------------------------------------------------------------


def new_rows(mesh: Mesh) -> list[float]:
    """Rows that one rank sees first, between two exchanges, in blocks of signs of their own."""
    torch.manual_seed(0)
    compression = CompressionSection.model_validate(ZERO_ONE)
    path = parallelize(torch.nn.Embedding(256, 16), mesh, compression=compression)
    optimizer = AdamW(path, lr=0.01, weight_decay=0.0)
    for step in range(58):
        draws = torch.Generator().manual_seed(step * 2 + mesh.rank)
        rows = torch.randint(0, 128, (16,), generator=draws)
        if step >= 20:
            rows = torch.cat([rows, torch.randint(128, 256, (2,), generator=draws)])
        path.backward(path.model(rows).square().mean())
        path.finish()
        optimizer.step()
        path.publish()
        path.publish()  # once more, as where something was loaded: the count of steps goes on
    apart = gap(mesh, main_params(path))
    path.consolidate()
    state = [main_params(path), *(flat for flats in optimizer.moments.values() for flat in flats)]
    return [apart, *(gap(mesh, flat) for flat in state if flat is not None)]


def gap(mesh: Mesh, flat: torch.Tensor) -> float:
    """Return how far ranks are apart at most."""
    [a, b] = all_gather_object(flat.clone(), mesh.dp, "comparison")
    return float((a - b).abs().max())


def test_ranks_are_alike_again_after_their_own_ways(tmp_path: Path) -> None:
    for apart, *after in run_ranks(new_rows, 2, tmp_path):
        assert 0 < apart < 0.15, "fifteen steps of 0.01 at most"
        assert after == [0.0] * 3


def saved_or_not(mesh: Mesh, section: dict[str, Any], saves: bool) -> list[float]:
    """Return how far from its goal a run is, some steps after it was saved, and not."""
    path, optimizer = mean_path(mesh, section, lossless=False)
    goal, found = 2 * torch.eye(30, 40), []
    for step in range(320):
        if step == 20 and section["kind"] == "onebit":
            at_once(path)
        if step == 280 and saves:
            path.consolidate()
        take_step(path, optimizer, mesh, step, 0.002)
        found.append(float((main_params(path).view(30, 40) - goal).square().mean()))
    return found


@pytest.mark.parametrize("name", BOTH)
def test_a_save_does_not_throw_a_run_off(name: str, tmp_path: Path) -> None:
    saved, not_saved = (
        run_ranks(saved_or_not, 2, tmp_path, args=(BOTH[name], saves))[0] for saves in (True, False)
    )
    assert saved[:280] == not_saved[:280]
    assert saved[280:] != not_saved[280:]
    assert saved[280:] == pytest.approx(not_saved[280:], rel=0.1)


def norms(mesh: Mesh) -> list[tuple[float, float]]:
    """Gradients are alike in the warm-up, and later noise; return the norm that is told, and is."""
    path, optimizer = mean_path(mesh, ONEBIT, lossless=False)
    common, found = torch.randn(30, 40, generator=torch.Generator().manual_seed(5)), []
    for step in range(300):
        if step == 20:
            at_once(path)
        own = 0.001 * common if step > 30 else common
        own = own + torch.randn(
            30, 40, generator=torch.Generator().manual_seed(step * 8 + mesh.rank)
        )
        path.backward((path.model.weight * own).sum())
        path.finish()
        told = float(path.grad_norm())
        assert path.model.weight.grad is None, "it would not be the mean of all ranks"
        every = torch.stack(all_gather_object(own, mesh.dp, "gradients"))
        found.append((told, float(every.mean(0).norm())))
        optimizer.step(1e-3)
        path.publish()
    return found


def test_a_norm_is_found_again_once_gradients_are_less_alike(tmp_path: Path) -> None:
    found = run_ranks(norms, 4, tmp_path)[0]
    assert found[10][0] == pytest.approx(found[10][1], rel=1e-4)
    assert found[20 + 255][0] == pytest.approx(found[20 + 255][1], rel=1e-4), "it came exactly"
    for told, real in found[20 + 256 :]:
        assert told == pytest.approx(real, rel=0.1)


# -- checkpoints -------------------------------------------------------------------------------


def trained(mesh: Mesh, config: Config, steps: Sequence[int], resume: bool) -> list[float]:
    """Take so many steps, saving after each of these numbers of them."""
    trainer = Trainer(config, mesh, Path(config.run.dir))
    losses: list[float] = []
    if resume:
        assert trainer.resume() is not None
        assert ledger_of(trainer.path).switch.compressed
    for number, count in enumerate(steps):
        for step in range(count):
            if not resume and number == 0 and step == 6 and config.compression.kind == "onebit":
                at_once(trainer.path)
            losses.append(trainer.train_step().loss)
        trainer.save()
        trainer.check_replicas()
    return losses


def run_of(folder: Path, name: str, section: dict[str, Any], **sections: Any) -> Config:
    values = {"compression": section, "optimizer": {"lr": 0.004, "betas": BETAS}, **sections}
    return config_of(folder, run={"dir": str(folder / name)}, **values)


@pytest.mark.parametrize("kind", [*BOTH, "onebit, LAMB"])
def test_a_resumed_run_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    """It is saved between two exchanges of 0/1 Adam, too."""
    layout = Layout(dp=2, tp=2) if kind.startswith("onebit") else Layout(dp=2)
    size, options = layout.world_size, {"layout": layout}
    sections: dict[str, Any] = {"optimizer": LAMB} if "LAMB" in kind else {}
    section = BOTH.get(kind, ONEBIT)
    whole, config = (run_of(tmp_path, name, section, **sections) for name in ("whole", "run"))
    wanted = run_ranks(trained, size, tmp_path, args=(whole, (31, 9), False), **options)
    first = run_ranks(trained, size, tmp_path, args=(config, (31,), False), **options)
    second = run_ranks(trained, size, tmp_path, args=(config, (9,), True), **options)
    for a, b, c in zip(first, second, wanted, strict=True):
        assert a + b == c


@pytest.mark.parametrize("kind", ["onebit", "zero_one"])
def test_other_numbers_of_workers_go_on(kind: str, tmp_path: Path) -> None:
    train = {"steps": 40, "global_batch": 12}
    whole, config = (run_of(tmp_path, name, BOTH[kind], train=train) for name in ("whole", "run"))
    wanted = run_ranks(trained, 4, tmp_path, args=(whole, (13, 10, 10), False))[0]
    losses: list[float] = []
    for workers, steps in ((4, 13), (3, 10), (4, 10)):
        args = (config, (steps,), bool(losses))
        losses += run_ranks(trained, workers, tmp_path, args=args)[0]
    assert losses[:13] == wanted[:13]
    assert losses == pytest.approx(wanted, rel=0.05)


def test_other_kinds_go_on_with_its_momentum(tmp_path: Path) -> None:
    """And back: of all there is the first moment, and where the run is."""
    config = run_of(tmp_path, "run", ONEBIT)
    losses = run_ranks(trained, 2, tmp_path, args=(config, (12,), False))[0]
    default = {**ONEBIT, "kind": "default", "when": "always"}
    for section in (default, ZERO_ONE, {"kind": "none"}, ONEBIT):
        other = run_of(tmp_path, "run", section)
        losses += run_ranks(resumed, 2, tmp_path, args=(other, 5))[0]
    assert losses[-1] < 0.8 * losses[0]
    rises = [b - a for a, b in itertools.pairwise(losses)]
    assert max(rises) < 0.25, "a jump"


def resumed(mesh: Mesh, config: Config, steps: int) -> list[float]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    assert trainer.resume() is not None
    losses = [trainer.train_step().loss for _ in range(steps)]
    trainer.save()
    return losses


# -- bad input ---------------------------------------------------------------------------------


def with_infinity(mesh: Mesh, section: dict[str, Any]) -> list[bool]:
    """An infinity in the gradient of one worker; say of each step whether parameters are good."""
    path, optimizer = mean_path(mesh, section, lossless=False)
    good = []
    for step in range(12):
        if step == 2 and section["kind"] == "onebit":
            at_once(path)
        x, y = batch_of(step, mesh.dp.rank)
        x = x * (torch.inf if step == 6 and mesh.rank == 1 else 1.0)
        path.backward((path.model(x) - y).square().mean())
        path.finish()
        norm = float(path.grad_norm())
        assert (norm < torch.inf) == (step != 6)
        if norm < torch.inf:
            optimizer.step(0.01, torch.tensor(1.0))
            path.publish()
        else:
            path.abandon()
        good.append(bool(main_params(path).isfinite().all()))
    path.consolidate()
    alike = all_gather_object(main_params(path).tolist(), mesh.dp, "parameters")
    return [*good, alike[0] == alike[1]]


@pytest.mark.parametrize("kind", BOTH)
def test_an_infinity_on_one_worker_costs_one_step(kind: str, tmp_path: Path) -> None:
    for good in run_ranks(with_infinity, 2, tmp_path, args=(BOTH[kind],)):
        assert all(good)


def odd_models(mesh: Mesh, section: dict[str, Any]) -> float:
    """Frozen parameters, rows without gradients, buckets smaller than a block, rates of 0."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 16), torch.nn.Linear(16, 9))
    model[1].weight.requires_grad_(False)
    compression = CompressionSection.model_validate(section)
    path = parallelize(model, mesh, compression=compression, bucket_mb=1e-4)
    optimizer = AdamW(path, lr=0.01, weight_decay=0.0)
    before = model[0].weight[8].detach().clone()
    for step in range(10):
        if step == 2 and section["kind"] == "onebit" and mesh.dp.degree > 1:
            at_once(path)
        tokens = torch.arange(4) + step % 4  # never 8
        path.backward(model(tokens).square().mean())
        path.finish()
        path.grad_norm()
        optimizer.step(0.0 if step in (0, 5) else 0.01)
        path.publish()
    path.consolidate()
    return float((model[0].weight[8] - before).abs().max())


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", BOTH)
def test_odd_models(world: int, kind: str, tmp_path: Path) -> None:
    section = {**BOTH[kind], "least_numel": 0}
    for moved in run_ranks(odd_models, world, tmp_path, args=(section,)):
        assert moved < 0.05


def refusals(mesh: Mesh) -> list[str]:
    told = []
    for arguments in ({"zero": 1}, {"compression": {**ONEBIT, "node_degree": 2}}):
        compression = CompressionSection.model_validate(arguments.get("compression", ONEBIT))
        zero: Any = arguments.get("zero", 0)
        with pytest.raises(BigtrainError) as caught:
            parallelize(gpt(), mesh, compression=compression, zero=zero)
        told.append(str(caught.value))
    path = parallelize(gpt(), mesh, compression=CompressionSection.model_validate(ONEBIT))
    with pytest.raises(BigtrainError) as caught:
        SGD(path)
    told.append(str(caught.value))
    path = parallelize(gpt(), mesh, compression=CompressionSection.model_validate(ZERO_ONE))
    with pytest.raises(BigtrainError) as caught:
        OneBitLAMB(path)
    return [*told, str(caught.value)]


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    for with_zero, with_nodes, with_sgd, with_lamb in run_ranks(refusals, 4, tmp_path):
        assert "compression.kind=default or max" in with_zero
        assert "node_degree" in with_nodes
        assert "SGD" in with_sgd
        assert "compression onebit" in with_lamb


# -- what it costs -----------------------------------------------------------------------------


def bytes_of(mesh: Mesh, section: dict[str, Any]) -> tuple[float, float]:
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(4)))
    compression = CompressionSection.model_validate({**section, "block": 1024})
    path = parallelize(model, mesh, compression=compression, bucket_mb=1.0)
    optimizer, total = AdamW(path), 0.0
    at_once(path)
    ledger_of(path).switch.now.num_refreshes = 16 * 5  # each 32nd step
    ledger_of(path).switch.now.next_refresh = 1000
    for step in range(17):
        with recorded_collectives() as calls:
            path.backward(model(torch.randn(2, 512)).square().mean())
            path.finish()
            optimizer.step(0.001)
            path.publish()
        total += sent(calls) if step else 0.0
    n = mesh.dp.degree
    numel = sum(bucket.numel for bucket in path.buckets)
    return total / 16, 2 * (n - 1) / n * 4 * numel


def test_bytes_on_the_wire(tmp_path: Path) -> None:
    for measured, exact in run_ranks(bytes_of, 4, tmp_path, args=(ONEBIT,)):
        assert 1 / 32 < measured / exact < 0.0325
    for measured, exact in run_ranks(bytes_of, 4, tmp_path, args=(ZERO_ONE,)):
        assert measured / exact < 0.0325 / 14, "one exchange in 16 steps"


@pytest.mark.parametrize("kind", BOTH)
def test_memory_is_what_was_predicted(kind: str, tmp_path: Path) -> None:
    config = config_of(tmp_path, compression=BOTH[kind])
    for held, predicted in run_ranks(memory, 2, tmp_path, args=(config,)):
        assert held == predicted


def memory(mesh: Mesh, config: Config) -> tuple[int, int]:
    trainer = Trainer(config, mesh, Path(config.run.dir))
    ledger = ledger_of(trainer.path)
    at_once(trainer.path)
    ledger.switch.now.num_refreshes = 32  # each fourth step
    for _ in range(3):
        trainer.train_step()
    held = [*ledger.phases._sent.values(), *ledger.phases._summed.values()]
    ways = [t for way in ledger._ways.values() for t in (way.moved, way.start) if t is not None]
    gradients = 4 * sum(b.numel for b in trainer.path.buckets if b.sharing.own_grads)
    assert trainer.memory is not None
    assert trainer.memory.in_flight == (gradients if config.compression.kind == "zero_one" else 0)
    assert trainer.memory is not None
    total = sum(kept.num_bytes for kept in held) + sum(t.nbytes for t in ways)
    return total, trainer.memory.errors
