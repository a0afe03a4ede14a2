"""From records to spans, stores and blame; nothing here opens a socket."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

from cluster.core import LayerCall
from cluster.settings import TelemetryConfig
from cluster.telemetry.account import StepEvent
from cluster.telemetry.blame import blame
from cluster.telemetry.exchange import to_jaeger, to_otlp_json
from cluster.telemetry.exporters import place_of
from cluster.telemetry.hub import Telemetry
from cluster.telemetry.keep import TailSampler
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.records import PhaseRecord, SpanRef, StepRecord
from cluster.telemetry.steps import StepDetail, new_span_id, new_trace_id
from cluster.telemetry.store import read_store
from cluster.telemetry.waterfall import waterfall
from tests.records import in_store, record, traces_from
from tests.trace_lint import from_jaeger, lint, spans_of


def test_spans_are_well_formed_whatever_the_length_and_the_number_of_groups(tmp_path: Path) -> None:
    cold = StepEvent("cold_load", 0.0, 0.05, group=1, layer=3, expert=7, num_bytes=10)
    records = [record(4), record(4000, groups=2), record(1), record(40, groups=40), record(5, events=(cold,) * 20)]
    records += [record(3, error_code="UNAVAILABLE", error="a lone \ud800 surrogate")]
    traces = traces_from(in_store(tmp_path), records)
    assert len(traces) == len(records)
    # A collector gets the same: encoded by the SDK and read again.
    telemetry = Telemetry(TelemetryConfig(traces="off"), "expertmesh-router", {}, "model")
    telemetry.close()
    for item in records[:3]:
        encoded = spans_of([encode_spans(telemetry._maker.request(item, "", "ratio"))])
        assert lint(encoded) == []
        assert len(encoded) == len(traces[item.ref.trace_id].spans)
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
        record(3, parent=parent, trace_state=place_of("file", in_store(tmp_path))),
        record(3, parent=parent, trace_state=place_of("file", in_store(tmp_path / "other"))),
        record(3, parent=parent, trace_state="otlp"),
        record(3, parent=parent),
        record(3, parent=parent, sampled=False),
    ]
    traces = traces_from(in_store(tmp_path), records)
    found = [traces[item.ref.trace_id].request.parent_id if item.ref.trace_id in traces else None for item in records]  # type: ignore[union-attr]
    assert found == [parent, "", "", "", None]


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
