"""What a drill makes of the times and tokens that its streams saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.bench.damage import Kind
from cluster.bench.reference import Reference
from cluster.bench.verify import NEAR_TIE, allowed_ties
from cluster.routing.speeds import HEDGED_SHARE
from cluster.rpc.v1 import control_pb2

RECOVERED = 0.95
"""Of the throughput before."""


@dataclass(slots=True)
class Answered:
    """One request: its prompt's number, tokens and when they came, and what it failed with."""

    prompt: int
    new: int
    sent_s: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: str = ""
    exact: bool = True
    router: int = 0
    """The router that it was sent to first."""


def report_of(answers: list[Answered], begun_s: float, until_s: float) -> dict[str, Any]:
    """What clients saw before, during (from ``begun_s`` to ``until_s``) and after the damage."""
    gaps: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    untouched = 0.0
    for answer in answers:
        for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False):
            name = "before" if later < begun_s else "during" if earlier <= until_s else "after"
            gaps[name].append(later - earlier)
            if answer.router and name == "during":
                untouched = max(untouched, later - earlier)
    firsts = {
        name: [a.times_s[0] - a.sent_s for a in answers if a.times_s and (a.times_s[0] < begun_s) == (name == "before")]
        for name in ("before", "during")
    }
    tpots: dict[str, list[float]] = {"before": [], "during": [], "after": []}
    for answer in answers:
        if len(answer.times_s) > 1:
            first_s, last_s = answer.times_s[0], answer.times_s[-1]
            name = "before" if last_s < begun_s else "after" if first_s > until_s else "during"
            tpots[name].append((last_s - first_s) / (len(answer.times_s) - 1))
    errors: dict[str, int] = {}
    for answer in answers:
        short = answer.error.split(":")[0] or ("short" if len(answer.tokens) != answer.new else "")
        if short:
            errors[short] = errors.get(short, 0) + 1
    p99 = {name: float(np.quantile(found, 0.99) * 1e3) if found else None for name, found in gaps.items()}
    return {
        "requests": len(answers),
        "failed": sum(errors.values()),
        "errors": errors,
        "inexact": sum(not answer.exact for answer in answers),
        "max_token_gap_ms": max(gaps["during"], default=0.0) * 1e3,
        "max_token_gap_untouched_ms": untouched * 1e3,
        "max_token_gap_before_ms": max(gaps["before"], default=0.0) * 1e3,
        "token_gap_p99_ms": p99,
        "tpot_p99_ms": {
            name: float(np.quantile(found, 0.99) * 1e3) if found else None for name, found in tpots.items()
        },
        "tpot_p50_ms": {name: float(np.median(found) * 1e3) if found else None for name, found in tpots.items()},
        "answers": {name: len(found) for name, found in tpots.items()},
        "max_first_token_ms": {name: max(found, default=0.0) * 1e3 for name, found in firsts.items()},
        "gaps": {name: len(found) for name, found in gaps.items()},
        "damage_s": until_s - begun_s,
    }


def mismatches(
    reference: Reference, prompts: list[list[int]], known: list[list[int]], answers: list[Answered]
) -> dict[str, int]:
    """Tokens that are not the known ones. Where an answer leaves the known one at a near tie of the reference's logits,
    or behind a tie of two experts, it is judged by the reference along its own tokens from there on."""
    wrong = ties = routing = 0
    for answer in answers:
        expected = known[answer.prompt][: len(answer.tokens)]
        if answer.tokens == expected:
            continue
        prompt = prompts[answer.prompt]
        far = _far(reference.logits(prompt, answer.tokens), answer.tokens)
        # Of two experts, or of the tokens. Once more have been found than is chance, nobody looks any more.
        looks = far and routing <= allowed_ties(len(answers))
        if looks and not all(_far(other_NV, answer.tokens) for other_NV in reference.others(prompt, answer.tokens)):
            routing += 1
            continue
        wrong += far
        ties += far == 0
    return {"mismatched_tokens": wrong, "near_tie_answers": ties, "routing_ties": routing}


def _far(logits_NV: torch.Tensor, tokens: list[int]) -> int:
    """Tokens that are not the likeliest, nor near it."""
    chosen_N = logits_NV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
    return int((logits_NV.max(-1).values - chosen_N > NEAR_TIE * logits_NV.std()).sum())


def calls_between(first: control_pb2.StatusReply, last: control_pb2.StatusReply) -> dict[str, Any]:
    """Layer calls of one router."""
    calls = last.dispatch.calls - first.dispatch.calls
    hedged = last.dispatch.hedged - first.dispatch.hedged
    return {
        "layer_calls": calls,
        "resent_calls": last.dispatch.resent - first.dispatch.resent,
        "hedges": hedged,
        "hedges_won": last.dispatch.hedges_won - first.dispatch.hedges_won,
        "hedged_share": hedged / calls if calls else 0.0,
    }


def problems_of(kind: Kind, report: dict[str, Any]) -> list[str]:
    """What is not within the kind's limits."""
    found = [f"{report[key]} {what}" for key, what in _NONE_OF.items() if report[key]]
    if report["routing_ties"] > allowed_ties(report["requests"]):
        found.append(f"{report['routing_ties']} answers are right only if experts tied: too many to be chance")
    if kind.max_gap_ms is not None and report["max_token_gap_ms"] > kind.max_gap_ms:
        found.append(f"a token came {report['max_token_gap_ms']:.0f} ms after the one before ({kind.max_gap_ms:g} ms)")
    apart = report["max_token_gap_untouched_ms"]
    if kind.max_untouched_gap_ms is not None and apart > kind.max_untouched_gap_ms:
        found.append(f"at another router a token came {apart:.0f} ms late ({kind.max_untouched_gap_ms:g} ms)")
    before, during, after = (report["tpot_p99_ms"][name] for name in ("before", "during", "after"))
    if kind.must_improve and before and (after is None or after >= before):
        found.append(f"TPOT p99 was {before:.1f} ms before and is not less afterwards")
    if kind.max_p99_ratio is not None and before and during and during > kind.max_p99_ratio * before:
        found.append(f"TPOT p99 went from {before:.0f} to {during:.0f} ms ({kind.max_p99_ratio:g} x)")
    if report["hedged_share"] > HEDGED_SHARE:
        found.append(f"{report['hedged_share']:.1%} of the calls were sent twice ({HEDGED_SHARE:.0%})")
    if report["recovery_s"] is None:
        found.append(f"throughput did not come back to {RECOVERED:.0%}")
    return found


_NONE_OF = {"failed": "requests failed", "mismatched_tokens": "tokens differ", "inexact": "answers were not exact"}
