"""Who owns the tail: causes, groups, layers and experts of slow requests, from their traces. Pure.

Requests differ in size, so slow means slow for its size. What is usual of each cause comes from the requests
themselves: the median of its seconds a prompt token before the first token, an output token after it, and a request for
what has nothing to do with tokens. The tail are the requests that took longest beyond that.

A cause stands out if the tail spent more on it than is usual, by a part of its time that matters and by more than the
other requests scatter. It is ranked by what is beyond the usual. The others may be what everybody suffers from, and are
ranked by a part of what they took: a quarter of what was waited for others (where all requests are slow because of one
group, no request is unusual, and that group is the answer), a twentieth of the router's own work.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.telemetry.ledger import GROUP_STAGES, Stage
from cluster.telemetry.traces import SpanView, TraceView

CLIENT_CAUSE = "client"
MATTERS, BEYOND_SCATTER = 0.02, 2.0
WAITING_WEIGHT, WORK_WEIGHT = 0.25, 0.05
LAYER_SHARE = 0.5
"""A layer is named where it has so much of a cause's waiting."""
_WORK = frozenset(
    stage.value
    for stage in (
        Stage.TOKENIZE,
        Stage.SCHEDULE,
        Stage.TRUNK,
        Stage.DISPATCH,
        Stage.COMBINE,
        Stage.SAMPLE,
        Stage.EMIT,
    )
)
_GROUP_NAMES = frozenset(stage.value for stage in GROUP_STAGES)
_BY_REQUEST = frozenset(
    stage.value for stage in (Stage.TOKENIZE, Stage.QUEUE, Stage.TURN, Stage.DELIVER, Stage.STREAM_OUT)
) | {CLIENT_CAUSE}


class Cause(NamedTuple):
    """What time went to. ``group`` for time that was waited for a group, ``layer`` and ``expert`` for a cold load."""

    name: str
    group: int | None = None
    layer: int | None = None
    expert: int | None = None


@dataclass(slots=True)
class Spent:
    """One request: seconds by cause before its first token, after it, and independent of tokens."""

    trace_id: str
    wall_s: float
    unattributed_s: float
    prompt_tokens: int
    output_tokens: int
    prefill: dict[Cause, float] = field(default_factory=dict)
    decode: dict[Cause, float] = field(default_factory=dict)
    once: dict[Cause, float] = field(default_factory=dict)
    layers: dict[Cause, dict[int, float]] = field(default_factory=dict)

    def seconds(self) -> dict[Cause, float]:
        """By cause, all together."""
        total: dict[Cause, float] = defaultdict(float)
        for part in (self.prefill, self.decode, self.once):
            for cause, seconds in part.items():
                total[cause] += seconds
        return total


