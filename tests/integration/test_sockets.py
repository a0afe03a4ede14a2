"""What a group's compute thread hears of its sockets, and how it answers, with and without a compiler."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from cluster.experts import shm_server
from cluster.experts import sockets as listening
from cluster.experts.sockets import Sockets
from cluster.kernels.door import MAX_LINKS, UNREAD, Answers, Door, can_listen
from cluster.routing.step import StepContext
from cluster.transport.codec import WAKE, Kind
from tests.shm_world import ShmWorld, right

BYTES = 4096
ROUTER, GROUP = 0, 1
Pair = tuple[socket.socket, socket.socket]


class Link:
    """A watched connection: what its owner is told, and the packets that came."""

    def __init__(self, pair: Pair, sockets: Sockets) -> None:
        self.router, self.group = pair
        self.group.setblocking(False)
        self.frame = ctypes.create_string_buffer(BYTES)
        self.told: list[tuple[int, int]] = []
        self.packets: list[bytes] = []
        self.fd = self.group.fileno()
        sockets.watch(self.fd, self.ready, (ctypes.addressof(self.frame), BYTES), (0, 0))

    def ready(self, events: int, size: int) -> None:
        self.told.append((events, size))
        if size == UNREAD:
            with contextlib.suppress(BlockingIOError):
                self.packets.append(self.group.recv(BYTES))
        elif size >= 0:
            self.packets.append(self.frame.raw[:size])


@pytest.fixture
def pairs() -> Iterator[Callable[[], Pair]]:
    with contextlib.ExitStack() as stack:

        def make() -> Pair:
            pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            for each in pair:
                stack.callback(each.close)
            return pair

        yield make


@pytest.fixture(params=[True, False], ids=["compiled", "interpreted"])
def compiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        for module in (listening, shm_server):
            monkeypatch.setattr(module, "can_listen", lambda: False)
    return bool(request.param)


def tell(sockets: Sockets, waits: bool = False) -> listening.Found:
    found = sockets.poll(waits)
    for fd, events in found.events:
        ready = sockets.ready(fd)
        if ready is not None:
            ready(events, found.size)
    return found


def test_a_packet_is_read_before_its_owner_is_told(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    link = Link(pairs(), sockets)
    assert tell(sockets).events == []
    for _ in range(3):
        packet = os.urandom(1 + int.from_bytes(os.urandom(1), "little"))
        if packet == WAKE:
            continue
        link.router.send(packet)
        found = tell(sockets, waits=True)
        assert found.events == [(link.fd, select.EPOLLIN)]
        assert not found.slept  # it was there
        assert found.size == (len(packet) if compiles else UNREAD)
        assert link.packets.pop() == packet


def test_who_waits_is_woken_and_says_so(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    link = Link(pairs(), sockets)
    sender = threading.Timer(0.05, link.router.send, [b"late"])
    sender.start()
    found = tell(sockets, waits=True)
    sender.join()
    assert found.slept
    assert link.packets == [b"late"]


def test_what_only_wakes_is_not_told_and_the_wait_goes_on(pairs: Callable[[], Pair]) -> None:
    sockets = Sockets()
    link = Link(pairs(), sockets)
    link.router.send(WAKE)
    link.router.send(WAKE)
    link.router.send(b"a call")
    assert not tell(sockets, waits=True).slept
    assert link.told == [(select.EPOLLIN, len(b"a call"))]
    link.router.send(WAKE)
    sender = threading.Timer(0.05, link.router.send, [b"the next"])
    sender.start()
    assert tell(sockets, waits=True).slept
    sender.join()
    assert link.packets == [b"a call", b"the next"]
    link.router.send(WAKE)
    assert tell(sockets).events == []


def test_a_packet_of_one_byte_that_is_something_else_is_told(pairs: Callable[[], Pair]) -> None:
    sockets = Sockets()
    link = Link(pairs(), sockets)
    other = bytes([int(Kind.CANCEL)])
    link.router.send(other)
    tell(sockets)
    assert link.packets == [other]


def test_of_several_sockets_each_owner_reads_by_itself(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    links = [Link(pairs(), sockets) for _ in range(3)]
    for number, link in enumerate(links):
        link.router.send(b"packet %d" % number)
    found = tell(sockets)
    assert sorted(fd for fd, _ in found.events) == sorted(link.fd for link in links)
    assert found.size == UNREAD
    assert [link.packets for link in links] == [[b"packet 0"], [b"packet 1"], [b"packet 2"]]


def test_the_bell_wakes_once_and_is_told_from_packets(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    link = Link(pairs(), sockets)
    sockets.ring()
    assert sockets.poll(True).only_bell
    assert sockets.poll(False).events == []
    sockets.ring()
    link.router.send(b"x")
    assert not tell(sockets).only_bell
    assert link.packets == [b"x"]


def test_an_end_and_a_socket_that_can_be_written_are_told(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    writes, ends = Link(pairs(), sockets), Link(pairs(), sockets)
    sockets.want_write(writes.fd, True)
    assert tell(sockets).size == UNREAD
    assert writes.told == [(select.EPOLLOUT, UNREAD)]
    sockets.want_write(writes.fd, False)
    ends.router.shutdown(socket.SHUT_WR)
    tell(sockets)
    assert ends.told[0][0] & select.EPOLLIN
    assert ends.packets == [b""]


def test_who_is_not_watched_any_more_is_not_read(pairs: Callable[[], Pair], compiles: bool) -> None:
    sockets = Sockets()
    gone = Link(pairs(), sockets)
    sockets.unwatch(gone.fd)
    gone.router.send(b"nobody hears")
    assert sockets.poll(False).events == []
    assert sockets.ready(gone.fd) is None
    again = Link((gone.router, gone.group), sockets)
    tell(sockets)
    assert again.packets == [b"nobody hears"]
    assert not gone.told


@pytest.mark.skipif(not can_listen(), reason="no compiler")
def test_links_beyond_those_there_is_room_for_are_read_by_their_owners(pairs: Callable[[], Pair]) -> None:
    sockets = Sockets()
    links = [Link(pairs(), sockets) for _ in range(MAX_LINKS + 1)]
    links[-1].router.send(b"last")
    assert tell(sockets).size == UNREAD
    assert links[-1].packets == [b"last"]
    sockets.unwatch(links[3].fd)
    sockets.unwatch(links[-1].fd)
    takes_its_place = Link((links[-1].router, links[-1].group), sockets)
    takes_its_place.router.send(b"again")
    assert tell(sockets).size == len(b"again")


@pytest.mark.skipif(not can_listen(), reason="no compiler")
def test_a_broken_connection_is_an_errors_number() -> None:
    reader, writer = os.pipe()
    frame = ctypes.create_string_buffer(BYTES)
    with select.epoll() as epoll:
        door = Door(epoll.fileno(), WAKE[0])
        epoll.register(reader, select.EPOLLIN)
        door.put(reader, (ctypes.addressof(frame), BYTES), (0, 0))
        os.write(writer, b"no socket")
        assert door.listen(True, False) == [(reader, select.EPOLLIN)]
        assert door.size == -errno.ENOTSOCK
    for fd in (reader, writer):
        os.close(fd)


@pytest.mark.skipif(not can_listen(), reason="no compiler")
def test_an_answer_is_moved_then_sent_with_the_time_of_that(pairs: Callable[[], Pair]) -> None:
    router, group = pairs()
    answers = Answers(group.fileno(), 24, 12)
    for _ in range(3):
        source = ctypes.create_string_buffer(os.urandom(100), 100)
        to = ctypes.create_string_buffer(100)
        answers.packet[:] = packet = os.urandom(24)
        before_s = time.monotonic()
        assert answers.send(ctypes.addressof(source), ctypes.addressof(to), 99) == 0
        got = router.recv(BYTES)
        assert got[:12] + got[20:] == packet[:12] + packet[20:]
        assert before_s <= memoryview(got[12:20]).cast("d")[0] <= time.monotonic()
        assert to.raw == source.raw[:99] + b"\0"


@pytest.mark.skipif(not can_listen(), reason="no compiler")
def test_what_a_socket_does_not_take_is_an_errors_number_at_once(pairs: Callable[[], Pair]) -> None:
    router, group = pairs()
    answers, sent = Answers(group.fileno(), 24, 12), 0
    while (error := answers.send(0, 0, 0)) == 0:
        sent += 1
        assert sent < 1_000_000
    assert error == errno.EAGAIN
    for _ in range(sent):
        assert len(router.recv(BYTES)) == 24
    assert answers.send(0, 0, 0) == 0
    router.close()
    assert answers.send(0, 0, 0) in (errno.EPIPE, errno.ECONNRESET)


def test_a_group_answers_alike_with_and_without_a_compiler(compiles: bool) -> None:
    world = ShmWorld(2, layers=2, copies=2)
    try:
        dispatcher = world.dispatcher()
        for number, num_tokens in enumerate((1, 3, 8)):
            right(world, dispatcher, StepContext(number), num_tokens)
    finally:
        world.fabric.close()
        for group in world.groups.values():
            group.close()
