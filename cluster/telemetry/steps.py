"""Times of single layers in a step that somebody wants to see in detail: what becomes `moe.step` and its children."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.telemetry.critical import Answer


def new_trace_id() -> str:
    """32 hex digits, not all zero."""
    return secrets.token_hex(16)


def new_span_id() -> str:
    """16 hex digits, not all zero."""
    return secrets.token_hex(8)


@dataclass(slots=True)
class LayerTimes:
    """One layer: from the router's split to its sum, and who answered when."""

    layer: int
    started_s: float
    span_id: str = ""
    sent_s: float = 0.0
    ended_s: float = 0.0
    answers: Sequence[Answer] = ()


@dataclass(slots=True)
class StepDetail:
    """A step's own trace. ``by_layer``: its layers are timed one by one, and their calls carry the trace's context, so
    that groups add their spans to it."""

    by_layer: bool = False
    trace_id: str = field(default_factory=new_trace_id)
    span_id: str = field(default_factory=new_span_id)
    layers: list[LayerTimes] = field(default_factory=list)

    def open(self, times: LayerTimes) -> str:
        """The traceparent of a layer's calls."""
        times.span_id = new_span_id()
        return f"00-{self.trace_id}-{times.span_id}-01"

    def close(self, times: LayerTimes, sent_s: float, answers: Sequence[Answer], ended_s: float) -> None:
        """The layer is done."""
        times.sent_s, times.answers, times.ended_s = sent_s, tuple(answers), ended_s
        self.layers.append(times)
