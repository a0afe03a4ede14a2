"""The queue in front of an exporter, and the embedded store."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from cluster.settings import TelemetryConfig
from cluster.telemetry.hub import Telemetry
from cluster.telemetry.pump import SpanPump
from cluster.telemetry.store import StoreExporter, read_store
from cluster.telemetry.traces import traces_of
from tests.records import in_store, record, traces_from


class Slow(SpanExporter):
    """An exporter that waits until it may, and fails when told."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.fails = False
        self.got: list[ReadableSpan] = []

    def export(self, spans: Any) -> SpanExportResult:
        self.may.wait(20)
        if self.fails:
            return SpanExportResult.FAILURE
        self.got += spans
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.may.set()


def spans(number: int) -> list[ReadableSpan]:
    return [ReadableSpan(f"span {i}") for i in range(number)]


def test_every_span_is_exported_or_counted_and_nobody_waits() -> None:
    exporter = Slow()
    pump = SpanPump(exporter, "x", max_spans=1000, delay_s=0.01)
    random_sizes = [random.randrange(1, 60) for _ in range(100)]
    began_s = time.monotonic()
    for size in random_sizes:
        pump.put(spans(size))
    assert time.monotonic() - began_s < 5, "an exporter that hangs slows nobody"
    assert pump.created == sum(random_sizes)
    assert pump.dropped["queue_full"] == pump.created - pump.waiting()
    assert pump.dropped["queue_full"] > 0
    exporter.may.set()
    assert pump.flush(10)
    assert pump.exported == len(exporter.got) == pump.created - pump.dropped["queue_full"]
    exporter.fails = True
    pump.put(spans(7))
    assert pump.flush(10)
    assert pump.dropped["export_failed"] == 7
    pump.close()
    pump.put(spans(3))
    assert pump.dropped["shutdown"] == 3
    assert pump.created == pump.exported + sum(pump.dropped.values())


def test_an_exporter_that_raises_loses_its_batch_only() -> None:
    class Broken(Slow):
        def export(self, spans: Any) -> SpanExportResult:
            raise RuntimeError("planted")

    pump = SpanPump(Broken(), "x", max_spans=100, delay_s=0.01)
    pump.put(spans(5))
    assert pump.flush(10)
    assert pump.dropped["export_failed"] == 5
    pump.close()


def test_progress_has_an_age_only_while_there_is_something_to_do() -> None:
    clock = [0.0]
    exporter = Slow()
    pump = SpanPump(exporter, "x", 100, delay_s=0.01, clock=lambda: clock[0])
    assert pump.progress_age_s() == 0
    pump.put(spans(1))
    clock[0] = 9.0
    assert pump.progress_age_s() > 0
    exporter.may.set()
    pump._exporter.shutdown()
    limit_s = time.monotonic() + 10
    while pump.waiting() and time.monotonic() < limit_s:
        time.sleep(0.01)
    assert pump.progress_age_s() == 0
    pump.close(0.1)


def test_the_store_stays_within_its_bytes_and_keeps_the_newest(tmp_path: Path) -> None:
    config = in_store(tmp_path, store_bytes=256 * 1024)
    exporter = StoreExporter(tmp_path, config.store_bytes)
    telemetry = Telemetry(TelemetryConfig(traces="off"), "x", {}, "m")
    last = ""
    for _ in range(300):
        item = record(20)
        last = item.ref.trace_id
        assert exporter.export(telemetry._maker.request(item, "", "ratio")) is SpanExportResult.SUCCESS
    telemetry.close()
    exporter.shutdown()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= config.store_bytes
    traces = traces_of(read_store(tmp_path))
    assert last in traces
    assert len(traces) < 300


def test_a_line_that_was_cut_or_damaged_is_left_out_and_the_others_are_read(tmp_path: Path) -> None:
    traces_from(in_store(tmp_path), [record(5)])
    [segment] = tmp_path.iterdir()
    line = segment.read_bytes()
    whole = len(list(read_store(tmp_path)))
    assert whole > 5
    for broken in (line[:-40], line.replace(b'"trace"', b'"tr\xffce"', 1), line.replace(b'"spans"', b'"spun"')):
        segment.write_bytes(line + broken)
        assert len(list(read_store(tmp_path))) == whole


def test_a_store_that_cannot_be_written_drops_and_counts(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    telemetry = Telemetry(in_store(blocked / "store"), "x", {}, "m")
    telemetry.request(record(5))
    assert telemetry.flush(10)
    assert telemetry.counts()["dropped"] == telemetry.counts()["created"] > 0
    telemetry.close()


def test_a_segment_that_others_removed_is_left_for_a_new_one(tmp_path: Path) -> None:
    exporter = StoreExporter(tmp_path, 1 << 20)
    telemetry = Telemetry(TelemetryConfig(traces="off"), "x", {}, "m")
    telemetry.close()
    assert exporter.export(telemetry._maker.request(record(3), "", "")) is SpanExportResult.SUCCESS
    for segment in tmp_path.iterdir():
        segment.unlink()
    item = record(3)
    assert exporter.export(telemetry._maker.request(item, "", "")) is SpanExportResult.SUCCESS
    exporter.shutdown()
    assert list(traces_of(read_store(tmp_path))) == [item.ref.trace_id]
