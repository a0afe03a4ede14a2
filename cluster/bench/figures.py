"""Figures of a served load, from what the client processes saw. Pure.

Time to first token, and end to end, count from the *planned* arrival, so a generator that is late, or a connection that
blocks, makes them longer and not shorter. A gap is the time between two successive tokens of one stream, 0 for tokens
that came in one message: what the client saw. Latencies are those of completed requests; the others are counted by
their code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cluster.bench.load import Outcome

SLICES = 5
MIN_SAMPLES = 2 * SLICES
FEW_FAILED = 0.01
LATE_MS = 20.0
"""The generator was the bottleneck if one request in a hundred left later than that."""


def ttft_s(outcome: Outcome) -> float:
    """Planned arrival to first token, seconds."""
    return outcome.arrivals[0][0] - outcome.planned_s


def gaps_s(outcome: Outcome) -> list[float]:
    """Between successive tokens, seconds; as many as tokens, less one."""
    gaps: list[float] = []
    before: float | None = None
    for at_s, number in outcome.arrivals:
        gaps += ([] if before is None else [at_s - before]) + [0.0] * (number - 1)
        before = at_s
    return gaps


def tpot_s(outcome: Outcome) -> float | None:
    """(end - first token) / (tokens - 1), seconds; None for a single token."""
    if outcome.tokens < 2 or outcome.end_s is None:
        return None
    return (outcome.end_s - outcome.arrivals[0][0]) / (outcome.tokens - 1)


def distribution(values_s: Iterable[float]) -> dict[str, Any]:
    """Quantiles in milliseconds, and their spread: the lowest and highest that consecutive fifths of the samples have.
    None where there are too few samples."""
    values = np.array(list(values_s), dtype=np.float64) * 1e3
    found: dict[str, Any] = {"samples": len(values)}
    for name, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)):
        found[name] = round(float(np.quantile(values, quantile)), 3) if len(values) else None
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        parts = np.array_split(values, SLICES) if len(values) >= MIN_SAMPLES else []
        spread = [round(float(np.quantile(part, quantile)), 3) for part in parts]
        found[f"{name}_low"], found[f"{name}_high"] = (min(spread), max(spread)) if spread else (None, None)
    return found


def of_class(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts and latencies of some requests, in order of their planned times."""
    completed = [item for item in outcomes if item.ok]
    tpots = (tpot_s(item) for item in completed)
    return {
        "requests": len(outcomes),
        "completed": len(completed),
        "failed": len(outcomes) - len(completed),
        "errors": dict(Counter(item.code for item in outcomes if not item.ok)),
        "prompt_tokens": sum(item.prompt_tokens for item in completed),
        "tokens": sum(item.tokens for item in completed),
        "ttft_ms": distribution(ttft_s(item) for item in completed),
        "gap_ms": distribution(gap for item in completed for gap in gaps_s(item)),
        "tpot_ms": distribution(value for value in tpots if value is not None),
        "e2e_ms": distribution(item.end_s - item.planned_s for item in completed if item.end_s is not None),
    }


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All requests together, by class, and the whole: throughput over the time from the start of the load to the end of
    the last request, and how late the generator was."""
    ordered = sorted(outcomes, key=lambda item: (item.planned_s, item.index))
    result = of_class(ordered)
    span_s = max((item.end_s for item in ordered if item.end_s is not None), default=0.0)
    late = distribution(item.sent_s - item.planned_s for item in ordered if item.sent_s is not None)
    examples: dict[str, str] = {}
    for item in ordered:
        if not item.ok:
            examples.setdefault(item.code, item.detail)
    return {
        **result,
        "error_examples": examples,
        "span_s": round(span_s, 3),
        "requests_per_s": round(result["completed"] / span_s, 4) if span_s else 0.0,
        "tokens_per_s": round(result["tokens"] / span_s, 3) if span_s else 0.0,
        "max_in_flight": _most_in_flight(ordered),
        "late_ms": late,
        "classes": [
            {"class": kind, **of_class([item for item in ordered if item.kind == kind])}
            for kind in dict.fromkeys(item.kind for item in ordered)
        ],
    }


def _most_in_flight(outcomes: Sequence[Outcome]) -> int:
    changes = []
    for item in outcomes:
        if item.sent_s is not None and item.end_s is not None:
            changes += [(item.sent_s, 1), (item.end_s, -1)]
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


def problems(result: dict[str, Any]) -> list[str]:
    """What makes figures doubtful: a slow generator, requests that were lost in it, latencies of a lucky few."""
    found = []
    if result["failed"] > FEW_FAILED * result["requests"]:
        found.append(
            f"{result['failed']} of {result['requests']} requests failed: latencies are those of the others only, and "
            "look better than what clients had"
        )
    late = result["late_ms"]["p99"]
    if late is not None and late > LATE_MS:
        found.append(
            f"the generator was late: p99 of sent - planned is {late:.0f} ms, more than {LATE_MS:.0f}; use more "
            "--clients, or give it cores of its own"
        )
    lost = result["errors"].get("LOST", 0)
    if lost:
        found.append(f"{lost} requests were lost in the client processes: {result['error_examples']['LOST']}")
    return found
