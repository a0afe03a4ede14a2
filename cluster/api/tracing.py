"""A request's trace at the front door: the client's context, and the parts of its time that are spent here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cluster.core import Clock, Request
from cluster.engine.events import TokenEvent
from cluster.errors import ExpertMeshError, InvalidArgument
from cluster.telemetry.account import RequestAccount
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.records import RequestRecord, SpanRef
from cluster.telemetry.steps import new_span_id, new_trace_id

DETAIL_KEY, DETAIL_LAYER = "x-moe-trace-detail", "layer"
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Ids of one request: its trace (the client's, where it sent a valid traceparent), its own span, the client's span
    ("" without), the vendor part of the tracestate, and whether layers are asked for."""

    trace_id: str
    span_id: str
    parent: str = ""
    state: str = ""
    sampled: bool = True
    detail: bool = False

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> TraceContext:
        """From gRPC metadata (lower-case keys); a new trace where there is no valid context in it."""
        detail = metadata.get(DETAIL_KEY, "") == DETAIL_LAYER
        found = trace.get_current_span(_PROPAGATOR.extract(dict(metadata))).get_span_context()
        if not found.is_valid:
            return cls(new_trace_id(), new_span_id(), detail=detail)
        return cls(
            trace.format_trace_id(found.trace_id),
            new_span_id(),
            trace.format_span_id(found.span_id),
            found.trace_state.get("expertmesh") or "",
            found.trace_flags.sampled,
            detail,
        )


class DoorTimes:
    """Clock reads of one request at the front door.

    While its engine still works for it, a request's time is the engine's, whatever happens here. Afterwards it is
    either on its way to this process's event loop (deliver) or being taken by the client (stream_out).
    """

    def __init__(self, context: TraceContext, clock: Clock) -> None:
        self.context, self._clock = context, clock
        self.arrived_s = clock()
        self.tokenized_s = self.submitted_s = 0.0
        self.request: Request | None = None
        self.in_engine = False
        self.output_tokens = 0
        self.finish_reason = ""
        self.error: ExpertMeshError | None = None
        self._account: RequestAccount | None = None
        self._blocked_s = self._waiting_s = self._sent_s = self._got_s = self._left_s = 0.0
        self._own = Ledger()

    def tokenized(self, request: Request) -> None:
        """The prompt is token ids."""
        self.request, self.tokenized_s = request, self._clock()
        self._own.add(Stage.TOKENIZE, self.tokenized_s - self.arrived_s)

    def submitted(self) -> None:
        """The engine has it."""
        self.submitted_s = self._clock()
        self.in_engine = True

    def waiting(self) -> None:
        """Nothing to send: the front door waits for the engine."""
        self._waiting_s = self._clock()

    def left(self) -> None:
        """The client is gone; the engine does not know yet."""
        self._left_s = self._waiting_s = self._clock()

    def got(self, last: TokenEvent) -> None:
        """Events have come; ``last`` is the newest."""
        self.in_engine = not last.last
        if last.account is not None:
            self._account = last.account
            done_s = last.account.ended_s
            if done_s is not None:
                self._got_s = self._clock()
                if self._sent_s:  # of the sending before it waited, what came after the engine was done
                    self._own.add(Stage.STREAM_OUT, self._waiting_s - max(self._sent_s, done_s))
                self._own.add(Stage.DELIVER, self._got_s - max(self._waiting_s, done_s))

    def sending(self) -> None:
        """A chunk goes to the client."""
        self._sent_s = self._clock()
        if self._account is not None:
            self._own.add(Stage.EMIT, self._sent_s - self._got_s)

    def sent(self) -> None:
        """The client's side has taken it."""
        now_s = self._clock()
        self._blocked_s += now_s - self._sent_s
        if self._account is not None:
            self._own.add(Stage.STREAM_OUT, now_s - self._sent_s)

    def stages(self) -> dict[str, float]:
        """Seconds by part until now."""
        return self._whole().spent()

    def _whole(self) -> Ledger:
        whole = self._own.copy()
        if self._account is not None:
            whole.absorb(self._account.total())
        return whole

    def record(self, exact: bool, prompt: str = "", answer: str = "", told: bool = False) -> RequestRecord:
        """What is told of it. To be called once, at its end. ``told``: what the client sent may be in it."""
        request, context, error = self.request, self.context, self.error
        if request is None:  # refused while it was looked at
            self._own.add(Stage.TOKENIZE, self._clock() - self.arrived_s)
        said = str(error) if error is not None else ""
        if isinstance(error, InvalidArgument) and not told:
            said = f"{error.field}: refused"  # the message quotes what was sent
        return RequestRecord(
            ref=SpanRef(context.trace_id, context.span_id),
            request_id=request.request_id if request is not None else "",
            arrived_s=self.arrived_s,
            ended_s=self._clock(),
            ledger=self._whole(),
            account=self._account,
            parent=context.parent,
            trace_state=context.state,
            sampled=context.sampled,
            left_s=self._left_s,
            tokenized_s=self.tokenized_s,
            submitted_s=self.submitted_s,
            blocked_s=self._blocked_s,
            finish_reason=self.finish_reason,
            error_code=error.code if error is not None else "",
            error=said,
            prompt_tokens=len(request.prompt_ids) if request is not None else 0,
            output_tokens=self.output_tokens,
            max_tokens=request.stop.max_new_tokens if request is not None else 0,
            exact=exact and not (self._account is not None and self._account.missing),
            prompt=prompt,
            answer=answer,
        )
