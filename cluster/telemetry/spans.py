"""Records as OpenTelemetry spans, made when everything is over, with explicit times.

`ReadableSpan` is built directly rather than through a tracer: ids are known before (the client got the trace id with
its first token), and nothing is recorded while work goes on. Span tree and names: ARCHITECTURE.md, "Traces".
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from cluster import __version__
from cluster.telemetry.account import RequestAccount, StepEvent, Window
from cluster.telemetry.critical import Answer
from cluster.telemetry.ledger import GroupSpent, Ledger
from cluster.telemetry.records import PhaseRecord, RequestRecord, SpanRef, StepRecord
from cluster.telemetry.steps import StepDetail, new_span_id, new_trace_id

MAX_GROUPS, MAX_LINKS, MAX_LAYER_SPANS = 16, 128, 512
MAX_TEXT = 4096
WINDOW_PARTS = 3
MIN_NS = 1_000
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_SCOPE = InstrumentationScope("expertmesh", __version__)

Attributes = dict[str, Any]


def wall_ns_of(monotonic_s: float) -> int:
    """Nanoseconds of the epoch, by what the two clocks say now."""
    return time.time_ns() + int((monotonic_s - time.monotonic()) * 1e9)


def clean(text: str) -> str:
    """Without lone surrogates, which the protobuf encoder refuses together with their whole batch."""
    return text.encode("utf-8", "replace").decode("utf-8")


class _Same(Resource):
    """A resource that hashes fast: the encoder asks each span's, and the SDK's makes JSON of itself each time."""

    def __init__(self, resource: Resource) -> None:
        super().__init__(resource.attributes, resource.schema_url)
        self._hash = super().__hash__()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


class SpanMaker:
    """Spans of one process. ``model`` is named in them."""

    def __init__(self, resource: Resource, model: str = "") -> None:
        self._resource, self._model = _Same(resource), model

    def span(
        self,
        name: str,
        ref: SpanRef,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Any],
        parent: str = "",
        remote: bool = False,
        kind: SpanKind = SpanKind.INTERNAL,
        events: Sequence[Event] = (),
        links: Sequence[Link] = (),
        error: str = "",
    ) -> ReadableSpan:
        """One span. It lasts a microsecond at least; attributes that are not finite are left out."""
        trace_id = int(ref.trace_id, 16)
        kept: Attributes = {}
        for key, value in attributes.items():
            if isinstance(value, str):
                kept[key] = clean(value)
            elif not isinstance(value, float) or math.isfinite(value):
                kept[key] = value
        above = SpanContext(trace_id, int(parent, 16), remote, _SAMPLED) if parent else None
        return ReadableSpan(
            name=name,
            context=SpanContext(trace_id, int(ref.span_id, 16), False, _SAMPLED),
            parent=above,
            resource=self._resource,
            attributes=kept,
            events=events,
            links=links,
            kind=kind,
            status=Status(StatusCode.ERROR, clean(error)) if error else Status(StatusCode.UNSET),
            start_time=start_ns,
            end_time=max(end_ns, start_ns + MIN_NS),
            instrumentation_scope=_SCOPE,
        )

    # -- requests ----------------------------------------------------------------------------------------------------

    def request(self, record: RequestRecord, parent: str, kept: str) -> list[ReadableSpan]:
        """The spans of a request, root first. ``parent`` is the client's span; ``kept`` says why it was kept."""
        offset_ns = wall_ns_of(0.0)
        tree = _Tree(self, record.ref.trace_id, offset_ns)
        root = self.span(
            "moe.request",
            record.ref,
            tree.ns(record.arrived_s),
            tree.ns(record.ended_s),
            self._request_attributes(record, kept),
            parent,
            remote=True,
            kind=SpanKind.SERVER,
            error=f"{record.error_code}: {record.error}" if record.error_code else "",
        )
        tree.spans.append(root)
        above, account = record.ref.span_id, record.account
        if record.tokenized_s:
            tree.add("moe.tokenize", above, record.arrived_s, record.tokenized_s, {})
        if account is not None:
            self._engine_spans(tree, above, record, account)
        return tree.spans

    def _request_attributes(self, record: RequestRecord, kept: str) -> Attributes:
        found: Attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "expertmesh",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": record.max_tokens,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.output_tokens,
            "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else [],
            "gen_ai.latency.e2e": record.wall_s,
            "moe.request.id": record.request_id,
            "moe.exact": record.exact,
            "moe.kept": kept,
            "moe.unattributed": record.unattributed_s,
            **_times(record.ledger.spent()),
        }
        if record.error_code:
            found["error.type"] = record.error_code
        if record.prompt:
            found["gen_ai.prompt"] = record.prompt[:MAX_TEXT]
        if record.answer:
            found["gen_ai.completion"] = record.answer[:MAX_TEXT]
        account = record.account
        if account is None:
            return found
        found |= {
            "moe.steps": account.steps,
            "moe.preemptions": account.preemptions,
            "moe.prefix.cached_tokens": account.cached_tokens,
            "moe.cold.expected_bytes": account.cold_bytes,
        }
        if account.step_links:
            found["moe.step.traces"] = account.step_links
        if account.first_step_s is not None:
            found["gen_ai.latency.time_in_queue"] = account.first_step_s - account.arrived_s
            if account.first_token_s is not None and account.ended_s is not None:
                found["gen_ai.latency.time_to_first_token"] = account.first_token_s - record.arrived_s
                found["gen_ai.latency.time_in_model_prefill"] = account.first_token_s - account.first_step_s
                found["gen_ai.latency.time_in_model_decode"] = account.ended_s - account.first_token_s
        return found

    def _engine_spans(self, tree: _Tree, above: str, record: RequestRecord, account: RequestAccount) -> None:
        ended_s = record.ended_s if account.ended_s is None else account.ended_s
        first_step_s = ended_s if account.first_step_s is None else account.first_step_s
        queue = tree.add("moe.queue", above, account.arrived_s, first_step_s, _times(account.queue.spent()))
        self._batches(tree, queue, account.arrived_s, account.queue)
        if account.first_step_s is not None:
            until_s = ended_s if account.first_token_s is None else account.first_token_s
            attributes = {"moe.tokens": record.prompt_tokens, **_times(account.prefill.spent())}
            prefill = tree.add("moe.prefill", above, first_step_s, until_s, attributes)
            self._batches(tree, prefill, first_step_s, account.prefill)
        if account.first_token_s is not None:
            self._decode(tree, above, account, ended_s)
        for event in account.events:
            tree.event(above, record.arrived_s, record.ended_s, event)
        if not record.left_s:
            tree.add("moe.stream_out", above, ended_s, record.ended_s, {"moe.blocked": record.blocked_s})

    def _decode(self, tree: _Tree, above: str, account: RequestAccount, ended_s: float) -> None:
        assert account.first_token_s is not None
        gaps = account.gaps_s()
        attributes: Attributes = {"moe.tokens": len(account.tokens), **_times(account.decode.spent())}
        if gaps:
            gaps.sort()
            p50, p99 = gaps[len(gaps) // 2], gaps[min(len(gaps) - 1, int(0.99 * len(gaps)))]
            attributes |= {"moe.tpot.p50": p50, "moe.tpot.p99": p99, "moe.tpot.max": gaps[-1]}
        first = Event("first_token", timestamp=tree.ns(account.first_token_s))
        decode = tree.add("moe.decode", above, account.first_token_s, ended_s, attributes, events=(first,))
        for window in account.windows:
            tree.add(
                "moe.decode.window",
                decode,
                window.start_s,
                window.end_s,
                {
                    "moe.tokens": window.tokens,
                    "moe.gap.max": window.max_gap_s,
                    **_worst(window),
                    **_times(dict(heapq.nlargest(WINDOW_PARTS, window.seconds.items(), key=lambda item: item[1]))),
                },
            )
        self._batches(tree, decode, account.first_token_s, account.decode)

    def _batches(self, tree: _Tree, above: str, start_s: float, ledger: Ledger) -> None:
        """What was waited for each group, one behind the other: all layers of the phase together."""
        groups = sorted(ledger.groups(), key=lambda item: -item.total_s)
        for item in groups[:MAX_GROUPS]:
            end_s = start_s + item.total_s
            tree.add("moe.expert_batch", above, start_s, end_s, _group_attributes(item))
            start_s = end_s
        rest = groups[MAX_GROUPS:]
        if rest:
            attributes = {
                "moe.groups": len(rest),
                "moe.calls": sum(item.calls for item in rest),
                "moe.tokens": sum(item.tokens for item in rest),
                "moe.bytes": sum(item.num_bytes for item in rest),
            }
            tree.add("moe.expert_batch", above, start_s, start_s + sum(item.total_s for item in rest), attributes)

    # -- steps and background work -------------------------------------------------------------------------------------

    def step(self, record: StepRecord, trace: StepDetail) -> list[ReadableSpan]:
        """A step's own trace, linked to the requests that were in it."""
        tree = _Tree(self, trace.trace_id, wall_ns_of(0.0))
        spent = record.after.since(record.before)
        links = [Link(_context(ref)) for ref in record.members[:MAX_LINKS]]
        attributes: Attributes = {
            "moe.step.id": record.step_id,
            "moe.sequences": record.sequences,
            "moe.tokens.prefill": record.prefill_tokens,
            "moe.tokens.decode": record.decode_tokens,
            **_times(spent.spent()),
        }
        ref = SpanRef(trace.trace_id, trace.span_id)
        start_ns, end_ns = tree.ns(record.started_s), tree.ns(record.ended_s)
        tree.spans.append(self.span("moe.step", ref, start_ns, end_ns, attributes, links=links))
        if trace.by_layer:
            for times in trace.layers[:MAX_LAYER_SPANS]:
                layer_ref = SpanRef(trace.trace_id, times.span_id)
                found = {
                    "moe.layer": times.layer,
                    "moe.sent": times.sent_s - times.started_s,
                    **_answers(times.answers),
                }
                start_ns, end_ns = tree.ns(times.started_s), tree.ns(times.ended_s)
                tree.spans.append(self.span("moe.layer", layer_ref, start_ns, end_ns, found, trace.span_id))
        else:
            self._batches(tree, trace.span_id, record.started_s, spent)
        for event in record.events:
            tree.event(trace.span_id, record.started_s, record.ended_s, event)
        return tree.spans

    def phases(self, record: PhaseRecord) -> list[ReadableSpan]:
        """A trace of background work."""
        tree = _Tree(self, new_trace_id(), wall_ns_of(0.0))
        start_s, end_s = record.phases[0][1], record.phases[-1][2]
        root = tree.add(record.name, "", start_s, end_s, record.attributes)
        for name, begin_s, done_s in record.phases:
            tree.add(f"{record.name}.{name}", root, begin_s, done_s, {})
        return tree.spans

    def expert_call(
        self, traceparent: str, started_s: float, ended_s: float, attributes: Mapping[str, Any]
    ) -> list[ReadableSpan]:
        """A group's span of one layer call, under the router's span of the layer. None for a bad ``traceparent``."""
        parts = traceparent.split("-")
        if len(parts) != 4 or len(parts[1]) != 32 or len(parts[2]) != 16:
            return []
        try:
            ref = SpanRef(parts[1], new_span_id())
            start_ns, end_ns = wall_ns_of(started_s), wall_ns_of(ended_s)
            return [self.span("moe.expert.compute", ref, start_ns, end_ns, attributes, parts[2], remote=True)]
        except ValueError:
            return []


class _Tree:
    """Spans of one trace while it is made."""

    def __init__(self, maker: SpanMaker, trace_id: str, offset_ns: int) -> None:
        self._maker, self._trace_id, self._offset_ns = maker, trace_id, offset_ns
        self.spans: list[ReadableSpan] = []

    def ns(self, at_s: float) -> int:
        return self._offset_ns + int(at_s * 1e9)

    def add(
        self,
        name: str,
        parent: str,
        start_s: float,
        end_s: float,
        attributes: Mapping[str, Any],
        events: Sequence[Event] = (),
        error: str = "",
    ) -> str:
        """Adds a span and returns its id."""
        ref = SpanRef(self._trace_id, new_span_id())
        start_ns, end_ns = self.ns(start_s), self.ns(end_s)
        self.spans.append(self._maker.span(name, ref, start_ns, end_ns, attributes, parent, events=events, error=error))
        return ref.span_id

    def event(self, parent: str, first_s: float, last_s: float, event: StepEvent) -> None:
        """A cold load or a fail-over, as far as it lies in its parent's time."""
        start_s = min(max(event.start_s, first_s), last_s)
        end_s = min(event.start_s + event.seconds, last_s)
        attributes: Attributes = {"moe.group": event.group, "moe.layer": event.layer, "moe.seconds": event.seconds}
        if event.kind == "cold_load":
            attributes |= {"moe.expert": event.expert, "moe.bytes": event.num_bytes}
            self.add("moe.expert.cold_load", parent, start_s, end_s, attributes)
        else:
            attributes |= {"moe.tokens": event.tokens, "moe.cause": event.cause}
            self.add(f"moe.{event.kind}", parent, start_s, end_s, attributes)


def _times(seconds: Mapping[str, float]) -> Attributes:
    return {f"moe.time.{name}": value for name, value in seconds.items()}


def _worst(window: Window) -> Attributes:
    return {} if window.layer < 0 else {"moe.worst.group": window.group, "moe.worst.layer": window.layer}


def _group_attributes(item: GroupSpent) -> Attributes:
    where = {"moe.worst.layer": item.worst_layer, "moe.worst.layer.seconds": item.worst_layer_s}
    return {
        "moe.group": item.group,
        "moe.calls": item.calls,
        "moe.tokens": item.tokens,
        "moe.bytes": item.num_bytes,
        **(where if item.worst_layer >= 0 else {}),
        **_times(item.seconds),
    }


def _answers(answers: Iterable[Answer]) -> Attributes:
    found = list(answers)
    return {
        "moe.groups": [item.group for item in found],
        "moe.answered": [item.answered_s - item.wait_from_s for item in found],
        "moe.compute": [item.compute_s for item in found],
        "moe.queue": [item.queue_s for item in found],
    }


def _context(ref: SpanRef) -> SpanContext:
    return SpanContext(int(ref.trace_id, 16), int(ref.span_id, 16), True, _SAMPLED)
