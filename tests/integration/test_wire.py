"""What arrives on the data plane and should not: damaged frames, strangers, and what either end leaves behind."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from cluster.core import Deadline
from cluster.errors import DeadlineExceeded, InvalidArgument, LinkBroken
from cluster.rpc.v1 import links_pb2
from cluster.transport.codec import (
    CALL_BYTES,
    PROTOCOL_VERSION,
    Placement,
    encode_call,
    encode_form,
    encode_ids,
)
from cluster.transport.greeting import NONCE_BYTES
from cluster.transport.grpc_link import METHOD, SERVICE
from cluster.transport.handshake import decode_welcome, encode_hello
from cluster.transport.mapped import SEALS
from cluster.transport.replies import ReplyStatus, decode_reply_head
from cluster.transport.shm import MEMORY_BYTES, ShmTransport
from tests.echo import BLOCKED, GROUP, SOON, EchoGroup, EchoProcess, call, connect, hello, rows, soon

LARGE = encode_form(torch.float32, (2**20, 2**10), Placement.INLINE) + encode_ids(call(5), 0)


@pytest.fixture
def group() -> Iterator[EchoGroup]:
    group = EchoGroup()
    yield group
    group.close()


# -- gRPC ----------------------------------------------------------------------------------------------------------


class RawStream:
    """A client of the gRPC method that says what it likes."""

    def __init__(self, address: str, *frames: bytes) -> None:
        self._done = threading.Event()
        self._channel = grpc.insecure_channel(address)
        method: Any = self._channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self.stream = method(self._frames(frames), timeout=SOON)

    def _frames(self, frames: tuple[bytes, ...]) -> Iterator[bytes]:
        yield from frames
        self._done.wait(SOON)

    def close(self) -> None:
        self._done.set()
        self._channel.close()


def greeting(**fields: object) -> bytes:
    return encode_hello(hello(protocol=PROTOCOL_VERSION, **fields))


@pytest.mark.parametrize(
    "first", [greeting(), b"", b"\x01\xff\xff", b"nonsense", encode_call(call(1), rows(1))], ids=range(5)
)
def test_a_stream_that_does_not_begin_with_a_handshake_is_refused(first: bytes, group: EchoGroup) -> None:
    raw = RawStream(group.server.address, first)
    if first == greeting():
        assert decode_welcome(next(raw.stream)) is not None
    else:
        with pytest.raises(grpc.RpcError) as caught:
            next(raw.stream)
        assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    raw.close()


def test_another_protocol_version_is_refused(group: EchoGroup) -> None:
    raw = RawStream(group.server.address, encode_hello(hello(protocol=99)))
    with pytest.raises(grpc.RpcError, match="protocol version 99"):
        next(raw.stream)
    raw.close()


@pytest.mark.parametrize("bad", [encode_call(call(5), rows(3))[:-1], LARGE], ids=["cut", "oversized"])
def test_a_call_that_makes_no_sense_is_answered_and_the_stream_goes_on(bad: bytes, group: EchoGroup) -> None:
    given = rows(3)
    raw = RawStream(group.server.address, greeting(), bad, encode_call(call(6), given))
    assert decode_welcome(next(raw.stream)) is not None
    replies = {(head.call_id, head.status) for head in (decode_reply_head(next(raw.stream)) for _ in range(2))}
    assert replies == {(5, ReplyStatus.BAD_CALL), (6, ReplyStatus.OK)}
    raw.close()


@pytest.mark.parametrize("junk", [b"", b"\x09junk", b"\x03short", b"\x04"], ids=range(4))
def test_what_is_no_call_ends_the_stream_and_no_other(junk: bytes, group: EchoGroup) -> None:
    good = connect("grpc", group)
    raw = RawStream(group.server.address, greeting(), junk)
    assert decode_welcome(next(raw.stream)) is not None
    with pytest.raises((StopIteration, grpc.RpcError)):
        next(raw.stream)
    raw.close()
    assert len(good.submit(call(1), rows(2), soon()).wait(soon()).partial_TH) == 2
    good.close()


# -- the local socket ----------------------------------------------------------------------------------------------


def memory(num_bytes: int = 2**20, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class RawLocal:
    """A local socket that says what it likes."""

    def __init__(self, group: EchoGroup, said: links_pb2.Hello | bytes, fds: list[int]) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(SOON)
        self.socket.connect(b"\0" + group.shm.address.encode())
        frame = said if isinstance(said, bytes) else encode_hello(said)
        socket.send_fds(self.socket, [frame], fds)
        for fd in fds:
            os.close(fd)
        self.answer = self.socket.recv(4096)


def local_hello(**fields: object) -> links_pb2.Hello:
    return hello(**{"protocol": PROTOCOL_VERSION, "memory_bytes": 2**20, **fields})


def test_memory_that_is_missing_unsealed_or_of_another_size_is_refused(group: EchoGroup) -> None:
    for said, fds, word in (
        (local_hello(), [], b"memory must come"),
        (local_hello(), [memory(seals=0)], b"sealed"),
        (local_hello(memory_bytes=2**21), [memory()], b"must have"),
        (local_hello(memory_bytes=8), [memory(8)], b"must have"),
        (local_hello(memory_bytes=MEMORY_BYTES), [memory()], b"must have"),
        (b"junk", [memory()], b"handshake"),
        (local_hello(secret="guess"), [memory()], b"secret"),
    ):
        raw = RawLocal(group, said, fds)
        assert word in raw.answer
        raw.socket.close()
    assert group.shm.num_links() == 0


@pytest.mark.parametrize(
    ("frame", "answered"),
    [
        (b"\x09junk", False),
        (b"\x03short", False),
        (b"\x04", False),
        (encode_call(call(5), rows(3)), True),  # inline, on a link that carries nothing inline
        (encode_form(torch.float32, (4, 8), Placement.SHARED, 2**20 - 4, 0, 0) + encode_ids(call(5), 0), True),
        (encode_form(torch.float32, (4, 8), Placement.SHARED, 0, 0, 2**20) + encode_ids(call(5), 0), True),
        (encode_form(torch.float32, (4, 8), Placement.SHARED, 0, 2**20, 0) + encode_ids(call(5), 4), True),
        (encode_form(torch.float32, (4, 8), Placement.SHARED, 2, 0, 0) + encode_ids(call(5), 0), True),
        (LARGE, True),
    ],
    ids=range(9),
)
def test_damaged_frames_end_the_link_or_are_answered_and_others_go_on(
    frame: bytes, answered: bool, group: EchoGroup
) -> None:
    good = connect("shm", group)
    raw = RawLocal(group, local_hello(), [memory()])
    assert decode_welcome(raw.answer) is not None
    raw.socket.send(frame[: CALL_BYTES + 64])
    said = raw.socket.recv(4096)
    if answered:
        head = decode_reply_head(said)
        assert (head.call_id, head.status) == (5, ReplyStatus.BAD_CALL)
    else:
        assert said == b"", "the link has ended"
    assert len(good.submit(call(1), rows(2), soon()).wait(soon()).partial_TH) == 2
    raw.socket.close()
    good.close()


def test_a_group_that_sees_other_memory_is_not_on_this_host(group: EchoGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a socket that leads elsewhere would look like: the nonce that comes back is another one."""
    monkeypatch.setattr("cluster.experts.shm_server.NONCE_BYTES", NONCE_BYTES - 1)
    with pytest.raises(LinkBroken, match="same memory"):
        connect("shm", group)


