"""Rules that every trace of ours keeps: what makes one open well in Jaeger, and no surprises for who reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cluster.telemetry.traces import SpanView

MAX_SPANS, MAX_SPAN_BYTES = 150, 8192
PARENTS: dict[str, tuple[str, ...]] = {
    "expertmesh.client.generate": ("",),
    "moe.request": ("", "expertmesh.client.generate"),
    "moe.tokenize": ("moe.request",),
    "moe.queue": ("moe.request",),
    "moe.prefill": ("moe.request",),
    "moe.decode": ("moe.request",),
    "moe.stream_out": ("moe.request",),
    "moe.decode.window": ("moe.decode",),
    "moe.expert_batch": ("moe.queue", "moe.prefill", "moe.decode", "moe.step"),
    "moe.expert.cold_load": ("moe.request", "moe.step"),
    "moe.failover": ("moe.request", "moe.step"),
    "moe.step": ("",),
    "moe.layer": ("moe.step",),
    "moe.expert.compute": ("moe.layer",),
    "moe.startup": ("",),
}
FORBIDDEN = ("error", "span.kind")


def spans_of(messages: Iterable[ExportTraceServiceRequest]) -> list[SpanView]:
    """What a collector got, as plain spans."""
    found = []
    for message in messages:
        for resource_spans in message.resource_spans:
            resource = {item.key: _value(item.value) for item in resource_spans.resource.attributes}
            for scope_spans in resource_spans.scope_spans:
                found += [_view(span, resource) for span in scope_spans.spans]
    return found


def _view(span: Span, resource: dict[str, Any]) -> SpanView:
    error = (span.status.message or "error") if span.status.code == Status.STATUS_CODE_ERROR else None
    return SpanView(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        int(span.kind),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        {item.key: _value(item.value) for item in span.attributes},
        resource,
        tuple((event.name, event.time_unix_nano) for event in span.events),
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        error,
        bool(span.flags & 0x200),
    )


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None


def from_jaeger(data: dict[str, Any]) -> list[SpanView]:
    """The spans of a file for Jaeger's UI."""
    found = []
    for trace in data["data"]:
        for span in trace["spans"]:
            assert span["traceID"] == trace["traceID"]
            process = trace["processes"][span["processID"]]
            tags = {tag["key"]: tag["value"] for tag in span["tags"]}
            for tag in span["tags"]:
                kinds = {"bool": bool, "int64": int, "float64": float, "string": str}
                assert type(tag["value"]) is kinds[tag["type"]], tag
            parents = [ref["spanID"] for ref in span["references"] if ref["refType"] == "CHILD_OF"]
            kind = {"internal": 1, "server": 2, "client": 3}[tags.pop("span.kind")]
            error = tags.pop("otel.status_description", "error") if tags.pop("error", False) else None
            resource = {tag["key"]: tag["value"] for tag in process["tags"]}
            found.append(
                SpanView(
                    span["traceID"],
                    span["spanID"],
                    parents[0] if parents else "",
                    span["operationName"],
                    kind,
                    span["startTime"] * 1000,
                    (span["startTime"] + span["duration"]) * 1000,
                    tags,
                    {**resource, "service.name": process["serviceName"]},
                    tuple((log["fields"][0]["value"], log["timestamp"] * 1000) for log in span["logs"]),
                    tuple((r["traceID"], r["spanID"]) for r in span["references"] if r["refType"] == "FOLLOWS_FROM"),
                    error,
                )
            )
    return found


def lint(spans: list[SpanView], complete: bool = True, slack_ns: int = 2_000) -> list[str]:
    """What is wrong with some traces, one line each; empty if nothing is. ``complete``: no parent may be missing."""
    problems: list[str] = []
    traces: dict[str, list[SpanView]] = {}
    for span in spans:
        traces.setdefault(span.trace_id, []).append(span)
    hosts = {span.resource.get("host.name") for span in spans}
    if len(hosts) > 1 or None in hosts:
        problems.append(f"resources of one machine name several hosts: {hosts}")
    for trace_id, members in traces.items():
        problems += [f"{trace_id[:8]}: {problem}" for problem in _trace_problems(members, complete, slack_ns)]
    return problems


def _trace_problems(spans: list[SpanView], complete: bool, slack_ns: int) -> list[str]:
    problems: list[str] = []
    by_id = {span.span_id: span for span in spans}
    if len(by_id) != len(spans):
        problems.append("span ids occur twice")
    if len(spans) > MAX_SPANS and not any(span.name == "moe.step" for span in spans):
        problems.append(f"{len(spans)} spans, more than {MAX_SPANS}")
    roots = [span for span in spans if span.parent_id not in by_id]
    if len(roots) != 1:
        problems.append(f"{len(roots)} roots: {[span.name for span in roots]}")
    if complete and any(span.parent_id for span in roots):
        problems.append(f"a parent is missing: {[span.name for span in roots if span.parent_id]}")
    descendants = {(span.trace_id, span.span_id) for span in spans}
    for span in spans:
        problems += [f"{span.name}: {problem}" for problem in _span_problems(span)]
        if any(link in descendants for link in span.links):
            problems.append(f"{span.name} links into its own trace")
        parent = by_id.get(span.parent_id)
        allowed = PARENTS.get(span.name)
        if allowed is None and not span.name.startswith("moe.startup."):
            problems.append(f"{span.name}: unknown name")
        elif allowed is not None and (parent.name if parent is not None else "") not in allowed:
            problems.append(f"{span.name} under {parent.name if parent else 'nothing'}")
        if parent is None or span.resource != parent.resource:
            continue
        if span.start_ns < parent.start_ns - slack_ns or span.end_ns > parent.end_ns + slack_ns:
            problems.append(f"{span.name} outside of {parent.name}")
    return problems


def _span_problems(span: SpanView) -> list[str]:
    problems = []
    if len(span.trace_id) != 32 or not int(span.trace_id, 16):
        problems.append("bad trace id")
    if len(span.span_id) != 16 or not int(span.span_id, 16):
        problems.append("bad span id")
    if not span.name or not span.service:
        problems.append("no name or no service")
    if span.end_ns < span.start_ns + 1000:
        problems.append("shorter than a microsecond")
    if any(isinstance(value, float) and not math.isfinite(value) for value in span.attributes.values()):
        problems.append("an attribute that is not finite")
    if any(key in FORBIDDEN or key.startswith("otel.") for key in span.attributes):
        problems.append("sets what the exporter sets")
    if sum(len(str(key)) + len(str(value)) for key, value in span.attributes.items()) > MAX_SPAN_BYTES:
        problems.append("too large")
    texts = [span.name, span.error or "", *(str(value) for value in span.attributes.values())]
    if any("\ud800" <= char <= "\udfff" for text in texts for char in text):
        problems.append("a lone surrogate")
    return problems
