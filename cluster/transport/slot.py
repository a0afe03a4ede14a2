"""The memory of one call over shared memory."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from cluster.transport.arena import ALIGNMENT, Block
from cluster.transport.codec import PAIR_BYTES, Placement, encode_form
from cluster.transport.replies import good_reply

AHEAD_BYTES = 256 * 1024
"""Copying up to so much takes no longer than the group takes to wake up and read the header."""


class Slot(Block):
    """The memory of one call: rows, answer, pairs. What the next call of the same shape needs of it is worked out
    once."""

    __slots__ = ("address", "ahead", "form", "good", "pairs_offset", "reply_offset", "rows_bytes", "shape")

    def __init__(
        self, offset: int, size: int, home: deque[Any], base: int, shape: tuple[int, int], dtype: torch.dtype
    ) -> None:
        super().__init__(offset, size, home)
        elements = shape[0] * shape[1]
        self.shape, self.rows_bytes, self.address = shape, elements * dtype.itemsize, base + offset
        self.reply_offset = offset + _up(self.rows_bytes)
        self.pairs_offset = self.reply_offset + _up(4 * elements)
        self.good = good_reply(shape, Placement.SHARED)
        self.ahead = self.rows_bytes <= AHEAD_BYTES
        placement = Placement.AHEAD if self.ahead else Placement.SHARED
        self.form = encode_form(dtype, shape, placement, offset, self.pairs_offset, self.reply_offset)

    @staticmethod
    def size_for(shape: tuple[int, int], dtype: torch.dtype, max_pairs: int) -> int:
        """Bytes of a slot."""
        elements = shape[0] * shape[1]
        return _up(elements * dtype.itemsize) + _up(4 * elements) + PAIR_BYTES * max_pairs


def _up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
