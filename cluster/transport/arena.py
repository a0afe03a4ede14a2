"""Blocks of a piece of memory: which bytes are in use, and memory that is free again when the last view of it is gone.

`Arena` is arithmetic. `LeasedMemory` puts it to a byte array and hands out views that give their block back by
themselves.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from cluster.transport.codec import Bytes

ALIGNMENT = 64
"""A cache line, so that no two blocks share one."""


class Arena:
    """First fit from the lowest offset, so that a link under a steady load stays on the same warm pages."""

    def __init__(self, start: int, end: int) -> None:
        start = -(-start // ALIGNMENT) * ALIGNMENT
        self._start, self._end = start, end
        self._free: list[tuple[int, int]] = [(start, end)]  # [from, to), sorted, never adjacent
        self._taken: dict[int, int] = {}
        self.high = start
        """End of the highest block since the arena was last empty."""

    @property
    def num_taken(self) -> int:
        """Blocks in use."""
        return len(self._taken)

    @property
    def capacity(self) -> int:
        """Bytes that one block can have when nothing else is taken."""
        return self._end - self._start

    def allocate(self, size: int) -> int | None:
        """Offset of a block of ``size`` bytes; None when there is no room for it now."""
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        for index, (first, last) in enumerate(self._free):
            if last - first >= size:
                if last - first == size:
                    del self._free[index]
                else:
                    self._free[index] = (first + size, last)
                self._taken[first] = first + size
                if first + size > self.high:
                    self.high = first + size
                return first
        return None

    def free(self, offset: int) -> None:
        """Gives the block that starts at ``offset`` back. KeyError if there is none: that is a bug of ours."""
        first, last = offset, self._taken.pop(offset)
        at = bisect.bisect_left(self._free, (first, last))
        if at < len(self._free) and self._free[at][0] == last:
            last = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == first:
            first = self._free[at - 1][0]
            del self._free[at - 1]
            at -= 1
        self._free.insert(at, (first, last))


class Home(deque[Any]):
    """Free blocks of a kind. One that is not ``open`` takes none back: a block that holds views of the memory, in the
    list of which it is, would keep it mapped until somebody looks for cycles."""

    open = True


class Block:
    """``size`` bytes at ``offset``, and the list of blocks of its kind that it goes back to."""

    __slots__ = ("home", "offset", "size")

    def __init__(self, offset: int, size: int, home: Home) -> None:
        self.offset, self.size, self.home = offset, size, home

    def give_back(self) -> None:
        """The block may be taken again. Atomic: garbage collection does it anywhere."""
        if self.home.open:
            self.home.append(self)


class _Lease(np.ndarray[Any, np.dtype[Any]]):
    """A view whose death gives its block back. Views of it are of this class too, without a block of their own, and
    keep it alive as their base."""

    block: Block | None = None

    def __del__(self) -> None:
        if self.block is not None:
            self.block.give_back()


Make = Callable[[int, int, Home], Any]


class LeasedMemory:
    """Blocks of ``memory`` of several kinds. Thread-safe, and without a lock where a block of the same kind was free
    already, as under a steady load.

    While less than ``kept`` bytes are in use, free blocks stay what they are. ``trim(high)`` is told when everything is
    free again after more was in use, with the end of the highest block.
    """

    def __init__(
        self, memory: Bytes, start: int = 0, kept: int = 64 * 1024**2, trim: Callable[[int], None] | None = None
    ) -> None:
        self._buffer = memory.data
        self._arena, self._lock, self._kept, self._trim = Arena(start, memory.size), threading.Lock(), kept, trim
        self._homes: dict[Any, Home] = {}

    @property
    def capacity(self) -> int:
        """The largest block there can be."""
        return self._arena.capacity

    def home(self, kind: Any) -> Home:
        """The free blocks of a kind: take one with ``pop``, or with `make` when there is none. Those of the kind None
        are not kept: `make` divides their memory anew."""
        home = self._homes.get(kind)
        return self._homes.setdefault(kind, Home()) if home is None else home

    def make(self, home: Home, size: int, make: Make = Block) -> Any:
        """A new block of ``size`` bytes, made with ``make(offset, size, home)``; None when there is no room now."""
        with self._lock:
            if self._arena.high > self._kept:
                self._merge()
            else:
                self._dissolve(self._homes.get(None, home))
            offset = self._arena.allocate(size)
            if offset is None:
                self._merge()
                offset = self._arena.allocate(size)
        return None if offset is None else make(offset, size, home)

    def lease(
        self, block: Block, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """An array at ``offset`` inside the block; the block goes back when no view of the array is left."""
        view = _Lease(shape, dtype, self._buffer, offset)
        view.block = block
        return view

    def relax(self) -> None:
        """Lets go of memory above ``kept`` if nothing is in use."""
        if self._arena.high > self._kept:
            self.num_taken()

    def num_taken(self) -> int:
        """Blocks in use."""
        with self._lock:
            self._merge()
            return self._arena.num_taken

    def close(self) -> None:
        """Blocks that are given back from now on are forgotten, and so are those that are free."""
        for home in list(self._homes.values()):
            home.open = False
            home.clear()

    def _dissolve(self, home: Home) -> None:
        while home:
            try:
                self._arena.free(home.popleft().offset)
            except IndexError:  # taken by another thread in between
                break

    def _merge(self) -> None:
        """Free blocks become free memory again."""
        for home in list(self._homes.values()):
            self._dissolve(home)
        if not self._arena.num_taken:
            if self._trim is not None and self._arena.high > self._kept:
                self._trim(self._arena.high)
            self._arena.high = 0
