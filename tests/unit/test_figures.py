"""Figures are those of what was seen, and what went wrong is in them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cluster.bench.figures import distribution, gaps_s, problems, summary, tpot_s, ttft_s
from cluster.bench.load import Arrival, Outcome
from cluster.bench.plot import write_plot
from cluster.bench.serve import warmup_of

GOOD = Outcome(0, "main", 10, 4, 1.0, 1.002, ((1.5, 1), (1.6, 2), (1.9, 1)), 2.0, "OK", "", 4)


def at(index: int, planned_s: float, **changes: object) -> Outcome:
    """`GOOD`, planned at another time."""
    later = planned_s - GOOD.planned_s
    moved = dataclasses.replace(
        GOOD,
        index=index,
        planned_s=planned_s,
        sent_s=planned_s + 0.002,
        arrivals=tuple((t + later, n) for t, n in GOOD.arrivals),
        end_s=2.0 + later,
    )
    return dataclasses.replace(moved, **changes)  # type: ignore[arg-type]


def test_times_count_from_the_planned_arrival_and_tokens_that_come_together_have_no_gap() -> None:
    assert ttft_s(GOOD) == pytest.approx(0.5)
    assert gaps_s(GOOD) == pytest.approx([0.1, 0.0, 0.3])
    assert tpot_s(GOOD) == pytest.approx(0.5 / 3)
    assert tpot_s(dataclasses.replace(GOOD, tokens=1)) is None
    together = dataclasses.replace(GOOD, arrivals=((1.5, 4),))
    assert gaps_s(together) == [0.0, 0.0, 0.0]


def test_a_late_generator_makes_latencies_longer_and_says_so() -> None:
    late = [at(i, float(i), sent_s=i + 0.4) for i in range(20)]
    result = summary(late)
    assert result["ttft_ms"]["p50"] == 500.0
    assert result["late_ms"]["p99"] == 400.0
    assert "the generator was late" in problems(result)[0]
    assert problems(summary([at(i, float(i)) for i in range(20)])) == []


def test_failures_are_counted_by_code_and_are_no_samples() -> None:
    gone = at(1, 3.0, code="UNAVAILABLE", detail="broken", arrivals=(), end_s=3.01, tokens=0)
    cut = at(2, 4.0, code="INCOMPLETE", detail="3 of 4", tokens=3)
    lost = Outcome.lost(3, Arrival(5.0, 10, 4))
    result = summary([GOOD, gone, cut, lost])
    assert (result["requests"], result["completed"], result["failed"]) == (4, 1, 3)
    assert result["errors"] == {"UNAVAILABLE": 1, "INCOMPLETE": 1, "LOST": 1}
    assert result["error_examples"]["INCOMPLETE"] == "3 of 4"
    assert {result[key]["samples"] for key in ("ttft_ms", "tpot_ms", "e2e_ms")} == {1}
    assert result["gap_ms"]["samples"] == 3
    assert result["tokens"] == 4
    assert result["span_s"] == 5.0  # the one that was cut ended then
    assert result["tokens_per_s"] == pytest.approx(4 / 5)
    assert "3 of 4 requests failed" in problems(result)[0]
    assert "1 requests were lost" in problems(result)[1]


def test_classes_are_told_apart() -> None:
    slow = at(1, 2.0, kind="long", arrivals=((7.0, 4),), end_s=7.0)
    result = summary([slow, GOOD])
    assert [(entry["class"], entry["ttft_ms"]["max"]) for entry in result["classes"]] == [
        ("main", 500.0),
        ("long", 5000.0),
    ]
    assert result["ttft_ms"]["max"] == 5000.0
    assert result["max_in_flight"] == 1
    assert summary([at(0, 1.0), at(1, 1.5), at(2, 3.0)])["max_in_flight"] == 2


def test_spread_is_that_of_fifths_of_the_samples_in_their_order() -> None:
    found = distribution([0.001] * 10 + [0.009] * 10)
    assert (found["p50"], found["p50_low"], found["p50_high"]) == (5.0, 1.0, 9.0)
    assert (found["p99_low"], found["p99_high"], found["max"], found["samples"]) == (1.0, 9.0, 9.0, 20)
    few = distribution([0.001, 0.002])
    assert (few["p50_low"], few["p99_high"], few["max"]) == (None, None, 2.0)
    none = distribution([])
    assert (none["p50"], none["max"], none["samples"]) == (None, None, 0)


def test_a_load_of_which_nothing_completed_has_figures_and_a_picture(tmp_path: Path) -> None:
    gone = [at(i, float(i), code="UNAVAILABLE", arrivals=(), tokens=0) for i in range(3)]
    lost = Outcome.lost(3, Arrival(5.0, 10, 4))
    result = summary([*gone, lost])
    json.dumps(result, allow_nan=False)
    assert result["requests_per_s"] == 0.0
    for name, outcomes in (("failed", [*gone, lost]), ("both", [GOOD, *gone]), ("one", [GOOD])):
        write_plot(tmp_path / name, outcomes, "title")
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_the_warm_up_is_of_every_class_with_prompts_of_its_own() -> None:
    arrivals = [Arrival(0.0, 2, 1, "a", (1, 2)), Arrival(1.0, 3, 1, "a"), Arrival(2.0, 4, 1, "b")]
    assert [(a.kind, a.prompt_tokens) for a in warmup_of(arrivals, 5)] == [
        ("a", 2),
        ("b", 4),
        ("a", 3),
        ("b", 4),
        ("a", 2),
    ]
    assert all(a.prompt_ids is None for a in warmup_of(arrivals, 5))
