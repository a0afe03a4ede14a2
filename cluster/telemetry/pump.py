"""From spans to an exporter, through a bounded queue and a thread of its own.

The SDK's batch processor does the same, but neither counts the spans that its exporter gives up nor says when it last
got through; here every span is exported, waiting or counted as dropped with its cause.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from cluster.core import Clock

log = logging.getLogger(__name__)

BATCH_SPANS = 512
QUEUE_FULL, EXPORT_FAILED, SHUT_DOWN = "queue_full", "export_failed", "shutdown"


class SpanPump:
    """Queue and thread in front of one exporter. `put` never blocks."""

    def __init__(
        self, exporter: SpanExporter, name: str, max_spans: int, delay_s: float = 0.25, clock: Clock = time.monotonic
    ) -> None:
        self.name, self._exporter, self._max_spans, self._delay_s = name, exporter, max_spans, delay_s
        self._clock = clock
        self._queue: deque[ReadableSpan] = deque()
        self._lock = threading.Condition()
        self._closed = self._flushing = False
        self._in_flight = 0
        self.created = self.exported = 0
        self.dropped: Counter[str] = Counter()
        self._progress_s = clock()
        self._thread = threading.Thread(target=self._run, name=f"spans-{name}", daemon=True)
        self._thread.start()

    def put(self, spans: Sequence[ReadableSpan]) -> None:
        """Queues the spans of one trace, or drops all of them: half a trace helps nobody."""
        with self._lock:
            self.created += len(spans)
            if self._closed:
                self.dropped[SHUT_DOWN] += len(spans)
            elif len(self._queue) + len(spans) > self._max_spans:
                self.dropped[QUEUE_FULL] += len(spans)
            else:
                self._queue.extend(spans)
                if len(self._queue) >= BATCH_SPANS:
                    self._lock.notify()

    def waiting(self) -> int:
        """Spans that are neither exported nor dropped yet."""
        with self._lock:
            return len(self._queue) + self._in_flight

    def progress_age_s(self) -> float:
        """Seconds since a batch got through, or nothing was to be done."""
        with self._lock:
            return self._clock() - self._progress_s if self._queue or self._in_flight else 0.0

    def flush(self, timeout_s: float) -> bool:
        """Waits until nothing waits; False when the time is up before."""
        ends_s = self._clock() + timeout_s
        with self._lock:
            self._flushing = True
            self._lock.notify_all()
            while self._queue or self._in_flight:
                left_s = ends_s - self._clock()
                if left_s <= 0:
                    break
                self._lock.wait(min(left_s, 0.05))
            self._flushing = False
            return not (self._queue or self._in_flight)

    def close(self, timeout_s: float = 3.0) -> None:
        """Exports what waits as long as there is time; the rest is dropped."""
        self.flush(timeout_s)
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._exporter.shutdown()
        self._thread.join(timeout=timeout_s)
        with self._lock:
            self.dropped[SHUT_DOWN] += len(self._queue)
            self._queue.clear()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._closed and not self._flushing and len(self._queue) < BATCH_SPANS:
                    self._lock.wait(self._delay_s)
                if self._closed:
                    return
                batch = [self._queue.popleft() for _ in range(min(BATCH_SPANS, len(self._queue)))]
                self._in_flight = len(batch)
                if not batch:
                    self._progress_s = self._clock()
            if batch:
                self._export(batch)

    def _export(self, batch: list[ReadableSpan]) -> None:
        try:
            done = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:
            log.exception("the exporter %s failed", self.name)
            done = False
        with self._lock:
            if done:
                self.exported += len(batch)
                self._progress_s = self._clock()
            else:
                self.dropped[EXPORT_FAILED] += len(batch)
            self._in_flight = 0
            self._lock.notify_all()
