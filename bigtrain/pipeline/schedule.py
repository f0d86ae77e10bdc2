"""Pipeline schedules by name: tables of actions, made by pure functions. No torch, no processes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.generators import (
    dualpipe_v,
    gpipe,
    interleaved,
    looped,
    one_f_one_b,
    vee,
    zb_h1,
    zb_v,
)
from bigtrain.pipeline.table import Action, Table
from bigtrain.pipeline.wires import with_communication

__all__ = [
    "MAX_ACTIONS",
    "SCHEDULES",
    "Action",
    "Table",
    "forward_only",
    "make_table",
    "placement_of",
    "with_communication",
]

MAX_ACTIONS = 2_000_000
"""A table that is larger is a typing error, and would take minutes to make."""

SCHEDULES: Mapping[str, Callable[[int, int, int], Table]] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb_h1": zb_h1,
        "zb_v": zb_v,
        "dualpipe_v": dualpipe_v,
    }
)

_VEE = ("zb_v", "dualpipe_v")


def make_table(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> Table:
    """Return the table of the schedule `name`, compute actions only.

    `virtual_stages` is how many stages each rank has: at least 2 for interleaved; always 2 for
    zb_v and dualpipe_v, where 1 means not given; else 1.

    Raises:
        BigtrainError: there is no such schedule, or it cannot run with these numbers.
    """
    stages = len(placement_of(name, num_ranks, virtual_stages))
    _check_count("microbatches", num_microbatches)
    if stages * num_microbatches * 3 > MAX_ACTIONS:
        raise BigtrainError(
            f"{stages} stages and {num_microbatches} microbatches make a table of more than "
            f"{MAX_ACTIONS:,} actions",
            why="a step of that many actions is most likely a typing error",
            mend="give fewer ranks, virtual stages or microbatches",
        )
    return SCHEDULES[name](num_ranks, num_microbatches, stages // num_ranks)


def placement_of(name: str, num_ranks: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """Return the rank of each stage under the schedule `name`.

    Raises:
        BigtrainError: there is no such schedule, or it has no such placement.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name).lower(), SCHEDULES, n=1, cutoff=0.4)
        raise BigtrainError(
            f"{name!r} is not a schedule",
            mend=(f"did you mean {near[0]}? " if near else "") + f"legal: {', '.join(SCHEDULES)}",
        )
    _check_count("ranks", num_ranks)
    _check_count("virtual stages", virtual_stages)
    if num_ranks * virtual_stages > MAX_ACTIONS:
        raise BigtrainError(
            f"{num_ranks} ranks of {virtual_stages} virtual stages are too many",
            mend=f"give at most {MAX_ACTIONS:,} stages in all",
        )
    _check_virtual_stages(name, virtual_stages)
    return vee(num_ranks) if name in _VEE else looped(num_ranks, virtual_stages)


def _check_count(what: str, number: int) -> None:
    if type(number) is not int or number < 1:
        raise BigtrainError(
            f"a schedule for {number!r} {what}", mend=f"give a whole number of {what}, at least 1"
        )


def _check_virtual_stages(name: str, given: int) -> None:
    if name == "interleaved":
        good, legal = given >= 2, "at least 2"
        why = "interleaving is between the stages of a rank; with one each it is 1f1b"
    elif name in _VEE:
        good, legal, why = given in (1, 2), "2", "the V placement has two stages on every rank"
    else:
        good, legal, why = given == 1, "1", "it has one stage on every rank"
    if not good:
        more = "" if name == "interleaved" else ", or take interleaved, which has 2 or more"
        raise BigtrainError(
            f"{name} cannot have {given} virtual stages",
            why=why,
            mend=f"set virtual stages to {legal}{more}",
        )


def forward_only(placement: Sequence[int], num_microbatches: int) -> Table:
    """Return a table of forwards alone, for evaluation: any placement, any number of microbatches.

    Made by a clock on which every forward takes as long: a free rank does the deepest stage that
    can go, so that microbatches leave the pipeline, and its memory, soonest.

    Raises:
        BigtrainError: there are no microbatches, or a rank of the placement has no stage.
    """
    _check_count("microbatches", num_microbatches)
    ranks = set(placement)
    if not ranks or ranks != set(range(len(ranks))):
        raise BigtrainError(
            f"the placement {tuple(placement)} leaves ranks without a stage",
            mend="give the rank of every stage, with ranks counted from 0 and none left out",
        )
    rows: list[list[Action]] = [[] for _ in ranks]
    deepest_first = sorted(range(len(placement)), reverse=True)
    passed = [0] * len(placement)  # how many microbatches each stage has done
    while passed[-1] < num_microbatches:
        before = [num_microbatches, *passed]  # what has come to each stage when this tick begins
        busy: set[int] = set()
        for stage in deepest_first:
            rank = placement[stage]
            if rank not in busy and passed[stage] < before[stage]:
                busy.add(rank)
                rows[rank].append(Action("F", stage, passed[stage]))
                passed[stage] += 1
    return Table("forward", tuple(placement), num_microbatches, tuple(map(tuple, rows)))
