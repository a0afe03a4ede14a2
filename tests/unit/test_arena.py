from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.transport.arena import ALIGNMENT, Arena, Block, Home, LeasedMemory

FP32 = np.dtype("<f4")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=60))
def test_blocks_never_overlap_and_everything_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena, taken = Arena(10, 4096), {}
    for take, number in steps:
        if take:
            offset = arena.allocate(number)
            if offset is None:
                continue
            assert offset % ALIGNMENT == 0
            assert offset >= 10
            assert offset + number <= 4096
            assert all(offset + number <= other or other + size <= offset for other, size in taken.items())
            taken[offset] = max(1, number)
        elif taken:
            offset = list(taken)[number % len(taken)]
            arena.free(offset)
            del taken[offset]
    for offset in taken:
        arena.free(offset)
    assert arena.num_taken == 0
    assert arena.allocate(arena.capacity) is not None, "one free piece again"


def test_a_block_that_was_not_taken_cannot_be_freed() -> None:
    with pytest.raises(KeyError):
        Arena(0, 1024).free(64)


def test_a_block_is_free_again_when_the_last_view_of_its_lease_is_gone() -> None:
    memory = LeasedMemory(np.zeros(4096, np.uint8))
    block = memory.make(memory.home("kind"), 1024)
    rows = torch.from_numpy(memory.lease(block, block.offset, (4, 8), FP32))
    part = rows[1:2].view(2, 4)
    del rows
    gc.collect()
    assert not memory.home("kind"), "a view of a view still looks at it"
    part = part.numpy()[0]  # type: ignore[assignment]
    gc.collect()
    assert not memory.home("kind")
    del part
    gc.collect()
    assert memory.home("kind").pop() is block


def test_blocks_of_a_kind_are_used_again_and_dissolved_when_others_need_room() -> None:
    memory = LeasedMemory(np.zeros(1024, np.uint8))
    block = memory.make(memory.home("a"), 512)
    block.give_back()
    assert memory.home("a")[0] is block
    assert memory.make(memory.home("b"), 1024) is not None
    assert not memory.home("a")
    assert memory.make(memory.home("b"), 64) is None


def test_memory_above_what_is_kept_is_let_go_of_when_all_is_free() -> None:
    told: list[int] = []
    memory = LeasedMemory(np.zeros(4096, np.uint8), kept=1024, trim=told.append)
    large, small = memory.make(memory.home(None), 2048), memory.make(memory.home("a"), 64)
    large.give_back()
    memory.relax()
    assert not told
    small.give_back()
    memory.relax()
    assert told == [large.size + small.size]
    memory.relax()
    assert len(told) == 1


def test_a_block_knows_where_it_goes() -> None:
    home = Home()
    Block(1, 2, home).give_back()
    assert (home[0].offset, home[0].size) == (1, 2)
