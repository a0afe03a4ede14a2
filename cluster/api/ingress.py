"""What Serve's gRPC ingress adds to its server: our services, with streams that end when their client leaves.

Serve's proxy cancels the replica's task only where the cancellation of a call finds it waiting for the next message
(`ray.serve._private.proxy_response_generator`, Ray 2.56). A client that leaves while a message is being sent, which is
where a client that does not read always leaves, goes unnoticed, and its request runs on to its end for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any

from grpc_health.v1 import health_pb2_grpc

from cluster.api.servicer import add_inference_servicer
from cluster.rpc.v1 import control_pb2_grpc

Streaming = Callable[[Any, Any], AsyncGenerator[Any, None]]


def add_inference(servicer: Any, server: Any) -> None:
    """The service ``cluster.rpc.v1.Inference``, as Serve's ``grpc_servicer_functions`` want it."""
    _add(add_inference_servicer, servicer, server)


def add_control(servicer: Any, server: Any) -> None:
    """The service ``cluster.rpc.v1.Control``."""
    _add(control_pb2_grpc.add_ControlServicer_to_server, servicer, server)


def add_health(servicer: Any, server: Any) -> None:
    """The service ``grpc.health.v1.Health``."""
    _add(health_pb2_grpc.add_HealthServicer_to_server, servicer, server)


def _add(add: Callable[[Any, Any], None], servicer: Any, server: Any) -> None:
    make = server.service_handler_factory

    def make_noticing(service_method: str, streaming_type: Any) -> Any:
        handler = make(service_method=service_method, streaming_type=streaming_type)
        return noticing(handler) if streaming_type.name == "UNARY_STREAM" else handler

    server.service_handler_factory = make_noticing
    try:
        add(servicer, server)
    finally:
        server.service_handler_factory = make


def noticing(handler: Streaming) -> Callable[[Any, Any], Coroutine[Any, Any, None]]:
    """``handler``, told of a client that left while a message was sent as of one that left while the next was awaited.

    A coroutine that writes, not a generator that yields: the server throws the cancellation into it while the call is
    still there. What a generator does when it is closed comes after the call's end, where Serve's use of the call's
    context ends the process.
    """

    async def handle(request: Any, context: Any) -> None:
        messages = handler(request, context)
        async for message in messages:
            try:
                await context.write(message)
            except BaseException:
                # The failure of what was being sent comes first, the cancellation while that is dealt with, or alone.
                leaving = asyncio.ensure_future(_cancel(messages))
                while not leaving.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([leaving])
                raise

    return handle


async def _cancel(messages: AsyncGenerator[Any, None]) -> None:
    """Asks for the next message, and cancels the wait for it."""
    while True:
        task = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)  # a task that has not begun would be cancelled before it could tell anybody
        task.cancel()
        try:
            await task
        except (asyncio.CancelledError, StopAsyncIteration):
            return
