"""How a router and a group begin to talk over shared memory: the router's side."""

from __future__ import annotations

import mmap
import secrets
import socket

from cluster.core import Deadline, GroupId
from cluster.errors import LinkBroken, LinkRefused
from cluster.rpc.v1 import links_pb2
from cluster.transport.codec import PROTOCOL_VERSION
from cluster.transport.handshake import decode_welcome, encode_hello

NONCE_BYTES = 32
FRAME_BYTES = 64 * 1024
"""The longest packet."""


def greet(
    connection: socket.socket,
    memory: tuple[int, mmap.mmap],
    address: str,
    group: GroupId,
    hello: links_pb2.Hello,
    deadline: Deadline,
) -> None:
    """Connects to a group's socket and hands it the memory (descriptor and map), the first bytes of which become a
    nonce.

    Raises:
        LinkRefused, LinkBroken: as for `cluster.transport.shm.ShmTransport`.
    """
    fd, mapped = memory
    greeting, nonce = links_pb2.Hello(), secrets.token_bytes(NONCE_BYTES)
    greeting.CopyFrom(hello)
    greeting.protocol, greeting.memory_bytes = PROTOCOL_VERSION, len(mapped)
    mapped[:NONCE_BYTES] = nonce
    try:
        connection.settimeout(max(0.001, deadline.remaining_s()))
        connection.connect(b"\0" + address.encode())
        socket.send_fds(connection, [encode_hello(greeting)], [fd])
        answer = connection.recv(FRAME_BYTES)
    except OSError as exc:
        raise LinkBroken(f"group {group}: no local socket {address}: {exc.strerror or exc}") from exc
    if not answer:
        raise LinkBroken(f"group {group} closed its local socket during the handshake")
    welcome = decode_welcome(answer)
    if welcome is None:
        reason = answer.decode("utf-8", "replace")
        raise LinkRefused(f"group {group} refused the shared-memory link: {reason}")
    if welcome.nonce != nonce:
        raise LinkBroken(f"group {group} does not see the same memory")
