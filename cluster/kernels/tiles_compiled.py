"""What `cluster.kernels.tiles` runs.

A thread takes its next piece of work before it begins one, so that the last tile of a piece can fetch the first weights
of the next: otherwise what it fetches is as often as not another thread's, and its own next weights are not there.
Where nothing is fetched (`cluster.kernels.registers`), a tile's outputs are spread over its piece.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.registers import (
    FETCHES,
    OUTPUTS,
    ROWS,
    dots_of_bytes,
    dots_of_floats,
    dots_of_halves,
    floats,
    next_piece,
)
from cluster.kernels.tiles import HEADER, PIECE

_BLOCK = 96 * 1024
"""Floats of rows that stay in the second-level cache beside a piece of weights."""


@njit  # type: ignore[untyped-decorator]
def _scale(numbers: Any, factors: Any, n: int) -> None:
    for i in range(n):
        numbers[i] *= factors[i]


@njit(inline="always")  # type: ignore[untyped-decorator]
def multiply(
    x: int,
    x_row: int,
    low: int,
    high: int,
    w: int,
    size: int,
    scales: int,
    first: int,
    last: int,
    y: int,
    N: int,
    K: int,
    after: int,
) -> None:
    """Rows ``low`` to ``high`` times outputs ``first`` to ``last`` of the weight [N, K] at ``w``, ``size`` bytes each
    number of it, and times the output's own number at ``scales``, if that is not 0. ``after`` is where the next ones
    are read."""
    row_bytes, block = K * size, max(1, _BLOCK // (K * ROWS)) * ROWS
    tiles = (last - first) // OUTPUTS
    apart, step = (1, OUTPUTS) if FETCHES else (tiles, 1)
    for begin in range(low, high, block):
        end = min(begin + block, high)
        for tile in range(tiles):
            n = first + tile * step
            here = w + n * row_bytes
            ahead = here + step * row_bytes if tile + 1 < tiles else after
            for row in range(begin, end, ROWS):
                rows, start, to = min(ROWS, end - row), x + row * x_row, y + (row * N + n) * 4
                if size == 4:
                    dots_of_floats(rows, here, apart, start, x_row, to, N * 4, K, ahead)
                elif size == 2:
                    dots_of_halves(rows, here, apart, start, x_row, to, N * 4, K, ahead)
                else:
                    dots_of_bytes(rows, here, apart, start, x_row, to, N * 4, K, ahead)
    if scales != 0:
        for row in range(low, high):
            _scale(floats(y + (row * N + first) * 4), floats(scales + first * 4), last - first)


def _pieces(work: Any) -> None:
    x_at, w_at, y_at, K, N, num, pieces = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    x_row, size, scales_at, total = work[8], work[9], work[10], num * pieces
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        number, first = piece // pieces, piece % pieces * PIECE
        slot = work[HEADER + number]
        expert, scales = w_at + slot * N * K * size, scales_at + slot * N * 4 if scales_at else 0
        after = expert
        if coming < total:
            after = w_at + (work[HEADER + coming // pieces] * N + coming % pieces * PIECE) * K * size
        low, high = work[HEADER + num + number], work[HEADER + num + number + 1]
        multiply(x_at, x_row, low, high, expert, size, scales, first, min(first + PIECE, N), y_at, N, K, after)
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
        multiply(x_at, x_row, 0, rows, weight, 4, 0, first, min(first + PIECE, N), y_at, N, K, after)
        piece = coming


run, side_by_side = compiled(_pieces), compiled(_side_by_side)
