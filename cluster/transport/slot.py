"""The memory of one call over shared memory."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cluster.transport.arena import ALIGNMENT, Block, Home
from cluster.transport.codec import PAIR_BYTES, Placement, encode_form
from cluster.transport.replies import good_reply


class Answered(NamedTuple):
    """Shape of a call's rows, and how a good reply to it begins."""

    shape: tuple[int, int]
    good: bytes


class Slot(Block):
    """The memory of one call: rows, answer, pairs. What the next call of the same shape needs of it is worked out
    once."""

    __slots__ = ("address", "answered", "header", "pairs_offset", "reply_offset", "rows_bytes", "shape")

    def __init__(
        self,
        offset: int,
        size: int,
        home: Home,
        base: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(offset, size, home)
        elements = shape[0] * shape[1]
        self.shape, self.rows_bytes, self.address = shape, elements * dtype.itemsize, base + offset
        self.reply_offset = offset + _up(self.rows_bytes)
        self.pairs_offset = self.reply_offset + _up(4 * elements)
        self.header = encode_form(dtype, shape, Placement.SHARED, offset, self.pairs_offset, self.reply_offset)
        self.answered = self.answered_with(shape[0])

    def answered_with(self, num_rows: int) -> Answered:
        """As ``answered``, of a call with so many rows."""
        shape = num_rows, self.shape[1]
        return Answered(shape, good_reply(shape, Placement.SHARED))

    @staticmethod
    def size_for(shape: tuple[int, int], dtype: torch.dtype, max_pairs: int) -> int:
        """Bytes of a slot."""
        elements = shape[0] * shape[1]
        return _up(elements * dtype.itemsize) + _up(4 * elements) + PAIR_BYTES * max_pairs


def _up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