def test_memory_comes_back_when_answers_are_dropped_calls_cancelled_or_refused(group: EchoGroup) -> None:
    link = connect("shm", group)
    assert isinstance(link, ShmTransport)
    stuck = link.submit(call(1, BLOCKED), rows(1), soon())
    assert group.compute.entered.wait(SOON)
    cancelled = [link.submit(call(number), rows(number), soon()) for number in range(2, 20)]
    for pending in cancelled:
        link.cancel(pending)
    group.compute.open.set()
    kept = stuck.wait(soon()).partial_TH
    for number in range(20, 120):
        link.submit(call(number), rows(number, 32), soon()).wait(soon())
    with pytest.raises(InvalidArgument, match="split"):
        link.submit(call(500), rows(2**14, 2**14), soon())
    del stuck, cancelled, pending
    gc.collect()
    assert link._memory.num_taken() == 1, "the one answer that is still looked at"
    del kept
    gc.collect()
    assert link._memory.num_taken() == 0
    link.close()


def test_a_full_memory_is_waited_for_until_the_deadline(group: EchoGroup) -> None:
    link = ShmTransport(GROUP, group.shm.address, hello(), soon(), memory_bytes=2**20)
    given = rows(64, 512)  # 128 KiB and as much for the answer
    held = [link.submit(call(number), given, soon()).wait(soon()) for number in range(1, 4)]
    began_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="full"):
        link.submit(call(9), given, Deadline.after(0.2))
    assert time.monotonic() - began_s < SOON / 2
    assert link.healthy()
    threading.Timer(0.2, held.clear).start()
    assert torch.equal(link.submit(call(10), given, soon()).wait(soon()).partial_TH, given.hidden_TH + 1)
    link.close()


