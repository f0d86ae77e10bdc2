"""Blocks: rectangles of a tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bigtrain.comm.block import Block
from bigtrain.errors import BigtrainError


def random_block(shape: tuple[int, ...], dice: random.Random) -> Block:
    offsets = tuple(dice.randrange(size) for size in shape)
    sizes = tuple(dice.randint(1, size - o) for size, o in zip(shape, offsets, strict=True))
    return Block(offsets, sizes)


def elements(block: Block, shape: tuple[int, ...]) -> set[int]:
    """The positions of a block's elements in the flattened tensor."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return set(numbers[block.slices].flatten().tolist())


@pytest.mark.parametrize("shape", [(), (0,), (5,), (4, 3), (0, 3), (2, 3, 4)])
def test_whole(shape: tuple[int, ...]) -> None:
    block = Block.whole(shape)
    assert block.sizes == shape
    assert elements(block, shape) == set(range(torch.Size(shape).numel()))
    assert Block.rows(shape, 0, block.numel) == block


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)])
def test_rows_are_that_part_of_the_flat_tensor(shape: tuple[int, ...]) -> None:
    row = torch.Size(shape[1:]).numel()
    for first, last in itertools.combinations(range(7), 2):
        block = Block.rows(shape, first * row, last * row)
        assert elements(block, shape) == set(range(first * row, last * row))
        assert block.numel == (last - first) * row


@pytest.mark.parametrize(("start", "stop"), [(1, 8), (0, 5), (4, 7), (3, 5)])
def test_cuts_inside_a_row_are_refused(start: int, stop: int) -> None:
    with pytest.raises(BigtrainError, match="a row has 4 elements"):
        Block.rows((6, 4), start, stop)


def test_intersect_is_what_both_have() -> None:
    dice, shape = random.Random(0), (5, 4, 3)
    num_apart = 0
    for _ in range(300):
        a, b = random_block(shape, dice), random_block(shape, dice)
        common = a.intersect(b)
        both = elements(a, shape) & elements(b, shape)
        assert (elements(common, shape) if common else set()) == both
        assert common == b.intersect(a)
        num_apart += common is None
    assert 30 < num_apart < 270


def test_within_finds_the_same_elements() -> None:
    """An index into a piece of a tensor that is an index into the whole."""
    dice, shape = random.Random(1), (5, 4, 3)
    full = torch.arange(60).reshape(shape)
    for _ in range(100):
        outer, other = random_block(shape, dice), random_block(shape, dice)
        inner = outer.intersect(other)
        if inner is not None:
            part = full[outer.slices]
            assert torch.equal(part[inner.within(outer).slices], full[inner.slices])


def test_a_block_meets_itself_and_the_whole() -> None:
    block = Block((1, 2), (3, 1))
    assert block.intersect(block) == block.intersect(Block.whole((6, 4))) == block
    assert block.within(block) == Block((0, 0), (3, 1))


def test_neighbours_do_not_meet() -> None:
    assert Block((0, 0), (2, 4)).intersect(Block((2, 0), (2, 4))) is None
    assert Block((0,), (0,)).intersect(Block((0,), (3,))) is None
