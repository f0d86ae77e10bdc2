"""ZeRO trains as one process does, at every stage, with all that it meets.

Tolerances of fp32 as for the other techniques, and for the same reasons: gradients of the first
step 5e-6 in the relative 2-norm of a tensor (the order of fp32 sums), later gradients and the way
that parameters have gone 1e-3 (AdamW magnifies the rounding of small gradients). bf16 and fp16 are
compared with one process of that precision, which takes the microbatches of all replicas one after
the other: replicas compute the same low-precision numbers as it does, and sums are in fp32, so that
nearly all bits are the same (SAME). But stages that share an embedding add its gradients in fp32
and not in the model's dtype (TIED), and with tensor parallelism parts of products are rounded, and
AdamW makes full steps of small gradients (SPLIT). Where ranks add the same numbers in the same
order, which is so for all settings that only say what lies where and when it travels, results are
the same bits. A lost, doubled or late contribution shows as 1 and more in a later gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from parity_models import assemble, relative_error, survey
from pipeline_models import shown
from zero_models import BATCH, DTYPES, FROZEN, Case, make, one_process, plain, train

from bigtrain.config.layout import Layout

pytestmark = pytest.mark.parity


# -- the matrix -------------------------------------------------------------------------------


def world(dp: int = 1, tp: int = 1, pp: int = 1) -> Layout:
    return Layout(dp=dp, tp=tp, pp=pp)


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"stage": stage, **more}


ONE_8, TWO_8, THREE_8 = (8,), (5, 3), (3, 3, 2)  # of the 8 samples of one of 2 replicas
ONE_4, TWO_4, THREE_4 = (4,), (2, 2), (1, 2, 1)  # of one of 4

WORLDS: dict[str, tuple[Layout, int | None, list[Case]]] = {
    "dp1": (
        world(),
        None,
        [Case("gpt-tied", (16,), zero(3)), Case("llama", (10, 6), zero(2), frozen=True)],
    ),
    "dp2": (
        world(dp=2),
        None,
        [
            Case("gpt-tied", ONE_8, zero(1), frozen=True),
            Case("llama", TWO_8, zero(2), "bf16", frozen=True),
            Case("gpt", TWO_8, zero(3), "fp16"),
            Case("llama-tied", THREE_8, zero(3), "bf16", frozen=True, bucket_mb=0.003),
            Case("gpt-tied", THREE_8, zero(1), "fp16", frozen=True, bucket_mb=0.003),
            Case("gpt-tied", ONE_8, zero(3, reshard_after_forward=False), frozen=True),
            Case("gpt", TWO_8, zero(3, order="agreed"), bucket_mb=0.003),
            Case("gpt", TWO_8, zero(3, order="agreed", reshard_after_forward=False)),
            Case("gpt-tied", TWO_8, zero(3, persistent_numel=100), "bf16", bucket_mb=0.003),
            Case("gpt-tied", TWO_8, zero(3, in_flight=1, prefetch=0), bucket_mb=0.0001),
            Case("gpt-tied", TWO_8, zero(2, in_flight=1), frozen=True, bucket_mb=0.0001),
            Case("gpt-tied", TWO_8, zero(3, prefetch=2), frozen=True, bucket_mb=0.003),
            Case("gpt-tied", TWO_8, zero(3, shard_degree=1), frozen=True),
            Case("gpt-tied", TWO_8, zero(3, offload="file"), "bf16", frozen=True),
            Case("llama", TWO_8, zero(2, offload="file")),
        ],
    ),
    "dp2-late": (
        world(dp=2),
        1,
        [
            Case("gpt-tied", TWO_8, zero(3, prefetch=2), frozen=True, bucket_mb=0.01),
            Case("llama", TWO_8, zero(3, order="agreed")),
            Case("gpt-tied", TWO_8, zero(1), bucket_mb=0.01),
        ],
    ),
    "dp4": (
        world(dp=4),
        None,
        [
            Case("gpt-tied", ONE_4, zero(3), bucket_mb=0.003),
            Case("gpt", TWO_4, zero(1), frozen=True),
            Case("gpt-tied", THREE_4, zero(2), "fp16"),
            Case("gpt", TWO_4, zero(2), "bf16", frozen=True),
            Case("gpt-tied", TWO_4, zero(3, shard_degree=2), frozen=True, bucket_mb=0.003),
            Case("gpt", TWO_4, zero(2, shard_degree=2), "bf16", frozen=True),
            Case("gpt-tied", ONE_4, zero(1, shard_degree=2), bucket_mb=0.003),
            Case("llama", TWO_4, zero(3, shard_degree=2, reshard_after_forward=False), "fp16"),
        ],
    ),
    "dp4-late": (
        world(dp=4),
        2,
        [
            Case("gpt", TWO_4, zero(3, shard_degree=2), bucket_mb=0.03),
            Case("gpt-tied", ONE_4, zero(2), bucket_mb=0.03),
        ],
    ),
    # Parameters of 16 elements for 8 owners, matrices of a row or two for each, and cuts in rows.
    "dp8": (
        world(dp=8),
        None,
        [
            Case("gpt-tied", (1, 1), zero(3), frozen=True, bucket_mb=0.0001, layers=1),
            Case("llama", (2,), zero(2), bucket_mb=0.003),
            Case("gpt", (2,), zero(1, shard_degree=4), "bf16", bucket_mb=0.003),
        ],
    ),
    "dp2-tp2": (
        world(dp=2, tp=2),
        None,
        [
            Case("gpt-tied", ONE_8, zero(1), sequence=True, bucket_mb=0.003),
            Case("llama", TWO_8, zero(2), "fp16", frozen=True),
            Case("llama-tied", TWO_8, zero(3), sequence=True, frozen=True, bucket_mb=0.003),
            Case("gpt", ONE_8, zero(3), "bf16", sequence=True),
        ],
    ),
    "dp2-pp2": (
        world(dp=2, pp=2),
        None,
        [
            Case("gpt-tied", THREE_8, zero(1), schedule="zb_h1", layers=4),
            Case("gpt-tied", (2, 2, 2, 2), zero(2), schedule="interleaved/2", layers=4),
            Case("gpt-tied", THREE_8, zero(3), frozen=True, bucket_mb=0.003),
            Case("gpt-tied", THREE_8, zero(3), schedule="dualpipe_v", layers=4),
            Case("llama-tied", THREE_8, zero(3), schedule="zb_v", layers=4, frozen=True),
            Case("llama", THREE_8, zero(3), schedule="zb_h1", layers=4, bucket_mb=0.003),
            Case("gpt", (2, 2, 2, 2), zero(3, prefetch=2), schedule="interleaved/2", layers=4),
            Case("llama", TWO_8, zero(3, order="agreed"), "bf16", schedule="zb_h1"),
            Case("gpt-tied", ONE_8, zero(3, reshard_after_forward=False), "fp16"),
            Case("gpt", THREE_8, zero(2), "bf16", schedule="dualpipe_v", layers=4),
            Case("llama", ONE_8, zero(2), "fp16", frozen=True),
            Case(
                "llama-tied",
                THREE_8,
                zero(3, reshard_after_forward=False),
                schedule="zb_h1",
                layers=4,
            ),
        ],
    ),
    "dp2-pp2-late": (
        world(dp=2, pp=2),
        3,
        [
            Case("gpt-tied", THREE_8, zero(3), schedule="zb_v", layers=4, bucket_mb=0.05),
            Case("gpt-tied", TWO_8, zero(1), bucket_mb=0.05),
        ],
    ),
    "dp4-pp2": (
        world(dp=4, pp=2),
        None,
        [
            Case("gpt-tied", TWO_4, zero(3, shard_degree=2), schedule="zb_h1"),
            Case("llama-tied", THREE_4, zero(2), schedule="zb_v", layers=4),
        ],
    ),
    "dp4-tp2": (
        world(dp=4, tp=2),
        None,
        [
            Case("gpt-tied", TWO_4, zero(1), "bf16", frozen=True),
            Case("llama", ONE_4, zero(3, shard_degree=2), sequence=True),
        ],
    ),
    "dp2-tp2-pp2": (
        world(dp=2, tp=2, pp=2),
        None,
        [
            Case("gpt-tied", THREE_8, zero(1), sequence=True, schedule="zb_h1"),
            Case("llama-tied", TWO_8, zero(2), "fp16", frozen=True),
            Case("gpt-tied", TWO_8, zero(3), frozen=True, sequence=True),
            Case("llama", THREE_8, zero(3), "bf16", schedule="dualpipe_v", layers=4),
        ],
    ),
    "tp2-pp4": (
        world(tp=2, pp=4),
        None,
        [Case("gpt-tied", THREE_8 * 2, zero(3), frozen=True, layers=4)],
    ),
}


def name_of(case: Case) -> str:
    more = "_".join(f"{k}-{v}" for k, v in case.zero.items() if k != "stage")
    words = [
        f"zero{case.zero.get('stage', 0)}",
        case.model,
        case.precision,
        case.schedule.replace("/", ""),
        "-".join(map(str, case.sizes)),
        more.replace("_", "-"),
        "frozen" * case.frozen,
        "sequence" * case.sequence,
        f"{case.bucket_mb}",
    ]
    return "_".join(word for word in words if word)


def traits(layout: Layout, case: Case) -> dict[str, Any]:
    return {
        "stage": case.zero["stage"],
        "dp": layout.dp,
        "tp": layout.tp,
        "pp": layout.pp,
        "accumulates": len(case.sizes) > 1,
        "tied": case.model.endswith("tied"),
        "frozen": case.frozen,
        "precision": case.precision,
    }


def test_every_pair_is_in_the_matrix() -> None:
    values: dict[str, Sequence[Any]] = {
        **{"stage": (1, 2, 3), "dp": (2, 4), "tp": (1, 2), "pp": (1, 2)},
        **{"accumulates": (False, True), "tied": (False, True), "frozen": (False, True)},
        "precision": tuple(DTYPES),
    }
    found = [traits(layout, case) for layout, _, cases in WORLDS.values() for case in cases]
    missing = [
        (one, a, other, b)
        for one, other in itertools.combinations(values, 2)
        for a, b in itertools.product(values[one], values[other])
        if not any(each[one] == a and each[other] == b for each in found)
    ]
    assert missing == []


_outcomes: dict[str, dict[str, Any]] = {}
_alone: dict[tuple[Any, ...], dict[str, Any]] = {}


@pytest.fixture
def outcomes(where: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of all cases in one world, whose ranks are started once."""
    if where not in _outcomes:
        layout, delays, cases = WORLDS[where]
        _outcomes[where] = survey(
            {name_of(case): partial(train, case=case) for case in cases},
            layout.world_size,
            tmp_path_factory.mktemp(where),
            layout=layout,
            delay_seed=delays,
            timeout=100,
        )
    return _outcomes[where]


