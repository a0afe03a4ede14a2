"""Traces as files for others: Jaeger's JSON, which its UI opens without a backend, and OTLP's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.telemetry.traces import SpanView, TraceView

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
_TYPES = ((bool, "bool"), (int, "int64"), (float, "float64"))  # in this order: a bool is an int
_IS_REMOTE_KNOWN, _IS_REMOTE, _STATUS_ERROR = 0x100, 0x200, 2


def to_jaeger(trace: TraceView) -> dict[str, Any]:
    """The object that Jaeger's tab "JSON File" takes. Times in microseconds."""
    known = {span.span_id for span in trace.spans}
    processes: dict[str, dict[str, Any]] = {}
    numbers: dict[str, str] = {}
    spans = []
    for span in trace.spans:
        instance = str(span.resource.get("service.instance.id", span.service))
        number = numbers.setdefault(instance, f"p{len(numbers) + 1}")
        if number not in processes:
            tags = {key: value for key, value in span.resource.items() if key != "service.name"}
            processes[number] = {"serviceName": span.service, "tags": _tags(tags)}
        spans.append(_jaeger_span(span, number, known))
    return {"data": [{"traceID": trace.trace_id, "spans": spans, "processes": processes, "warnings": None}]}


def _jaeger_span(span: SpanView, process: str, known: set[str]) -> dict[str, Any]:
    references = [{"refType": "FOLLOWS_FROM", "traceID": trace, "spanID": other} for trace, other in span.links]
    if span.parent_id in known:
        references.insert(0, {"refType": "CHILD_OF", "traceID": span.trace_id, "spanID": span.parent_id})
    tags = {**span.attributes, "span.kind": _KINDS.get(span.kind, "internal")}
    if span.error is not None:
        tags |= {"error": True, "otel.status_description": span.error}
    start_us = span.start_ns // 1000
    return {
        "traceID": span.trace_id,
        "spanID": span.span_id,
        "operationName": span.name,
        "references": references,
        "startTime": start_us,
        "duration": max(1, span.end_ns // 1000 - start_us),
        "tags": _tags(tags),
        "logs": [
            {"timestamp": at_ns // 1000, "fields": [{"key": "event", "type": "string", "value": name}]}
            for name, at_ns in span.events
        ],
        "processID": process,
        "warnings": None,
    }


def _tags(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for key, value in values.items():
        kind = next((name for of, name in _TYPES if isinstance(value, of)), "string")
        plain = kind != "string" or isinstance(value, str)
        found.append({"key": key, "type": kind, "value": value if plain else str(value)})
    return found


def to_otlp_json(trace: TraceView) -> dict[str, Any]:
    """The trace as one OTLP object: ids in hex, 64-bit numbers as strings, as OTLP's JSON has them."""
    by_process: dict[str, list[SpanView]] = {}
    for span in trace.spans:
        by_process.setdefault(str(span.resource.get("service.instance.id", span.service)), []).append(span)
    return {
        "resourceSpans": [
            {
                "resource": {"attributes": _attributes(spans[0].resource)},
                "scopeSpans": [{"scope": {"name": "expertmesh"}, "spans": [_otlp_span(span) for span in spans]}],
            }
            for spans in by_process.values()
        ]
    }


def _otlp_span(span: SpanView) -> dict[str, Any]:
    found: dict[str, Any] = {
        "traceId": span.trace_id,
        "spanId": span.span_id,
        "name": span.name,
        "kind": span.kind,
        "startTimeUnixNano": str(span.start_ns),
        "endTimeUnixNano": str(span.end_ns),
        "attributes": _attributes(span.attributes),
        "flags": _IS_REMOTE_KNOWN | (_IS_REMOTE if span.remote_parent else 0) | 1,
        "status": {} if span.error is None else {"code": _STATUS_ERROR, "message": span.error},
    }
    if span.parent_id:
        found["parentSpanId"] = span.parent_id
    if span.events:
        found["events"] = [{"name": name, "timeUnixNano": str(at_ns)} for name, at_ns in span.events]
    if span.links:
        found["links"] = [{"traceId": other, "spanId": span_id} for other, span_id in span.links]
    return found


def _attributes(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _any_value(value)} for key, value in values.items()]


def _any_value(value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {"doubleValue": value}
    if isinstance(value, (list, tuple)):
        return {"arrayValue": {"values": [_any_value(item) for item in value]}}
    return {"stringValue": str(value)}
