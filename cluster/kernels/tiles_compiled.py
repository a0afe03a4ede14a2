"""What `cluster.kernels.tiles` runs.

A thread takes its next piece of work before it begins one, so that the last tile of a piece can fetch the first weights
of the next: otherwise what it fetches is as often as not another thread's, and its own next weights are not there.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.registers import OUTPUTS, ROWS, dots, next_piece
from cluster.kernels.tiles import HEADER, PIECE

_BLOCK = 96 * 1024
"""Floats of rows that stay in the second-level cache beside a piece of weights."""


@njit(inline="always")  # type: ignore[untyped-decorator]
def multiply(
    x: int, x_row: int, low: int, high: int, w: int, first: int, last: int, y: int, N: int, K: int, after: int
) -> None:
    """Rows ``low`` to ``high`` times outputs ``first`` to ``last`` of the weight [N, K] at ``w``. ``after`` is where
    the next ones are read."""
    row_bytes, block = K * 4, max(1, _BLOCK // (K * ROWS)) * ROWS
    for begin in range(low, high, block):
        end = min(begin + block, high)
        for n in range(first, last, OUTPUTS):
            here = w + n * row_bytes
            ahead = here + OUTPUTS * row_bytes if n + OUTPUTS < last else after
            for row in range(begin, end, ROWS):
                to = y + (row * N + n) * 4
                dots(min(ROWS, end - row), here, row_bytes, x + row * x_row, x_row, to, N * 4, K, ahead)


def _pieces(work: Any) -> None:
    x_at, w_at, y_at, K, N, num, pieces = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    x_row, total = work[8], num * pieces
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        number, first = piece // pieces, piece % pieces * PIECE
        expert = w_at + work[HEADER + number] * N * K * 4
        after = expert
        if coming < total:
            after = w_at + (work[HEADER + coming // pieces] * N + coming % pieces * PIECE) * K * 4
        low, high = work[HEADER + num + number], work[HEADER + num + number + 1]
        multiply(x_at, x_row, low, high, expert, first, min(first + PIECE, N), y_at, N, K, after)
        piece = coming


@njit(inline="always")  # type: ignore[untyped-decorator]
def _weight_of(work: Any, piece: int) -> tuple[int, int]:
    """Where the numbers of a piece's weight are, and which of its pieces that is."""
    at = HEADER
    while piece >= work[at + 3]:
        piece -= work[at + 3]
        at += 4
    return at, piece


def _side_by_side(work: Any) -> None:
    x_at, K, rows, x_row, total = work[1], work[2], work[3], work[4], work[5]
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        at, number = _weight_of(work, piece)
        weight, y_at, N, first = work[at], work[at + 1], work[at + 2], number * PIECE
        after = weight
        if coming < total:
            at, number = _weight_of(work, coming)
            after = work[at] + number * PIECE * K * 4
        multiply(x_at, x_row, 0, rows, weight, first, min(first + PIECE, N), y_at, N, K, after)
        piece = coming


run, side_by_side = compiled(_pieces), compiled(_side_by_side)
