"""What stands behind the gRPC services, whoever hosts them: admission, the engine's events as a stream, status.

Plain asyncio; the engine's thread is told apart by ``call_soon_threadsafe``. Errors are raised as `ExpertMeshError`
and turned into gRPC statuses by the host.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from cluster.api.convert import ModelLimits, check_ids, to_chunk, to_reply, to_request
from cluster.api.status import as_known
from cluster.api.tracing import DoorTimes, TraceContext
from cluster.core import Clock
from cluster.engine.engine import Engine
from cluster.engine.events import TokenEvent
from cluster.engine.text import Tokenizer
from cluster.errors import Cancelled, CheckpointError, ConfigError, DeadlineExceeded, Unavailable
from cluster.rpc.v1 import control_pb2, inference_pb2
from cluster.telemetry.hub import Telemetry

STARTING, SERVING, DRAINING = "starting", "serving", "draining"
LONG_REQUEST_BYTES = 64 * 1024
_GRACE_S = 1.0
"""The engine ends a request at its deadline; only when its thread is stuck does the servicer do it, this much later."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a ready router serves. ``telemetry`` is told of every request; ``keep_text``: of its text too."""

    engine: Engine
    tokenizer: Tokenizer | None
    limits: ModelLimits
    info: inference_pb2.ModelInfoReply
    status: Callable[[], control_pb2.StatusReply]
    telemetry: Telemetry | None = None
    keep_text: bool = False
    loads: Callable[[], control_pb2.LoadsReply] = control_pb2.LoadsReply
    control: PlacementControl | None = None
    set_fail_over: Callable[[bool], bool] = bool
    """On or off; how it was."""


class PlacementControl(Protocol):
    """The coordinator, as a router reaches it. Methods may block, and raise `ExpertMeshError`."""

    def change(self, request: control_pb2.ChangePlacementRequest) -> control_pb2.ChangePlacementReply:
        """See the proto file."""
        ...

    def placement(self) -> control_pb2.PlacementReply:
        """See the proto file."""
        ...


class EventInbox:
    """One request's events, from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._then: Callable[[TokenEvent], object] | None = None

    def tell(self, event: TokenEvent) -> None:
        """The engine's listener."""
        self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: TokenEvent) -> None:
        if self._then is None:
            self._events.put_nowait(event)
        elif event.last:
            self._then(event)

    async def take(self, timeout_s: float) -> list[TokenEvent]:
        """Waits for an event; it and all that came with it.

        Raises:
            DeadlineExceeded: none came in time.
        """
        try:
            batch = [await asyncio.wait_for(self._events.get(), timeout_s)]
        except TimeoutError as exc:
            raise DeadlineExceeded("the deadline of the request has passed") from exc
        while not self._events.empty():
            batch.append(self._events.get_nowait())
        return batch

    def leave(self, then: Callable[[TokenEvent], object]) -> None:
        """Nobody takes events any more; ``then`` is called with the last one."""
        self._then = then
        while not self._events.empty():
            event = self._events.get_nowait()
            if event.last:
                then(event)


