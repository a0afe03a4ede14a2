"""Metrics: GenAI semantic conventions and our own, for Prometheus and OTLP alike. Recorded outside the hot path."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry

from cluster import __version__
from cluster.config import split_address
from cluster.errors import ConfigError
from cluster.telemetry.ledger import Stage
from cluster.telemetry.records import PhaseRecord, RequestRecord, StepRecord

log = logging.getLogger(__name__)

DEFAULT_LISTEN = "127.0.0.1:9464"
# The convention's own buckets.
_REQUEST_S = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_STEP_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


@dataclass(frozen=True, slots=True)
class Gauge:
    """A value that is asked for when somebody looks: ``read()`` gives (labels, value) pairs."""

    name: str
    unit: str
    help: str
    read: Callable[[], Iterable[tuple[Mapping[str, str], float]]]
    counts: bool = False
    """It only grows."""


class Metrics:
    """All instruments of one process, and what they are read by."""

    def __init__(self, resource: Resource, model: str, readers: Sequence[MetricReader]) -> None:
        self._labels = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "expertmesh",
            "gen_ai.request.model": model,
        }
        self._provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
        self._meter = meter = self._provider.get_meter("expertmesh", __version__)

        def histogram(name: str, help: str, buckets: Sequence[float]) -> Any:
            return meter.create_histogram(name, "s", help, explicit_bucket_boundaries_advisory=buckets)

        self._request = histogram("gen_ai.server.request.duration", "Arrival to last byte.", _REQUEST_S)
        self._first = histogram("gen_ai.server.time_to_first_token", "Arrival to first token.", _FIRST_S)
        self._token = histogram("gen_ai.server.time_per_output_token", "Time a token after the first.", _TOKEN_S)
        self._queue = histogram("moe.queue.duration", "Wait for a first place in a step.", _REQUEST_S)
        self._dispatch = histogram("moe.dispatch.duration", "Splitting and sending layer calls, a step.", _STEP_S)
        self._wait = histogram("moe.dispatch.wait.duration", "Waiting for a group, a step.", _STEP_S)
        self._compute = histogram("moe.expert.compute.duration", "Experts computing, waited for, a step.", _STEP_S)
        self._combine = histogram("moe.combine.duration", "Adding the groups' answers, a step.", _STEP_S)
        self._load = histogram("moe.expert.load.duration", "A cold load on the critical path.", _STEP_S)
        self._failover = histogram("moe.failover.duration", "From a failed call to its answer elsewhere.", _LONG_S)
        self._cancel = histogram("moe.cancel.latency", "From a client's leaving to its freed sequence.", _STEP_S)
        self._phase = histogram("moe.startup.phase.duration", "Phases of the start.", _LONG_S)
        self._bytes = meter.create_counter("moe.dispatch.bytes", "By", "Rows to and from a group.")
        self._tokens = meter.create_counter("moe.expert.tokens", "{token}", "Token rows sent to a group.")
        self._cold = meter.create_counter("moe.expert.cold_loads", "{load}", "Cold loads on the critical path.")
        self._failures = meter.create_counter("moe.group.failures", "{call}", "Calls that had to be sent again.")
        self._cancelled = meter.create_counter("moe.requests.cancelled", "{request}", "Requests whose client left.")
        self._requests = meter.create_counter("moe.requests", "{request}", "Requests by how they ended.")
        self._out = meter.create_counter("moe.tokens", "{token}", "Prompt, cached and output tokens.")
        self._known_groups: set[int] = set()
        # A counter that was never touched is not there, and a panel or alert over it says nothing instead of 0.
        self._cancelled.add(0)
        self._requests.add(0, {"code": "OK"})

    def gauges(self, gauges: Iterable[Gauge]) -> None:
        """Adds what is asked for on demand."""
        for gauge in gauges:
            kind = self._meter.create_observable_counter if gauge.counts else self._meter.create_observable_gauge
            kind(gauge.name, [_callback(gauge)], gauge.unit, gauge.help)

    def request(self, record: RequestRecord) -> None:
        """A request is over."""
        labels = dict(self._labels)
        code = record.error_code or "OK"
        if record.error_code:
            labels["error.type"] = record.error_code
        self._request.record(record.wall_s, labels)
        self._requests.add(1, {"code": code})
        self._out.add(record.prompt_tokens, {"kind": "prompt"})
        self._out.add(record.output_tokens, {"kind": "output"})
        account = record.account
        if record.left_s:
            self._cancelled.add(1)
            if account is not None and account.ended_s is not None:
                self._cancel.record(max(0.0, account.ended_s - record.left_s))
        if account is None:
            return
        self._out.add(account.cached_tokens, {"kind": "cached"})
        if account.first_step_s is not None:
            self._queue.record(account.first_step_s - account.arrived_s)
        if account.first_token_s is not None:
            self._first.record(account.first_token_s - record.arrived_s, self._labels)
            if len(account.tokens) > 1:
                last_s = account.tokens[-1]
                self._token.record((last_s - account.first_token_s) / (len(account.tokens) - 1), self._labels)

    def step(self, record: StepRecord) -> None:
        """A step is over."""
        spent = record.after.since(record.before)
        self._dispatch.record(spent.seconds(Stage.DISPATCH))
        self._combine.record(spent.seconds(Stage.COMBINE))
        for item in spent.groups():
            labels = {"group": str(item.group)}
            if item.group not in self._known_groups:
                self._known_groups.add(item.group)
                self._cold.add(0, labels)
                self._failures.add(0, {**labels, "cause": "none"})
            self._wait.record(item.total_s, labels)
            self._compute.record(item.seconds.get(Stage.GROUP_COMPUTE.value, 0.0), labels)
            self._bytes.add(item.num_bytes, labels)
            self._tokens.add(item.tokens, labels)
        for event in record.events:
            labels = {"group": str(event.group)}
            if event.kind == "cold_load":
                self._cold.add(1, labels)
                self._load.record(event.seconds, labels)
            elif event.kind == "failover":
                self._failures.add(1, {**labels, "cause": event.cause.partition(":")[0] or "unknown"})
                self._failover.record(event.seconds, labels)

    def phases(self, record: PhaseRecord) -> None:
        """A process has started."""
        for name, begin_s, end_s in record.phases:
            self._phase.record(end_s - begin_s, {"phase": name})

    def close(self) -> None:
        """Ends the readers."""
        with contextlib.suppress(Exception):  # a reader whose collector is gone complains
            self._provider.shutdown(timeout_millis=2000)


def _callback(gauge: Gauge) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(value, dict(labels)) for labels, value in gauge.read()]

    return read


class PrometheusEndpoint:
    """The HTTP endpoint that Prometheus scrapes. ``listen`` is HOST:PORT, or auto. ``address`` is where it is.

    Raises (constructor):
        ConfigError: the port is in use, or the interface is not this machine's.
    """

    def __init__(self, listen: str) -> None:
        self.registry = CollectorRegistry()
        self.reader = PrometheusMetricReader(scope_info_enabled=False, registry=self.registry)
        host, port = split_address("telemetry.metrics_listen", DEFAULT_LISTEN if listen == "auto" else listen)
        try:
            self._serve(host, port)
        except OSError as exc:
            if listen != "auto":
                raise ConfigError(f"telemetry.metrics_listen: cannot listen on {listen!r}: {exc.strerror}") from exc
            self._serve(host, 0)
        self.address = f"{host}:{self._server.server_port}"

    def _serve(self, host: str, port: int) -> None:
        self._server, self._thread = prometheus_client.start_http_server(port, host, self.registry)

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)