def alone(case: Case) -> dict[str, Any]:
    """What one process makes of it: plain torch in fp32, else bigtrain with the same microbatches.

    `case` has all microbatches of the replicas.
    """
    if case.precision == "fp32":
        case = Case(case.model, (), frozen=case.frozen, layers=case.layers)
    else:
        case = replace(case, zero={}, schedule="1f1b", sequence=False, bucket_mb=0.02)
    key = case.model, case.sizes, case.precision, case.frozen, case.layers
    if key not in _alone:
        if case.precision == "fp32":
            _alone[key] = plain(case)
        else:
            found = one_process(case)
            for what in ("start", "params"):
                found[what] = assemble([found[what]])
            found["grads"] = [assemble([each]) for each in found["grads"]]
            _alone[key] = found
    return _alone[key]


# Of losses and logits (absolute), norms, gradients of the first step and later, parameters' ways.
Limits = tuple[float, float, float, float, float, float]
EXACT: Limits = (3e-5, 2e-4, 1e-3, 5e-6, 1e-3, 1e-3)
SAME: Limits = (2e-6, 1e-6, 1e-6, 1e-6, 1e-6, 1e-6)  # the same low-precision numbers everywhere
TIED: Limits = (2e-5, 2e-3, 2e-4, 2e-3, 1e-2, 1e-2)  # of fp16; seen: a tenth
SPLIT: dict[str, Limits] = {  # by tensor parallelism; seen: a third at most
    "bf16": (2e-3, 8e-2, 1e-2, 5e-2, 3e-1, 3e-1),
    "fp16": (2e-4, 2e-2, 2e-3, 6e-3, 1e-1, 1e-1),
}


