"""Requests as records, for tests of what is made of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cluster.settings import TelemetryConfig
from cluster.telemetry.account import RequestAccount, StepEvent
from cluster.telemetry.hub import Telemetry
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.records import PhaseRecord, RequestRecord, SpanRef, StepRecord
from cluster.telemetry.steps import new_span_id, new_trace_id
from cluster.telemetry.store import read_store
from cluster.telemetry.traces import TraceView, traces_of


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
            last = group == groups - 1
            total.wait(group, 1, Stage.STRAGGLER if last else Stage.GROUP_COMPUTE, straggler_s if last else 0.002)
            total.called(group, 4, 512)
        now_s += 0.01 + straggler_s + (groups - 1) * 0.002
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
