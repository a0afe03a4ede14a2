"""What `cluster.kernels.decode` runs beside products and attention, a few rows at a time."""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.exponential import REORDERS
from cluster.kernels.norm_compiled import norm
from cluster.kernels.registers import floats, longs, next_piece
from cluster.kernels.rotary_compiled import turn


@njit  # type: ignore[untyped-decorator]
def _copy(x: Any, y: Any, n: int) -> None:
    for i in range(n):
        y[i] = x[i]


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def _sum(x: Any, y: Any, total: Any, n: int) -> None:
    for i in range(n):
        total[i] = x[i] + y[i]


def _heads(work: Any) -> None:
    """Queries turned; keys turned and values, where they are kept. What was given is spoilt."""
    T, many, dim, cos_at, sin_at, at_T = work[1], work[2], work[3], work[4], work[5], longs(work[6])
    while True:
        first = next_piece(work[0]) * many
        if first >= T:
            break
        for row in range(first, min(first + many, T)):
            cos, sin = floats(cos_at + row * dim * 4), floats(sin_at + row * dim * 4)
            for at in range(7, 23, 8):  # queries; keys
                heads, bias_at, weight_at, n = work[at + 1], work[at + 2], work[at + 3], work[at + 4]
                x, y_row = work[at] + row * heads * dim * 4, work[at + 7]
                y = work[at + 6] + (row if at == 7 else at_T[row]) * y_row
                if bias_at != 0:
                    _sum(floats(x), floats(bias_at), floats(x), heads * dim)
                if weight_at != 0:
                    epsilon = floats(work[at + 5])[0]
                    for start in range(0, heads * dim, n):
                        norm(floats(x + start * 4), floats(weight_at), floats(x + start * 4), n, epsilon)
                for head in range(heads):
                    turn(floats(x + head * dim * 4), floats(y + head * dim * 4), cos, sin, dim // 2)
            n, bias_at = work[24], work[25]
            value, to = floats(work[23] + row * n * 4), floats(work[26] + at_T[row] * n * 4)
            if bias_at != 0:
                _sum(value, floats(bias_at), to, n)
            else:
                _copy(value, to, n)


def _add_and_norm(work: Any) -> None:
    """Rows, plus others if there are any, and the norm of that."""
    x_at, add_at, total_at, w_at, y_at, n, rows = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    many, epsilon, y_row = work[8], floats(work[9])[0], work[10]
    while True:
        first = next_piece(work[0]) * many
        if first >= rows:
            break
        for row in range(first, min(first + many, rows)):
            x = x_at + row * n * 4
            if add_at != 0:
                _sum(floats(x), floats(add_at + row * n * 4), floats(total_at + row * n * 4), n)
                x = total_at + row * n * 4
            norm(floats(x), floats(w_at), floats(y_at + row * y_row), n, epsilon)


run, add_and_norm = compiled(_heads), compiled(_add_and_norm)
