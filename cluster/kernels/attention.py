"""Attention of sequences that have one token each in a step, on keys and values where they lie in the blocks.

torch's own attention on CPUs is made for many queries: for one token it takes far longer than reading the history, and
it wants one call a sequence. Here all sequences are one call, divided among threads by sequence and head; the heads
that share a key are rows of one product (`cluster.kernels.dots`), so a history is read once.

Softmax over paged blocks: W. Kwon et al., Efficient Memory Management for Large Language Model Serving with
PagedAttention, SOSP 2023.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence

import torch

from cluster.kernels.team import team

NUMBERS = 5
"""Of each sequence in a table, before the ranges of all."""
_COMPILED, _INPUTS = "attention_compiled", 16

Runs = Sequence[tuple[int, int]]


class Histories:
    """Where the histories of some sequences lie in a store of tokens, for all layers of a step.

    ``rows`` are the sequences' rows of the step's T; ``runs`` of each are ranges of positions in the store, in order;
    ``of`` are their numbers in the step, for whoever asks.
    """

    def __init__(self, rows: Sequence[int], runs: Sequence[Runs], of: Collection[int] = ()) -> None:
        self.rows, self.of = rows, frozenset(of)
        table: list[int] = []
        ranges: list[int] = []
        self.num_tokens, first = 0, NUMBERS * len(rows)
        for row, parts in zip(rows, runs, strict=True):
            tokens = sum(last - start for start, last in parts)
            table += (row, tokens, self.num_tokens, first + len(ranges), len(parts))
            ranges += (number for part in parts for number in part)
            self.num_tokens += tokens
        self.highest = max(ranges, default=0)
        numbers = (*table, *ranges)
        self._table = (ctypes.c_int64 * len(numbers))(*numbers)
        self.table_at = ctypes.addressof(self._table)


def can_attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """`attend` takes tensors like these, and this machine can run it."""
    tensors = (query, keys, values)
    fits = all(t.is_cpu and t.dtype is torch.float32 and t.stride(-1) == 1 for t in tensors)
    fits = fits and keys.is_contiguous() and values.is_contiguous() and query.shape[1] % keys.shape[1] == 0
    whole = keys.shape[2] % _INPUTS == 0 and values.shape[2] % _INPUTS == 0 and query.shape[3] == keys.shape[2]
    return fits and whole and team(_COMPILED) is not None


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    histories: Histories,
    scale: float,
    result: torch.Tensor,
) -> None:
    """Each sequence's attention over all of its history, into its row of ``result`` [1, T, heads, V]; fp32.

    ``query`` is [1, heads, T, D], ``keys`` [tokens, kv heads, D] and ``values`` [tokens, kv heads, V] are the store.
    Tensors are such as `can_attend` has accepted, ``scale`` is positive.

    Raises:
        ValueError: a row or a position does not exist, or shapes do not fit each other.
    """
    run = team(_COMPILED)
    assert run is not None
    _, heads, rows, dim = query.shape
    tokens, kv_heads, v_dim = values.shape
    fits = keys.shape == (tokens, kv_heads, dim) and result.shape == (1, rows, heads, v_dim) and result.is_contiguous()
    fits = fits and query.stride(3) == 1
    if not fits or histories.highest > tokens or max(histories.rows) >= rows or not scale > 0:
        raise ValueError(f"attention of {tuple(query.shape)} over {tuple(keys.shape)} to {tuple(result.shape)}")
    scores = torch.empty(heads * histories.num_tokens, dtype=torch.float32)
    factor = ctypes.c_float(scale)
    places = (query.data_ptr(), keys.data_ptr(), values.data_ptr(), result.data_ptr(), scores.data_ptr())
    shape = (len(histories.rows), kv_heads, heads // kv_heads, dim, v_dim, 4 * query.stride(2), 4 * query.stride(1))
    run((*places, *shape, ctypes.addressof(factor), 4 * heads * v_dim, histories.table_at))
