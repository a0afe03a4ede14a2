"""The other process of `bench dispatch`: a group whose experts only echo, or the floors to compare it with.

Run as ``python -m cluster.bench.echo group|floors``; prints one JSON object with addresses, then serves until its
standard input ends.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import torch

from cluster.bench.echo_compiled import echo
from cluster.experts.host import ExpertHost
from cluster.experts.identity import Identity
from cluster.experts.server import DataPlaneServer, Offers
from cluster.experts.shm_server import ShmServer
from cluster.kernels.door import can_listen
from cluster.kernels.served import ServedLayer, ServedLayers
from cluster.transport.grpc_link import CHANNEL_OPTIONS

IDENTITY = Identity(0, "echo", "echo", "fp32", "echo")
FLOOR_METHOD = "/floor.Echo/Echo"
LARGEST_BYTES = 256 * 1024**2


def serve_group() -> tuple[dict[str, str], list[Callable[[], None]]]:
    """A whole group but for its experts: queue, compute thread, all servers; as in one whose experts are in memory,
    decode calls over shared memory are served where they are read. Its answer is its input, in fp32."""
    served = ServedLayers([ServedLayer(echo.address, 0, 0, echo)]) if can_listen() else None
    host = ExpertHost(lambda _layer, rows: rows.hidden_TH.float(), threads=1, served=served)
    shm = ShmServer(IDENTITY, host)
    server = DataPlaneServer(IDENTITY, host, "127.0.0.1", "127.0.0.1", Offers(shm.address))
    return {"grpc": server.address, "shm": shm.address}, [server.close, shm.close, host.close]


def serve_floors() -> tuple[dict[str, str], list[Callable[[], None]]]:
    """What plain Python does with the same bytes: a local socket, a TCP socket, a gRPC stream."""
    local = socket.socket(socket.AF_UNIX)
    local.bind(b"\0expertmesh-floor-" + os.urandom(8).hex().encode())
    tcp = socket.create_server(("127.0.0.1", 0))
    for listening in (local, tcp):
        listening.listen()
        threading.Thread(target=_accept, args=(listening,), daemon=True).start()
    server = grpc.server(ThreadPoolExecutor(4), options=CHANNEL_OPTIONS)
    service, method = FLOOR_METHOD[1:].split("/")
    handler: Any = grpc.stream_stream_rpc_method_handler(_echo_stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    addresses = {
        "socket": local.getsockname()[1:].decode(),
        "tcp": str(tcp.getsockname()[1]),
        "grpc_echo": f"127.0.0.1:{port}",
    }
    return addresses, [lambda: _stop(server)]


def _stop(server: grpc.Server) -> None:
    server.stop(0).wait(5)


def _echo_stream(messages: Iterator[bytes], _context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from messages


def _accept(listening: socket.socket) -> None:
    while True:
        connection, _ = listening.accept()
        if connection.family == socket.AF_INET:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_echo_socket, args=(connection,), daemon=True).start()


def _echo_socket(connection: socket.socket) -> None:
    """The first 8 bytes say how many bytes each message has."""
    size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")
    buffer = memoryview(bytearray(min(size, LARGEST_BYTES)))
    while receive_exactly(connection, buffer):
        connection.sendall(buffer)


def receive_exactly(connection: socket.socket, buffer: memoryview) -> bool:
    """Fills the buffer; False when the other end is gone."""
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if not count:
            return False
        filled += count
    return True


def main() -> None:
    """Serves what the command line names."""
    role, core = sys.argv[1], int(sys.argv[2])
    if core >= 0:
        os.sched_setaffinity(0, {core})  # before any thread is there
    torch.set_num_threads(1)
    addresses, closers = {"group": serve_group, "floors": serve_floors}[role]()
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    for close in closers:
        close()


if __name__ == "__main__":
    main()