class Frontend:
    """Answers requests once `ready` was called; before that, and while draining, with UNAVAILABLE."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.state = STARTING
        self._served: Served | None = None
        self._clock = clock
        self._ready_s = clock()
        self.door: Callable[[], control_pb2.SecurityStatus] | None = None
        """How the port is kept that clients come in by, where it is our own."""

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
        times = DoorTimes(TraceContext.of(metadata), self._clock)
        inbox = EventInbox(asyncio.get_running_loop())
        answer: list[str] = []

        def tell_observer() -> None:
            if served.telemetry is not None:
                prompt = _text_of(message) if served.keep_text else ""
                served.telemetry.request(
                    times.record(served.limits.exact, prompt, "".join(answer), told=served.keep_text)
                )

        def freed(last: TokenEvent) -> None:
            times.got(last)
            tell_observer()

        try:
            async with aclosing(self._stream(served, message, time_left_s, times, inbox)) as chunks:
                async for chunk in chunks:
                    if served.keep_text:
                        answer.append(chunk.text)
                    times.sending()
                    try:
                        yield chunk
                    finally:
                        times.sent()
        except (GeneratorExit, asyncio.CancelledError):
            if not times.finish_reason:
                times.error = Cancelled("the client left")
            raise
        except Exception as exc:
            times.error = as_known(exc)
            raise times.error from exc
        finally:
            if times.in_engine:
                # It frees the request within a step, and says then what the request has spent.
                if isinstance(times.error, Cancelled):
                    times.left()
                else:
                    times.waiting()
                inbox.leave(freed)
            else:
                tell_observer()

    async def _stream(
        self,
        served: Served,
        message: inference_pb2.GenerateRequest,
        time_left_s: float | None,
        times: DoorTimes,
        inbox: EventInbox,
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        arguments = (message, served.limits, served.tokenizer, time_left_s, times.context)
        # Tokenising a long text takes a while, which other streams should not wait for.
        long = message.ByteSize() > LONG_REQUEST_BYTES
        request = await asyncio.to_thread(to_request, *arguments) if long else to_request(*arguments)
        times.tokenized(request)
        served.engine.submit(request, inbox.tell)
        times.submitted()
        try:
            while times.in_engine:
                times.waiting()
                batch = await inbox.take(request.deadline.remaining_s() + _GRACE_S)
                last = batch[-1]
                times.got(last)
                good = [event for event in batch if event.error is None]
                times.output_tokens += sum(event.token is not None for event in good)
                if good:
                    stages = times.stages() if last.last else {}
                    chunk = to_chunk(good, request, times.output_tokens, stages, served.limits.exact)
                    if last.finish is not None:
                        times.finish_reason = last.finish.value
                    yield chunk
                if last.error is not None:
                    raise last.error
        finally:
            if times.in_engine:
                served.engine.cancel(request.request_id)

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
        if self.door is not None:
            reply.security.CopyFrom(self.door())
        if self._served is not None:
            reply.uptime_s = self._clock() - self._ready_s
        return reply

    def set_tracing(self, message: control_pb2.SetTracingRequest) -> control_pb2.SetTracingReply:
        """Switches traces.

        Raises:
            ConfigError: they go nowhere.
        """
        telemetry = self._serving().telemetry
        if telemetry is None or not telemetry.kinds:
            raise ConfigError("telemetry.traces: got off; the server was started without a place for traces")
        was_on, telemetry.tracing = telemetry.tracing, message.on
        return control_pb2.SetTracingReply(was_on=was_on)

    def set_fail_over(self, message: control_pb2.SetFailOverRequest) -> control_pb2.SetFailOverReply:
        """Switches fail-over and hedging."""
        return control_pb2.SetFailOverReply(was_on=self._serving().set_fail_over(message.on))

    def loads(self) -> control_pb2.LoadsReply:
        """How often each expert was wanted."""
        return self._serving().loads()

    async def change_placement(self, message: control_pb2.ChangePlacementRequest) -> control_pb2.ChangePlacementReply:
        """Asks the coordinator.

        Raises:
            ExpertMeshError: there is none, it does not answer, or the change is not possible.
        """
        return await asyncio.to_thread(self._control().change, message)

    async def placement(self) -> control_pb2.PlacementReply:
        """Asks the coordinator. Raises as `change_placement`."""
        return await asyncio.to_thread(self._control().placement)

    def _control(self) -> PlacementControl:
        control = self._serving().control
        if control is None:
            raise ConfigError("groups: they live in the router's process, and cannot be changed while it serves")
        return control

    async def flush_traces(self) -> None:
        """Waits a little until what was told is exported."""
        if self._served is not None and self._served.telemetry is not None:
            await asyncio.to_thread(self._served.telemetry.flush, 3.0)

    def num_live(self) -> int:
        """Requests that have not ended."""
        return self._served.engine.num_live() if self._served is not None else 0


def _text_of(message: inference_pb2.GenerateRequest) -> str:
    """What the client wrote."""
    if message.messages:
        return "\n".join(f"{turn.role}: {turn.content}" for turn in message.messages)
    return str(message.prompt)
