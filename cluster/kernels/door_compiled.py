"""What `cluster.kernels.door` runs."""

from __future__ import annotations

import platform
from typing import Any

from numba import njit, types

from cluster.kernels.compiling import compiled
from cluster.kernels.door import (
    ANSWER,
    ANSWER_COMPUTE,
    ANSWER_DONE,
    ANSWER_ID,
    ANSWER_SHAPE,
    BUSY_NS,
    CALL_BYTES,
    CALL_FIRST,
    CALL_ID,
    CALL_LAYER,
    CALL_NUM_PAIRS,
    CALL_PAIRS,
    CALL_PRIORITY,
    CALL_REPLY,
    CALL_ROWS,
    CALL_TOKENS,
    CALL_TRACE,
    CALL_WIDTH,
    DONE_AT,
    EPOLL,
    ERROR,
    EVENTS,
    FD,
    FRAME,
    FRAME_BYTES,
    FREE,
    FREE_BYTES,
    FROM,
    GOOD,
    GOOD_BYTES,
    LAYERS,
    LINK,
    LINKS,
    MAX_EVENTS,
    MEMORY,
    MEMORY_BYTES,
    MOVED,
    NUM,
    NUM_LAYERS,
    NUM_LINKS,
    REPLY,
    REPLY_BYTES,
    SCRATCH,
    SCRATCH_AT,
    SERVED,
    SERVED_WORD,
    SERVES,
    SINCE_NS,
    SIZE,
    SLEPT,
    SOON_NS,
    TIMEOUT_MS,
    TO,
    TO_FD,
    UNREAD,
    URGENT,
    WAITS,
    WAKE,
)
from cluster.kernels.libc import (
    DONTWAIT,
    EINTR,
    EPOLLIN,
    NOSIGNAL,
    epoll_wait,
    errno_at,
    memcpy,
    now_ns,
    read_packet,
    sched_yield,
    send_packet,
)
from cluster.kernels.registers import doubles, longs, run_at, words
from cluster.kernels.served import CALL, HIDDEN, LAYER, NUM_PAIRS, OUT, PAIRS, SCRATCH_BYTES, STATUS, TOKENS, WIDTH
from cluster.kernels.served import SCRATCH as ROOM

_WORDS = 3 if platform.machine() in ("x86_64", "AMD64", "i686") else 4
"""Of a kernel's event, which is packed on these machines: 32 bits of events, and at its end 64 that begin with the
descriptor."""
_SECONDS = 1e-9
_MOST = 1 << 20
"""Rows, and width, of a call that is looked at here: their product is no surprise."""


@njit  # type: ignore[untyped-decorator]
def _link_of(work: Any, fd: int) -> Any:
    """Where the numbers of a connection are; 0 if it is not one of those that are read here."""
    for number in range(work[NUM_LINKS]):
        link = work[LINKS] + 8 * LINK * number
        if longs(link)[FD] == fd:
            return link
    return 0


@njit  # type: ignore[untyped-decorator]
def _read(link: Any) -> Any:
    """One packet."""
    while True:
        size = read_packet(link[FD], link[FRAME], link[FRAME_BYTES], DONTWAIT)
        if size >= 0:
            return size
        error = errno_at()[0]
        if error != EINTR:
            return -error


@njit  # type: ignore[untyped-decorator]
def _fits(at: int, num_bytes: int, memory_bytes: int) -> bool:
    return at >= 0 and at & 3 == 0 and num_bytes >= 0 and at <= memory_bytes and num_bytes <= memory_bytes - at


