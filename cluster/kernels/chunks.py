"""Causal attention of one sequence's many tokens, on keys and values where they lie in the blocks.

torch's own on CPUs computes what a causal mask hides. Here each token's products end with itself, keys are turned once
for all tokens and heads that share them, and rows of one head are the tile: no sum lies across a register.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from cluster.kernels.registers import LANES, OUTPUTS, ROWS
from cluster.kernels.team import team

RUNS = 18
"""Where, in the numbers of a call, the runs begin."""
QUERIES = 4 * ROWS
"""Tokens of a piece of work."""
WIDE = OUTPUTS * LANES
"""Keys that are turned together."""
FEWEST = 16
"""Of fewer tokens turning the keys is not worth it."""
_COMPILED, _PAD = "chunks_compiled", 16

Runs = Sequence[tuple[int, int]]


def scratch_bytes(num_queries: int, num_keys: int, heads: int, kv_heads: int, dim: int) -> int:
    """Memory that `attend_causal` takes meanwhile: for the sequence's keys, turned, and scores of each thread."""
    return 4 * (_turned(num_keys, kv_heads, dim) + _scores(num_queries, num_keys, heads, kv_heads))


def _turned(num_keys: int, kv_heads: int, dim: int) -> int:
    return kv_heads * -(-num_keys // WIDE) * WIDE * dim


def _row(num_keys: int) -> int:
    return -(-num_keys // LANES) * LANES + _PAD


def _scores(num_queries: int, num_keys: int, heads: int, kv_heads: int) -> int:
    pieces = kv_heads * -(-num_queries // QUERIES)
    return min(torch.get_num_threads(), pieces) * heads // kv_heads * ROWS * _row(num_keys)


def attend_causal(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, runs: Runs, scale: float, result: torch.Tensor
) -> None:
    """Attention of a sequence's last T tokens, each over all before it and itself, into ``result`` [1, T, heads, V].

    ``query`` is [1, heads, T, D], ``keys`` [tokens, kv heads, D] and ``values`` [tokens, kv heads, V] are the store,
    and ``runs`` the ranges in it that hold the sequence, its last T tokens included. fp32, such as
    `cluster.kernels.attention.can_attend` has accepted; ``scale`` is positive. Takes `scratch_bytes` meanwhile.

    Raises:
        ValueError: a position does not exist, or shapes do not fit each other.
    """
    turn, attend = team(_COMPILED, "turn"), team(_COMPILED, "attend")
    assert turn is not None
    assert attend is not None
    _, heads, T, dim = query.shape
    tokens, kv_heads, v_dim = values.shape
    S = sum(last - first for first, last in runs)
    fits = keys.shape == (tokens, kv_heads, dim) and result.shape == (1, T, heads, v_dim) and result.is_contiguous()
    fits = fits and query.stride(3) == 1 and T <= S and all(0 <= first <= last <= tokens for first, last in runs)
    if not fits or not scale > 0:
        raise ValueError(f"attention of {tuple(query.shape)} over {S} tokens of {tuple(keys.shape)}")
    places = [number for run in runs for number in run]
    turned = torch.empty(_turned(S, kv_heads, dim), dtype=torch.float32)
    turn((keys.data_ptr(), turned.data_ptr(), S, kv_heads, dim, len(runs), *[0] * (RUNS - 7), *places))
    row = _row(S)
    scores = torch.empty(_scores(T, S, heads, kv_heads), dtype=torch.float32)
    factor, threads = ctypes.c_float(scale), ctypes.c_int64(0)
    attend(
        (
            *(query.data_ptr(), turned.data_ptr(), values.data_ptr(), result.data_ptr()),
            *(S, kv_heads, dim, len(runs), T, heads // kv_heads, v_dim, 4 * query.stride(2), 4 * query.stride(1)),
            *(ctypes.addressof(factor), ctypes.addressof(threads), scores.data_ptr(), 4 * row),
            *places,
        )
    )
