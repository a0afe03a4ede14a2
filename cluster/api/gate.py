"""The gate of the client port: who shows a good token comes in, within the token's limits; refusals are counted."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from cluster.api.tokens import Limits, TokenFile
from cluster.core import Clock
from cluster.errors import ExpertMeshError

log = logging.getLogger(__name__)

LOG_PERIOD_S = 1.0
OPEN_METHODS = ("/grpc.health.v1.Health/Check",)
"""Probes of orchestrators have no token, and learn nothing but SERVING."""
CHANGES = ("SetTracing", "SetFailOver", "ChangePlacement")
"""Methods of Control that change the system."""


class Gate(grpc.aio.ServerInterceptor):
    """With ``tokens`` None everybody comes in."""

    def __init__(self, tokens: TokenFile | None, clock: Clock = time.monotonic) -> None:
        self._tokens, self._clock = tokens, clock
        self._limits = Limits(clock)
        self._logged_s = -LOG_PERIOD_S
        self.refused: Counter[str] = Counter()
        """Calls that did not come in, by the code they were refused with."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(details)
        if self._tokens is None or handler is None or details.method in OPEN_METHODS:
            return handler
        token = _bearer(details.invocation_metadata)
        try:
            found = self._tokens.grant(token) if token else None
            grant = self._limits.admit(found, bool(token), details.method.rpartition("/")[2] in CHANGES)
        except ExpertMeshError as exc:
            self._refuse(exc, details.method)
            return _refusal(exc)

        def enter() -> None:
            try:
                self._limits.enter(grant)
            except ExpertMeshError as exc:
                self._refuse(exc, details.method)
                raise

        return _guarded(handler, enter, lambda: self._limits.leave(grant))

    def _refuse(self, error: ExpertMeshError, method: str) -> None:
        self.refused[error.code] += 1
        now_s = self._clock()
        if now_s - self._logged_s >= LOG_PERIOD_S:  # whoever hammers at the gate does not fill the disk
            self._logged_s = now_s
            log.warning("refused a call of %s (%d so far): %s", method, self.refused.total(), error)


def _bearer(metadata: Any) -> str:
    for key, value in metadata or ():
        if key == "authorization":
            text = value if isinstance(value, str) else value.decode("latin-1")
            scheme, _, token = text.partition(" ")
            return token.strip() if scheme.lower() == "bearer" else ""
    return ""


def _refusal(error: ExpertMeshError) -> Any:
    """A handler that says no. Of a kind that reads nothing first: what strangers send is not even received."""

    async def refuse(_requests: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode[error.code], str(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _guarded(handler: Any, enter: Callable[[], None], leave: Callable[[], None]) -> Any:
    """The handler, with `enter` before each of its calls and `leave` after those that came in."""

    async def come_in(context: Any) -> None:
        try:
            enter()
        except ExpertMeshError as exc:
            await context.abort(grpc.StatusCode[exc.code], str(exc))

    def unary(behavior: Any) -> Any:
        async def answer(request: Any, context: Any) -> Any:
            await come_in(context)
            try:
                return await behavior(request, context)
            finally:
                leave()

        return answer

    def streaming(behavior: Any) -> Any:
        async def answer(request: Any, context: Any) -> AsyncIterator[Any]:
            await come_in(context)
            try:
                async with aclosing(behavior(request, context)) as messages:
                    async for message in messages:
                        yield message
            finally:
                leave()

        return answer

    make = {
        (False, False): (grpc.unary_unary_rpc_method_handler, unary, handler.unary_unary),
        (False, True): (grpc.unary_stream_rpc_method_handler, streaming, handler.unary_stream),
        (True, False): (grpc.stream_unary_rpc_method_handler, unary, handler.stream_unary),
        (True, True): (grpc.stream_stream_rpc_method_handler, streaming, handler.stream_stream),
    }
    kind, guard, behavior = make[handler.request_streaming, handler.response_streaming]
    return kind(guard(behavior), handler.request_deserializer, handler.response_serializer)
