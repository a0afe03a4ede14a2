"""Clients that leave streams of Serve's ingress: with a server and a handler that are built as Serve's are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest

from cluster.api.ingress import noticing

PERIOD_S = 0.005


class Upstream:
    """Yields messages of ``size`` bytes, and knows of a client that has left only while it waits for the next one."""

    def __init__(self, size: int) -> None:
        self._message = b"x" * size
        self.sent, self.told = 0, asyncio.Event()

    async def stream(self, _request: Any, _context: Any) -> AsyncGenerator[bytes, None]:
        while True:
            try:
                await asyncio.sleep(PERIOD_S)
            except asyncio.CancelledError:
                self.told.set()
                return
            self.sent += 1
            yield self._message


async def _served(handler: Any) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(handler)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Stream": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, port


async def _leave(port: int, reads: int, pause_s: float) -> None:
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_stream("/test.Test/Stream")(b"")
        for _ in range(reads):
            await call.read()
        await asyncio.sleep(pause_s)
        call.cancel()


@pytest.mark.parametrize(("size", "pause_s"), [(10, 0.0), (100_000, 0.3)], ids=["reads", "does-not-read"])
def test_a_client_that_leaves_is_noticed(size: int, pause_s: float) -> None:
    async def scene() -> None:
        upstream = Upstream(size)
        server, port = await _served(noticing(upstream.stream))
        await _leave(port, 3, pause_s)
        await asyncio.wait_for(upstream.told.wait(), 10)
        sent = upstream.sent
        assert sent < 2_000
        await asyncio.sleep(10 * PERIOD_S)
        assert upstream.sent == sent
        await server.stop(0)

    asyncio.run(scene())


def test_without_it_a_client_that_does_not_read_leaves_unnoticed() -> None:
    """The control: so it is with a generator, which is what Serve has."""

    async def scene() -> None:
        upstream = Upstream(100_000)
        server, port = await _served(upstream.stream)
        await _leave(port, 3, 0.3)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(upstream.told.wait(), 1)
        await server.stop(0)

    asyncio.run(scene())