def limits_of(layout: Layout, case: Case) -> Limits:
    if case.precision == "fp32":
        return EXACT
    if layout.tp > 1:
        return SPLIT[case.precision]
    return TIED if layout.pp > 1 and case.model.endswith("tied") else SAME


@pytest.mark.parametrize(
    ("where", "case"),
    [
        pytest.param(where, case, id=f"{where}-{name_of(case)}")
        for where, (_, _, cases) in WORLDS.items()
        for case in cases
    ],
)
def test_equals_one_process(where: str, case: Case, outcomes: dict[str, Any]) -> None:
    layout = WORLDS[where][0]
    ranks = shown(outcomes[name_of(case)])
    assert sum(case.sizes) * layout.dp == BATCH
    wanted = alone(replace(case, sizes=case.sizes * layout.dp))
    limits = limits_of(layout, case)
    assert_same_training(ranks, wanted, limits)
    assert_model_is(ranks, DTYPES[case.precision], make(case) if case.frozen else None)
    for rank in ranks:
        assert rank["divergence"] == []
        assert rank["leftover"] == 0
        for got, exact in zip(rank["logits"], wanted["logits"], strict=True):
            torch.testing.assert_close(got, exact, rtol=0, atol=limits[1])


def assert_same_training(
    ranks: list[dict[str, Any]], wanted: dict[str, Any], limits: Limits
) -> None:
    of_losses, _, of_norms, of_first, of_later, of_params = limits
    start = assemble(rank["start"] for rank in ranks)
    assert start.keys() == wanted["start"].keys()
    for name, tensor in wanted["start"].items():
        assert torch.equal(start[name], tensor), f"{name} does not start as in one process"
    means = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(means, torch.tensor(wanted["losses"]), rtol=0, atol=of_losses)
    for rank in ranks:
        assert rank["norms"] == ranks[0]["norms"]
        assert rank["norms"] == pytest.approx(wanted["norms"], rel=of_norms)
    for step, exact in enumerate(wanted["grads"]):
        got = assemble(rank["grads"][step] for rank in ranks)
        assert got.keys() == exact.keys()
        for name, grad in exact.items():
            error = relative_error(got[name], grad, floor=1e-4)
            assert error < (of_later if step else of_first), f"gradient {step} of {name}: {error}"
    params = assemble(rank["params"] for rank in ranks)
    for name, param in wanted["params"].items():
        begin = wanted["start"][name]
        error = relative_error(params[name] - begin, param - begin, floor=1e-6)
        assert error < of_params, f"parameter {name}: {error}"


