"""Sequences that have one token each in a step, side by side: their attention in one call instead of one for each.

On a GPU every call of a kernel costs more than what it computes for one decoding sequence, so histories are gathered
into one padded batch there. On CPUs they are read where they lie, sequence by sequence, which copies nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_POSITIONS = 32 * 1024
"""Sequences times the longest history of one padded batch: with 80 KiB a token and layer, as in DeepSeek-V3's eager
attention, 2.5 GiB."""
MAX_PADDING = 4 * 1024
"""Positions of a padded batch that may be nobody's; a guess at what gathering them costs beside another batch's
launches, not measured."""
MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Single:
    """A sequence with one token: its row of the step's T, its length with this token, where its history begins in the
    S where all histories lie one behind the other, and its blocks in the store."""

    row: int
    total: int
    key_first: int
    blocks: Sequence[int]


class Bundle:
    """Some of them, in the order of their rows, padded to the longest.

    ``rows_B`` are their rows. ``offset_BS`` counts each history, and where that is over repeats its beginning, since
    memory that nobody wrote may hold what even a masked product spoils.
    """

    def __init__(self, singles: Sequence[Single], block_size: int, device: torch.device) -> None:
        self._device, self._block_size = device, block_size
        blocks = max(-(-single.total // block_size) for single in singles)
        table_B4 = np.zeros((len(singles), 3 + blocks), np.int64)
        for number, single in enumerate(singles):
            used = -(-single.total // block_size)
            table_B4[number, :3] = single.row, single.total, single.key_first
            table_B4[number, 3 : 3 + used] = single.blocks[:used]
        rows = [single.row for single in singles]
        self._slice = slice(rows[0], rows[-1] + 1) if rows[-1] - rows[0] == len(rows) - 1 else None
        table = torch.from_numpy(table_B4).to(device)
        self.rows_B, self.totals_B, self._keys_B = table[:, 0], table[:, 1], table[:, 2]
        self._blocks_BN = table[:, 3:]
        self._keys_S = torch.arange(blocks * block_size, device=device)
        self.inside_BS = self._keys_S[None, :] < self.totals_B[:, None]
        self.offset_BS = torch.where(self.inside_BS, self._keys_S[None, :], 0)
        self._at: dict[bool, torch.Tensor] = {}

    def at(self, in_store: bool) -> torch.Tensor:
        """[B, S]: where the histories are in the store's buffers, or in all histories one behind the other."""
        if in_store not in self._at:
            if in_store:
                block_BS = self._blocks_BN.gather(1, self.offset_BS // self._block_size)
                self._at[in_store] = block_BS * self._block_size + self.offset_BS % self._block_size
            else:
                self._at[in_store] = self._keys_B[:, None] + self.offset_BS
        return self._at[in_store]

    def allowed(self, function: MaskFunction) -> torch.Tensor:
        """Bool [B, 1, 1, S]: what of its history each token may see."""
        zero = torch.zeros((), dtype=torch.int64, device=self._device)
        seen_BS = function(zero, zero, self.totals_B[:, None] - 1, self._keys_S[None, :])
        return (seen_BS & self.inside_BS)[:, None, None, :]

    def queries(self, query: torch.Tensor) -> torch.Tensor:
        """[B, heads, 1, dim] of the step's [1, heads, T, dim]."""
        own = query[:, :, self._slice] if self._slice is not None else query.index_select(2, self.rows_B)
        return own[0].transpose(0, 1)[:, :, None]

    def put(self, outputs: torch.Tensor, output: torch.Tensor) -> None:
        """Attention's [B, 1, heads, dim] to their rows of [1, T, heads, dim]."""
        if self._slice is not None:
            outputs[0, self._slice] = output[:, 0]
        else:
            outputs[0].index_copy_(0, self.rows_B, output[:, 0])


def bundles_of(singles: Sequence[Single], block_size: int, device: torch.device) -> list[Bundle]:
    """All of them, those of like lengths together, in bundles that are not too large to gather."""
    parts: list[list[Single]] = []
    filled = 0
    for single in sorted(singles, key=lambda single: single.total):
        positions = (len(parts[-1]) + 1) * single.total if parts else 0
        if not parts or positions > MAX_POSITIONS or positions - filled - single.total > MAX_PADDING:
            parts.append([])
            filled = 0
        parts[-1].append(single)
        filled += single.total
    return [Bundle(sorted(part, key=lambda single: single.row), block_size, device) for part in parts]
