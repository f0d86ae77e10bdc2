"""Blocks: rectangles of a tensor."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bigtrain.comm.block import Block


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
    assert list(Block.cover(shape, 0, block.numel)) == [block]


@pytest.mark.parametrize("shape", [(6,), (6, 4), (4, 2, 3), (3, 1, 2, 2)])
def test_cover_is_that_part_of_the_flat_tensor(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for start, stop in itertools.combinations(range(numbers.numel() + 1), 2):
        blocks = list(Block.cover(shape, start, stop))
        found = torch.cat([numbers[block.slices].flatten() for block in blocks])
        assert found.tolist() == list(range(start, stop))
        assert len(blocks) <= 2 * len(shape) - 1


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (4, 20), (12, 16)])
def test_whole_rows_are_one_block(start: int, stop: int) -> None:
    row = Block((start // 4, 0), ((stop - start) // 4, 4))
    assert list(Block.cover((6, 4), start, stop)) == [row]


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
