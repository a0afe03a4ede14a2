"""Traces as they are read again: plain spans, put together by trace."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

REQUEST, CLIENT = "moe.request", "expertmesh.client.generate"


@dataclass(frozen=True, slots=True)
class SpanView:
    """One span. Ids are hex; ``parent_id`` is empty for a root; ``remote_parent``: its parent is another process's."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    resource: Mapping[str, Any]
    events: tuple[tuple[str, int], ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    error: str | None = None
    remote_parent: bool = False

    @property
    def seconds(self) -> float:
        """Its length."""
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def service(self) -> str:
        """Name of the service that it is of."""
        return str(self.resource.get("service.name", ""))

    def times(self) -> dict[str, float]:
        """Its attributes ``moe.time.*``: seconds by part."""
        return {key.removeprefix("moe.time."): value for key, value in self.attributes.items() if _is_time(key)}


def _is_time(key: str) -> bool:
    return key.startswith("moe.time.")


@dataclass(slots=True)
class TraceView:
    """All spans of a trace that are known, by start."""

    trace_id: str
    spans: list[SpanView] = field(default_factory=list)

    @property
    def request(self) -> SpanView | None:
        """The server's span of the request; None for a trace of something else."""
        return next((span for span in self.spans if span.name == REQUEST), None)

    @property
    def requests(self) -> list[SpanView]:
        """All requests of the trace: a caller may have made several."""
        return self.named(REQUEST)

    @property
    def client(self) -> SpanView | None:
        """The client's span, where it is known."""
        return next((span for span in self.spans if span.name == CLIENT), None)

    @property
    def root(self) -> SpanView:
        """The span that the others hang from: one whose parent is not known here."""
        known = {span.span_id for span in self.spans}
        return next((span for span in self.spans if span.parent_id not in known), self.spans[0])

    def named(self, name: str) -> list[SpanView]:
        """Spans of a name."""
        return [span for span in self.spans if span.name == name]

    def children(self) -> dict[str, list[SpanView]]:
        """Spans by their parent's id; those whose parent is not known are under ""."""
        known = {span.span_id for span in self.spans}
        found: dict[str, list[SpanView]] = {}
        for span in self.spans:
            found.setdefault(span.parent_id if span.parent_id in known else "", []).append(span)
        return found


def traces_of(spans: Iterable[SpanView]) -> dict[str, TraceView]:
    """Traces by id, in the order of their first spans' starts."""
    found: dict[str, TraceView] = {}
    for span in spans:
        found.setdefault(span.trace_id, TraceView(span.trace_id)).spans.append(span)
    for trace in found.values():
        trace.spans.sort(key=lambda span: (span.start_ns, -span.end_ns))
    return dict(sorted(found.items(), key=lambda item: item[1].spans[0].start_ns))
