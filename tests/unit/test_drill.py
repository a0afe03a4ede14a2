"""What a drill makes of the times and tokens that its streams saw."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.bench.damage import KINDS
from cluster.bench.drill import Work
from cluster.bench.drill_report import Answered, problems_of, report_of
from cluster.errors import InvalidArgument
from tests.e2e.processes import run_here


def answered(times_s: list[float], tokens: list[int] | None = None, error: str = "") -> Answered:
    return Answered(0, 4, times_s[0] - 0.1, tokens or list(range(len(times_s))), times_s, error)


def full_report(*answers: Answered) -> dict[str, Any]:
    fine = {"mismatched_tokens": 0, "routing_ties": 0, "hedged_share": 0.0, "recovery_s": 1.0}
    return {**report_of(list(answers), begun_s=10.0, until_s=20.0), **fine}


def test_gaps_are_told_apart_by_when_they_were() -> None:
    report = full_report(
        answered([1.0, 1.1, 1.2, 1.3]), answered([9.0, 10.2, 10.3, 25.0]), answered([21.0, 22, 23, 24])
    )
    assert report["requests"] == 3
    assert report["failed"] == 0
    assert report["max_token_gap_before_ms"] == pytest.approx(100)
    assert report["max_token_gap_ms"] == pytest.approx(14_700), "what spans the damage counts, what began after it not"
    assert report["gaps"] == {"before": 3, "during": 3, "after": 3}


def test_failed_and_short_answers_are_counted_by_what_they_failed_with() -> None:
    report = full_report(answered([1.0], error="Unavailable: gone"), answered([1.0, 1.1]), answered([1, 2, 3, 4]))
    assert report["errors"] == {"Unavailable": 1, "short": 1}
    assert report["failed"] == 2


@pytest.mark.parametrize(
    ("kind", "change", "word"),
    [
        ("drop-link", {"failed": 1}, "failed"),
        ("drop-link", {"mismatched_tokens": 2}, "differ"),
        ("drop-link", {"routing_ties": 2}, "tied"),
        ("drop-link", {"recovery_s": None}, "come back"),
        ("drop-link", {"inexact": 1}, "exact"),
        ("kill-group", {"max_token_gap_ms": 301.0}, "301 ms"),
        ("slow-group", {"tpot_p99_ms": {"before": 10.0, "during": 21.0, "after": 9.0}}, "p99"),
        ("rebalance", {"tpot_p99_ms": {"before": 10.0, "during": 12.0, "after": 10.0}}, "not less"),
        ("rebalance", {"tpot_p99_ms": {"before": 10.0, "during": 13.0, "after": 9.0}}, "1.25"),
        ("kill-router", {"max_token_gap_untouched_ms": 301.0}, "another router"),
        ("slow-group", {"hedged_share": 0.06}, "twice"),
    ],
)
def test_a_drill_fails_for_each_limit_alone(kind: str, change: dict[str, Any], word: str) -> None:
    report = full_report(Answered(0, 4, 0.9, [0, 1, 2, 3], [1.0, 1.1, 10.1, 10.2], exact=True))
    report |= {"max_token_gap_ms": 100.0, "tpot_p99_ms": {"before": 10.0, "during": 12.0, "after": 9.0}}
    assert problems_of(KINDS[kind], report) == []
    [problem] = problems_of(KINDS[kind], report | change)
    assert word in problem


def test_what_cannot_be_drilled_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="--before"):
        Work(before=1.0)
    done = run_here("drill", "set-fire")
    assert done.returncode == 2
    assert "kill-group" in done.stderr
    done = run_here("drill", "drop-link", "--server", "127.0.0.1:1")
    assert done.returncode == 2
    assert "--server" in done.stderr