def test_memory_of_a_prefill_is_kept_for_the_next(group: EchoGroup) -> None:
    """28 MiB: to give them back and take them again takes five times as long as the call."""
    link, trims = connect("shm", group), []
    assert isinstance(link, ShmTransport)
    link._memory._trim = trims.append
    for number in range(1, 4):
        link.submit(call(number), rows(512, 7168), soon()).wait(soon())
        gc.collect()
        assert link.healthy()
    assert link._memory.num_taken() == 0
    assert not trims
    link.close()


def test_memory_of_a_burst_goes_back_to_the_system(group: EchoGroup) -> None:
    link = connect("shm", group)
    assert isinstance(link, ShmTransport)

    def resident() -> int:
        mappings = Path("/proc/self/smaps").read_text().split("expertmesh-link")[1:]  # the router's and the group's
        return max(int(mapping[mapping.index("Rss:") :].split()[1]) * 1024 for mapping in mappings)

    link.submit(call(1), rows(8192, 2048), soon()).wait(soon())
    burst = resident()
    assert burst > 100 * 1024**2
    limit = soon()
    while resident() > 80 * 1024**2:
        gc.collect()
        link.healthy()  # as the keeper of a link calls it
        assert not limit.expired()
        time.sleep(0.02)
    given = rows(8192, 2048)
    assert torch.equal(link.submit(call(2), given, soon()).wait(soon()).partial_TH, given.hidden_TH + 1)
    link.close()


def traces() -> tuple[set[str], int]:
    """Names in shared memory, and local sockets of ours."""
    names = set(os.listdir("/dev/shm"))
    return names, sum("expertmesh-" in line for line in Path("/proc/net/unix").read_text().splitlines())


def test_a_killed_end_leaves_nothing_behind() -> None:
    gc.collect()  # what other tests have left
    before = traces()
    process = EchoProcess()
    link = connect("shm", process)
    link.submit(call(1), rows(512, 512), soon()).wait(soon())
    process.close()
    limit = soon()
    while link.healthy():
        assert not limit.expired()
        time.sleep(0.01)
    link.close()
    del link
    gc.collect()
    assert traces() == before
    assert "expertmesh-link" not in Path("/proc/self/maps").read_text(), "nor is the memory mapped any more"


def test_servers_listen_on_loopback_only() -> None:
    process = EchoProcess()
    link = connect("gloo", process)  # which brings a store and the process groups' own listeners
    link.submit(call(1), rows(2), soon()).wait(soon())
    inodes = set()
    for fd in Path(f"/proc/{process.process.pid}/fd").iterdir():
        target = os.readlink(fd)
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1].split(":")[0])
    assert len(listening) >= 3, "the gRPC server, the store, and the process groups"
    assert all(address.endswith("0100007F") for address in listening), "127.0.0.1, or the same as an IPv6 address"
    link.close()
    process.close()
