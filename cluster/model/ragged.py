"""All sequences of a step in one call of attention, whatever their lengths, on GPUs in half precision.

A step there costs what its kernels cost to launch, so one call and two gathers a layer replace a dozen launches for
each sequence that reads its prompt. torch's variable-length attention (FlashAttention-2, Dao, arXiv 2307.08691) lines
the last token of a sequence up with the last of its history, which is what causal attention over a cache is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn

from cluster.model.kv import Runs

HALVES = (torch.bfloat16, torch.float16)
MOST_BYTES = 1024**3
"""Keys and values of all histories that are gathered at once."""
TOLERANCE = 2.0**-6
"""Of the largest value: what sums of halves may differ by from sums in fp32."""


class Ragged:
    """Where the sequences of a step begin: among its tokens, int32 [B + 1], and in all histories one behind the other;
    ``at_S`` are the histories' positions in the store."""

    def __init__(self, rows: Sequence[int], runs: Sequence[Runs], device: torch.device) -> None:
        totals = [sum(last - first for first, last in own) for own in runs]
        self.longest_row, self.longest_total = max(rows), max(totals)
        starts_2B = np.zeros((2, len(rows) + 1), np.int32)
        np.cumsum(rows, out=starts_2B[0, 1:])
        np.cumsum(totals, out=starts_2B[1, 1:])
        self.row_starts, self.key_starts = torch.from_numpy(starts_2B).to(device).unbind()
        at_S = np.concatenate([np.arange(first, last) for own in runs for first, last in own])
        self.at_S = torch.from_numpy(at_S).to(device)

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, T, heads, dim] of a query [1, heads, T, dim] over keys and values [S, heads, dim] of all histories; every
        token sees what is before it in its own.

        Raises:
            RuntimeError, ValueError, TypeError: it does not take these.
        """
        own = query[0].transpose(0, 1)
        where = (self.row_starts, self.key_starts, self.longest_row, self.longest_total)
        grouped = own.shape[1] != keys.shape[1]
        result = varlen_attn(own, keys, values, *where, scale=scaling, window_size=(-1, 0), enable_gqa=grouped)
        assert isinstance(result, torch.Tensor)
        return result[None]


def can_attend(query: torch.Tensor) -> bool:
    """It is worth asking whether rows like these can be attended to so."""
    return query.is_cuda and query.dtype in HALVES
