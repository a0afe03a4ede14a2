"""What `cluster.kernels.exchange` runs."""

from __future__ import annotations

from typing import Any

from numba import njit, types

from cluster.kernels.compiling import compiled
from cluster.kernels.exchange import (
    BEFORE,
    BEGAN_NS,
    BROKEN,
    BUFFER,
    BUFFER_BYTES,
    CALL,
    CALL_ID,
    DIVISION,
    FD,
    FOUND,
    FULL,
    GOOD,
    GOOD_WORD,
    GROUP,
    HEADER,
    HEADER_BYTES,
    IDLE,
    IDS,
    IDS_AT,
    LATE,
    LINK,
    LINKS,
    NUMBERS,
    OTHER,
    REPLY,
    SCRATCH,
    SENT,
    SENT_NS,
    SHAPE,
    SIZE,
    STATE,
    STATE_OF_ALL,
    TICK_NS,
    TIMES,
    TOLD,
    TOTAL,
    WAIT_NS,
)
from cluster.kernels.libc import (
    DONTWAIT,
    EAGAIN,
    EINTR,
    NOSIGNAL,
    POLLIN,
    errno_at,
    now_ns,
    ppoll,
    read_packet,
    send_packet,
)
from cluster.kernels.registers import doubles, floats, longs, words
from cluster.kernels.rows import FIRST
from cluster.kernels.rows_compiled import add_rows, divide_rows


@njit  # type: ignore[untyped-decorator]
def _base_of(work: Any) -> Any:
    return DIVISION + 3 * (work[7] + 1)


def _send_all(work: Any) -> None:
    divide_rows(work)
    found, G, T, H = longs(work[11]), work[7], work[8], work[10]
    base = _base_of(work)
    work[base + STATE_OF_ALL] = found[0]
    if found[0] != 0:
        return
    size, ids_at, ids, total = (
        work[base + HEADER_BYTES],
        work[base + IDS_AT],
        words(work[base + IDS]),
        work[base + TOTAL],
    )
    for number in range(work[base + LINKS]):
        at = base + NUMBERS + LINK * number
        group, header, told = work[at + GROUP], work[at + HEADER], doubles(work[base + TOLD] + 8 * FOUND * number)
        pairs, rows = found[FIRST + group + 1], found[FIRST + G + 1 + group + 1]
        told[1], told[2], told[3] = rows, pairs, found[FIRST + 2 * (G + 1) + group + 1]
        work[at + STATE] = IDLE
        told[0] = IDLE
        for i in range(4, FOUND):
            told[i] = 0.0
        if pairs == 0:
            continue
        words(header + SHAPE)[0] = rows
        for i in range((size - ids_at) // 4):
            words(header + ids_at)[i] = ids[i]
        words(header + ids_at)[0] = pairs
        before, state = work[at + BEFORE], SENT
        while True:
            if send_packet(work[at + FD], header - before, size + before, DONTWAIT | NOSIGNAL) >= 0:
                break
            error = errno_at()[0]
            if error != EINTR:
                state = FULL if error == EAGAIN else BROKEN
                work[at + SIZE] = -error
                break
        work[at + STATE] = state
        told[0] = state
    for i in range(T * H):
        floats(total)[i] = 0.0
    work[base + SENT_NS] = now_ns(work[base + SCRATCH])


@njit  # type: ignore[untyped-decorator]
def _read(work: Any, at: int, ends_ns: int, scratch: int) -> int:
    """One packet of a link, if it comes before the end."""
    while True:
        left, flags = ends_ns - now_ns(scratch), 0
        if left < TICK_NS:  # a socket's own limit is coarse
            flags = DONTWAIT
            if left > 0:
                longs(scratch)[0], longs(scratch)[1] = 0, left
                longs(scratch)[2] = (work[at + FD] & 0xFFFFFFFF) | (POLLIN << 32)
                ppoll(scratch + 16, 1, scratch, 0)
        size = read_packet(work[at + FD], work[at + BUFFER], work[at + BUFFER_BYTES], flags)
        work[at + SIZE] = size
        if size > 0:
            return GOOD
        if size == 0:
            return BROKEN
        error = errno_at()[0]
        if error == EAGAIN and left <= 0:
            return LATE
        if error != EAGAIN and error != EINTR:
            work[at + SIZE] = -error
            return BROKEN


@njit  # type: ignore[untyped-decorator]
def _as_hoped(work: Any, at: int, good: int, rows: int, H: int) -> Any:
    if work[at + SIZE] < TIMES + 32:
        return False
    word, shape = words(work[at + BUFFER]), words(work[at + BUFFER] + SHAPE)
    first, second = words(work[at + BUFFER] + CALL_ID)[0], words(work[at + BUFFER] + CALL_ID)[1]
    call = (types.int64(first) & 0xFFFFFFFF) | (types.int64(second) << 32)
    return word[0] == good and shape[0] == rows and shape[1] == H and call == work[at + CALL]


def _wait_for_all(work: Any) -> None:
    base = _base_of(work)
    found, G, T, H = longs(work[11]), work[7], work[8], work[10]
    scratch = work[base + SCRATCH]
    began_ns = now_ns(scratch)
    work[base + BEGAN_NS] = began_ns
    ends_ns = began_ns + work[base + WAIT_NS]
    work[base + STATE_OF_ALL] = 1
    for number in range(work[base + LINKS]):
        at, told = base + NUMBERS + LINK * number, doubles(work[base + TOLD] + 8 * FOUND * number)
        if work[at + STATE] == IDLE:
            continue
        if work[at + STATE] != SENT:
            return
        group = work[at + GROUP]
        rows = found[FIRST + G + 1 + group + 1]
        state = _read(work, at, ends_ns, scratch)
        told[8] = now_ns(scratch) * 1e-9
        if state == GOOD and not _as_hoped(work, at, work[base + GOOD_WORD], rows, H):
            state = OTHER
        work[at + STATE] = state
        told[0] = state
        if state != GOOD:
            return
        index = 0 if rows == T else work[DIVISION + 3 * (group + 1)]
        add_rows(work[base + TOTAL], T, H, index, work[at + REPLY], rows)
        for i in range(4):
            told[4 + i] = doubles(work[at + BUFFER] + TIMES)[i]
        told[9] = now_ns(scratch) * 1e-9
    work[base + STATE_OF_ALL] = 0


send, wait = compiled(_send_all), compiled(_wait_for_all)
