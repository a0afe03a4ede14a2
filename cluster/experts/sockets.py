"""Local sockets that a compute thread reads between two calls, and a bell that others wake it with."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from typing import NamedTuple

from cluster.kernels.door import UNREAD, Door, can_listen
from cluster.kernels.served import ServedLayers
from cluster.transport.codec import Kind

WAIT_S = 1.0
Ready = Callable[[int, int], None]
"""(epoll events, size): a socket can be read. ``size`` is that of the packet that has been read into the socket's frame
already, with 0 at the end of the connection and an error's number below 0; `UNREAD` if none was."""


class Found(NamedTuple):
    """Sockets that have something, with their events; whether that was waited for; the size of the packet that was
    read, if there is one socket; and whether there is the bell and nothing else."""

    events: list[tuple[int, int]]
    slept: bool
    size: int
    only_bell: bool


class Sockets:
    """Those of one compute thread, which is the only one to call `poll`. The rest is for any thread."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._bell, select.EPOLLIN | select.EPOLLET)  # each ring wakes once and need not be read
        self._only_bell = [(self._bell, select.EPOLLIN)]
        self._door = Door(self._epoll.fileno(), int(Kind.WAKE)) if can_listen() else None
        self._lock = threading.Lock()
        self._watched: dict[int, Ready] = {}

    def ring(self) -> None:
        """Wakes up whoever waits."""
        os.eventfd_write(self._bell, 1)

    def serve(self, layers: ServedLayers, good: bytes) -> None:
        """See `Door.serve`; nothing where nothing can be compiled."""
        if self._door is not None:
            self._door.serve(layers, good)

    @property
    def served(self) -> tuple[int, float, float]:
        """Calls that were served so, seconds of computing them, and since when one is computed (0: none is)."""
        door = self._door
        return (0, 0.0, 0.0) if door is None else (door.served, door.busy_s, door.since_s)

    @property
    def serving(self) -> bool:
        """One is computed just now."""
        return self._door is not None and self._door.since_s > 0

    def watch(self, fd: int, ready: Ready, frame: tuple[int, int], memory: tuple[int, int]) -> None:
        """From now on ``ready`` is called in the compute thread when ``fd`` can be read. It must not block and reads a
        message or two a call. ``frame`` (address and bytes) is for packets that are read before it is called, and
        ``memory`` is what the connection's calls point into."""
        with self._lock:
            self._watched[fd] = ready
            if self._door is not None:
                self._door.put(fd, frame, memory)
        self._epoll.register(fd, select.EPOLLIN)

    def want_write(self, fd: int, wanted: bool) -> None:
        """``ready`` is called too when ``fd`` can be written."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def unwatch(self, fd: int) -> None:
        """Ends `watch`. To be called before ``fd`` is closed."""
        with self._lock:
            self._watched.pop(fd, None)
            if self._door is not None:
                self._door.remove(fd)
        self._epoll.unregister(fd)

    def poll(self, waits: bool, serves: bool = False) -> Found:
        """What there is now, or if ``waits`` within `WAIT_S`. Packets that only wake are not told of, nor calls that
        are served (see `Door.listen`)."""
        if self._door is not None:
            events = self._door.listen(waits, serves)
            return Found(events, self._door.slept, self._door.size, events == self._only_bell)
        events, slept = self._epoll.poll(0.0), False
        if not events and waits:
            events, slept = self._epoll.poll(WAIT_S), True
        return Found(events, slept, UNREAD, events == self._only_bell)

    def ready(self, fd: int) -> Ready | None:
        """Whom to tell of a socket; None if it is not watched any more, or it is the bell."""
        return self._watched.get(fd)
