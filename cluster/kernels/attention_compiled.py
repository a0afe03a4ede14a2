"""What `cluster.kernels.attention` runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.attention import NUMBERS
from cluster.kernels.compiling import compiled
from cluster.kernels.dots import dots, dots_of_one, mixes, mixes_of_one
from cluster.kernels.exponential import HIGHEST, REORDERS, exponential
from cluster.kernels.registers import LANES, OUTPUTS, ROWS, floats, longs, next_piece

_AHEAD = 32
"""Tokens that are fetched ahead: a head's part of one is too short for the hardware's prefetcher. Of 8, 16 and 32 the
best on two Zen 4 cores, where it takes 0.6 to 0.8 of what four tokens ahead take."""
_WIDE = OUTPUTS * LANES
_ONE = np.float32(1.0)


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def weigh(scores: Any, first: int, n: int, scale: Any) -> None:
    """Softmax of n scores times ``scale``, in place."""
    highest = scores[first]
    for i in range(first + 1, first + n):
        highest = max(highest, scores[i])
    total = np.float32(0.0)
    for i in range(first, first + n):
        x = (scores[i] - highest) * scale
        weight = exponential(-HIGHEST if x < -HIGHEST else x)
        scores[i] = weight
        total += weight
    share = _ONE / total
    for i in range(first, first + n):
        scores[i] *= share


def _heads(work: Any) -> None:
    q_at, k_at, v_at, y_at, scores_at = work[1], work[2], work[3], work[4], work[5]
    num, kv_heads, group, dim, v_dim = work[6], work[7], work[8], work[9], work[10]
    q_row, q_head, scale, y_row, table = work[11], work[12], floats(work[13])[0], work[14], longs(work[15])
    k_token, v_token, y_head = kv_heads * dim * 4, kv_heads * v_dim * 4, v_dim * 4
    while True:
        piece = next_piece(work[0])
        if piece >= num * kv_heads:
            break
        head, at = piece % kv_heads, piece // kv_heads * NUMBERS
        row, tokens, before, first_run, runs = table[at], table[at + 1], table[at + 2], table[at + 3], table[at + 4]
        q = q_at + row * q_row + head * group * q_head
        scores = scores_at + (before * kv_heads + head * tokens) * group * 4
        y = y_at + row * y_row + head * group * y_head
        done = 0
        for run_at in range(first_run, first_run + 2 * runs, 2):
            n = table[run_at + 1] - table[run_at]
            key = k_at + table[run_at] * k_token + head * dim * 4
            for low in range(0, group, ROWS):
                rows, whole = min(ROWS, group - low), n // OUTPUTS * OUTPUTS
                mine, there = q + low * q_head, scores + (low * tokens + done) * 4
                for t in range(0, whole, OUTPUTS):
                    dots(
                        rows,
                        key + t * k_token,
                        k_token,
                        mine,
                        q_head,
                        there + t * 4,
                        tokens * 4,
                        dim,
                        key + (t + _AHEAD) * k_token,
                    )
                for t in range(whole, n):
                    dots_of_one(
                        rows,
                        key + t * k_token,
                        k_token,
                        mine,
                        q_head,
                        there + t * 4,
                        tokens * 4,
                        dim,
                        key + (t + _AHEAD) * k_token,
                    )
            done += n
        for number in range(group):
            weigh(floats(scores), number * tokens, tokens, scale)
        result = floats(y)
        for i in range(group * v_dim):
            result[i] = np.float32(0.0)
        done = 0
        for run_at in range(first_run, first_run + 2 * runs, 2):
            n = table[run_at + 1] - table[run_at]
            value = v_at + table[run_at] * v_token + head * v_dim * 4
            for low in range(0, group, ROWS):
                rows, whole = min(ROWS, group - low), v_dim // _WIDE * _WIDE
                shares, there = scores + (low * tokens + done) * 4, y + low * y_head
                for d in range(0, whole, _WIDE):
                    mixes(rows, shares, tokens * 4, value + d * 4, v_token, there + d * 4, y_head, n, _AHEAD * v_token)
                for d in range(whole, v_dim, LANES):
                    mixes_of_one(
                        rows, shares, tokens * 4, value + d * 4, v_token, there + d * 4, y_head, n, _AHEAD * v_token
                    )
            done += n


run = compiled(_heads)
