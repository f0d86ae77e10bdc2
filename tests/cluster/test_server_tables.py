"""Runs whose tables are on servers, launched: equal to a table of one's own, through deaths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import yaml
from runs import BASE, Bench, Run
from safetensors.torch import load_file

pytestmark = pytest.mark.cluster

SYNC = ("server.servers=2", "server.replicas=2", "server.mode=sync")
ADAGRAD = ("optimizer.kind=adagrad", "optimizer.lr=0.1", "schedule.kind=constant")
EACH = ("server.rows.optimizer=adagrad", "server.rows.lr=0.1")
SLOW = "model.args={slow: 0.05}"


@pytest.fixture
def bags(bench: Bench) -> Bench:
    """A bench whose config has a model with a table."""
    config = {
        **BASE,
        "model": {"factory": "bags:bags", "loss": "bags:loss"},
        "data": {"factory": "bags:numbers"},
        "parallel": {"dp": 1},
    }
    (bench.path / "config.yaml").write_text(yaml.safe_dump(config))
    return bench


def numbers(run: Run) -> list[tuple[float, float]]:
    """Return (loss, norm) of each step."""
    return [(r["loss"], r["grad_norm"]) for r in run.metrics() if "loss" in r]


def rows(run: Run) -> dict[int, list[float]]:
    """Return all rows that the last checkpoint has, with moments."""
    folder = run.folder / "checkpoints" / run.checkpoints()[-1]
    found: dict[int, list[float]] = {}
    for path in sorted(folder.glob("rows-*.safetensors")):
        content = load_file(path)
        number = content.pop("rows").tolist()
        state = torch.cat([content[k].view(len(number), -1) for k in sorted(content)], 1)
        found |= dict(zip(number, state.tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    "options",
    [("server.workers=2",), ("server.workers=2", "train.microbatch=2", "parallel.dp=2")],
    ids=["ranks", "workers of two ranks"],
)
def test_a_table_on_servers_is_a_table(bags: Bench, options: Sequence[str]) -> None:
    ours = bags.launch(*SYNC, *options, *ADAGRAD, *EACH, "run.dir=ours")
    dp = 4 if "parallel.dp=2" in options else 2
    own = (f"parallel.dp={dp}", "model.args={served: false}", *options[1:2])
    peer = bags.launch(*own, *ADAGRAD, "run.dir=peer")
    for one, other in zip(numbers(ours), numbers(peer), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert ours.validation_losses() == pytest.approx(peer.validation_losses(), rel=1e-5)
    assert 10 < len(rows(ours)) < 1000
    ours.assert_clean()


@pytest.mark.parametrize("served", [True, False])
def test_rows_of_a_model_without_tables(bags: Bench, served: bool) -> None:
    """Told once, by one of all ranks."""
    model = f"model.args={{served: {str(served).lower()}}}"
    run = bags.launch(*SYNC, "parallel.dp=2", *ADAGRAD, *EACH, model, "train.steps=2")
    assert (run.out + run.err).count("server.rows has no effect") == (not served)
    run.assert_clean()


@pytest.mark.parametrize("server", [0, 1])
def test_a_server_is_killed_and_comes_back(bags: Bench, server: int) -> None:
    """It is given the rows that it had."""
    options = (*SYNC, *ADAGRAD, SLOW, "train.steps=60")
    calm = bags.launch(*options, "run.dir=calm")
    chaos = ("--chaos", f"kill:server={server},step=8")
    run = bags.launch(*options, *chaos, "run.dir=killed")
    assert numbers(run) == numbers(calm)
    assert rows(run) == rows(calm)
    assert "started again" in run.err
    run.assert_clean()


def test_a_run_goes_on_with_other_servers(bags: Bench) -> None:
    whole = bags.launch(*SYNC, *ADAGRAD, "train.steps=9", "run.dir=whole")
    bags.launch(*SYNC, *ADAGRAD, "train.steps=3")
    one = ("server.servers=1", "server.mode=sync")
    bags.launch(*one, *ADAGRAD, "train.steps=6", resume=True)
    run = bags.launch(*SYNC, *ADAGRAD, "train.steps=9", "server.servers=3", resume=True)
    for mine, other in zip(numbers(run), numbers(whole), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    assert rows(run).keys() == rows(whole).keys()


@pytest.mark.parametrize("mode", ["ssp", "async"])
def test_other_modes(bags: Bench, mode: str) -> None:
    rates = ("optimizer.lr=0.03", "server.rows.lr=0.2", "schedule.kind=constant")
    more = ("train.steps=160", "optimizer.kind=sgd", "train.global_batch=32")
    run = bags.launch("server.servers=1", f"server.mode={mode}", *more, *rates)
    losses = [loss for loss, _ in numbers(run)]
    assert len(losses) == 160
    assert sum(losses[-40:]) < 0.7 * sum(losses[:40])
    run.assert_clean()


def test_a_table_without_servers(bags: Bench) -> None:
    bags.launch("parallel.dp=2", code=1).assert_told("server.servers = 0", "server.servers=1")


def test_a_table_in_local_mode(bags: Bench) -> None:
    options = ("server.servers=1", "server.local_steps=2")
    bags.launch(*options, code=1).assert_told("server.mode = local", "server.mode=sync")


def test_an_id_that_is_no_row(bags: Bench) -> None:
    run = bags.launch(*SYNC, "data.args={most: 1500}", code=1)
    run.assert_told("table", "rows 0 to 999", "modulo")


def test_a_worker_that_is_split(bags: Bench) -> None:
    run = bags.launch(*SYNC, "parallel.pp=2", "pipeline.split=[table]", code=1)
    run.assert_told("is split over ranks", "parallel.tp, pp")


def test_a_folder_that_is_none(bags: Bench) -> None:
    run = bags.launch(*SYNC, "server.rows.folder=nowhere", code=1)
    run.assert_told("server.rows.folder = nowhere")


def test_tables_in_files(bags: Bench) -> None:
    (bags.path / "tables").mkdir()
    files = bags.launch(*SYNC, *ADAGRAD, "server.rows.folder=tables", "run.dir=files")
    memory = bags.launch(*SYNC, *ADAGRAD, "run.dir=memory")
    assert numbers(files) == numbers(memory)
    assert not list((bags.path / "tables").iterdir())


def test_a_checkpoint_of_another_table(bags: Bench) -> None:
    bags.launch(*SYNC, *ADAGRAD, "train.steps=4")
    more = (*ADAGRAD, "train.steps=8")
    for wrong, words in (
        ((*SYNC, "server.rows.optimizer=adam"), ("server.rows.optimizer", "exp_avg")),
        ((*SYNC, "model.args={rows: 500}"), ("has become smaller",)),
        ((*SYNC, "model.args={size: 4}"), ("another size",)),
        (("parallel.dp=2", "model.args={served: false}"), ("no such tables",)),
    ):
        bags.launch(*wrong, *more, resume=True, code=1).assert_told(*words)
