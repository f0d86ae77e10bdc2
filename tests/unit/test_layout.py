"""A layout is numbers: ranks to coordinates and back."""

from __future__ import annotations

import itertools

import pytest

from bigtrain.config.layout import AXES, Layout
from bigtrain.errors import BigtrainError

LAYOUTS = [
    Layout(*degrees)
    for degrees in itertools.product(range(1, 9), repeat=len(AXES))
    if Layout(*degrees).world_size <= 8
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_coordinates_and_ranks_are_inverse(layout: Layout) -> None:
    """Every rank has a place of its own, inside the degrees."""
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank_of(place) for place in places] == list(range(layout.world_size))
    assert len({tuple(place.values()) for place in places}) == layout.world_size
    for place in places:
        assert all(0 <= place[axis] < layout.degrees[axis] for axis in AXES)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("axis", AXES)
def test_ranks_along_an_axis(layout: Layout, axis: str) -> None:
    """The groups of an axis split the world, and their ranks differ on that axis only."""
    groups = {layout.ranks_along(axis, rank) for rank in range(layout.world_size)}
    assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
    for group in groups:
        places = [layout.coordinate(rank) for rank in group]
        assert [place.pop(axis) for place in places] == list(range(layout.degrees[axis]))
        assert all(place == places[0] for place in places)


def test_order_of_axes() -> None:
    """Outermost first: neighbours are tensor parallel, so that tp stays inside a node."""
    layout = Layout(pp=2, dp=2, cp=1, tp=2)
    assert layout.ranks_along("tp", 0) == (0, 1)
    assert layout.ranks_along("dp", 0) == (0, 2)
    assert layout.ranks_along("pp", 0) == (0, 4)
    assert layout.ranks_along("dp", 5) == (5, 7)
    assert layout.coordinate(5) == {"pp": 1, "dp": 0, "cp": 0, "tp": 1}


def test_text_shows_every_axis() -> None:
    assert str(Layout(dp=2, tp=4)) == "pp=1 x dp=2 x cp=1 x tp=4"


@pytest.mark.parametrize(("world_size", "dp"), [(4, 1), (8, 2), (12, 3)])
def test_auto_takes_what_is_left(world_size: int, dp: int) -> None:
    assert Layout.infer({"dp": "auto", "tp": 4}, world_size) == Layout(dp=dp, tp=4)


def test_missing_degrees_are_one() -> None:
    assert Layout.infer({"dp": 2}, 2) == Layout(dp=2)


def test_wrong_world_shows_the_arithmetic() -> None:
    with pytest.raises(BigtrainError) as caught:
        Layout.infer({"dp": 2, "tp": 2}, 6)
    text = str(caught.value)
    assert "the world has 6 ranks, but pp=1 x dp=2 x cp=1 x tp=2 = 4" in text
    assert "start 4 ranks" in text


def test_indivisible_world_shows_the_arithmetic() -> None:
    with pytest.raises(BigtrainError) as caught:
        Layout.infer({"pp": 2, "dp": "auto", "tp": 2}, 6)
    text = str(caught.value)
    assert "pp=2 x cp=1 x tp=2 = 4 does not divide 6" in text
    assert "multiple of 4 ranks" in text


@pytest.mark.parametrize("degree", [0, -1, 1.0, True, "2"])
def test_bad_degree_is_refused(degree: object) -> None:
    with pytest.raises(BigtrainError, match="axis tp") as caught:
        Layout(tp=degree)  # type: ignore[arg-type]
    assert "at least 1" in str(caught.value)


@pytest.mark.parametrize(
    "degrees", [{"tp": 0, "dp": "auto"}, {"dp": "many"}, {"dp": "auto", "tp": "auto"}], ids=str
)
def test_bad_degrees_are_refused_by_infer(degrees: dict) -> None:
    with pytest.raises(BigtrainError):
        Layout.infer(degrees, 4)
