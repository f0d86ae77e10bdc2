"""Who this rank is, by the environment."""

from __future__ import annotations

import pytest
from unit_helpers import assert_explained

from bigtrain.comm.world import World, read_world
from bigtrain.errors import LaunchError


def test_nobody_launched_it() -> None:
    """Alone; stray variables of other programs do not matter."""
    assert read_world({}) == read_world({"LOCAL_RANK": "3", "MASTER_PORT": "x"}) == World()
    assert World().world_size == 1


def test_torchrun() -> None:
    env = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "1",
    }
    assert read_world(env) == World(5, 8, 1, 4, 1)


def test_one_node_unless_told() -> None:
    assert read_world({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, 1, 2, 0)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is ''"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK is '1.0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 WORLD_SIZE=0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "?"}, "GROUP_RANK is '?'"),
    ],
)
def test_nonsense_is_refused(env: dict[str, str], words: str) -> None:
    """Never a world of one by mistake."""
    with pytest.raises(LaunchError) as caught:
        read_world(env)
    assert_explained(caught.value, "environment", words)
