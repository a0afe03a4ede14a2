"""What `cluster.kernels.experts` runs: sorting pairs by expert, the gated product, and the sum."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.experts import (
    BAD_EXPERT,
    BAD_ROW,
    COMBINE,
    DOWN,
    DOWN_SCALES,
    DOWN_SIZE,
    EXPERTS,
    GATED,
    INNER,
    MISSING,
    MOST,
    NUM,
    PRODUCT,
    ROW,
    SLOT_OF,
    SLOTS,
    SMALL,
    SORT,
    SORTED,
    STATUS,
    UP,
    UP_SCALES,
    UP_SIZE,
)
from cluster.kernels.exponential import HIGHEST, REORDERS, exponential
from cluster.kernels.libc import memcpy
from cluster.kernels.registers import PANEL, PANELS, floats, longs, next_piece, run_at, words
from cluster.kernels.served import (
    HIDDEN,
    LAYER,
    NOT_HERE,
    NUM_PAIRS,
    OUT,
    PAIRS,
    SCRATCH,
    SCRATCH_BYTES,
    TOKENS,
    WIDTH,
)
from cluster.kernels.served import (
    STATUS as CALL_STATUS,
)
from cluster.kernels.tiles import HEADER, INPUTS, PIECE
from cluster.kernels.tiles_compiled import copy_floats, multiply, multiply_panels

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_BLOCK_ROWS = 96
"""Rows whose gates are still in a cache when they are applied."""
assert _BLOCK_ROWS % PANEL == 0


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def _gate(gates: Any, ups: Any, n: int) -> None:
    """SiLU of n gates times what they let through, in place of the gates."""
    for i in range(n):
        gate = gates[i]
        x = -gate
        x = HIGHEST if x > HIGHEST else x
        x = -HIGHEST if x < -HIGHEST else x
        gates[i] = gate / (_ONE + exponential(x)) * ups[i]


@njit(fastmath=REORDERS)  # type: ignore[untyped-decorator]
def _add_times(total: Any, rows: Any, weight: Any, n: int) -> None:
    for i in range(n):
        total[i] += weight * rows[i]


def _sort(work: Any) -> None:
    """Pairs by slot and by row; and, where somebody wants that, the rows in the order of slots."""
    rows, experts, slot_of = words(work[1]), words(work[2]), longs(work[3])
    num_experts, T, P, S, plan = work[4], work[5], work[6], work[7], work[8]
    head = longs(plan)
    row_of, ends_of = longs(work[9]), longs(work[10])  # P; T
    place_of, pair_of, starts = longs(work[11]), longs(work[12]), longs(work[13])  # P; P; S
    head[STATUS] = 0
    for s in range(S):
        starts[s] = 0
    for t in range(T):
        ends_of[t] = 0
    for p in range(P):
        if experts[p] < 0 or experts[p] >= num_experts:
            head[STATUS] = BAD_EXPERT
            return
        if rows[p] < 0 or rows[p] >= T:
            head[STATUS] = BAD_ROW
            return
        slot = slot_of[experts[p]]
        if slot < 0 or slot >= S:
            head[STATUS] = MISSING
            return
        starts[slot] += 1
        ends_of[rows[p]] += 1
    num = 0
    for s in range(S):
        if starts[s] > 0:
            head[SORTED + HEADER + num] = s
            num += 1
    head[NUM] = num
    total = 0
    for number in range(num):
        head[SORTED + HEADER + num + number] = total
        s = head[SORTED + HEADER + number]
        count = starts[s]
        starts[s] = total
        total += count
    head[SORTED + HEADER + num + num] = total
    total = 0
    for t in range(T):  # to where each begins; when all are placed, it is where each ends
        count = ends_of[t]
        ends_of[t] = total
        total += count
    for p in range(P):
        slot, row = slot_of[experts[p]], rows[p]
        place, at = starts[slot], ends_of[row]
        starts[slot] += 1
        ends_of[row] += 1
        row_of[place] = row
        place_of[at] = place
        pair_of[at] = p
    if work[15] != 0:
        for place in range(P):
            source = work[14] + row_of[place] * work[17] * 4
            copy_floats(floats(work[15] + place * work[16]), floats(source), work[17])


def _gated(work: Any) -> None:
    x_at, w_at, h_at, K, N, num, pieces = work[1], work[2], work[3], work[4], work[5], work[6], work[7]
    x_row, u_at, plan, total = work[8], work[9], longs(work[10]), work[6] * work[7]
    size, scales_at, panels = work[11], work[12], work[13]
    piece = next_piece(work[0])
    while piece < total:
        coming = next_piece(work[0])
        number, first = piece // pieces, piece % pieces * PIECE
        last = min(first + PIECE, N)
        slot = plan[SORTED + HEADER + number]
        gates = w_at + slot * 2 * N * K * size
        ups, after = gates + N * K * size, gates
        gate_scales = scales_at + slot * 2 * N * 4 if scales_at else 0
        up_scales = gate_scales + N * 4 if scales_at else 0
        if coming < total:
            slot = plan[SORTED + HEADER + coming // pieces]
            after = w_at + (slot * 2 * N + coming % pieces * PIECE) * K * size
        start, end = plan[SORTED + HEADER + num + number], plan[SORTED + HEADER + num + number + 1]
        then, between = ups + first * K * size, start
        if PANELS:
            if panels != 0:
                between += (end - start) // PANEL * PANEL
            for low in range(start, between, _BLOCK_ROWS):
                high = min(low + _BLOCK_ROWS, between)
                multiply_panels(x_at, x_row, low, high, gates, gate_scales, first, last, h_at, N, K, 0)
                multiply_panels(x_at, x_row, low, high, ups, up_scales, first, last, u_at, N, K, 0)
                for row in range(low, high, PANEL):
                    at = (row * N + first * PANEL) * 4
                    _gate(floats(h_at + at), floats(u_at + at), (last - first) * PANEL)
        for low in range(between, end, _BLOCK_ROWS):
            high = min(low + _BLOCK_ROWS, end)
            multiply(x_at, x_row, low, high, gates, size, gate_scales, first, last, h_at, N, K, then)
            multiply(x_at, x_row, low, high, ups, size, up_scales, first, last, u_at, N, K, after)
            for row in range(low, high):
                _gate(floats(h_at + (row * N + first) * 4), floats(u_at + (row * N + first) * 4), last - first)
        piece = coming


def _combine(work: Any) -> None:
    y_at, out_at, H, T, adds, many = work[1], work[2], work[3], work[4], work[5], work[6]
    ends_of, place_of, pair_of, weights = longs(work[7]), longs(work[8]), longs(work[9]), floats(work[10])
    while True:
        first = next_piece(work[0]) * many
        if first >= T:
            break
        for t in range(first, min(first + many, T)):
            total = floats(out_at + t * H * 4)
            if adds == 0:
                for i in range(H):
                    total[i] = _ZERO
            for at in range(ends_of[t - 1] if t else 0, ends_of[t]):
                _add_times(total, floats(y_at + place_of[at] * H * 4), weights[pair_of[at]], H)


@njit  # type: ignore[untyped-decorator]
def _up_to(at: int, bytes_each: int) -> int:
    return (at + bytes_each - 1) // bytes_each * bytes_each


def _serve(call: Any) -> None:
    """A whole call of few rows, by one thread: what `GatedExperts.run` does."""
    layer, T, H, P = longs(call[LAYER]), call[TOKENS], call[WIDTH], call[NUM_PAIRS]
    S, inner = layer[SLOTS], layer[INNER]
    call[CALL_STATUS] = NOT_HERE
    if layer[ROW] != H or T < 1 or layer[MOST] < T or P < 1 or P * H > SMALL:
        return
    used = min(P, S)
    at = _up_to(call[SCRATCH], 64)
    sort, gated, combine, plan = at, at + 8 * 20, at + 8 * 36, at + 8 * 50
    product = plan + 8 * SORTED
    rows_of = product + 8 * (HEADER + 2 * used + 2)
    places, pairs_of, ends = rows_of + 8 * P, rows_of + 16 * P, rows_of + 24 * P
    starts = ends + 8 * T
    pairs = starts + 8 * S
    gates = _up_to(pairs + 12 * P, 64)
    ups = gates + 4 * P * inner
    outputs = ups + 4 * P * inner
    x_row, x = 0, call[HIDDEN]
    end = outputs + 4 * P * H
    if T > 1:
        x_row, x = 4 * (H + INPUTS), end
        end += P * x_row
    if end > call[SCRATCH] + call[SCRATCH_BYTES]:
        return
    memcpy(pairs, call[PAIRS], 12 * P)  # the other end may write there; what is checked is what is used
    numbers = longs(sort)
    numbers[1], numbers[2], numbers[3], numbers[4] = pairs, pairs + 4 * P, layer[SLOT_OF], layer[EXPERTS]
    numbers[5], numbers[6], numbers[7], numbers[8] = T, P, S, plan
    numbers[9], numbers[10], numbers[11], numbers[12], numbers[13] = rows_of, ends, places, pairs_of, starts
    numbers[14], numbers[15], numbers[16], numbers[17] = call[HIDDEN], (x if T > 1 else 0), x_row, H
    run_at(layer[SORT], sort)
    if longs(plan)[STATUS] != 0:
        return
    num = longs(plan)[NUM]
    numbers, counter = longs(gated), sort  # whose numbers have been used
    numbers[0], numbers[1], numbers[2], numbers[3], numbers[4] = counter, x, layer[UP], gates, H
    numbers[5], numbers[6], numbers[7], numbers[8] = inner, num, -(-inner // PIECE), x_row
    numbers[9], numbers[10], numbers[11], numbers[12], numbers[13] = ups, plan, layer[UP_SIZE], layer[UP_SCALES], 0
    longs(counter)[0] = 0
    run_at(layer[GATED], gated)
    numbers = longs(product)
    numbers[0], numbers[1], numbers[2], numbers[3], numbers[4] = counter, gates, layer[DOWN], outputs, inner
    numbers[5], numbers[6], numbers[7], numbers[8] = H, num, -(-H // PIECE), 4 * inner
    numbers[9], numbers[10], numbers[11] = layer[DOWN_SIZE], layer[DOWN_SCALES], 0
    longs(counter)[0] = 0
    run_at(layer[PRODUCT], product)
    numbers = longs(combine)
    numbers[0], numbers[1], numbers[2], numbers[3], numbers[4] = counter, outputs, call[OUT], H, T
    numbers[5], numbers[6], numbers[7], numbers[8], numbers[9] = 0, T, ends, places, pairs_of
    numbers[10] = pairs + 8 * P
    longs(counter)[0] = 0
    run_at(layer[COMBINE], combine)
    call[CALL_STATUS] = 0


sort, gated, combine, serve = compiled(_sort), compiled(_gated), compiled(_combine), compiled(_serve)