@njit  # type: ignore[untyped-decorator]
def _serves(work: Any, link: Any, size: int) -> Any:
    """Computes and answers a call; False, and nothing said, if it is not one of those."""
    frame = link[FRAME]
    if size != CALL_BYTES or words(frame + CALL_FIRST)[0] != SERVED_WORD:
        return False
    if words(frame + CALL_PRIORITY)[0] >= URGENT or words(frame + CALL_PRIORITY)[0] < 0:
        return False
    if words(frame + CALL_TRACE)[0] & 0xFF != 0:
        return False
    T, H = types.int64(words(frame + CALL_TOKENS)[0]), types.int64(words(frame + CALL_WIDTH)[0])
    P, layer = types.int64(words(frame + CALL_NUM_PAIRS)[0]), types.int64(words(frame + CALL_LAYER)[0])
    rows, pairs, reply = longs(frame + CALL_ROWS)[0], longs(frame + CALL_PAIRS)[0], longs(frame + CALL_REPLY)[0]
    if T < 1 or T > _MOST or H < 1 or H > _MOST or P < 1 or layer < 0 or layer >= work[NUM_LAYERS]:
        return False
    memory, memory_bytes = link[MEMORY], link[MEMORY_BYTES]
    if not (_fits(rows, 4 * T * H, memory_bytes) and _fits(reply, 4 * T * H, memory_bytes)):
        return False
    function, numbers = longs(work[LAYERS] + 16 * layer)[0], longs(work[LAYERS] + 16 * layer)[1]
    if function == 0 or not _fits(pairs, 12 * P, memory_bytes):
        return False
    began_ns = now_ns(work[SCRATCH_AT])
    work[SINCE_NS] = began_ns
    call_at = work[FREE]
    call = longs(call_at)
    call[LAYER], call[HIDDEN], call[TOKENS], call[WIDTH] = numbers, memory + rows, T, H
    call[PAIRS], call[NUM_PAIRS], call[OUT] = memory + pairs, P, memory + reply
    call[ROOM], call[SCRATCH_BYTES] = call_at + 8 * CALL, work[FREE_BYTES] - 8 * CALL
    call[STATUS] = 0
    run_at(function, call_at)
    good = call[STATUS] == 0
    if good:
        answer = work[ANSWER]
        memcpy(answer, work[GOOD], work[GOOD_BYTES])
        words(answer + ANSWER_SHAPE)[0], words(answer + ANSWER_SHAPE)[1] = words(frame + CALL_TOKENS)[0], H
        longs(answer + ANSWER_ID)[0] = longs(frame + CALL_ID)[0]
        ended_ns = now_ns(work[SCRATCH_AT])
        doubles(answer + ANSWER_COMPUTE)[0] = (ended_ns - began_ns) * _SECONDS
        doubles(answer + ANSWER_DONE)[0] = ended_ns * _SECONDS
        work[BUSY_NS] += ended_ns - began_ns
        work[SERVED] += 1  # before anybody may have the answer
        work[SINCE_NS] = 0
        good = _sent(link[FD], answer, work[GOOD_BYTES]) == 0
        if not good:
            work[SERVED] -= 1
    work[SINCE_NS] = 0
    return good


@njit  # type: ignore[untyped-decorator]
def _sent(fd: int, packet: int, num_bytes: int) -> Any:
    """An error's number, or 0."""
    while send_packet(fd, packet, num_bytes, DONTWAIT | NOSIGNAL) < 0:
        error = errno_at()[0]
        if error != EINTR:
            return error
    return 0


def _listen(work: Any) -> None:
    events = words(work[EVENTS])
    work[SLEPT], timeout_ms, soon_ns = 0, 0, 0
    ends_ns = now_ns(work[SCRATCH_AT]) + work[TIMEOUT_MS] * 1_000_000
    while True:
        num = epoll_wait(work[EPOLL], work[EVENTS], MAX_EVENTS, timeout_ms)
        work[NUM], work[SIZE] = num, UNREAD
        if num == 0 and timeout_ms == 0 and work[WAITS]:
            if soon_ns > 0 and now_ns(work[SCRATCH_AT]) < soon_ns:
                sched_yield()
                continue
            work[SLEPT], timeout_ms = 1, work[TIMEOUT_MS]
            continue
        if num == 1 and events[0] == EPOLLIN:
            link = _link_of(work, events[_WORDS - 2])
            if link != 0:
                size = _read(longs(link))
                if size == 1 and words(longs(link)[FRAME])[0] & 0xFF == work[WAKE]:
                    timeout_ms, soon_ns = 0, now_ns(work[SCRATCH_AT]) + SOON_NS
                    if work[WAITS]:
                        continue
                    work[NUM] = num = 0
                    break
                if work[SERVES] and _serves(work, longs(link), size):
                    timeout_ms, soon_ns = 0, 0
                    if work[WAITS] and now_ns(work[SCRATCH_AT]) < ends_ns:
                        continue  # as long as nobody rings
                    work[NUM] = num = 0
                    break
                work[SIZE] = size
        break
    for i in range(num):  # closer together; what is written has been read
        mask, fd = events[_WORDS * i], events[_WORDS * i + _WORDS - 2]
        events[2 * i], events[2 * i + 1] = mask, fd


def _answer(work: Any) -> None:
    if work[MOVED] > 0:
        memcpy(work[TO], work[FROM], work[MOVED])
    doubles(work[REPLY] + work[DONE_AT])[0] = now_ns(work[SCRATCH]) * _SECONDS
    work[ERROR] = _sent(work[TO_FD], work[REPLY], work[REPLY_BYTES])


listen, answer = compiled(_listen), compiled(_answer)
