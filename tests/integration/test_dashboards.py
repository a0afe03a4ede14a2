"""Every query of the dashboard and the alerts, against what a router really exports; by Prometheus itself where this
machine has one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.api.client import Client
from cluster.rpc.v1 import inference_pb2 as pb
from tests.e2e.processes import free_port
from tests.traced import Traced, traced

DEPLOY = Path(__file__).parents[2] / "deploy"
OBSERVABILITY = DEPLOY / "observability"
_NAME = re.compile(r"\b((?:moe|gen_ai)_[a-z0-9_]+)\b(?:\{([^}]*)\})?")
_BY = re.compile(r"by \(([^)]*)\)")


def queries() -> list[str]:
    dashboard = json.loads((OBSERVABILITY / "grafana/dashboards/expertmesh.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text())
    return found + [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def exporting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    """A router that has seen good requests, a cold load, calls that failed, and a client that left."""
    store = tmp_path_factory.mktemp("store")
    faults = {"group": 0, "cold_expert": "1/2", "cold_ms": 20.0, "cold_every_s": 0.2}
    with traced(store, telemetry={"metrics_listen": "127.0.0.1:0"}, faults=faults) as system:
        exercise(system)
        yield system


def exercise(system: Traced) -> None:
    with system.dead_link(after_s=0.3, for_s=0.2):
        system.load(system.mixed(16), 4)
    with Client(system.door.address) as client:
        message = pb.GenerateRequest(prompt_ids=pb.TokenIds(ids=[5] * 8), max_new_tokens=300, ignore_eos=True)
        stream = client.generate(message)
        next(stream)
        stream.close()
    time.sleep(0.5)
    system.traces()


def address(system: Traced) -> str:
    assert system.router.telemetry is not None
    return system.router.telemetry.metrics_address


def exported(system: Traced) -> dict[str, set[str]]:
    """Labels of every sample's name."""
    with urllib.request.urlopen(f"http://{address(system)}/metrics", timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    found: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_and_label_that_is_asked_for_is_exported(exporting: Traced) -> None:
    known = exported(exporting)
    asked = queries()
    assert len(asked) > 30
    for query in asked:
        names = _NAME.findall(query)
        assert names, query
        labels = {label.strip() for by in _BY.findall(query) for label in by.split(",")}
        for name, matchers in names:
            assert name in known, f"{query}: nothing exports {name}"
            wanted = labels | set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert wanted <= known[name], f"{query}: {name} has the labels {known[name]}"


def test_metrics_of_the_design_are_there(exporting: Traced) -> None:
    known = exported(exporting)
    for name in (
        "gen_ai_server_request_duration_seconds_bucket",
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_server_time_per_output_token_seconds_bucket",
        "moe_queue_duration_seconds_bucket",
        "moe_dispatch_duration_seconds_bucket",
        "moe_dispatch_wait_duration_seconds_bucket",
        "moe_expert_compute_duration_seconds_bucket",
        "moe_combine_duration_seconds_bucket",
        "moe_dispatch_bytes_total",
        "moe_expert_tokens_total",
        "moe_expert_load_ratio",
        "moe_expert_resident",
        "moe_expert_cold_loads_total",
        "moe_expert_load_duration_seconds_bucket",
        "moe_group_healthy",
        "moe_group_failures_total",
        "moe_failover_duration_seconds_bucket",
        "moe_requests_cancelled_total",
        "moe_cancel_latency_seconds_bucket",
        "moe_startup_phase_duration_seconds_bucket",
        "moe_trace_spans_dropped_total",
    ):
        assert name in known
    assert not any("request_id" in labels or "trace_id" in labels for labels in known.values())


def test_prometheus_itself_answers_every_query(exporting: Traced, tmp_path: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("no prometheus on this machine (Debian: apt install prometheus): queries were checked by name only")
    config = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [address(exporting)]
    config["rule_files"] = [str(OBSERVABILITY / "alerts.yaml")]
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    port = free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={tmp_path / 'prometheus.yaml'}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        ask(port, "up", wait_s=30)
        exercise(exporting)
        time.sleep(3)
        exercise(exporting)
        time.sleep(2)
        for query in queries():
            found = ask(port, query.replace("$__rate_interval", "30s"))
            bare = re.sub(r"\s*[<>=]+\s*[\d.]+$", "", query)  # an alert that is quiet has no result
            found = found or ask(port, bare.replace("$__rate_interval", "30s"))
            assert found, f"{query}: Prometheus found nothing"
        rules = get(port, "/api/v1/rules")["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]
    finally:
        process.terminate()
        process.wait(20)


def get(port: int, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
        result: dict[str, Any] = json.load(reply)
    return result


def ask(port: int, query: str, wait_s: float = 0.0) -> list[Any]:
    limit_s = time.monotonic() + wait_s
    while True:
        try:
            found: list[Any] = get(port, "/api/v1/query?" + urllib.parse.urlencode({"query": query}))["data"]["result"]
        except OSError:
            found = []
            if time.monotonic() > limit_s:
                raise
        if found or time.monotonic() > limit_s:
            return found
        time.sleep(0.3)


def test_manifests_are_yaml_and_fit_together() -> None:
    for file in DEPLOY.rglob("*.yaml"):
        assert list(yaml.safe_load_all(file.read_text())), file
    compose = yaml.safe_load((OBSERVABILITY / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert ":" in service["image"]
        for volume in service.get("volumes", ()):
            assert (OBSERVABILITY / volume.split(":")[0]).exists(), volume
    collector = yaml.safe_load((OBSERVABILITY / "otel-collector.yaml").read_text())
    pipeline = collector["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) <= set(collector[kind])
    kept = [p for p in collector["processors"]["tail_sampling"]["policies"] if p["type"] == "string_attribute"]
    assert set(kept[0]["string_attribute"]["values"]) == {"error", "cold", "failover", "slow"}
