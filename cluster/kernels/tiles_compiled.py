"""What `cluster.kernels.tiles` runs.

A thread takes its next piece of work before it begins one, so that the last tile of a piece can fetch the first weights
of the next: otherwise what it fetches is as often as not another thread's, and its own next weights are not there.
Where nothing is fetched (`cluster.kernels.streams`), a tile's outputs are spread over its piece.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.panels import (
    MOST_ROWS,
    PANEL_OUTPUTS,
    dots_in_panel,
    into_panel,
    on_stack,
    out_of_panel,
)
from cluster.kernels.registers import LANES, OUTPUTS, PANEL, PANELS, ROWS, floats, longs, next_piece
from cluster.kernels.streams import (
    FETCHES,
    stream_of_bytes,
    stream_of_floats,
    stream_of_halves,
    tile_of_bytes,
    tile_of_floats,
    tile_of_halves,
)
from cluster.kernels.tiles import HEADER, PIECE

_BLOCK = 96 * 1024
"""Floats of rows that stay in the second-level cache beside a piece of weights."""
_AHEAD_OF_STREAM, _AHEAD_OF_TILE = 8 * 1024, 16 * 1024
"""Bytes that are fetched before they are read, or a whole output or tile at least."""
_SLOWEST = 2
"""What a tile fetches is divided by 2 to this, at most."""


@njit  # type: ignore[untyped-decorator]
def _scale(numbers: Any, factors: Any, n: int) -> None:
    for i in range(n):
        numbers[i] *= factors[i]


@njit  # type: ignore[untyped-decorator]
def _scale_all(numbers: Any, factor: Any, n: int) -> None:
    for i in range(n):
        numbers[i] *= factor


@njit  # type: ignore[untyped-decorator]
def copy_floats(to: Any, source: Any, n: int) -> None:
    for i in range(n):
        to[i] = source[i]


@njit  # type: ignore[untyped-decorator]
def _stream_past(
    x: int,
    x_row: int,
    begin: int,
    end: int,
    w: int,
    size: int,
    first: int,
    last: int,
    y: int,
    N: int,
    K: int,
    row_bytes: int,
    after: int,
) -> None:
    """An output at a time, past as many rows as a tile has or fewer."""
    rows, start = end - begin, x + begin * x_row
    far = min(last - first, max(1, _AHEAD_OF_STREAM // row_bytes))
    for n in range(first, last):
        here, to = w + n * row_bytes, y + (begin * N + n) * 4
        ahead = here + far * row_bytes if n + far < last else after + (n + far - last) * row_bytes
        if size == 4:
            stream_of_floats(rows, here, start, x_row, to, N * 4, K, ahead)
        elif size == 2:
            stream_of_halves(rows, here, start, x_row, to, N * 4, K, ahead)
        else:
            stream_of_bytes(rows, here, start, x_row, to, N * 4, K, ahead)


@njit  # type: ignore[untyped-decorator]
def _tiles_past(
    x: int,
    x_row: int,
    begin: int,
    end: int,
    w: int,
    size: int,
    first: int,
    last: int,
    y: int,
    N: int,
    K: int,
    row_bytes: int,
    after: int,
) -> None:
    """A tile of outputs at a time, past all rows, as evenly as they can be divided. While the first of them go past it,
    what comes is fetched, an equal part at a time."""
    tiles = (last - first) // OUTPUTS
    apart, step = (1, OUTPUTS) if FETCHES else (tiles, 1)
    times = (end - begin + ROWS - 1) // ROWS
    many = (end - begin + times - 1) // times
    slow = 0
    while slow < _SLOWEST and 2 << slow <= times:
        slow += 1
    far, part = min(tiles, max(1, _AHEAD_OF_TILE // (OUTPUTS * row_bytes))), (OUTPUTS * row_bytes) >> slow
    for tile in range(tiles):
        n = first + tile * step
        here = w + n * row_bytes
        later = tile + far
        ahead = here + far * step * row_bytes if later < tiles else after + (later - tiles) * step * row_bytes
        parts = 1 << slow
        for row in range(begin, end, many):
            rows, start, to = min(many, end - row), x + row * x_row, y + (row * N + n) * 4
            if size == 4:
                tile_of_floats(rows, here, apart, start, x_row, to, N * 4, K, ahead, slow)
            elif size == 2:
                tile_of_halves(rows, here, apart, start, x_row, to, N * 4, K, ahead, slow)
            else:
                tile_of_bytes(rows, here, apart, start, x_row, to, N * 4, K, ahead, slow)
            parts -= 1
            ahead = ahead + part if parts > 0 else here  # which is there: nothing comes of asking for it


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
    for begin in range(low, high, block):
        end = min(begin + block, high)
        if FETCHES and end - begin <= ROWS:
            _stream_past(x, x_row, begin, end, w, size, first, last, y, N, K, row_bytes, after)
        else:
            _tiles_past(x, x_row, begin, end, w, size, first, last, y, N, K, row_bytes, after)
    if scales != 0:
        for row in range(low, high):
            _scale(floats(y + (row * N + first) * 4), floats(scales + first * 4), last - first)


@njit(inline="always")  # type: ignore[untyped-decorator]
def multiply_panels(
    x: int,
    x_row: int,
    low: int,
    high: int,
    w: int,
    scales: int,
    first: int,
    last: int,
    y: int,
    N: int,
    K: int,
    results: int,
) -> None:
    """The same for a weight of floats and rows that lie in panels (`cluster.kernels.panels`), each where its first row
    would begin. What comes out are panels too; or, if ``results`` is room for them, rows."""
    row_bytes, block = K * 4, max(1, min(_BLOCK // K, MOST_ROWS) // PANEL) * PANEL
    whole = (last - first) // PANEL_OUTPUTS
    rest = last - first - whole * PANEL_OUTPUTS
    for begin in range(low, high, block):
        end = min(begin + block, high)
        to, to_row = y + (begin * N + first * PANEL) * 4, N * 4
        if results != 0:
            to, to_row = results, PIECE * 4
        for tile in range(whole + (1 if rest else 0)):
            outputs, apart, n = PANEL_OUTPUTS, whole, tile
            if tile == whole:
                outputs, apart, n = rest, 1, whole * PANEL_OUTPUTS
            here = w + (first + n) * row_bytes
            for row in range(begin, end, PANEL):
                start, panel = x + row * x_row, to + (row - begin) * to_row + n * PANEL * 4
                dots_in_panel(outputs, here, apart, start, panel, K)
        for row in range(begin, end, PANEL):
            panel = to + (row - begin) * to_row
            if scales != 0:
                for n in range(last - first):
                    _scale_all(floats(panel + n * PANEL * 4), floats(scales)[first + n], PANEL)
            if results != 0:
                turned = (last - first) // LANES * LANES
                out_of_panel(panel, turned, y + (row * N + first) * 4, N * 4)
                for n in range(turned, last - first):
                    for number in range(PANEL):
                        floats(y + ((row + number) * N + first + n) * 4)[0] = floats(panel)[n * PANEL + number]


def _lay_out(work: Any) -> None:
    """Rows, in the order of slots, to where products read them, ``many`` of a slot at a time: a panel where these are
    as many as one has, and panels are wanted."""
    x_at, x_row, row_of, to_at, to_row, K, many = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    num, begins, panels, rows = work[8], longs(work[9]), work[10], on_stack()
    number, before = 0, 0  # the slot of this thread's piece, whose numbers rise, and pieces of the slots in front of it
    while True:
        piece = next_piece(work[0])
        while number < num:
            pieces = (begins[number + 1] - begins[number] + many - 1) // many
            if piece < before + pieces:
                break
            before += pieces
            number += 1
        if number == num:
            break
        first = begins[number] + (piece - before) * many
        last = min(first + many, begins[number + 1])
        if PANELS and panels != 0 and last - first == PANEL:
            for at in range(PANEL):
                row = first + at if row_of == 0 else longs(row_of)[first + at]
                longs(rows)[at] = x_at + row * x_row
            into_panel(rows, K, to_at + first * to_row)
            continue
        for place in range(first, last):
            row = place if row_of == 0 else longs(row_of)[place]
            copy_floats(floats(to_at + place * to_row), floats(x_at + row * x_row), K)


def _pieces(work: Any) -> None:
    x_at, w_at, y_at, K, N, num, pieces = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    x_row, size, scales_at, total = work[8], work[9], work[10], num * pieces
    results = on_stack()
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        number, first = piece // pieces, piece % pieces * PIECE
        slot = work[HEADER + number]
        expert, scales = w_at + slot * N * K * size, scales_at + slot * N * 4 if scales_at else 0
        after = expert
        if coming < total:
            after = w_at + (work[HEADER + coming // pieces] * N + coming % pieces * PIECE) * K * size
        low, high, last = work[HEADER + num + number], work[HEADER + num + number + 1], min(first + PIECE, N)
        if PANELS and work[11] != 0:
            between = low + (high - low) // PANEL * PANEL
            multiply_panels(x_at, x_row, low, between, expert, scales, first, last, y_at, N, K, results)
            low = between
        multiply(x_at, x_row, low, high, expert, size, scales, first, last, y_at, N, K, after)
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
    x_at, K, rows, x_row, total, results = work[1], work[2], work[3], work[4], work[5], on_stack()
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        at, number = _weight_of(work, piece)
        weight, y_at, N, first = work[at], work[at + 1], work[at + 2], number * PIECE
        after = weight
        if coming < total:
            at, number = _weight_of(work, coming)
            after = work[at] + number * PIECE * K * 4
        last, low = min(first + PIECE, N), 0
        if PANELS and work[6] != 0:
            low = rows // PANEL * PANEL
            multiply_panels(x_at, x_row, 0, low, weight, 0, first, last, y_at, N, K, results)
        multiply(x_at, x_row, low, rows, weight, 4, 0, first, last, y_at, N, K, after)
        piece = coming


run, side_by_side, lay_out = compiled(_pieces), compiled(_side_by_side), compiled(_lay_out)
