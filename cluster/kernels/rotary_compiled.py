"""What `cluster.kernels.rotary` runs."""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.exponential import REORDERS
from cluster.kernels.registers import floats, next_piece


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def turn(x: Any, y: Any, cos: Any, sin: Any, half: int) -> None:
    for i in range(half):
        y[i] = x[i] * cos[i] - x[half + i] * sin[i]
    for i in range(half):
        y[half + i] = x[half + i] * cos[half + i] + x[i] * sin[half + i]


def _heads(work: Any) -> None:
    T, dim, many, cos_at, sin_at = work[1], work[2], work[3], work[4], work[5]
    while True:
        first = next_piece(work[0]) * many
        if first >= T:
            break
        for row in range(first, min(first + many, T)):
            cos, sin = floats(cos_at + row * dim * 4), floats(sin_at + row * dim * 4)
            for at in range(6, 16, 5):  # queries; keys
                x_at, heads, x_head, x_row, y_at = work[at], work[at + 1], work[at + 2], work[at + 3], work[at + 4]
                for head in range(heads):
                    to = y_at + (row * heads + head) * dim * 4
                    turn(floats(x_at + head * x_head + row * x_row), floats(to), cos, sin, dim // 2)


run = compiled(_heads)
