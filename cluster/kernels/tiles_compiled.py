"""What `cluster.kernels.tiles` runs."""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.registers import OUTPUTS, ROWS, dots, next_piece
from cluster.kernels.tiles import HEADER, PIECE

_BLOCK = 96 * 1024
"""Floats of rows that stay in the second-level cache beside a piece of weights."""


@njit  # type: ignore[untyped-decorator]
def block_of(inputs: int) -> int:
    """Rows that go through a piece of weights before the next ones do."""
    return max(1, _BLOCK // (inputs * ROWS)) * ROWS


def _pieces(work: Any) -> None:
    x_at, w_at, y_at, K, N, num, pieces = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    x_row = work[8]
    block = block_of(K)
    while True:
        piece = next_piece(work[0])
        if piece >= num * pieces:
            break
        number, first = piece // pieces, piece % pieces * PIECE
        expert = w_at + work[HEADER + number] * N * K * 4
        start, end = work[HEADER + num + number], work[HEADER + num + number + 1]
        for low in range(start, end, block):
            high = min(low + block, end)
            for n in range(first, min(first + PIECE, N), OUTPUTS):
                for row in range(low, high, ROWS):
                    w, x, y = expert + n * K * 4, x_at + row * x_row, y_at + (row * N + n) * 4
                    dots(min(ROWS, high - row), w, K * 4, x, x_row, y, N * 4, K)


run = compiled(_pieces)
