"""Where spans and metrics go: a collector over OTLP, the embedded store, or nowhere. Made from the configuration and
the standard OTEL_* variables, which the SDK reads by itself (headers, certificates, timeouts, compression)."""

from __future__ import annotations

import hashlib
import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path

from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SpanExporter

from cluster import __version__
from cluster.errors import ConfigError
from cluster.settings import TelemetryConfig
from cluster.telemetry.store import StoreExporter, default_store

OTLP, FILE = "otlp", "file"


def destinations(config: TelemetryConfig) -> list[str]:
    """ "otlp", "file", both or neither.

    Raises:
        ConfigError: OTEL_TRACES_EXPORTER names an exporter that is not built in.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return []
    kinds = [kind.strip() for kind in config.traces.split(",")]
    if kinds == ["auto"]:
        wanted = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
        if wanted == "none":
            return []
        if wanted not in ("", OTLP):
            raise ConfigError(f"OTEL_TRACES_EXPORTER: got {wanted!r}; must be otlp or none")
        return [OTLP if wanted or _endpoint(config) else FILE]
    return [kind for kind in dict.fromkeys(kinds) if kind in (OTLP, FILE)]


def store_of(config: TelemetryConfig) -> Path:
    """Directory of the embedded store."""
    return Path(config.store) if config.store else default_store()


def place_of(kind: str, config: TelemetryConfig) -> str:
    """Names where spans go, for a tracestate: two processes with the same one export to the same place. A store is
    one of a host; of a collector, which has many addresses, only the kind counts."""
    if kind == OTLP:
        return OTLP
    place = f"{socket.gethostname()}:{store_of(config).absolute()}"
    return f"{kind}-{hashlib.sha256(place.encode()).hexdigest()[:12]}"


def span_exporter(kind: str, config: TelemetryConfig) -> SpanExporter:
    """The exporter of a destination."""
    if kind == FILE:
        return StoreExporter(store_of(config), config.store_bytes)
    endpoint = config.endpoint or None
    if _protocol(config, "TRACES") == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=_path(endpoint, "/v1/traces"))
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

    return GrpcExporter(endpoint=endpoint)


def metric_reader(config: TelemetryConfig) -> MetricReader | None:
    """Sends metrics to the collector every minute (OTEL_METRIC_EXPORT_INTERVAL), where there is one."""
    disabled = os.environ.get("OTEL_METRICS_EXPORTER", "").strip() == "none"
    if OTLP not in destinations(config) or disabled:
        return None
    endpoint = config.endpoint or None
    if _protocol(config, "METRICS") == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as HttpExporter

        return PeriodicExportingMetricReader(HttpExporter(endpoint=_path(endpoint, "/v1/metrics")))
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as GrpcExporter

    return PeriodicExportingMetricReader(GrpcExporter(endpoint=endpoint))


def resource_of(service: str, attributes: Mapping[str, str | int]) -> Resource:
    """Who this process is; OTEL_RESOURCE_ATTRIBUTES adds to it."""
    return Resource.create(
        {
            "service.name": service,
            "service.namespace": "expertmesh",
            "service.version": __version__,
            "service.instance.id": uuid.uuid4().hex,
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
            **attributes,
        }
    )


def _endpoint(config: TelemetryConfig) -> str:
    named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return config.endpoint or next((os.environ[name] for name in named if os.environ.get(name)), "")


def _protocol(config: TelemetryConfig, signal: str) -> str:
    named = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    return config.protocol or next((os.environ[name] for name in named if os.environ.get(name)), "grpc")


def _path(endpoint: str | None, path: str) -> str | None:
    """The exporter adds the signal's path to what the environment says, and not to what it is given."""
    if endpoint is None or endpoint.rstrip("/").endswith(path):
        return endpoint
    return endpoint.rstrip("/") + path
