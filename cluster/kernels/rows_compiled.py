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


@njit  # type: ignore[untyped-decorator]
def _choose(owners: Any, first: Any, second: Any, wanted: Any, busy: Any, E: int, G: int) -> bool:
    """The group of each expert that is wanted: of two that hold it the one with fewer, if that is not the first."""
    for expert in range(E):
        if wanted[expert] and second[expert] < 0:
            owners[expert] = first[expert]
            if first[expert] < -1 or first[expert] >= G:
                return False
            busy[first[expert] + 1] += 1
    for expert in range(E):
        if wanted[expert] and second[expert] >= 0:
            group, other = first[expert], second[expert]
            if group < 0 or group >= G or other >= G:
                return False
            if busy[other + 1] < busy[group + 1]:
                group = other
            owners[expert] = group
            busy[group + 1] += 1
    return True


@njit  # type: ignore[untyped-decorator]
def divide_rows(work: Any) -> None:
    first, rows, experts, weights = longs(work[1]), longs(work[2]), longs(work[3]), words(work[4])
    E, P, G, T, hidden, H, found = work[5], work[6], work[7], work[8], work[9], work[10], longs(work[11])
    second, wanted, chosen = work[12], longs(work[13]), longs(work[13] + 8 * work[5])
    # Of each group: its pairs, its rows, its experts, the last of its rows, and pairs that have been placed.
    for i in range(5 * (G + 1)):
        found[FIRST + i] = 0
    for expert in range(E):
        wanted[expert] = 0
    found[0] = BAD
    pairs, count, named_experts = FIRST, FIRST + G + 1, FIRST + 2 * (G + 1)
    last, done = FIRST + 3 * (G + 1), FIRST + 4 * (G + 1)
    for p in range(P):
        if experts[p] < 0 or experts[p] >= E or rows[p] < 0 or rows[p] >= T or (p > 0 and rows[p] < rows[p - 1]):
            return
        wanted[experts[p]] = 1
    owner_of = first
    if second != 0:
        owner_of = chosen
        if not _choose(chosen, first, longs(second), wanted, longs(work[11] + 8 * done), E, G):
            return
        for group in range(G + 1):
            found[done + group] = 0
    for expert in range(E):
        if wanted[expert]:
            group = owner_of[expert] + 1  # -1 is nobody's
            if group < 0 or group > G:
                return
            found[named_experts + group] += 1
    for p in range(P):
        found[pairs + owner_of[experts[p]] + 1] += 1
    for p in range(P):
        group, row = owner_of[experts[p]] + 1, rows[p]
        index, copies, named = work[14 + 3 * group], work[15 + 3 * group], words(work[16 + 3 * group])
        if copies == 0:
            return
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


@njit  # type: ignore[untyped-decorator]
def add_rows(total: int, T: int, H: int, index: int, partial: int, num: int) -> None:
    for at in range(num):
        row = longs(index)[at] if index != 0 else at
        if row >= 0 and row < T:
            _add(floats(total + row * H * 4), floats(partial + at * H * 4), H)


def _divide(work: Any) -> None:
    divide_rows(work)


def _add_all(work: Any) -> None:
    add_rows(work[1], work[2], work[3], work[4], work[5], work[6])


divide, add = compiled(_divide), compiled(_add_all)
