"""Traces as files for others: Jaeger's JSON, which its UI opens without a backend, and OTLP's JSON."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from cluster.telemetry.traces import SpanView, TraceView

_KINDS = {1: "internal", 2: "server", 3: "client", 4: "producer", 5: "consumer"}
_TYPES = ((bool, "bool"), (int, "int64"), (float, "float64"))  # in this order: a bool is an int
_IDS = ("traceId", "spanId", "parentSpanId")


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


def to_otlp_json(messages: Iterable[ExportTraceServiceRequest], trace_id: str) -> dict[str, Any]:
    """One OTLP object with the spans of one trace: ids in hex, nanoseconds as strings, as OTLP's JSON has them."""
    wanted = bytes.fromhex(trace_id)
    found = ExportTraceServiceRequest()
    for message in messages:
        for resource_spans in message.resource_spans:
            for scope_spans in resource_spans.scope_spans:
                spans = [span for span in scope_spans.spans if span.trace_id == wanted]
                if spans:
                    kept = found.resource_spans.add(resource=resource_spans.resource)
                    kept.scope_spans.add(scope=scope_spans.scope, spans=spans)
    result: dict[str, Any] = MessageToDict(found, use_integers_for_enums=True)
    for resource_spans_json in result.get("resourceSpans", []):
        for scope_spans_json in resource_spans_json["scopeSpans"]:
            for span_json in scope_spans_json["spans"]:
                _hex_ids(span_json)
                for link in span_json.get("links", []):
                    _hex_ids(link)
    return result


def _hex_ids(item: dict[str, Any]) -> None:
    for name in _IDS:
        if name in item:
            item[name] = base64.b64decode(item[name]).hex()
