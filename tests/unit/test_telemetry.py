"""From records to spans, stores and blame; nothing here opens a socket."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from cluster.config import TelemetryConfig, load_config
from cluster.core import LayerCall
from cluster.errors import ConfigError
from cluster.telemetry.account import RequestAccount, StepEvent
from cluster.telemetry.blame import blame
from cluster.telemetry.exchange import to_jaeger, to_otlp_json
from cluster.telemetry.exporters import destinations
from cluster.telemetry.hub import Telemetry
from cluster.telemetry.keep import TailSampler
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.logs import JsonLines, TextLines, log_request
from cluster.telemetry.pump import SpanPump
from cluster.telemetry.records import PhaseRecord, RequestRecord, SpanRef, StepRecord
from cluster.telemetry.steps import StepDetail, new_span_id, new_trace_id
from cluster.telemetry.store import StoreExporter, read_store
from cluster.telemetry.traces import TraceView, traces_of
from cluster.telemetry.waterfall import waterfall
from tests.trace_lint import from_jaeger, lint


def record(
    tokens: int = 20,
    prompt: int = 10,
    groups: int = 2,
    straggler_s: float = 0.002,
    queue_s: float = 0.01,
    events: tuple[StepEvent, ...] = (),
    **fields: Any,
) -> RequestRecord:
    """A request that decodes steadily."""
    start_s = time.monotonic() - 100
    total = Ledger()
    account = RequestAccount(start_s + 0.001)
    account.enter(total, start_s + 0.001 + queue_s)
    now_s = start_s + 0.001 + queue_s
    for event in events:
        account.note(event._replace(start_s=now_s))
        total.wait(event.group, event.layer, Stage.COLD_LOAD, event.seconds)
        now_s += event.seconds
    for _ in range(tokens):
        total.add(Stage.TRUNK, 0.01)
        for group in range(groups):
            total.wait(group, 1, Stage.STRAGGLER if group == groups - 1 else Stage.GROUP_COMPUTE, straggler_s)
            total.called(group, 4, 512)
        now_s += 0.01 + groups * straggler_s
        account.token(total, now_s)
    account.end(total, now_s)
    whole = account.total()
    whole.add(Stage.TOKENIZE, 0.001)
    ids = {"ref": SpanRef(new_trace_id(), new_span_id()), "request_id": "r1", "tokenized_s": start_s + 0.001}
    sizes = {"prompt_tokens": prompt, "output_tokens": tokens, "max_tokens": tokens, "finish_reason": "length"}
    return RequestRecord(arrived_s=start_s, ended_s=now_s, ledger=whole, account=account, **{**ids, **sizes, **fields})


def traces_from(telemetry_config: TelemetryConfig, records: list[Any]) -> dict[str, TraceView]:
    telemetry = Telemetry(telemetry_config, "expertmesh-router", {}, "model")
    for item in records:
        if isinstance(item, StepRecord):
            telemetry.step(item)
        elif isinstance(item, PhaseRecord):
            telemetry.phases(item)
        else:
            telemetry.request(item)
    assert telemetry.flush(10)
    telemetry.close()
    return traces_of(read_store(Path(telemetry_config.store)))


def in_store(path: Path, **fields: Any) -> TelemetryConfig:
    return TelemetryConfig(traces="file", store=str(path), metrics_listen="off", **fields)


def test_spans_are_well_formed_whatever_the_length_and_the_number_of_groups(tmp_path: Path) -> None:
    cold = StepEvent("cold_load", 0.0, 0.05, group=1, layer=3, expert=7, num_bytes=10)
    records = [record(4), record(4000, groups=2), record(1), record(40, groups=40), record(5, events=(cold,) * 20)]
    records += [record(3, error_code="UNAVAILABLE", error="a lone \ud800 surrogate")]
    traces = traces_from(in_store(tmp_path), records)
    assert len(traces) == len(records)
    for trace in traces.values():
        assert len(trace.spans) <= 150
        assert lint(trace.spans) == []
        request = trace.request
        assert request is not None
        total_s = sum(request.times().values()) + request.attributes["moe.unattributed"]
        assert total_s == pytest.approx(request.seconds, rel=1e-3)
    many = traces[records[3].ref.trace_id]
    assert len([span for span in many.named("moe.expert_batch") if "moe.groups" in span.attributes]) == 2
    numbers = [len(trace.spans) for trace in traces.values()]
    assert abs(numbers[0] - numbers[1]) <= 32, "only windows are more"


def test_exports_keep_the_rules_and_what_was_there(tmp_path: Path) -> None:
    [trace] = traces_from(in_store(tmp_path), [record(50)]).values()
    jaeger = json.loads(json.dumps(to_jaeger(trace), allow_nan=False))
    assert lint(from_jaeger(jaeger), slack_ns=4_000) == []
    assert len(jaeger["data"][0]["spans"]) == len(trace.spans)
    otlp = json.loads(json.dumps(to_otlp_json(trace), allow_nan=False))
    [resource_spans] = otlp["resourceSpans"]
    spans = resource_spans["scopeSpans"][0]["spans"]
    assert {span["spanId"] for span in spans} == {span.span_id for span in trace.spans}
    from google.protobuf.json_format import ParseDict
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    for span in spans:  # protobuf's own JSON has ids in base64, OTLP's in hex
        for name in ("traceId", "spanId", "parentSpanId"):
            if name in span:
                import base64

                span[name] = base64.b64encode(bytes.fromhex(span[name])).decode()
    message = ParseDict(otlp, ExportTraceServiceRequest())
    assert message.resource_spans[0].scope_spans[0].spans[0].name == "moe.request"


def test_a_waterfall_has_every_span(tmp_path: Path) -> None:
    [trace] = traces_from(in_store(tmp_path), [record(50)]).values()
    assert waterfall(trace).row_count == len(trace.spans)
    assert waterfall(trace, windows=False).row_count == len(trace.spans) - len(trace.named("moe.decode.window"))


def test_a_parent_that_is_exported_elsewhere_is_left_out(tmp_path: Path) -> None:
    parent = new_span_id()
    records = [
        record(3, parent=parent, trace_state="file"),
        record(3, parent=parent, trace_state="otlp"),
        record(3, parent=parent),
        record(3, parent=parent, sampled=False),
    ]
    traces = traces_from(in_store(tmp_path), records)
    found = [traces[item.ref.trace_id].request.parent_id if item.ref.trace_id in traces else None for item in records]  # type: ignore[union-attr]
    assert found == [parent, "", parent, None]


def test_steps_have_traces_of_their_own_with_links(tmp_path: Path) -> None:
    before, after = Ledger(), Ledger()
    after.add(Stage.TRUNK, 0.02)
    after.wait(0, 2, Stage.GROUP_COMPUTE, 0.01)
    members = [SpanRef(new_trace_id(), new_span_id()) for _ in range(3)]
    now_s = time.monotonic()
    step = StepRecord(7, now_s - 0.03, now_s, 3, 5, 2, before, after, members, detail=StepDetail())
    [trace] = traces_from(in_store(tmp_path), [step]).values()
    assert trace.root.name == "moe.step"
    assert trace.root.parent_id == ""
    assert trace.root.links == tuple(members)
    assert lint(trace.spans) == []


def test_starts_are_traces(tmp_path: Path) -> None:
    now_s = time.monotonic()
    started = PhaseRecord("moe.startup", now_s - 3)
    started.done("weights", now_s - 1)
    started.done("links", now_s)
    [trace] = traces_from(in_store(tmp_path), [started]).values()
    assert [span.name for span in trace.spans] == ["moe.startup", "moe.startup.weights", "moe.startup.links"]
    assert lint(trace.spans) == []


def test_a_groups_span_hangs_under_the_routers_and_nonsense_is_ignored(tmp_path: Path) -> None:
    telemetry = Telemetry(in_store(tmp_path), "expertmesh-experts", {"moe.group": 1}, "model")
    trace_id, span_id = new_trace_id(), new_span_id()
    for traceparent in (f"00-{trace_id}-{span_id}-01", "", "00-zz-zz-01", f"00-{'x' * 32}-{'y' * 16}-01", "-" * 55):
        call = LayerCall(1, 2, 3, 1, 1, traceparent=traceparent)
        telemetry.layer_call(call, time.monotonic() - 0.01, time.monotonic(), 0.001, 0.0, 4)
    assert telemetry.flush(10)
    telemetry.close()
    [span] = read_store(tmp_path)
    assert (span.trace_id, span.parent_id, span.name) == (trace_id, span_id, "moe.expert.compute")
    assert span.remote_parent


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_failed_cold_failed_over_and_slow_requests_are_always_kept() -> None:
    sampler = TailSampler(0.0)
    assert [sampler.why(record(10)) for _ in range(40)] == [""] * 40
    assert sampler.why(record(10, error_code="INTERNAL")) == "error"
    assert sampler.why(record(10, error_code="CANCELLED")) == ""
    assert sampler.why(record(10, events=(StepEvent("cold_load", 0.0, 0.001, 0, 1, 2),))) == "cold"
    assert sampler.why(record(10, events=(StepEvent("failover", 0.0, 0.001, 0, 1),))) == "failover"
    assert sampler.why(record(10, straggler_s=0.05)) == "slow"
    assert sampler.why(record(10, queue_s=1.0)) == "slow"
    assert sampler.why(record(10)) == ""


def test_a_ratio_decides_by_the_trace_id_alike_everywhere() -> None:
    records = [record(2) for _ in range(400)]
    first, second = TailSampler(0.25), TailSampler(0.25)
    kept = [item.ref.trace_id for item in records if first.why(item) == "ratio"]
    assert [item.ref.trace_id for item in reversed(records) if second.why(item) == "ratio"] == kept[::-1]
    assert 50 <= len(kept) <= 150
    assert all(TailSampler(1.0).why(item) for item in records[:20])


# -- the pump --------------------------------------------------------------------------------------------------------


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


# -- the store -------------------------------------------------------------------------------------------------------


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
    assert list(traces)[-1] == last or last in traces
    assert len(traces) < 300


def test_a_segment_that_was_cut_is_read_up_to_there(tmp_path: Path) -> None:
    traces_from(in_store(tmp_path), [record(5), record(5)])
    [segment] = tmp_path.iterdir()
    data = segment.read_bytes()
    segment.write_bytes(data[: len(data) - 40])
    whole = list(read_store(tmp_path))
    segment.write_bytes(data.replace(b'"trace"', b'"tr\xffce"', 1))
    damaged = list(read_store(tmp_path))
    assert len(whole) < len(damaged) + 200
    segment.write_bytes(data)
    assert len(list(read_store(tmp_path))) > len(whole)


def test_a_store_that_cannot_be_written_drops_and_counts(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    telemetry = Telemetry(in_store(blocked / "store"), "x", {}, "m")
    telemetry.request(record(5))
    assert telemetry.flush(10)
    assert telemetry.counts()["dropped"] == telemetry.counts()["created"] > 0
    telemetry.close()


# -- blame -----------------------------------------------------------------------------------------------------------


def test_blame_names_what_is_unusual_in_the_tail(tmp_path: Path) -> None:
    cold = StepEvent("cold_load", 0.0, 0.08, group=1, layer=3, expert=7)
    records = [record(random.randrange(5, 60)) for _ in range(60)] + [record(20, events=(cold,))]
    report = blame(traces_from(in_store(tmp_path), records).values(), 0.99)
    first = report.causes[0]
    assert (first.cause, first.group, first.layer, first.expert) == ("expert.cold_load", 1, 3, 7)
    assert first.stands_out
    assert report.tail == (records[-1].ref.trace_id,)
    assert first.seconds == pytest.approx(0.08, rel=0.01)
    assert sum(item.share for item in report.causes) == pytest.approx(1.0, abs=0.02)
    found = report.as_json()
    assert found["attributed_share_min"] > 0.95
    assert json.dumps(found, allow_nan=False)


def test_blame_of_everybody_is_by_seconds_and_of_nobody_is_empty(tmp_path: Path) -> None:
    records = [record(20, straggler_s=0.03) for _ in range(10)]
    report = blame(traces_from(in_store(tmp_path), records).values(), 0.0)
    assert (report.causes[0].cause, report.causes[0].group, report.causes[0].layer) == ("expert.straggler", 1, 1)
    assert not report.causes[0].stands_out
    nothing = blame([], 0.99)
    assert nothing.causes == ()
    assert nothing.as_json()["attributed_share_p50"] is None


# -- settings and logs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "settings", "wanted"),
    [
        ({}, {}, ["file"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, {}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x:4317"}, {}, ["otlp"]),
        ({}, {"endpoint": "http://x:4317"}, ["otlp"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:4317"}, {"traces": "file"}, ["file"]),
        ({}, {"traces": "otlp,file"}, ["otlp", "file"]),
        ({}, {"traces": "off"}, []),
        ({"OTEL_TRACES_EXPORTER": "none"}, {}, []),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, {}, ["otlp"]),
        ({"OTEL_SDK_DISABLED": "true"}, {"traces": "file"}, []),
    ],
)
def test_where_traces_go(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], settings: dict[str, str], wanted: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert destinations(TelemetryConfig(**settings)) == wanted  # type: ignore[arg-type]


def test_an_exporter_that_is_not_built_in_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with pytest.raises(ConfigError, match=r"OTEL_TRACES_EXPORTER.*zipkin"):
        destinations(TelemetryConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("traces", "zipkin"),
        ("protocol", "thrift"),
        ("sample_ratio", 1.5),
        ("queue_spans", 0),
        ("store_bytes", 10),
        ("log_level", "loud"),
        ("log_format", "xml"),
        ("metrics_listen", "nowhere"),
    ],
)
def test_settings_outside_their_limits_are_refused_by_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"telemetry.{key}"):
        load_config(flags={"telemetry": {key: value}}, environ={})


def test_logs_are_one_line_each_with_ids_and_without_text(caplog: pytest.LogCaptureFixture) -> None:
    item = record(5, answer="a secret answer")
    item.prompt = "a secret prompt"
    with caplog.at_level(logging.INFO, logger="cluster.requests"):
        logging.getLogger("cluster.requests").propagate = True
        log_request(item)
    [logged] = caplog.records
    line = JsonLines().format(logged)
    told = json.loads(line)
    assert "\n" not in line
    assert (told["trace_id"], told["request_id"], told["code"]) == (item.ref.trace_id, "r1", "OK")
    assert "secret" not in line
    assert "secret" not in TextLines().format(logged)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        failed = logging.LogRecord("cluster.x", logging.ERROR, "f", 1, "it\nfailed", None, __import__("sys").exc_info())
    assert "\n" not in JsonLines().format(failed)
    assert "\n" not in TextLines().format(failed)


def test_no_text_is_in_spans_unless_asked_for(tmp_path: Path) -> None:
    traces_from(in_store(tmp_path), [record(5)])
    assert "gen_ai.prompt" not in "".join(file.read_text() for file in tmp_path.iterdir())
    traces = traces_from(in_store(tmp_path / "with"), [record(5, prompt=10)])
    assert traces
