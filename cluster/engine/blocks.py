"""The key-value cache's accounts: paged blocks with reference counts, and a prefix cache over them. Pure Python.

No tensor is here. A block is a number from 0 to ``num_blocks - 1`` with room for ``block_size`` tokens of all layers.
Each block is in one of three states: *used* (some table refers to it), *cached* (nobody does, but its tokens are known
and may come again) or *free*. A full block whose tokens have been computed is known by a digest chained over everything
before it, so equal digests mean equal prefixes. Cached blocks are evicted least recently used first.

Attention on CPUs reads a sequence without a copy where its blocks are consecutive, so placement matters: a table goes
on right behind its last block, new runs start where they have room to grow, and room behind growing tables is left to
them for as long as there is any elsewhere.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from cluster.errors import ConfigError
from cluster.settings import EngineConfig

_DIGEST_BYTES = 16
_LOOKED_AT = 64
"""Free runs of one size class that a search looks at; it stays cheap in a pool that is in a thousand pieces."""
_CLEARED = 3
"""For a run in one piece so many times its blocks are evicted at most. Tried on a pool where cached prefixes fill what
requests leave: with 1, 29 % of the sequences of a step were in pieces, with 2, 6 %, and with 4 none."""


def num_blocks_of(config: EngineConfig, kv_bytes_per_token: int) -> int:
    """Blocks that ``engine.kv_cache_bytes`` pays for.

    Raises:
        ConfigError: not one.
    """
    block_bytes = max(1, kv_bytes_per_token) * config.block_size
    if config.kv_cache_bytes < block_bytes:
        raise ConfigError(
            f"engine.kv_cache_bytes: got {config.kv_cache_bytes}; one block of {config.block_size} tokens "
            f"(engine.block_size) takes {block_bytes}"
        )
    return config.kv_cache_bytes // block_bytes


@dataclass(slots=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens. Only the pool changes it, except for ``expected``.

    ``expected`` is a hint: blocks that the sequence may come to need in all. ``digests`` belong to the tokens and not
    to the blocks: they outlive `BlockPool.release`, and a preempted sequence finds its blocks again without hashing.
    """

    expected: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    registered: int = 0
    """Blocks from the first one on that the prefix index has seen."""
    _view: tuple[int, ...] = ()

    def view(self) -> tuple[int, ...]:
        """The blocks as a tuple, made anew only when they have changed."""
        if len(self._view) != len(self.blocks):  # they are only ever appended to, or released all together
            self._view = tuple(self.blocks)
        return self._view


class _FreeRuns:
    """A set of free blocks as maximal runs [start, end). Constant time but for `runs`."""

    def __init__(self, num_blocks: int) -> None:
        self.count = num_blocks
        self._ends: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._classes: list[dict[int, None]] = [{} for _ in range(num_blocks.bit_length() + 1)]
        self._put(0, num_blocks)

    def end(self, start: int) -> int:
        """Where the run that starts at ``start`` ends; ``start`` itself when none does."""
        return self._ends.get(start, start)

    def give(self, block: int) -> int:
        """Adds a block; the start of the run that it is in now."""
        start, end = self._starts.get(block, block), self._ends.get(block + 1, block + 1)
        if start < block:
            self._drop(start)
        if end > block + 1:
            self._drop(block + 1)
        self._put(start, end)
        self.count += 1
        return start

    def take(self, start: int, first: int, count: int) -> None:
        """Removes ``count`` blocks from ``first`` on, all of the run that starts at ``start``."""
        end = self._ends[start]
        self._drop(start)
        self._put(start, first)
        self._put(first + count, end)
        self.count -= count

    def runs(self, shortest: int, longest_first: bool = False) -> Iterator[tuple[int, int]]:
        """Some runs of at least ``shortest`` blocks, by size class; the shortest class first unless told otherwise."""
        classes = self._classes[shortest.bit_length() :]
        for starts in reversed(classes) if longest_first else classes:
            for start in itertools.islice(starts, _LOOKED_AT):
                if self._ends[start] - start >= shortest:
                    yield start, self._ends[start]

    def _put(self, start: int, end: int) -> None:
        if start < end:
            self._ends[start], self._starts[end] = end, start
            self._classes[(end - start).bit_length()][start] = None

    def _drop(self, start: int) -> None:
        end = self._ends.pop(start)
        del self._starts[end], self._classes[(end - start).bit_length()][start]