def assert_model_is(ranks: list[dict[str, Any]], dtype: torch.dtype, frozen: Any) -> None:
    """See that ranks compute with what the owners have, rounded; and with what was frozen."""
    main = assemble(rank["params"] for rank in ranks)
    if frozen is not None:
        known = dict(frozen.named_parameters())
        assert not main.keys() & set(FROZEN)
        main |= {name: known[name].detach() for name in FROZEN if name in known}
    assert {name for rank in ranks for name in rank["model"]} == main.keys()
    for rank in ranks:
        for name, tensor in rank["model"].items():
            exact = rank["shards"][name].take(main[name]).to(dtype)
            assert torch.equal(tensor, exact), name


# -- the same bits ----------------------------------------------------------------------------

BITS: dict[str, tuple[Layout, dict[str, list[Case]]]] = {
    "dp4": (
        world(dp=4),
        {
            # What lies where does not change a sum.
            "stages": [Case("gpt-tied", ONE_4, zero(stage), frozen=True) for stage in (1, 2, 3)],
            "accumulated": [
                Case("gpt-tied", TWO_4, each, bucket_mb=size)
                for size, each in (
                    (0.02, zero(2)),
                    (0.02, zero(3)),
                    (0.02, zero(3)),
                    (0.001, zero(3)),
                    (0.02, zero(3, reshard_after_forward=False)),
                    (0.02, zero(3, order="agreed")),
                    (0.02, zero(3, prefetch=0, in_flight=1)),
                    (0.003, zero(3, prefetch=3, in_flight=4)),
                    (0.02, zero(3, persistent_numel=500)),
                    (0.02, zero(3, offload="file")),
                    (0.02, zero(2, in_flight=1)),
                )
            ],
            "bf16": [
                Case("llama", TWO_4, each, "bf16")
                for each in (zero(2), zero(3), zero(3, persistent_numel=500), zero(2, in_flight=1))
            ],
            "hybrid": [
                Case("llama", TWO_4, each, bucket_mb=0.003)
                for each in (zero(2, shard_degree=2), zero(3, shard_degree=2))
            ],
        },
    ),
    # The sum of two numbers has one order, that of stage 0 too.
    "dp2": (
        world(dp=2),
        {"copied": [Case("gpt-tied", ONE_8, zero(stage)) for stage in (0, 1, 2, 3)]},
    ),
    "dp2-tp2-pp2": (
        world(dp=2, tp=2, pp=2),
        {"stages": [Case("llama", (*TWO_8[:1], 3), zero(stage)) for stage in (2, 3)]},
    ),
}


def bits_of(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    found = {f"param {n}": t for n, t in assemble(rank["params"] for rank in ranks).items()}
    for step in range(len(ranks[0]["grads"])):
        full = assemble(rank["grads"][step] for rank in ranks)
        found |= {f"gradient {step} of {n}": t for n, t in full.items()}
    losses = torch.tensor([rank["losses"] for rank in ranks])
    return {**found, "losses": losses, "logits": ranks[0]["logits"][1]}


@pytest.mark.parametrize("where", BITS)
def test_same_bits(where: str, tmp_path: Any) -> None:
    layout, groups = BITS[where]
    cases = {
        f"{group} {number}": partial(train, case=case)
        for group, each in groups.items()
        for number, case in enumerate(each)
    }
    results = survey(cases, layout.world_size, tmp_path, layout=layout, timeout=100)
    for group, each in groups.items():
        first = bits_of(shown(results[f"{group} 0"]))
        for number, case in enumerate(each):
            found = bits_of(shown(results[f"{group} {number}"]))
            assert found.keys() == first.keys()
            other = [name for name, tensor in first.items() if not torch.equal(found[name], tensor)]
            assert other == [], (group, name_of(case))
