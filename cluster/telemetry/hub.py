"""What a process tells: records in, spans and metrics out.

The engine and the front door only append to a queue; a thread of its own does the rest, and the pumps' threads export.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan

from cluster.core import Clock, LayerCall
from cluster.settings import TelemetryConfig
from cluster.telemetry.exporters import OTLP, destinations, metric_reader, place_of, resource_of, span_exporter
from cluster.telemetry.keep import TailSampler
from cluster.telemetry.logs import log_request
from cluster.telemetry.metrics import Gauge, Metrics, PrometheusEndpoint
from cluster.telemetry.pump import SpanPump
from cluster.telemetry.records import PhaseRecord, RequestRecord, StepRecord
from cluster.telemetry.spans import SpanMaker
from cluster.telemetry.steps import StepDetail

log = logging.getLogger(__name__)

MAX_RECORDS = 8192
PERIOD_S = 0.1
RECORDS_FULL, RECORD_FAILED = "records_full", "record_failed"

Call = tuple[LayerCall, float, float, float, float, int]
Record = RequestRecord | StepRecord | PhaseRecord | Call


def telemetry_of(
    config: TelemetryConfig, service: str, attributes: Mapping[str, str | int], model: str, serve_metrics: bool
) -> Telemetry | None:
    """The telemetry of a process, if there is anything to tell it to."""
    if not destinations(config) and not (serve_metrics and config.metrics_listen != "off"):
        return None
    return Telemetry(config, service, attributes, model, serve_metrics)


class Telemetry:
    """Traces and metrics of one process; implements `Observer`. ``tracing`` may be switched while it runs.

    ``serve_metrics``: this process has the Prometheus endpoint.

    Raises (constructor):
        ConfigError: the endpoint for metrics cannot be had.
    """

    def __init__(
        self,
        config: TelemetryConfig,
        service: str,
        attributes: Mapping[str, str | int] | None = None,
        model: str = "",
        serve_metrics: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config, self._clock = config, clock
        resource = resource_of(service, attributes or {})
        kinds = destinations(config)
        self.kinds = tuple(kinds)
        self._places = frozenset(place_of(kind, config) for kind in kinds)
        self.tracing = bool(kinds)
        self._pumps = [SpanPump(span_exporter(kind, config), kind, config.queue_spans) for kind in kinds]
        self._maker = SpanMaker(resource, model)
        self._keep = TailSampler(config.sample_ratio)
        self._endpoint: PrometheusEndpoint | None = None
        self._metrics: Metrics | None = None
        if serve_metrics:
            self._start_metrics(resource, model)
        self._records: deque[Record] = deque()
        self._lost: Counter[str] = Counter()
        self._next_step_s = 0.0
        self._progress_s = clock()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._thread.start()

    def _start_metrics(self, resource: Resource, model: str) -> None:
        readers: list[MetricReader] = []
        if self._config.metrics_listen != "off":
            self._endpoint = PrometheusEndpoint(self._config.metrics_listen)
            readers.append(self._endpoint.reader)
        pushed = metric_reader(self._config)
        if pushed is not None:
            readers.append(pushed)
        if readers:
            self._metrics = Metrics(resource, model, readers)
            self._metrics.gauges([Gauge("moe.trace.spans_dropped", "{span}", "Lost spans.", self._dropped, True)])
            self._metrics.gauges([Gauge("moe.trace.spans", "{span}", "Spans exported.", self._exported, True)])

    @property
    def metrics_address(self) -> str:
        """HOST:PORT of the Prometheus endpoint; empty without."""
        return self._endpoint.address if self._endpoint is not None else ""

    def gauges(self, gauges: Iterable[Gauge]) -> None:
        """Adds metrics that are asked for on demand."""
        if self._metrics is not None:
            self._metrics.gauges(gauges)

    # -- Observer ----------------------------------------------------------------------------------------------------

    def begin_step(self, asked: bool) -> StepDetail | None:
        """See `Observer`."""
        if not self.tracing:
            return None
        if asked:
            return StepDetail(by_layer=True)
        if self._config.steps_per_s <= 0:
            return None
        now_s = self._clock()
        if now_s < self._next_step_s:
            return None
        self._next_step_s = now_s + 1.0 / self._config.steps_per_s
        return StepDetail()

    def step(self, record: StepRecord) -> None:
        """See `Observer`."""
        if self._metrics is not None or record.detail is not None:
            self._put(record)

    def request(self, record: RequestRecord) -> None:
        """See `Observer`."""
        record.traced = self.tracing
        self._put(record)

    def phases(self, record: PhaseRecord) -> None:
        """Background work is over."""
        if record.phases:
            self._put(record)

    def layer_call(
        self, call: LayerCall, started_s: float, ended_s: float, queue_s: float, load_s: float, rows: int
    ) -> None:
        """A group has answered a call that belongs to a trace."""
        if self.tracing:
            self._put((call, started_s, ended_s, queue_s, load_s, rows))

    def _put(self, record: Record) -> None:
        if len(self._records) >= MAX_RECORDS:
            self._lost[RECORDS_FULL] += 1
        else:
            self._records.append(record)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        self._idle.clear()
        while self._records:
            try:
                self._handle(self._records.popleft())
            except Exception:
                log.exception("a record could not be told")
                self._lost[RECORD_FAILED] += 1
        self._progress_s = self._clock()
        self._idle.set()

    def _handle(self, record: Record) -> None:
        if isinstance(record, RequestRecord):
            log_request(record)
            if self._metrics is not None:
                self._metrics.request(record)
            kept = self._keep.why(record)
            if record.traced and kept:
                # A parent that nobody exports to where we do would leave our spans hanging. Who does not say where
                # its spans go is no client of ours, and cannot write to our store.
                places = set(record.trace_state.split(";")) if record.trace_state else {OTLP}
                found = self._places <= places
                parent = record.parent if record.sampled and found else ""
                self._export(self._maker.request(record, parent, kept))
        elif isinstance(record, StepRecord):
            if self._metrics is not None:
                self._metrics.step(record)
            if record.detail is not None:
                self._export(self._maker.step(record, record.detail))
        elif isinstance(record, PhaseRecord):
            if self._metrics is not None:
                self._metrics.phases(record)
            if self.tracing:
                self._export(self._maker.phases(record))
        else:
            call, started_s, ended_s, queue_s, load_s, rows = record
            attributes = {"moe.layer": call.layer, "moe.tokens": rows, "moe.queue": queue_s, "moe.load": load_s}
            self._export(self._maker.expert_call(call.traceparent, started_s, ended_s, attributes))

    def _export(self, spans: list[ReadableSpan]) -> None:
        for pump in self._pumps:
            pump.put(spans)

    # -- how it is ---------------------------------------------------------------------------------------------------

    def _dropped(self) -> list[tuple[Mapping[str, str], float]]:
        causes: Counter[str] = Counter(self._lost)
        for pump in self._pumps:
            causes.update(pump.dropped)
        return [({"cause": cause}, float(number)) for cause, number in causes.items()] or [({"cause": "none"}, 0.0)]

    def _exported(self) -> list[tuple[Mapping[str, str], float]]:
        return [({"exporter": pump.name}, float(pump.exported)) for pump in self._pumps]

    def dropped(self) -> dict[str, int]:
        """Lost spans by cause (records that became no spans count as one)."""
        return {labels["cause"]: int(number) for labels, number in self._dropped() if number}

    def counts(self) -> dict[str, int]:
        """Spans made, exported, dropped and still waiting, over all exporters."""
        return {
            "created": sum(pump.created for pump in self._pumps),
            "exported": sum(pump.exported for pump in self._pumps),
            "dropped": sum(self.dropped().values()),
            "waiting": sum(pump.waiting() for pump in self._pumps),
        }

    def progress_ages_s(self) -> dict[str, float]:
        """Seconds since the last progress of each loop."""
        ages = {f"spans-{pump.name}": pump.progress_age_s() for pump in self._pumps}
        return {"telemetry": self._clock() - self._progress_s, **ages}

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Waits until everything told so far is exported; False when the time is up before."""
        ends_s = self._clock() + timeout_s
        while self._records or not self._idle.is_set():
            if self._clock() > ends_s:
                return False
            time.sleep(0.01)
        return all(pump.flush(max(0.0, ends_s - self._clock())) for pump in self._pumps)

    def close(self) -> None:
        """Tells what is left, and ends the threads."""
        self._stop.set()
        self._thread.join(timeout=5)
        for pump in self._pumps:
            pump.close()
        if self._metrics is not None:
            self._metrics.close()
        if self._endpoint is not None:
            self._endpoint.close()
