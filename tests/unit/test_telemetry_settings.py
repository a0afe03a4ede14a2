"""Where traces go, what is refused, and what logs say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cluster.config import load_config
from cluster.errors import ConfigError
from cluster.settings import TelemetryConfig
from cluster.telemetry.exporters import destinations
from cluster.telemetry.logs import JsonLines, TextLines, log_request
from tests.records import in_store, record, traces_from


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
    item = record(5, answer="what was answered")
    item.prompt = "what was asked"
    [trace] = traces_from(in_store(tmp_path / "with"), [item]).values()
    assert trace.request is not None
    assert trace.request.attributes["gen_ai.prompt"] == "what was asked"
    assert trace.request.attributes["gen_ai.completion"] == "what was answered"
