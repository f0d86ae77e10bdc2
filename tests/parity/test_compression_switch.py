"""When momentum goes compressed, and when exactly again: the switch, and runs that decide it."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from parity_models import VOCAB, gpt
from test_compressed_momentum import SECTION, at_once, wire_of

from bigtrain.comm.mesh import Mesh
from bigtrain.compose import parallelize
from bigtrain.onebit.course import coherence_of
from bigtrain.onebit.switch import Clock, Switch
from bigtrain.optim import AdamW

pytestmark = pytest.mark.parity


def by_itself(mesh: Mesh, first: int) -> tuple[list[str], list[float]]:
    """Train with a rate that rises for 30 steps; return the phase of each step, and losses."""
    section = SECTION.model_copy(update={"warmup_steps": first})
    path = parallelize(gpt(), mesh, compression=section)
    optimizer, phases, losses = AdamW(path, lr=0.003), [], []
    wire = wire_of(path)
    for step in range(130):
        tokens = (torch.arange(24).view(3, 8) * (mesh.rank + 1) + step) % VOCAB
        loss = path.model(tokens[:, :-1], tokens[:, 1:])
        phases.append(wire.switch.now.phase)
        path.backward(loss)
        path.finish()
        norm = float(path.grad_norm())
        assert norm < 100
        optimizer.step(0.003 * min(1, (step + 1) / 30), torch.tensor(max(1.0, norm)))
        path.publish()
        losses.append(float(loss.detach()))
    path.settle()
    return phases, losses


def test_a_warm_up_ends_by_itself_but_not_before_its_time(tmp_path: Path) -> None:
    (phases, losses), (other, _) = run_ranks(by_itself, 2, tmp_path, args=(1,))
    assert phases == other
    begin = phases.index("compressed")
    assert begin >= 30 + 40, "the variance was no mean of steps at the full rate"
    assert set(phases[begin - 20 : begin]) == {"shadow"}
    assert losses[-1] < 0.7 * losses[0]
    assert max(losses[begin:]) < losses[begin - 21]


def test_a_switch_waits_for_the_rate_and_for_the_variance() -> None:
    switch = Switch(first=50)
    assert not any(switch.due(20, True, step) for step in range(1, 46))
    due = [step for step in range(46, 130) if switch.due(20, False, step)]
    assert due == [85, 105, 125]
    later = Switch(first=100)
    assert [step for step in range(1, 130) if later.due(20, False, step)] == [100, 120]
    assert not switch.settled(1.0), "there is nothing to compare with"
    assert not switch.settled(2.0)
    assert switch.settled(2.1)


def test_coherence_of_other_shares_of_a_batch() -> None:
    """Of samples with a common part, shared out in 2, 4 and 8 shares."""
    draws = torch.Generator().manual_seed(0)
    samples = 0.05 * torch.randn(1, 20000, generator=draws) + torch.randn(
        64, 20000, generator=draws
    )
    found = {}
    for shares in (2, 4, 8):
        own = samples.view(shares, -1, 20000).sum(1) / 64
        found[shares] = float(own.sum(0).square().sum() / own.square().sum())
    assert coherence_of(found[2], 2, 8) == pytest.approx(found[8], rel=0.03)
    assert coherence_of(found[8], 8, 4) == pytest.approx(found[4], rel=0.03)
    assert coherence_of(0.9, 2, 8) == 0.9
    assert coherence_of(4.1, 4, 3) == 3
    assert coherence_of(1.0, 1, 4) == 1


def test_refreshes_grow_apart() -> None:
    switch = Switch(refresh_every=2)
    switch.begin("compressed")
    found = []
    for step in range(200):
        if switch.refreshes:
            found.append(step)
        if switch.due(20, False, step):
            assert not switch.drifts(1.0, 1.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] == 1
    assert gaps[:15] == [2] * 15
    assert gaps[15:31] == [4] * 16
    never = Switch(refresh_every=0)
    never.begin("compressed")
    assert not any(never.refreshes or never.due(20, False, step) for step in range(100))


def test_what_does_not_pay_is_off_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bigtrain")
    switch = Switch()
    assert not switch.pays(Clock(steps=10, exposed=0.02, coding=0.05), saved=0.9)
    assert "waits 2.0 ms" in caplog.text
    assert "does not pay" in caplog.text
    assert switch.pays(Clock(steps=10, exposed=0.2, coding=0.05), saved=0.9)
    assert Switch(always=True).pays(Clock(steps=10, exposed=0.0, coding=1.0), saved=0.9)


def falls_back(mesh: Mesh) -> list[str]:
    """Gradients become ten times as long as the variance knows; return the phases."""
    section = SECTION.model_copy(update={"refresh_every": 4})
    path = parallelize(gpt(), mesh, compression=section)
    optimizer, phases = AdamW(path, lr=1e-5, betas=(0.9, 0.8)), []
    for step in range(24):
        tokens = (torch.arange(24).view(3, 8) * (mesh.rank + 1)) % VOCAB
        if step == 8:
            at_once(path)
        phases.append(wire_of(path).switch.now.phase)
        path.backward(path.model(tokens[:, :-1], tokens[:, 1:]) * (10 if step > 13 else 1))
        path.finish()
        assert path.grad_norm().isfinite()
        optimizer.step()
        path.publish()
    path.settle()
    return phases


def test_a_variance_that_is_out_of_date_ends_it(tmp_path: Path) -> None:
    for phases in run_ranks(falls_back, 2, tmp_path):
        assert phases == ["exact"] * 8 + ["compressed"] * 8 + ["exact"] * 8
