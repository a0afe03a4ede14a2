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


def _side_by_side(work: Any) -> None:
    x_at, K, rows, x_row, total = work[1], work[2], work[3], work[4], work[5]
    block = block_of(K)
    while True:
        piece = next_piece(work[0])
        if piece >= total:
            break
        at = HEADER
        while piece >= work[at + 3]:
            piece -= work[at + 3]
            at += 4
        weight, y_at, N, first = work[at], work[at + 1], work[at + 2], piece * PIECE
        for low in range(0, rows, block):
            high = min(low + block, rows)
            for n in range(first, min(first + PIECE, N), OUTPUTS):
                for row in range(low, high, ROWS):
                    w, x, y = weight + n * K * 4, x_at + row * x_row, y_at + (row * N + n) * 4
                    dots(min(ROWS, high - row), w, K * 4, x, x_row, y, N * 4, K)


run, side_by_side = compiled(_pieces), compiled(_side_by_side)
