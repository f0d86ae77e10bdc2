"""A layout is numbers: degrees, world size, coordinates of ranks. No groups, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bigtrain.errors import BigtrainError

AXES = ("pp", "dp", "cp", "tp")
"""Axes of a mesh, outermost first: neighbouring ranks differ in tp, so that tp is inside a node."""


def legal_head_degrees(num_heads: int, num_kv_heads: int) -> list[int]:
    """Return the tensor-parallel degrees that attention heads can be shared out to.

    Query heads must divide by the degree. Key-value heads must too, or the degree by them: then
    as many ranks share each.
    """
    return [
        degree
        for degree in range(1, num_heads + 1)
        if num_heads % degree == 0 and (num_kv_heads % degree == 0 or degree % num_kv_heads == 0)
    ]


@dataclass(frozen=True)
class Layout:
    """How many ways each axis splits the world.

    >>> Layout(dp=2, tp=2).coordinate(3)
    {'pp': 0, 'dp': 1, 'cp': 0, 'tp': 1}
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, degree in self.degrees.items():
            if type(degree) is not int or degree < 1:
                raise BigtrainError(
                    f"the degree of axis {axis} is {degree!r}",
                    why="a degree counts how many ways an axis splits",
                    mend=f"give {axis} a whole number of at least 1",
                )

    @classmethod
    def infer(cls, degrees: Mapping[str, int | str], world_size: int) -> Layout:
        """Return the layout for a world of `world_size` ranks, where `dp` may be "auto".

        Raises:
            BigtrainError: the degrees cannot make up that world; the arithmetic is shown.
        """
        autos = [axis for axis, degree in degrees.items() if degree == "auto"]
        if autos not in ([], ["dp"]) or not degrees.keys() <= set(AXES):
            raise BigtrainError(
                f"these are no degrees of a layout: {dict(degrees)}",
                why=f"the axes are {', '.join(AXES)}, and only dp can be auto",
                mend="give each axis a whole number of at least 1",
            )
        given = {axis: degrees.get(axis, 1) for axis in AXES if axis not in autos}
        fixed = cls(**given).degrees  # type: ignore[arg-type]  # it checks them
        fixed = {axis: degree for axis, degree in fixed.items() if axis not in autos}
        product = math.prod(fixed.values())
        arithmetic = " x ".join(f"{axis}={degree}" for axis, degree in fixed.items())
        if autos:
            if world_size % product:
                raise BigtrainError(
                    f"a world of {world_size} ranks cannot be split: "
                    f"{arithmetic} = {product} does not divide {world_size}",
                    why="parallel.dp is auto, so the other degrees must divide the world",
                    mend=f"start a multiple of {product} ranks, or change a degree",
                )
            fixed["dp"] = world_size // product
        elif product != world_size:
            raise BigtrainError(
                f"the world has {world_size} ranks, but {arithmetic} = {product}",
                why="the product of the degrees is the number of ranks",
                mend=f"start {product} ranks, or set parallel.dp=auto to take what there is",
            )
        return cls(**fixed)

    @property
    def degrees(self) -> dict[str, int]:
        """Degree of each axis, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return math.prod(self.degrees.values())

    def coordinate(self, rank: int) -> dict[str, int]:
        """Return where `rank` sits on each axis."""
        assert 0 <= rank < self.world_size
        place = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.degrees[axis])
        return {axis: place[axis] for axis in AXES}

    def rank_of(self, coordinate: Mapping[str, int]) -> int:
        """Return the rank at `coordinate`; the inverse of `coordinate`."""
        rank = 0
        for axis in AXES:
            rank = rank * self.degrees[axis] + coordinate[axis]
        return rank

    def ranks_along(self, axis: str, rank: int) -> tuple[int, ...]:
        """Return the ranks of the group of `axis` that runs through `rank`, in order."""
        place = self.coordinate(rank)
        return tuple(self.rank_of({**place, axis: i}) for i in range(self.degrees[axis]))

    def __str__(self) -> str:
        return " x ".join(f"{axis}={degree}" for axis, degree in self.degrees.items())
