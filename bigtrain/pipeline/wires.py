"""The messages of a schedule: where a table sends, and where it posts what it will receive."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from bigtrain.pipeline.play import Play
from bigtrain.pipeline.table import Action, Table, matching_receive, need_of, peer_of

Pair = tuple[int, int]  # the rank that sends, the rank that receives


def with_communication(table: Table) -> Table:
    """Return `table` with its SENDs and RECVs; one that has them already is returned as it is.

    A message leaves right after the action that makes it. It is awaited from one compute action
    before its use on, so that it travels while that action computes. Between each two ranks RECVs
    stand in the order of the SENDs, some therefore earlier; and also earlier where ranks would
    otherwise wait in a circle if a send lasted until its receive is posted.
    """
    if table.has_wires:
        return table
    posts, sends = _posts(table)
    rows = []
    for rank, row in enumerate(table.rows):
        new: list[Action] = []
        for index, action in enumerate(row):
            new += posts[rank].get(index, [])
            new.append(action)
            new += sends[rank].get(index, [])
        rows.append(new)
    _post_ahead(rows, table.placement)
    return replace(table, rows=tuple(map(tuple, rows)))


def _posts(table: Table) -> tuple[list[dict[int, list[Action]]], list[dict[int, list[Action]]]]:
    """Return, per rank, the RECVs before and the SENDs after each of its compute actions."""
    uses = _uses(table)
    sends: list[dict[int, list[Action]]] = [defaultdict(list) for _ in table.rows]
    receives: dict[Pair, list[tuple[int, Action]]] = defaultdict(list)
    for rank, row in enumerate(table.rows):
        for index, action in enumerate(row):
            send = _send_of(action, table.placement)
            if send is None:
                continue
            receive = matching_receive(send)
            if receive not in uses:  # a faulty table: nobody wants it
                continue
            sends[rank][index].append(send)
            target = peer_of(send, table.placement)
            receives[rank, target].append((max(0, uses[receive] - 1), receive))
    posts: list[dict[int, list[Action]]] = [defaultdict(list) for _ in table.rows]
    for (_, target), messages in sorted(receives.items()):
        latest = len(table.rows[target])
        ordered = []
        for index, receive in reversed(messages):  # a message is posted before all later ones
            latest = min(latest, index)
            ordered.append((latest, receive))
        for index, receive in reversed(ordered):
            posts[target][index].append(receive)
    return posts, sends


def _uses(table: Table) -> dict[Action, int]:
    """Return each RECV that the table needs, and which action of its row waits for it."""
    uses: dict[Action, int] = {}
    for rank, row in enumerate(table.rows):
        for index, action in enumerate(row):
            need = need_of(action, table.num_stages)
            if need is not None and table.placement[need[1]] != rank:
                uses.setdefault(Action(f"RECV_{need[0]}", action.stage, action.microbatch), index)
    return uses


def _send_of(action: Action, placement: tuple[int, ...]) -> Action | None:
    """Return the SEND of what a compute action makes, if another rank needs it."""
    kind = {"F": "SEND_F", "B": "SEND_B", "I": "SEND_B"}.get(action.kind)
    if kind is None:
        return None
    send = Action(kind, action.stage, action.microbatch)
    return send if peer_of(send, placement) not in (-1, placement[action.stage]) else None


def _post_ahead(rows: list[list[Action]], placement: tuple[int, ...]) -> None:
    """Move RECVs of `rows` forward until sends may block until their receive is posted.

    The rows are run. Whenever all ranks wait, some of them do for a RECV (or the table is faulty,
    and is left so): the first of these is moved to where its rank has come.
    """
    play = Play(rows, placement, blocking=True)
    awaited = play.run()
    while True:
        late = [action for action in awaited if action.kind in ("RECV_F", "RECV_B")]
        if not late:
            return
        receive = min(late, key=lambda action: (action.microbatch, action.stage, action.kind))
        rank = placement[receive.stage]
        place = play.places[rank]
        del rows[rank][rows[rank].index(receive, place)]
        rows[rank].insert(place, receive)
        awaited = play.run([rank])