@dataclass(frozen=True, slots=True)
class Blamed:
    """A cause in the tail. ``share`` is of the tail's time, ``excess_s`` what is beyond the usual; ``stands_out``: that
    is more than chance."""

    cause: str
    group: int | None
    layer: int | None
    expert: int | None
    seconds: float
    share: float
    excess_s: float
    stands_out: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What `expertmesh trace blame` says. ``attributed`` is the share of each request's time that has a cause."""

    requests: int
    tail: tuple[str, ...]
    tail_wall_s: float
    attributed: tuple[float, ...]
    causes: tuple[Blamed, ...]

    def as_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        ordered = sorted(self.attributed)
        return {
            "requests": self.requests,
            "attributed_share_p50": ordered[len(ordered) // 2] if ordered else None,
            "attributed_share_min": ordered[0] if ordered else None,
            "tail_requests": len(self.tail),
            "tail_wall_s": self.tail_wall_s,
            "tail_traces": list(self.tail),
            "causes": [{name: getattr(item, name) for name in Blamed.__slots__} for item in self.causes],
        }


def spent_of(trace: TraceView) -> list[Spent]:
    """What a trace says of its requests: none for a trace of something else, several where a client had more."""
    children = trace.children()
    return [_spent(trace, request, children) for request in trace.requests]


def _spent(trace: TraceView, request: SpanView, children: Mapping[str, list[SpanView]]) -> Spent:
    numbers = request.attributes
    found = Spent(
        trace.trace_id,
        request.seconds,
        float(numbers.get("moe.unattributed", 0.0)),
        int(numbers.get("gen_ai.usage.input_tokens", 0)),
        int(numbers.get("gen_ai.usage.output_tokens", 0)),
    )
    phases = {"moe.queue": found.prefill, "moe.prefill": found.prefill, "moe.decode": found.decode}
    within: dict[str, float] = defaultdict(float)
    for span in children.get(request.span_id, []):
        into = phases.get(span.name)
        if into is None:
            continue
        for name, seconds in span.times().items():
            within[name] += seconds
            if name not in _GROUP_NAMES:
                target = found.once if name in _BY_REQUEST else into
                target[Cause(name)] = target.get(Cause(name), 0.0) + seconds
        _groups(found, into, span, children.get(span.span_id, []))
    for name, seconds in request.times().items():
        rest_s = seconds - within[name]
        if rest_s > 1e-9:
            cause = Cause(name)
            found.once[cause] = found.once.get(cause, 0.0) + rest_s
    _cold(found, [span for span in children.get(request.span_id, []) if span.name == "moe.expert.cold_load"])
    client = trace.client
    if client is not None and client.span_id == request.parent_id:
        outside_s = client.seconds - request.seconds
        reading_s = min(float(client.attributes.get("moe.client.consume", 0.0)), outside_s)
        if reading_s > 0:
            found.once[Cause(CLIENT_CAUSE)] = reading_s
            found.wall_s += reading_s
    return found


def _groups(found: Spent, into: dict[Cause, float], phase: SpanView, batches: Sequence[SpanView]) -> None:
    """Time that was waited for groups, from the phase's batches; what they do not have stays without a group."""
    left = {name: seconds for name, seconds in phase.times().items() if name in _GROUP_NAMES}
    for batch in batches:
        if batch.name != "moe.expert_batch" or "moe.group" not in batch.attributes:
            continue
        group, layer = int(batch.attributes["moe.group"]), int(batch.attributes.get("moe.worst.layer", -1))
        total_s = sum(batch.times().values())
        for name, seconds in batch.times().items():
            cause = Cause(name, group)
            into[cause] = into.get(cause, 0.0) + seconds
            left[name] = left.get(name, 0.0) - seconds
            if layer >= 0 and total_s > 0:
                by_layer = found.layers.setdefault(cause, {})
                worst_s = float(batch.attributes.get("moe.worst.layer.seconds", 0.0))
                by_layer[layer] = by_layer.get(layer, 0.0) + worst_s * seconds / total_s
    for name, seconds in left.items():
        if seconds > 1e-9:
            into[Cause(name)] = into.get(Cause(name), 0.0) + seconds


def _cold(found: Spent, loads: Sequence[SpanView]) -> None:
    """Cold loads by expert: what was waited for a group's loads, divided by how long each of them took."""
    taken: dict[int, dict[Cause, float]] = {}
    for span in loads:
        numbers = span.attributes
        group = int(numbers.get("moe.group", -1))
        cause = Cause(
            Stage.COLD_LOAD.value, group, int(numbers.get("moe.layer", -1)), int(numbers.get("moe.expert", -1))
        )
        by_expert = taken.setdefault(group, {})
        by_expert[cause] = by_expert.get(cause, 0.0) + float(numbers.get("moe.seconds", span.seconds))
    for group, by_expert in taken.items():
        total_s = sum(by_expert.values())
        waited_s = sum(part.pop(Cause(Stage.COLD_LOAD.value, group), 0.0) for part in (found.prefill, found.decode))
        for cause, seconds in by_expert.items():
            if total_s > 0 and waited_s > 0:
                found.once[cause] = found.once.get(cause, 0.0) + waited_s * seconds / total_s


class _Usual:
    """What a request of some size usually spends, by cause."""

    def __init__(self, requests: Sequence[Spent]) -> None:
        self._prefill = _medians((item.prefill, item.prompt_tokens) for item in requests if item.prefill)
        self._decode = _medians((item.decode, item.output_tokens) for item in requests if item.decode)
        self._once = _medians((item.once, 1) for item in requests)

    def of(self, item: Spent) -> dict[Cause, float]:
        """Seconds by cause for one of its size."""
        total: dict[Cause, float] = defaultdict(float)
        for part, rates, size in (
            (item.prefill, self._prefill, item.prompt_tokens),
            (item.decode, self._decode, item.output_tokens),
            (item.once, self._once, 1),
        ):
            for cause in part:
                total[cause] += rates.get(cause, 0.0) * size
        return total


def _medians(parts: Iterable[tuple[Mapping[Cause, float], int]]) -> dict[Cause, float]:
    rows = [(part, max(1, size)) for part, size in parts]
    causes = {cause for part, _ in rows for cause in part}
    return {cause: _median([part.get(cause, 0.0) / size for part, size in rows]) for cause in causes}


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 2]


