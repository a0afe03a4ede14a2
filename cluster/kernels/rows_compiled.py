"""What `cluster.kernels.rows` runs."""

from __future__ import annotations

from typing import Any

from numba import njit

from cluster.kernels.compiling import compiled
from cluster.kernels.registers import floats, longs, words
from cluster.kernels.rows import BAD, FIRST


@njit  # type: ignore[untyped-decorator]
def _copy(to: Any, source: Any, n: int) -> None:
    for i in range(n):
        to[i] = source[i]


@njit  # type: ignore[untyped-decorator]
def _add(to: Any, source: Any, n: int) -> None:
    for i in range(n):
        to[i] += source[i]


def _divide(work: Any) -> None:
    owner_of, rows, experts, weights = longs(work[1]), longs(work[2]), longs(work[3]), words(work[4])
    E, P, G, T, hidden, H, found = work[5], work[6], work[7], work[8], work[9], work[10], longs(work[11])
    # Of each group: its pairs, its rows, the last of them, and pairs that have been placed.
    for i in range(4 * (G + 1)):
        found[FIRST + i] = 0
    found[0] = BAD
    pairs, count, last, done = FIRST, FIRST + G + 1, FIRST + 2 * (G + 1), FIRST + 3 * (G + 1)
    for p in range(P):
        if experts[p] < 0 or experts[p] >= E or rows[p] < 0 or rows[p] >= T or (p > 0 and rows[p] < rows[p - 1]):
            return
        group = owner_of[experts[p]] + 1  # -1 is nobody's
        if group < 0 or group > G:
            return
        found[pairs + group] += 1
        if found[last + group] != rows[p] + 1:
            found[last + group] = rows[p] + 1
            found[count + group] += 1
    for group in range(G + 1):
        found[count + group], found[last + group] = 0, 0
    for p in range(P):
        group, row = owner_of[experts[p]] + 1, rows[p]
        index, copies, named = work[12 + 3 * group], work[13 + 3 * group], words(work[14 + 3 * group])
        if found[last + group] != row + 1:
            found[last + group] = row + 1
            at = found[count + group]
            longs(index)[at] = row
            _copy(floats(copies + at * H * 4), floats(hidden + row * H * 4), H)
            found[count + group] = at + 1
        num, at = found[pairs + group], found[done + group]
        named[at] = found[count + group] - 1
        named[num + at] = experts[p]
        named[2 * num + at] = weights[p]
        found[done + group] = at + 1
    found[0] = 0


def _add_rows(work: Any) -> None:
    total, T, H, index, partial, num = work[1], work[2], work[3], work[4], work[5], work[6]
    for at in range(num):
        row = longs(index)[at] if index != 0 else at
        if row >= 0 and row < T:
            _add(floats(total + row * H * 4), floats(partial + at * H * 4), H)


divide, add = compiled(_divide), compiled(_add_rows)
