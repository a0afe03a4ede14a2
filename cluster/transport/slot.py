"""The memory of one call over shared memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from cluster.transport.arena import ALIGNMENT, Block, Home
from cluster.transport.base import LayerRows, Pairs
from cluster.transport.codec import PAIR_BYTES, Bytes, Placement, encode_form, pairs_over, tensor_at
from cluster.transport.replies import good_reply

AHEAD_BYTES = 256 * 1024
"""Copying up to so much takes no longer than the group takes to wake up and read the header."""


class Answered(NamedTuple):
    """Shape of a call's rows, and how a good reply to it begins."""

    shape: tuple[int, int]
    good: bytes


class Slot(Block):
    """The memory of one call: rows, answer, pairs. What the next call of the same shape needs of it is worked out
    once."""

    __slots__ = ("address", "ahead", "answered", "header", "pairs_offset", "reply_offset", "rows_bytes", "shape")

    def __init__(
        self,
        offset: int,
        size: int,
        home: Home,
        base: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        ahead: bool | None = None,
    ) -> None:
        super().__init__(offset, size, home)
        elements = shape[0] * shape[1]
        self.shape, self.rows_bytes, self.address = shape, elements * dtype.itemsize, base + offset
        self.reply_offset = offset + _up(self.rows_bytes)
        self.pairs_offset = self.reply_offset + _up(4 * elements)
        self.ahead = self.rows_bytes <= AHEAD_BYTES if ahead is None else ahead
        placement = Placement.AHEAD if self.ahead else Placement.SHARED
        self.header = encode_form(dtype, shape, placement, offset, self.pairs_offset, self.reply_offset)
        self.answered = Answered(shape, good_reply(shape, Placement.SHARED))

    @staticmethod
    def size_for(shape: tuple[int, int], dtype: torch.dtype, max_pairs: int) -> int:
        """Bytes of a slot."""
        elements = shape[0] * shape[1]
        return _up(elements * dtype.itemsize) + _up(4 * elements) + PAIR_BYTES * max_pairs


class SlotRoom(Slot):
    """One that the sender of a call writes to (see `Room`): room for so many rows and pairs, of which the call may use
    fewer. ``leaves`` is told when no call comes; it is not kept alive, since an answer keeps its slot, in a way that
    the search for cycles does not see, and a link its answers."""

    __slots__ = ("_all_TH", "_answered", "_leaves", "_memory", "_pairs", "_rows", "call_id", "pairs_at", "rows_at")

    def __init__(
        self,
        offset: int,
        size: int,
        home: Home,
        base: int,
        shape: tuple[int, int],
        memory: Bytes,
        leaves: Callable[[SlotRoom], None],
    ) -> None:
        super().__init__(offset, size, home, base, shape, torch.float32, True)
        self._memory, self._all_TH = memory, tensor_at(memory, torch.float32, shape, offset)
        self.rows_at, self.pairs_at = self.address, base + self.pairs_offset
        self.call_id = 0
        self._leaves = weakref.WeakMethod(leaves)
        # Making views takes longer than the copy of a few rows.
        self._rows: dict[int, torch.Tensor] = {}
        self._pairs: dict[int, Pairs] = {}
        self._answered: dict[int, Answered] = {}

    def rows(self, num_rows: int, num_pairs: int) -> LayerRows:
        """See `Room`."""
        rows_TH, pairs_3P = self._rows.get(num_rows), self._pairs.get(num_pairs)
        if rows_TH is None:
            rows_TH = self._rows[num_rows] = self._all_TH[:num_rows]
        if pairs_3P is None:
            pairs_3P = self._pairs[num_pairs] = pairs_over(self._memory, num_pairs, self.pairs_offset)
        return LayerRows(rows_TH, pairs_3P)

    def answered_with(self, num_rows: int) -> Answered:
        """As ``answered``, of a call with so many rows."""
        found = self._answered.get(num_rows)
        if found is None:
            shape = (num_rows, self.shape[1])
            found = self._answered[num_rows] = Answered(shape, good_reply(shape, Placement.SHARED))
        return found

    def leave(self) -> None:
        """See `Room`."""
        leaves = self._leaves()
        if leaves is not None:
            leaves(self)


def _up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
