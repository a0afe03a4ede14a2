"""Of the C library, for compiled functions: sockets, the clock, and what went wrong."""

from __future__ import annotations

from typing import Any

from numba import njit, types

from cluster.kernels.registers import longs

# By the names that the process knows them by.
send_packet = types.ExternalFunction("send", types.int64(types.int32, types.int64, types.int64, types.int32))
read_packet = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
ppoll = types.ExternalFunction("ppoll", types.int32(types.int64, types.int64, types.int64, types.int64))
epoll_wait = types.ExternalFunction("epoll_wait", types.int32(types.int32, types.int64, types.int32, types.int32))
memcpy = types.ExternalFunction("memcpy", types.int64(types.int64, types.int64, types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
errno_at = types.ExternalFunction("__errno_location", types.CPointer(types.int32)())
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))

POLLIN = EPOLLIN = 1
DONTWAIT, NOSIGNAL = 0x40, 0x4000
EINTR, EAGAIN = 4, 11
_MONOTONIC, _SECOND = 1, 1_000_000_000


@njit  # type: ignore[untyped-decorator]
def now_ns(scratch: int) -> Any:
    """The monotonic clock; ``scratch`` is the address of two numbers of 64 bits that it may write to."""
    _clock_gettime(_MONOTONIC, scratch)
    return longs(scratch)[0] * _SECOND + longs(scratch)[1]