class BlockPool:
    """All blocks of one router. Not thread-safe: the engine's lock is around it."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks, self.block_size, self._prefix_caching = num_blocks, block_size, prefix_caching
        self._free = _FreeRuns(num_blocks)
        self._references: dict[int, int] = {}
        self._index: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._growing: dict[int, BlockTable] = {}  # by the block that the table would like to have next
        self.hit_tokens = self.asked_tokens = self.evicted = 0

    @property
    def num_free(self) -> int:
        """Blocks with nothing in them."""
        return self._free.count

    @property
    def num_cached(self) -> int:
        """Blocks that nobody refers to and that a prefix may hit."""
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some table refers to."""
        return self.num_blocks - self._free.count - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that a table can get: free and cached ones."""
        return self._free.count + len(self._cached)

    def num_references(self, block: int) -> int:
        """Tables that hold the block."""
        return self._references.get(block, 0)

    def reach(self, table: BlockTable) -> int:
        """Tokens that `extend` could cover now."""
        return (len(table.blocks) + self.num_available) * self.block_size

    def fits(self, table: BlockTable, tokens: Sequence[int], num_new: int, spare: int) -> bool:
        """Whether an empty table could get what is cached of ``tokens`` and room for ``num_new`` tokens more (not
        beyond the last one), with ``spare`` blocks left over. Takes nothing."""
        hits = self._find(table, tokens)
        last = min(len(tokens), len(hits) * self.block_size + num_new)
        revived = sum(block not in self._references for block in hits)
        return self._blocks_for(last) - len(hits) + revived + spare <= self.num_available

    def match(self, table: BlockTable, tokens: Sequence[int], count: bool = True) -> int:
        """Gives an empty table the longest cached prefix of ``tokens`` in whole blocks; how many tokens that is.

        At least one token stays out of it: without computing one there are no logits. ``count`` False leaves
        ``asked_tokens`` and ``hit_tokens`` as they are (the same prompt once more).
        """
        assert not table.blocks, "a table starts empty"
        hits = self._find(table, tokens)
        for block in hits:
            if block not in self._references:
                del self._cached[block]
            self._references[block] = self._references.get(block, 0) + 1
        table.blocks.extend(hits)
        table.registered = len(hits)
        if hits:
            self._growing.setdefault(hits[-1] + 1, table)
        found = len(hits) * self.block_size
        if count:
            self.asked_tokens += len(tokens)
            self.hit_tokens += found
        return found

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Makes the table cover ``num_tokens`` tokens, evicting cached blocks where needed. False, and nothing is
        changed, where there are not enough blocks."""
        need = self._blocks_for(num_tokens) - len(table.blocks)
        if need <= 0:
            return True
        if need > self.num_available:
            return False
        total = len(table.blocks) + need
        if total > table.expected:
            table.expected = total + total // 4
        self._stop_growing(table)
        first = start = table.blocks[-1] + 1 if table.blocks else -1
        while need:
            end = self._free.end(start)
            if end == start:
                start, first = self._place(table.expected - len(table.blocks))
                end = self._free.end(start)
            taken = min(need, end - first)
            self._free.take(start, first, taken)
            for block in range(first, first + taken):
                self._references[block] = 1
            table.blocks.extend(range(first, first + taken))
            first = start = first + taken
            need -= taken
        self._growing[first] = table
        return True

    def register(self, table: BlockTable, tokens: Sequence[int], computed: int) -> None:
        """Makes the table's newly full blocks known: the first ``computed`` of ``tokens`` are in them. Of two blocks
        with the same content the first one stays known."""
        full = min(computed // self.block_size, len(table.blocks))
        if not self._prefix_caching:
            return
        for number in range(table.registered, full):
            digest, block = self._digest(table, tokens, number), table.blocks[number]
            if digest not in self._index:
                self._index[digest], self._digests[block] = block, digest
        table.registered = max(table.registered, full)

    def release(self, table: BlockTable) -> None:
        """Empties the table. Known blocks stay cached, the last ones to be evicted first: a prefix without its
        continuation is of use, a continuation without its prefix is not."""
        self._stop_growing(table)
        for block in reversed(table.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                del self._references[block]
                if block in self._digests:
                    self._cached[block] = None
                else:
                    self._free.give(block)
        table.blocks.clear()
        table.registered, table._view = 0, ()

    # -- the prefix index ------------------------------------------------------------------------------------------

    def _find(self, table: BlockTable, tokens: Sequence[int]) -> list[int]:
        found: list[int] = []
        if self._prefix_caching:
            for number in range((len(tokens) - 1) // self.block_size):
                block = self._index.get(self._digest(table, tokens, number))
                if block is None:
                    break
                found.append(block)
        return found

    def _digest(self, table: BlockTable, tokens: Sequence[int], number: int) -> bytes:
        """Digest of the first ``number + 1`` blocks of ``tokens``; each is computed once in a table's life."""
        size = self.block_size
        while len(table.digests) <= number:
            at = len(table.digests) * size
            parent = table.digests[-1] if table.digests else b""
            content = struct.pack(f"<{size}q", *tokens[at : at + size])
            table.digests.append(hashlib.blake2b(parent + content, digest_size=_DIGEST_BYTES).digest())
        return table.digests[number]

    def _evict(self) -> int:
        """Frees the block that was cached longest ago; the start of the free run that it is in now."""
        block, _ = self._cached.popitem(last=False)
        del self._index[self._digests.pop(block)]
        self.evicted += 1
        return self._free.give(block)

    # -- placement -------------------------------------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _stop_growing(self, table: BlockTable) -> None:
        if table.blocks and self._growing.get(table.blocks[-1] + 1) is table:
            del self._growing[table.blocks[-1] + 1]

    def _unclaimed(self, start: int) -> int:
        """Where a free run begins that no growing table right before it still expects to need (maybe at its end)."""
        table = self._growing.get(start)
        claimed = max(0, table.expected - len(table.blocks)) if table is not None else 0
        return min(start + claimed, self._free.end(start))

    def _place(self, wanted: int) -> tuple[int, int]:
        """Where ``wanted`` blocks would best go: (start of a free run, a block of it). At least one can be had.

        Rather than into a corner where it would soon have to move on, the run goes where cached blocks were. These are
        evicted in their order, until there is room in one piece or too many have been.
        """
        for start, end in self._free.runs(wanted):
            if end - self._unclaimed(start) >= wanted:
                return start, self._unclaimed(start)
        for _ in range(min(_CLEARED * wanted, len(self._cached))):
            start = self._evict()
            if self._free.end(start) - self._unclaimed(start) >= wanted:
                return start, self._unclaimed(start)
        runs = itertools.islice(self._free.runs(1, longest_first=True), _LOOKED_AT)
        _, _, start = max((end - self._unclaimed(start), end - start, start) for start, end in runs)
        first, end = self._unclaimed(start), self._free.end(start)
        # All of it may be claimed: then from the far end, and half of it at most.
        return start, first if first < end else max(start + (end - start) // 2, end - wanted)