def blame(traces: Iterable[TraceView], quantile: float) -> Report:
    """The causes of the slowest requests, those above the quantile: at least one."""
    requests = [spent for trace in traces for spent in spent_of(trace)]
    usual = _Usual(requests)
    beyond = {id(item): sum(item.seconds().values()) - sum(usual.of(item).values()) for item in requests}
    number = min(len(requests), max(1, math.ceil((1.0 - quantile) * len(requests) - 1e-9)))
    tail = sorted(requests, key=lambda item: -beyond[id(item)])[:number]
    wall_s = sum(item.wall_s for item in tail)
    seconds: dict[Cause, float] = defaultdict(float)
    excess: dict[Cause, float] = defaultdict(float)
    layers: dict[Cause, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for item in tail:
        expected = usual.of(item)
        for cause, spent_s in item.seconds().items():
            seconds[cause] += spent_s
            excess[cause] += max(0.0, spent_s - expected.get(cause, 0.0))
            for layer, waited_s in item.layers.get(cause, {}).items():
                layers[cause][layer] += waited_s
    scatter = _scatter([item for item in requests if item not in tail] or requests, usual)
    standing = {
        cause
        for cause in seconds
        if excess[cause] > max(MATTERS * wall_s, BEYOND_SCATTER * len(tail) * scatter.get(cause, 0.0))
    }
    causes = [
        Blamed(
            cause.name,
            cause.group,
            cause.layer if cause.layer is not None else _layer(layers[cause], seconds[cause]),
            cause.expert,
            seconds[cause],
            seconds[cause] / wall_s if wall_s else 0.0,
            excess[cause],
            cause in standing,
        )
        for cause in sorted(
            seconds, key=lambda c: excess[c] if c in standing else _weight(c) * seconds[c], reverse=True
        )
        if seconds[cause] > 0
    ]
    return Report(
        len(requests),
        tuple(item.trace_id for item in tail),
        wall_s,
        tuple(1.0 - max(0.0, item.unattributed_s) / item.wall_s for item in requests if item.wall_s > 0),
        tuple(causes),
    )


def _weight(cause: Cause) -> float:
    return WORK_WEIGHT if cause.name in _WORK else WAITING_WEIGHT


def _scatter(requests: Sequence[Spent], usual: _Usual) -> dict[Cause, float]:
    """Seconds by which a request differs from the usual on average, by cause."""
    total: dict[Cause, float] = defaultdict(float)
    for item in requests:
        expected = usual.of(item)
        for cause, seconds in item.seconds().items():
            total[cause] += abs(seconds - expected.get(cause, 0.0))
    return {cause: seconds / len(requests) for cause, seconds in total.items()}


def _layer(waited: Mapping[int, float], seconds: float) -> int | None:
    """The layer that has most of a cause, if it has enough of it to be named."""
    if not waited:
        return None
    layer = max(waited, key=waited.__getitem__)
    return layer if waited[layer] >= LAYER_SHARE * seconds else None
