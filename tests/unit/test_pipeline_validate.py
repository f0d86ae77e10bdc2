"""validate() proves what runs and refuses, with the place marked, what does not."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from unit_helpers import assert_explained
from unit_pipeline import changed, combinations, mutant, runs

from bigtrain.errors import BigtrainError
from bigtrain.pipeline.schedule import Action, Table, make_table, with_communication
from bigtrain.pipeline.validate import validate


def rows_of(*lines: str) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(Action.parse(cell) for cell in line.split()) for line in lines)


def refused(table: Table) -> BigtrainError:
    with pytest.raises(BigtrainError) as caught:
        validate(table)
    return caught.value


def is_valid(table: Table) -> bool:
    try:
        validate(table)
    except BigtrainError as error:
        assert_explained(error, "cannot run", "rank 0 |", ">", "<")
        return False
    return True


def test_mutants_without_wires_are_refused_unless_they_run() -> None:
    random = Random(1)
    tables = list(combinations(max_ranks=4, sizes=range(1, 7)))
    refused_ones = 0
    for _ in range(1500):
        table = mutant(random.choice(tables), random)
        valid = is_valid(table)
        refused_ones += not valid
        wired = validate(table).table if valid else None
        if wired is not None:
            assert runs(wired, blocking=False)
            assert runs(wired, blocking=True)
        else:  # wires that leave the order of work alone cannot make it run either
            assert not _runs_somehow(table)
    assert 600 < refused_ones < 1490


def _runs_somehow(table: Table) -> bool:
    """Whether the compute actions can be done in this order if all messages travel at once."""
    done: set[tuple[str, int, int]] = set()
    seen: list[Action] = []
    places = [0] * table.num_ranks
    last = table.num_stages - 1
    going = True
    while going:
        going = False
        for rank, row in enumerate(table.rows):
            while places[rank] < len(row):
                action = row[places[rank]]
                stage, batch = action.stage, action.microbatch
                if not 0 <= stage <= last or table.placement[stage] != rank:
                    return False
                needs = {
                    "F": [("F", stage - 1, batch)] * (stage > 0),
                    "W": [("I", stage, batch)],
                }.get(
                    action.kind,
                    [("F", stage, batch)] + [("grad", stage + 1, batch)] * (stage < last),
                )
                if not done.issuperset(needs):
                    break
                done.add((action.kind, stage, batch))
                done |= {("grad", stage, batch)} if action.kind in "BI" else set()
                seen.append(action)
                places[rank] += 1
                going = True
    kinds: dict[tuple[int, int], list[str]] = {}
    for action in seen:
        kinds.setdefault((action.stage, action.microbatch), []).append(action.kind)
    cells = [(s, m) for s in range(table.num_stages) for m in range(table.num_microbatches)]
    return (
        all(place == len(row) for place, row in zip(places, table.rows, strict=True))
        and sorted(kinds) == cells
        and all(sorted(k) in (["B", "F"], ["F", "I", "W"]) for k in kinds.values())
    )


def test_mutants_with_wires_are_refused_exactly_if_they_do_not_run() -> None:
    random = Random(2)
    tables = [with_communication(t) for t in combinations(max_ranks=4, sizes=range(1, 6))]
    tables = [table for table in tables if table.num_ranks > 1]
    verdicts = []
    for _ in range(1500):
        table = mutant(random.choice(tables), random)
        verdicts.append(is_valid(table))
        assert verdicts[-1] == (runs(table, blocking=False) and runs(table, blocking=True)), (
            "\n".join(" ".join(map(str, row)) for row in table.rows)
        )
    assert 50 < sum(verdicts) < 1400


def test_a_circle_names_who_waits_for_what() -> None:
    rows = rows_of("0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    error = refused(Table("mine", (0, 1), 2, rows))
    assert str(error) == (
        "schedule mine cannot run: ranks wait for each other in a circle\n"
        "rank 0 | 0F0  >0B0<  0F1  0B1\n"
        "rank 1 | 1F0  >1F1<  1B0  1B1\n"
        "  why:  rank 0 waits at 0B0 for 1B0 of rank 1, which stands at 1F1\n"
        "        rank 1 waits at 1F1 for 0F1 of rank 0, which stands at 0B0\n"
        "  mend: move 1B0 of rank 1 before 1F1, or break the circle at another place"
    )


def test_sends_that_block_may_not_cross() -> None:
    """Both send before either posts: fine where sends leave at once, a circle where they last."""
    rows = rows_of(
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1",
    )
    table = Table("mine", (0, 1), 2, rows)
    assert runs(table, blocking=False)
    assert not runs(table, blocking=True)
    assert_explained(
        refused(table), "rank 0 waits at 0SEND_F1 for 1RECV_F1 of rank 1, which stands at 1SEND_B0"
    )


def test_a_rank_that_waits_for_itself() -> None:
    error = refused(Table("mine", (0, 0), 1, rows_of("1F0 0F0 1B0 0B0")))
    assert_explained(error, "rank 0 waits at 1F0 for 0F0 of rank 0, later in its own row")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (("0F0 0B0 0B0", "1F0 1B0"), ["0B0 is there twice", ">0B0<  >0B0<"]),
        (("0F0", "1F0 1B0"), ["0B0 (or 0I0 and 0W0) is missing", ">0F0<"]),
        (("0B0", "1F0 1B0"), ["0F0 is missing"]),
        (("0F0 0I0", "1F0 1B0"), ["0W0 is missing", ">0I0<"]),
        (("0F0 0W0", "1F0 1B0"), ["0I0 is missing", ">0W0<"]),
        (("0F0 0B0 0I0 0W0", "1F0 1B0"), ["goes back twice", "keep 0B0, or 0I0 and 0W0"]),
        (("0F0 0W0 0I0", "1F0 1B0"), ["0W0 comes before 0I0"]),
        (("0B0 0F0", "1F0 1B0"), ["0B0 comes before 0F0"]),
        (("0F0 0B0 1B0", "1F0"), ["1B0 is on rank 0, but stage 1 is on rank 1", ">1B0<"]),
        (("0F0 0B0 0F1", "1F0 1B0"), ["microbatch that does not exist", ">0F1<"]),
        (("0F0 0B0 2F0", "1F0 1B0"), ["stage that does not exist", ">2F0<"]),
        (("0F0 0SEND_F0 0RECV_B0 0B0", "1F0 1B0 1SEND_B0"), ["1F0 lacks its 1RECV_F0"]),
        (("0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"), ["1RECV_F0 has no 0SEND_F0"]),
        (
            ("0SEND_F0 0F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            ["0SEND_F0 comes before 0F0, which makes what it sends"],
        ),
        (
            ("0F0 0SEND_F0 0B0 0RECV_B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            ["0RECV_B0 comes after 0B0", "put 0RECV_B0 before 0B0"],
        ),
        (
            ("0F0 0SEND_F0 0SEND_B0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"),
            ["0SEND_B0 leads nowhere: there is no such stage"],
        ),
        (("0F0 0SEND_F0", "1RECV_F0 1F0 1SEND_B0"), ["1SEND_B0 has no 0RECV_B0"]),
        (
            ("0F0 0SEND_F0 0RECV_B0", "1RECV_F0 1F0 1SEND_B0"),
            ["is for a backward, and there is none"],
        ),
    ],
)
def test_faults_are_named(lines: tuple[str, ...], words: list[str]) -> None:
    error = refused(Table("mine", (0, 1), 1, rows_of(*lines)))
    assert_explained(error, "schedule mine cannot run", *words)


def test_messages_may_not_overtake() -> None:
    table = with_communication(make_table("gpipe", 2, 3))
    row = list(table.rows[1])
    row.remove(Action("RECV_F", 1, 1))
    row.insert(0, Action("RECV_F", 1, 1))
    error = refused(changed(table, 1, row))
    assert_explained(error, "rank 1 posts", "in the order of the sends")


def test_shapes_that_are_no_table() -> None:
    good = make_table("1f1b", 2, 2)
    for bad in (
        replace(good, rows=good.rows[:1]),
        replace(good, placement=()),
        replace(good, placement=(0, 0)),
        replace(good, num_microbatches=0),
        changed(good, 0, [*good.rows[0], Action("X", 0, 0)]),
        changed(good, 0, [*good.rows[0], Action("F", -1, 0)]),
    ):
        assert_explained(refused(bad))


def test_of_a_large_table_the_place_is_shown() -> None:
    table = make_table("1f1b", 40, 100)
    row = list(table.rows[30])
    row[60], row[61] = row[61], row[60]
    row.pop(90)
    text = str(refused(changed(table, 30, row)))
    assert max(map(len, text.splitlines())) < 200
    assert len(text.splitlines()) < 25
    assert "rank 30 | ..." in text
    assert "(24 of 40 ranks are not shown)" in text
