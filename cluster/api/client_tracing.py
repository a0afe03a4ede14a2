"""The client's end of a trace: a span around the call, whose context travels with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from opentelemetry.trace import SpanKind

from cluster.config import load_config
from cluster.settings import TelemetryConfig
from cluster.telemetry.exporters import destinations, place_of, resource_of, span_exporter
from cluster.telemetry.pump import SpanPump
from cluster.telemetry.records import SpanRef
from cluster.telemetry.spans import SpanMaker, wall_ns_of
from cluster.telemetry.steps import new_span_id, new_trace_id

NAME = "expertmesh.client.generate"
CLOSE_S = 2.0


class ClientTracer:
    """Makes the clients' spans of this process and exports them where the configuration says. Use `close` at the end.

    Without a place for traces it is `off`: no context is sent, and the server begins the trace.
    """

    def __init__(self, config: TelemetryConfig) -> None:
        kinds = destinations(config)
        self._place = ";".join(place_of(kind, config) for kind in kinds)
        self._pumps = [SpanPump(span_exporter(kind, config), kind, config.queue_spans) for kind in kinds]
        self._maker = SpanMaker(resource_of("expertmesh-client", {}))

    @classmethod
    def from_environment(cls) -> ClientTracer:
        """As OTEL_* and EXPERTMESH_TELEMETRY__* say."""
        return cls(load_config().telemetry)

    @property
    def off(self) -> bool:
        """Nothing is traced from here."""
        return not self._pumps

    def begin(self) -> ClientCall:
        """The trace of one call."""
        return ClientCall(self._place, self._end)

    def _end(self, call: ClientCall, ended_s: float, error: str) -> None:
        span = self._maker.span(
            NAME,
            call.ref,
            wall_ns_of(call.started_s),
            wall_ns_of(ended_s),
            call.attributes(),
            kind=SpanKind.CLIENT,
            error=error,
        )
        for pump in self._pumps:
            pump.put([span])

    def close(self) -> None:
        """Exports what is left."""
        for pump in self._pumps:
            pump.close(CLOSE_S)


class ClientCall:
    """Clock reads of one call. Between a chunk's arrival and the next time it is asked for one, it is the caller who
    takes the time."""

    def __init__(self, place: str, end: Callable[[ClientCall, float, str], None]) -> None:
        self._place, self._end = place, end
        self.ref = SpanRef(new_trace_id(), new_span_id())
        self.started_s = time.monotonic()
        self._first_s: float | None = None
        self._consume_s = 0.0
        self._given_s = 0.0
        self._tokens = 0

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """gRPC metadata that carries the context. The tracestate tells where this span goes, so that a server that
        exports elsewhere does not hang its spans from one that nobody will find there."""
        return (
            ("traceparent", f"00-{self.ref.trace_id}-{self.ref.span_id}-01"),
            ("tracestate", f"expertmesh={self._place}"),
        )

    def got(self, tokens: int) -> None:
        """A chunk has come and goes to the caller."""
        self._given_s = time.monotonic()
        if tokens and self._first_s is None:
            self._first_s = self._given_s
        self._tokens += tokens

    def asked(self) -> None:
        """The caller wants the next one."""
        self._consume_s += time.monotonic() - self._given_s

    def attributes(self) -> dict[str, Any]:
        """Of the span."""
        found: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.usage.output_tokens": self._tokens,
            "moe.client.consume": self._consume_s,
        }
        if self._first_s is not None:
            found["gen_ai.latency.time_to_first_token"] = self._first_s - self.started_s
        return found

    def end(self, error: str = "") -> None:
        """The call is over."""
        self._end(self, time.monotonic(), error)
