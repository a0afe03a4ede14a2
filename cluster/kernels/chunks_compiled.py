"""What `cluster.kernels.chunks` runs: turning keys, and attention of a few tokens of one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.attention_compiled import weigh
from cluster.kernels.chunks import QUERIES, RUNS, WIDE
from cluster.kernels.compiling import compiled
from cluster.kernels.dots import mixes, mixes_of_one
from cluster.kernels.registers import LANES, ROWS, floats, next_piece

_ZERO = np.float32(0.0)
_AHEAD = 8
"""Values that are fetched ahead."""
_TOGETHER = 64
"""Values that all heads take before the next ones."""


@njit  # type: ignore[untyped-decorator]
def _clear(numbers: Any, first: int, last: int) -> None:
    for i in range(first, last):
        numbers[i] = _ZERO


def _turn(work: Any) -> None:
    k_at, to_at, S, kv_heads, dim, runs = work[1], work[2], work[3], work[4], work[5], work[6]
    blocks = (S + WIDE - 1) // WIDE
    while True:
        piece = next_piece(work[0])
        if piece >= kv_heads * blocks:
            break
        head, block = piece % kv_heads, piece // kv_heads
        first, last = block * WIDE, min(S, (block + 1) * WIDE)
        turned = floats(to_at + (head * blocks + block) * WIDE * dim * 4)
        if last - first < WIDE:
            _clear(turned, 0, WIDE * dim)  # what was there before might be no numbers
        done = 0
        for at in range(RUNS, RUNS + 2 * runs, 2):
            n = work[at + 1] - work[at]
            for s in range(max(first, done), min(last, done + n)):
                key = floats(k_at + ((work[at] + s - done) * kv_heads + head) * dim * 4)
                for d in range(dim):
                    turned[d * WIDE + s - first] = key[d]
            done += n


def _attend(work: Any) -> None:
    q_at, turned_at, v_at, y_at = work[1], work[2], work[3], work[4]
    S, kv_heads, dim, runs = work[5], work[6], work[7], work[8]
    T, group, v_dim, q_row, q_head, scale = work[9], work[10], work[11], work[12], work[13], floats(work[14])[0]
    row = work[17]  # bytes of a row of scores
    scores = 0
    blocks, queries = (S + WIDE - 1) // WIDE, (T + QUERIES - 1) // QUERIES
    v_token, y_token = kv_heads * v_dim * 4, kv_heads * group * v_dim * 4
    while True:
        piece = next_piece(work[0])
        if piece >= kv_heads * queries:
            break
        if scores == 0:  # this thread's own from now on; there are no more of them than pieces
            scores = work[16] + next_piece(work[15]) * group * ROWS * row
        # The last tokens first: they see the most, and what takes longest should not be what is begun last.
        head, begin = piece % kv_heads, (queries - 1 - piece // kv_heads) * QUERIES
        keys = turned_at + head * blocks * WIDE * dim * 4
        for low in range(begin, min(T, begin + QUERIES), ROWS):
            rows = min(ROWS, min(T, begin + QUERIES) - low)
            seen = S - T + low + rows  # by the last of them
            whole = seen // WIDE * WIDE
            q, y = q_at + head * group * q_head + low * q_row, y_at + low * y_token + head * group * v_dim * 4
            for number in range(group):
                for r in range(rows):
                    _clear(floats(scores + (number * ROWS + r) * row), 0, (seen + LANES - 1) // LANES * LANES)
                    _clear(floats(y + r * y_token + number * v_dim * 4), 0, v_dim)
            # Heads inside keys, and then inside values: what one has read lies in the first-level cache for the others.
            for s in range(0, whole, WIDE):
                for number in range(group):
                    here, to = q + number * q_head, scores + number * ROWS * row + s * 4
                    mixes(rows, here, q_row, keys + s * dim * 4, WIDE * 4, to, row, dim, WIDE * dim * 4)
            for s in range(whole, seen, LANES):
                for number in range(group):
                    here, to = q + number * q_head, scores + number * ROWS * row + s * 4
                    key = keys + whole * dim * 4 + (s - whole) * 4
                    mixes_of_one(rows, here, q_row, key, WIDE * 4, to, row, dim, 0)
            for number in range(group):
                for r in range(rows):
                    visible, mine = S - T + low + r + 1, floats(scores + (number * ROWS + r) * row)
                    weigh(mine, 0, visible, scale)
                    _clear(mine, visible, seen)
            done = 0
            for at in range(RUNS, RUNS + 2 * runs, 2):
                until = min(done + work[at + 1] - work[at], seen)
                value = v_at + (work[at] - done) * v_token + head * v_dim * 4
                wide = v_dim // WIDE * WIDE
                for s in range(done, until, _TOGETHER):
                    n, v = min(_TOGETHER, until - s), value + s * v_token
                    for number in range(group):
                        p, to = scores + number * ROWS * row + s * 4, y + number * v_dim * 4
                        for d in range(0, wide, WIDE):
                            mixes(rows, p, row, v + d * 4, v_token, to + d * 4, y_token, n, _AHEAD * v_token)
                        for d in range(wide, v_dim, LANES):
                            mixes_of_one(rows, p, row, v + d * 4, v_token, to + d * 4, y_token, n, _AHEAD * v_token)
                done = until


turn, attend = compiled(_turn), compiled(_attend)
