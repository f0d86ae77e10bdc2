"""What can be wrong with the SENDs and RECVs of a table, found by reading it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from bigtrain.pipeline.columns import Place
from bigtrain.pipeline.table import Action, Table, matching_receive, matching_send, need_of, peer_of

Wrong = tuple[str, str, tuple[Place, ...]]
"""What is wrong, how to mend it, and where."""


def find_wire_fault(table: Table, places: Mapping[Action, Place]) -> Wrong | None:
    """Return the first fault of the wires of a table whose compute actions are complete."""
    return _lacking(table, places) or _useless(table, places) or _crossed(table, places)


def _lacking(table: Table, places: Mapping[Action, Place]) -> Wrong | None:
    """Look for messages that are needed but not sent, not received, or sent or received late."""
    for user, place in places.items():
        need = need_of(user, table.num_stages) if user.is_compute else None
        if need is None or table.placement[need[1]] == place[0]:
            continue
        receive = Action(f"RECV_{need[0]}", user.stage, user.microbatch)
        send = matching_send(receive)
        kinds = "F" if need[0] == "F" else "BI"
        makers = [Action(kind, send.stage, send.microbatch) for kind in kinds]
        maker = next(action for action in makers if action in places)
        if receive not in places:
            return f"{user} lacks its {receive}", f"add {receive} before {user}", (place,)
        if send not in places:
            mend = f"add {send} after {maker} on rank {places[maker][0]}"
            return f"{receive} has no {send}", mend, (places[receive], places[maker])
        if places[receive] > place:
            what = f"{receive} comes after {user}, which needs what it receives"
            return what, f"put {receive} before {user}", (place, places[receive])
        if places[send] < places[maker]:
            what = f"{send} comes before {maker}, which makes what it sends"
            return what, f"put {send} after {maker}", (places[send], places[maker])
    return None


def _useless(table: Table, places: Mapping[Action, Place]) -> Wrong | None:
    """Look for wires that nobody needs."""
    for action, place in places.items():
        if action.is_compute:
            continue
        peer = peer_of(action, table.placement)
        if peer in (-1, place[0]):
            why = "there is no such stage" if peer == -1 else "both stages are on one rank"
            return f"{action} leads nowhere: {why}", f"take {action} away", (place,)
        sends = action.kind in ("SEND_F", "SEND_B")
        partner = matching_receive(action) if sends else matching_send(action)
        if partner not in places:  # only where nobody uses the message: the table has no backward
            return f"{action} has no {partner}", f"take {action} away", (place,)
        if action.kind.endswith("B") and not _goes_back(action, places):
            return f"{action} is for a backward, and there is none", f"take {action} away", (place,)
    return None


def _goes_back(action: Action, places: Mapping[Action, Place]) -> bool:
    return any(Action(kind, action.stage, action.microbatch) in places for kind in "BI")


def _crossed(table: Table, places: Mapping[Action, Place]) -> Wrong | None:
    """Look for two ranks between which messages are not received in the order they are sent in."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, row in enumerate(table.rows):
        for action in row:
            if action.kind in ("SEND_F", "SEND_B"):
                pair = (rank, peer_of(action, table.placement))
                sent[pair].append(matching_receive(action))
            elif not action.is_compute:
                received[peer_of(action, table.placement), rank].append(action)
    for pair, expected in sent.items():
        for wanted, found in zip(expected, received[pair], strict=True):
            if wanted != found:
                what = (
                    f"rank {pair[1]} posts {found} where rank {pair[0]} sends what {wanted} awaits"
                )
                mend = f"put {wanted} before {found}, in the order of the sends"
                return what, mend, (places[found], places[wanted])
    return None
