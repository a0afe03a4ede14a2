"""What stands behind the gRPC services, whoever hosts them: admission, the engine's events as a stream, status.

Plain asyncio; the engine's thread is told apart by ``call_soon_threadsafe``. Errors are raised as `ExpertMeshError`
and turned into gRPC statuses by the host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.api.convert import ModelLimits, check_ids, to_chunk, to_reply, to_request
from cluster.core import Clock
from cluster.engine.engine import Engine, TokenEvent
from cluster.engine.text import Tokenizer
from cluster.errors import CheckpointError, DeadlineExceeded, Unavailable
from cluster.rpc.v1 import control_pb2, inference_pb2
from cluster.telemetry.ledger import Stage

STARTING, SERVING, DRAINING = "starting", "serving", "draining"
LONG_REQUEST_BYTES = 64 * 1024
_GRACE_S = 1.0
"""The engine ends a request at its deadline; only when its thread is stuck does the servicer do it, this much later."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a ready router serves."""

    engine: Engine
    tokenizer: Tokenizer | None
    limits: ModelLimits
    info: inference_pb2.ModelInfoReply
    status: Callable[[], control_pb2.StatusReply]


class Frontend:
    """Answers requests once `ready` was called; before that, and while draining, with UNAVAILABLE."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.state = STARTING
        self._served: Served | None = None
        self._clock = clock
        self._ready_s = clock()

    def ready(self, served: Served) -> None:
        """Requests are taken from now on."""
        self._served, self.state, self._ready_s = served, SERVING, self._clock()

    def drain(self) -> None:
        """No new requests; running ones go on."""
        self.state = DRAINING

    def _serving(self) -> Served:
        if self._served is None or self.state != SERVING:
            raise Unavailable(f"the router is {self.state}; retry later or elsewhere")
        return self._served

    # -- inference -----------------------------------------------------------------------------------------------

    async def generate(
        self, message: inference_pb2.GenerateRequest, metadata: Mapping[str, str], time_left_s: float | None
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """Chunks of one generation. Closing the iterator (the client left) frees the request within a step.

        Raises:
            InvalidArgument, Overloaded, DeadlineExceeded, Unavailable, InternalError.
        """
        served = self._serving()
        started_s = self._clock()
        arguments = (message, served.limits, served.tokenizer, time_left_s, trace_id(metadata))
        # Tokenising a long text takes a while, which other streams should not wait for.
        long = message.ByteSize() > LONG_REQUEST_BYTES
        request = await asyncio.to_thread(to_request, *arguments) if long else to_request(*arguments)
        tokenize = ((Stage.TOKENIZE.value, self._clock() - started_s),)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TokenEvent] = asyncio.Queue()

        def tell(event: TokenEvent) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        served.engine.submit(request, tell)
        num_generated = 0
        ended = False
        try:
            while not ended:
                batch = [await self._next(events, request.deadline.remaining_s())]
                while not events.empty():
                    batch.append(events.get_nowait())
                good = [event for event in batch if event.error is None]
                num_generated += sum(event.token is not None for event in good)
                ended = batch[-1].last
                if good:
                    yield to_chunk(good, request, num_generated, tokenize, served.limits.exact)
                if batch[-1].error is not None:
                    raise batch[-1].error
        finally:
            if not ended:
                served.engine.cancel(request.request_id)

    @staticmethod
    async def _next(events: asyncio.Queue[TokenEvent], time_left_s: float) -> TokenEvent:
        try:
            return await asyncio.wait_for(events.get(), time_left_s + _GRACE_S)
        except TimeoutError as exc:
            raise DeadlineExceeded("the deadline of the request has passed") from exc

    async def generate_once(
        self, message: inference_pb2.GenerateRequest, metadata: Mapping[str, str], time_left_s: float | None
    ) -> inference_pb2.GenerateReply:
        """The same as one reply."""
        return to_reply([chunk async for chunk in self.generate(message, metadata, time_left_s)])

    def model_info(self) -> inference_pb2.ModelInfoReply:
        """What is served."""
        return self._serving().info

    async def tokenize(self, message: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeReply:
        """Text to ids."""
        special = message.add_special_tokens if message.HasField("add_special_tokens") else True
        ids = await asyncio.to_thread(self._tokenizer().encode, message.text, special)
        return inference_pb2.TokenizeReply(ids=ids)

    def detokenize(self, message: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeReply:
        """Ids to text."""
        served, tokenizer = self._serving(), self._tokenizer()
        check_ids("ids", message.ids, served.limits.vocab_size)
        skip = message.skip_special_tokens if message.HasField("skip_special_tokens") else True
        return inference_pb2.DetokenizeReply(text=tokenizer.decode(list(message.ids), skip))

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._serving().tokenizer
        if tokenizer is None:
            raise CheckpointError("this checkpoint has no tokenizer files: use token ids")
        return tokenizer

    # -- control -------------------------------------------------------------------------------------------------

    async def status(self) -> control_pb2.StatusReply:
        """How the system is; in every state."""
        served = self._served
        # In a thread: it takes locks that the engine's and the refresh thread hold now and then.
        reply = await asyncio.to_thread(served.status) if served is not None else control_pb2.StatusReply()
        reply.state = self.state
        if self._served is not None:
            reply.uptime_s = self._clock() - self._ready_s
        return reply

    def num_live(self) -> int:
        """Requests that have not ended."""
        return self._served.engine.num_live() if self._served is not None else 0


def trace_id(metadata: Mapping[str, str]) -> str:
    """32 hex digits: the client's when it sent a valid traceparent, else new ones."""
    context = TraceContextTextMapPropagator().extract(dict(metadata))
    span = trace.get_current_span(context).get_span_context()
    if span.is_valid:
        return trace.format_trace_id(span.trace_id)
    return trace.format_trace_id(RandomIdGenerator().generate_trace_id())
