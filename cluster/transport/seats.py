"""Memory of a link for calls that are written and answered by an exchange: kept for long, apart from that of calls."""

from __future__ import annotations

import torch

from cluster.transport.arena import Home, LeasedMemory
from cluster.transport.base import LayerRows
from cluster.transport.codec import Bytes, pairs_over, tensor_at
from cluster.transport.slot import Slot


class Seats:
    """Of one link, in ``memory`` from ``start`` on."""

    def __init__(self, memory: Bytes, start: int) -> None:
        self._bytes, self._base = memory, memory.ctypes.data
        self._memory = LeasedMemory(memory, start)

    def take(self, shape: tuple[int, int], max_pairs: int) -> Slot | None:
        """Memory for so many fp32 rows and pairs; None when there is none."""
        home = self._memory.home((shape, max_pairs))

        def make(offset: int, size: int, home: Home) -> Slot:
            return Slot(offset, size, home, self._base, shape, torch.float32)

        try:
            found: Slot | None = home.pop()
        except IndexError:
            found = self._memory.make(home, Slot.size_for(shape, torch.float32, max_pairs), make)
        return found

    def addresses(self, slot: Slot) -> tuple[int, int, int]:
        """Of rows, pairs and reply."""
        return slot.address, self._base + slot.pairs_offset, self._base + slot.reply_offset

    def rows(self, slot: Slot, num_rows: int, num_pairs: int) -> LayerRows:
        """What has been written there."""
        rows_TH = tensor_at(self._bytes, torch.float32, (num_rows, slot.shape[1]), slot.offset)
        return LayerRows(rows_TH, pairs_over(self._bytes, num_pairs, slot.pairs_offset))

    def num_taken(self) -> int:
        """That are in use."""
        return self._memory.num_taken()

    def close(self) -> None:
        """None is taken again."""
        self._memory.close()
