from __future__ import annotations

from collections import Counter, OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.engine.blocks import BlockPool, BlockTable, num_blocks_of
from cluster.errors import ConfigError
from cluster.settings import EngineConfig


def filled(pool: BlockPool, tokens: list[int], expected: int = 0) -> BlockTable:
    """A table whose tokens have all been computed."""
    table = BlockTable(expected)
    pool.match(table, tokens)
    assert pool.extend(table, len(tokens))
    pool.register(table, tokens, len(tokens))
    return table


def consecutive(table: BlockTable) -> bool:
    return table.blocks == list(range(table.blocks[0], table.blocks[0] + len(table.blocks)))


def take_all(pool: BlockPool) -> None:
    """Every block can be had, once."""
    table = BlockTable()
    assert not pool.extend(table, pool.num_blocks * pool.block_size + 1)
    assert pool.extend(table, pool.num_blocks * pool.block_size)
    assert sorted(table.blocks) == list(range(pool.num_blocks))
    assert (pool.num_used, pool.num_cached, pool.num_free) == (pool.num_blocks, 0, 0)
    pool.release(table)


class Mirror:
    """What the pool should be, the slow way: prefixes are kept whole, and the order of release is a list."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool, self.size = pool, pool.block_size
        self.tables: list[tuple[BlockTable, list[int]]] = []
        self.references: Counter[int] = Counter()
        self.known: dict[tuple[int, ...], int] = {}
        self.cached: OrderedDict[int, None] = OrderedDict()
        self.evicted = 0

    def open(self, tokens: list[int]) -> None:
        table = BlockTable()
        wanted = []
        for end in range(self.size, len(tokens), self.size):  # never the last token
            if tuple(tokens[:end]) not in self.known:
                break
            wanted.append(self.known[tuple(tokens[:end])])
        assert self.pool.match(table, tokens) == len(wanted) * self.size
        assert table.blocks == wanted
        for block in wanted:
            self.cached.pop(block, None)
            self.references[block] += 1
        self.tables.append((table, tokens))

    def extend(self, index: int, num_tokens: int) -> None:
        table, _ = self.tables[index]
        before = list(table.blocks)
        need = -(-num_tokens // self.size) - len(before)
        free = self.pool.num_blocks - len(+self.references)
        assert self.pool.extend(table, num_tokens) == (need <= free)
        for _ in range(self.pool.evicted - self.evicted):
            oldest, _ = self.cached.popitem(last=False)
            self.known = {prefix: block for prefix, block in self.known.items() if block != oldest}
        self.evicted = self.pool.evicted
        new = table.blocks[len(before) :]
        assert table.blocks[: len(before)] == before
        assert len(new) == (max(0, need) if need <= free else 0)
        for block in new:
            assert self.references[block] == 0, "two writers"
            assert block not in self.cached, "not the block that was unused longest"
            self.references[block] = 1

    def register(self, index: int, computed: int) -> None:
        table, tokens = self.tables[index]
        computed = min(computed, len(table.blocks) * self.size, len(tokens))
        self.pool.register(table, tokens, computed)
        for number in range(computed // self.size):
            self.known.setdefault(tuple(tokens[: (number + 1) * self.size]), table.blocks[number])

    def release(self, index: int) -> None:
        table, _ = self.tables.pop(index)
        blocks = list(table.blocks)
        self.pool.release(table)
        assert table.blocks == []
        for block in reversed(blocks):
            self.references[block] -= 1
            if self.references[block] == 0 and block in self.known.values():
                self.cached[block] = None

    def check(self) -> None:
        counted = Counter(block for table, _ in self.tables for block in table.blocks)
        assert all(self.pool.num_references(block) == counted[block] for block in range(self.pool.num_blocks))
        assert self.pool.num_used == len(counted)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_used + self.pool.num_cached + self.pool.num_free == self.pool.num_blocks


tokens_of_two_kinds = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 16), tokens_of_two_kinds), max_size=40),
)
def test_the_pool_does_what_its_slow_mirror_does(
    num_blocks: int, block_size: int, actions: list[tuple[int, int, int, list[int]]]
) -> None:
    pool = BlockPool(num_blocks, block_size)
    mirror = Mirror(pool)
    for action, which, amount, tokens in actions:
        index = which % len(mirror.tables) if mirror.tables else 0
        if action == 0 or not mirror.tables:
            mirror.open(tokens)
        elif action == 1:
            mirror.extend(index, amount)
        elif action == 2:
            mirror.register(index, amount)
        else:
            mirror.release(index)
        mirror.check()
    while mirror.tables:
        mirror.release(0)
    mirror.check()
    take_all(pool)


@settings(max_examples=60, deadline=None)
@given(st.lists(tokens_of_two_kinds, min_size=1, max_size=8))
def test_without_prefix_caching_nothing_is_shared_or_kept(prompts: list[list[int]]) -> None:
    pool = BlockPool(100, 2, prefix_caching=False)
    tables = [filled(pool, tokens) for tokens in prompts]
    blocks = [block for table in tables for block in table.blocks]
    assert len(set(blocks)) == len(blocks) == pool.num_used
    for table in tables:
        pool.release(table)
    assert (pool.num_used, pool.num_cached, pool.hit_tokens, pool.evicted) == (0, 0, 0, 0)
    take_all(pool)


def test_a_prefix_is_found_in_whole_blocks_and_one_token_is_left_to_compute() -> None:
    pool = BlockPool(10, 4)
    first = filled(pool, [*range(10)])
    found = [BlockTable() for _ in range(4)]
    lengths = [
        pool.match(table, tokens)
        for table, tokens in zip(found, ([*range(8)], [*range(9)], [*range(7), 99, 8], [99]), strict=True)
    ]
    assert lengths == [4, 8, 4, 0]
    assert found[1].blocks == first.blocks[:2]
    assert (pool.asked_tokens, pool.hit_tokens) == (10 + 8 + 9 + 9 + 1, 16)


def test_what_has_not_been_registered_is_not_found() -> None:
    pool = BlockPool(10, 4)
    table = BlockTable()
    pool.extend(table, 8)
    pool.register(table, [*range(8)], 7)
    again = BlockTable()
    assert pool.match(again, [*range(9)]) == 4
    pool.register(table, [*range(8)], 8)
    pool.release(again)
    assert pool.match(again, [*range(9)]) == 8


def test_the_prefix_that_was_unused_longest_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(6, 1)
    old, new = filled(pool, [1, 2, 3]), filled(pool, [4, 5, 6])
    pool.release(new)
    pool.release(old)
    touched = BlockTable()
    assert pool.match(touched, [4, 5, 6, 7]) == 3
    pool.release(touched)
    assert pool.extend(BlockTable(), 2)
    assert pool.match(BlockTable(), [1, 2, 3, 0]) == 1
    assert pool.match(BlockTable(), [4, 5, 6, 0]) == 3


def test_what_is_cached_fits_only_if_it_need_not_be_evicted_for_the_rest() -> None:
    pool = BlockPool(4, 1)
    pool.release(filled(pool, [1, 2, 3]))
    assert pool.fits(BlockTable(), [1, 2, 3, 4], 1, spare=0)
    assert not pool.fits(BlockTable(), [1, 2, 3, 4], 1, spare=1)
    assert not pool.fits(BlockTable(), [1, 2, 3, 4, 5], 2, spare=0)
    assert pool.fits(BlockTable(), [1, 2, 3, 4, 5], 1, spare=0)
    assert (pool.num_used, pool.num_cached) == (0, 3)


def test_tables_that_grow_in_turns_stay_in_one_piece() -> None:
    pool = BlockPool(1000, 4)
    tables = [BlockTable(expected=20) for _ in range(30)]
    for length in range(1, 81):
        assert all(pool.extend(table, length) for table in tables)
    assert all(consecutive(table) for table in tables)
    for table in tables[::2]:
        pool.release(table)
    late = [BlockTable(expected=20) for _ in range(15)]
    for length in range(1, 81):
        assert all(pool.extend(table, length) for table in late)
    assert all(consecutive(table) for table in late)


def test_in_a_pool_full_of_prefixes_new_tables_come_in_one_piece() -> None:
    pool = BlockPool(100, 1)
    for number in range(10):
        pool.release(filled(pool, [number * 1000 + i for i in range(10)], expected=10))
    assert pool.num_free == 0
    tables = [BlockTable(expected=10) for _ in range(5)]
    for length in range(1, 11):
        assert all(pool.extend(table, length) for table in tables)
    assert all(consecutive(table) for table in tables)
    assert pool.evicted == 50, "no more than was needed"


def test_room_that_others_expect_to_need_is_taken_when_there_is_no_other() -> None:
    pool = BlockPool(10, 1)
    greedy = BlockTable(expected=100)
    assert pool.extend(greedy, 2)
    other = BlockTable(expected=4)
    assert pool.extend(other, 4)
    assert other.blocks == [6, 7, 8, 9], "as far away as possible"
    assert pool.extend(greedy, 6)
    assert greedy.blocks == [*range(6)]


def test_a_prefix_that_goes_on_does_so_right_behind() -> None:
    pool = BlockPool(100, 1)
    first = filled(pool, [1, 2, 3], expected=10)
    pool.release(first)
    second = filled(pool, [1, 2, 3, 4, 5, 6])
    assert second.blocks == [0, 1, 2, 3, 4, 5]


def test_blocks_are_what_the_bytes_pay_for() -> None:
    config = EngineConfig(kv_cache_bytes=1000, block_size=4)
    assert num_blocks_of(config, 10) == 25
    assert num_blocks_of(config, 250) == 1
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_bytes: got 1000; one block of 4 tokens .* takes 1004"):
        num_blocks_of(config, 251)
