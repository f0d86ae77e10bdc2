"""Ranks on nodes of a fleet that a test plays: they meet, and what is lost with a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigtrain.launch.job import Job
from bigtrain.launch.remote import RemoteTeam


class Played:
    """A fleet that writes down what agents are told."""

    def __init__(self) -> None:
        self.ports: dict[str, int] = {}
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.gone: dict[str, str] = {}

    def enroll(self, member: object) -> int:
        return 7

    def tell(self, node: str, **message: Any) -> None:
        self.told.append((node, message))

    def address(self, node: str) -> str:
        return f"address of {node}"

    def how_lost(self, node: str) -> str:
        return self.gone.get(node, "")

    def sorts(self) -> list[tuple[str, str]]:
        """Return (node, what it was told to do) of each message."""
        kinds = ("listen", "start", "ask", "end", "close")
        return [(node, kind) for node, said in self.told for kind in kinds if kind in said]


@pytest.fixture
def fleet() -> Played:
    return Played()


def team(fleet: Any, *nodes: str) -> RemoteTeam:
    job = Job(Path("c.yaml"), Path("logs"), len(nodes), 2, 1, resume=False, env={"TOKEN": "x"})
    return RemoteTeam(job, fleet, nodes)


def lost(team: RemoteTeam) -> list[str]:
    return [rank.lost for rank in team.ranks]


def test_on_one_node_ranks_meet_by_themselves(fleet: Played) -> None:
    team(fleet, "a").start()
    [(node, message)] = fleet.told
    assert (node, message["team"], message["meeting"]) == ("a", 7, None)
    assert Job.from_message(message["start"]["job"]).env == {"TOKEN": "x"}


def test_on_several_nodes_they_are_started_once_they_can_meet(fleet: Played) -> None:
    it = team(fleet, "a", "b")
    it.start()
    it.update()
    it.ask(2)
    assert fleet.sorts() == [("a", "listen")]
    fleet.ports["team 7"] = 99
    it.update()
    it.update()
    starts = [("a", "start"), ("b", "start")]
    assert fleet.sorts() == [("a", "listen"), *starts, ("a", "ask"), ("b", "ask")]
    meeting = fleet.told[-3][1]["meeting"]
    assert meeting == {"address": "address of a", "port": 99, "listener": "team 7"}


def test_a_node_that_is_lost_takes_its_ranks_along(fleet: Played) -> None:
    it = team(fleet, "a", "b")
    it.start()
    fleet.ports["team 7"] = 99
    it.update()
    it.take_up("b", {"ended": 2, "code": 0, "report": {"done": True}})
    it.lose("b", "b is gone")
    assert lost(it) == ["", "", "", "b is gone"]


def test_without_the_node_where_they_would_meet_all_are_lost(fleet: Played) -> None:
    it = team(fleet, "a", "b")
    it.start()
    it.lose("a", "a is gone")
    assert lost(it) == ["a is gone"] * 4


def test_a_node_that_was_lost_before(fleet: Played) -> None:
    fleet.gone["a"] = "a is gone"
    it = team(fleet, "a")
    it.start()
    assert lost(it) == ["a is gone"] * 2


def test_an_agent_that_cannot_start_ranks(fleet: Played) -> None:
    it = team(fleet, "a", "b")
    it.take_up("b", {"refused": "no memory"})
    assert [rank.code for rank in it.ranks] == [None, None, 1, 1]
    assert it.ranks[3].report == {"text": "no memory"}
