"""`expertmesh drill`: steady load of known answers, damage, and what clients saw of it.

Streams ask one request after another, for prompts whose greedy answers single-process transformers gave before. Times
of all tokens are kept; whatever is reported is worked out afterwards. The load runs in the command's own process, which
does nothing else meanwhile.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.api.client import Client
from cluster.bench.damage import Kind, damaged
from cluster.bench.reference import Reference
from cluster.bench.verify import NEAR_TIE
from cluster.errors import ConfigError, ExpertMeshError, InvalidArgument, Unavailable
from cluster.routing.speeds import HEDGED_SHARE
from cluster.rpc.v1 import control_pb2, inference_pb2
from cluster.telemetry.memory import process_facts

Progress = Callable[[str], None]

_WINDOW_S, _STEP_S = 2.0, 0.1
_RECOVERED = 0.95
_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Work:
    """``streams`` at a time; ``before`` seconds of quiet, ``damage`` seconds of damage (of kinds that last), and up to
    ``after`` seconds more until throughput is back."""

    streams: int = 8
    prompts: int = 16
    new: int = 48
    before: float = 10.0
    damage: float = 6.0
    after: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("prompts", 1), ("new", 2), ("before", 3), ("damage", 0.1), ("after", 3)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"--{name}", getattr(self, name), f"must be at least {least}")


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


@dataclass(frozen=True, slots=True)
class System:
    """What is drilled: a server's address, and how to get at the coordinator and at a group's links."""

    address: str
    coordinator: Callable[[], int]
    drop_links: Callable[[int], None]


class _Streams:
    """The load."""

    def __init__(self, address: str, prompts: Sequence[list[int]], work: Work) -> None:
        self._address, self._prompts, self._work = address, prompts, work
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self.answers: list[Answered] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(work.streams)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        with Client(self._address, timeout_s=_GRACE_S) as client:
            while not self._stop.is_set():
                with self._lock:
                    # Of different lengths, so that prefills of some meet decoding of others.
                    new = self._work.new - self._next * 7 % (self._work.new // 2)
                    answer = Answered(self._next % len(self._prompts), new, time.monotonic())
                    self._next += 1
                    self.answers.append(answer)
                ids = inference_pb2.TokenIds(ids=self._prompts[answer.prompt])
                request = inference_pb2.GenerateRequest(prompt_ids=ids, max_new_tokens=answer.new, ignore_eos=True)
                try:
                    for chunk in client.generate(request):
                        answer.exact = chunk.exact  # the last one says it
                        answer.tokens += [token.id for token in chunk.tokens]
                        answer.times_s += [time.monotonic()] * len(chunk.tokens)
                except ExpertMeshError as exc:
                    answer.error = f"{type(exc).__name__}: {exc}"
                    self._stop.wait(0.1)

    def rate(self, since_s: float, until_s: float) -> float:
        """Tokens a second of a stretch of time."""
        count = sum(since_s <= at < until_s for answer in list(self.answers) for at in list(answer.times_s))
        return count / (until_s - since_s)

    def end(self) -> None:
        """Lets the requests that run finish."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _GRACE_S)


def run(kind: Kind, system: System, model: Path, work: Work, group: int, progress: Progress) -> dict[str, Any]:
    """The report; ``pass`` says whether everything is within its limits, ``problems`` what is not."""
    rng = random.Random(work.seed)
    with Client(system.address) as client:
        info, status = client.model_info(), client.status()
        if group not in {found.group for found in status.groups}:
            raise InvalidArgument("--group", group, f"must be one of the {len(status.groups)} groups, from 0")
        prompts = [[rng.randrange(info.vocab_size) for _ in range(rng.randint(4, 24))] for _ in range(work.prompts)]
        progress("computing the answers with transformers")
        reference = Reference(model, torch.float32)
        known = [reference.greedy(prompt, work.new) for prompt in prompts]
        streams = _Streams(system.address, prompts, work)
        try:
            progress(f"{work.streams} streams; damage in {work.before:g} s")
            time.sleep(work.before)
            first = client.status()
            begun_s = time.monotonic()
            progress(f"{kind.name}: {kind.what}")
            with damaged(kind, lambda: _pid_of(client, group), system.coordinator, lambda: system.drop_links(group)):
                time.sleep(max(work.damage, kind.least_s) if kind.lasts else 0.0)
            ended_s = time.monotonic()
            before = streams.rate(begun_s - work.before + 1.0, begun_s)
            if kind.restarts:
                _wait_until_back(client, group, first, work.after)
                progress(f"group {group} is back {time.monotonic() - ended_s:.1f} s after the damage")
                ended_s = time.monotonic()
            recovered_s = _wait_for(streams, before, ended_s, work.after, progress)
        finally:
            streams.end()
        last = client.status()
    report = _report(streams.answers, begun_s, ended_s if recovered_s is None else max(recovered_s, ended_s))
    report |= _wrong(reference, prompts, known, streams.answers)
    report |= {
        "drill": kind.name,
        "group": group,
        "tokens_per_s_before": before,
        "recovery_s": None if recovered_s is None else max(0.0, recovered_s - begun_s),
        **_calls(first, last),
        "seed": work.seed,
        "streams": work.streams,
        "groups": len(last.groups),
    }
    report["problems"] = _problems(kind, report)
    report["pass"] = not report["problems"]
    return report


def _pid_of(client: Client, group: int) -> int:
    process = next((item.process for item in client.status().groups if item.group == group), None)
    if process is None or not process.pid:
        raise Unavailable(f"group {group} is not there")
    if process.host != process_facts().host:
        raise ConfigError(
            f"--group: group {group} is on {process.host}; a drill reaches processes of its own host only"
        )
    return int(process.pid)


def _wait_until_back(client: Client, group: int, first: control_pb2.StatusReply, limit_s: float) -> None:
    """Until another process serves as the group and the router asks it again.

    Raises:
        Unavailable: not within ``limit_s``.
    """
    was = next(item.incarnation for item in first.groups if item.group == group)
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        now = client.status()
        if group not in now.dispatch.suspects and any(
            item.group == group and item.healthy and item.incarnation != was for item in now.groups
        ):
            return
        time.sleep(0.2)
    raise Unavailable(f"group {group} did not come back within {limit_s:g} s")


def _wait_for(streams: _Streams, before: float, ended_s: float, limit_s: float, progress: Progress) -> float | None:
    """When throughput was back for a whole window; None if it never was."""
    at_s = ended_s
    while at_s < ended_s + limit_s:
        time.sleep(max(0.0, at_s + _WINDOW_S - time.monotonic()))
        if streams.rate(at_s, at_s + _WINDOW_S) >= _RECOVERED * before:
            progress(f"throughput is back {at_s - ended_s:.1f} s later")
            return at_s
        at_s += _STEP_S
    return None


def _report(answers: list[Answered], begun_s: float, until_s: float) -> dict[str, Any]:
    gaps: dict[str, list[float]] = {"before": [], "during": []}
    for answer in answers:
        for earlier, later in zip(answer.times_s, answer.times_s[1:], strict=False):
            if later < begun_s:
                gaps["before"].append(later - earlier)
            elif earlier <= until_s:
                gaps["during"].append(later - earlier)
    firsts = {
        name: [a.times_s[0] - a.sent_s for a in answers if a.times_s and (a.times_s[0] < begun_s) == (name == "before")]
        for name in gaps
    }
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
        "max_token_gap_before_ms": max(gaps["before"], default=0.0) * 1e3,
        "token_gap_p99_ms": p99,
        "max_first_token_ms": {name: max(found, default=0.0) * 1e3 for name, found in firsts.items()},
        "gaps": {name: len(found) for name, found in gaps.items()},
        "damage_s": until_s - begun_s,
    }


def _wrong(
    reference: Reference, prompts: list[list[int]], known: list[list[int]], answers: list[Answered]
) -> dict[str, int]:
    """Tokens that are not the known ones. Where an answer leaves the known one at a near tie of the reference's logits,
    it is judged by the reference along its own tokens from there on."""
    wrong = ties = 0
    for answer in answers:
        expected = known[answer.prompt][: len(answer.tokens)]
        if answer.tokens == expected:
            continue
        logits_NV = reference.logits(prompts[answer.prompt], answer.tokens)
        best_N = logits_NV.max(-1).values
        chosen_N = logits_NV.gather(-1, torch.tensor(answer.tokens)[:, None])[:, 0]
        near = (best_N - chosen_N) <= NEAR_TIE * logits_NV.std()
        wrong += int((~near).sum())
        ties += int(near.all())
    return {"mismatched_tokens": wrong, "near_tie_answers": ties}


def _calls(first: control_pb2.StatusReply, last: control_pb2.StatusReply) -> dict[str, Any]:
    calls = last.dispatch.calls - first.dispatch.calls
    hedged = last.dispatch.hedged - first.dispatch.hedged
    return {
        "layer_calls": calls,
        "resent_calls": last.dispatch.resent - first.dispatch.resent,
        "hedges": hedged,
        "hedges_won": last.dispatch.hedges_won - first.dispatch.hedges_won,
        "hedged_share": hedged / calls if calls else 0.0,
    }


def _problems(kind: Kind, report: dict[str, Any]) -> list[str]:
    found = [f"{report[key]} {what}" for key, what in _NONE_OF.items() if report[key]]
    if kind.max_gap_ms is not None and report["max_token_gap_ms"] > kind.max_gap_ms:
        found.append(f"a token came {report['max_token_gap_ms']:.0f} ms after the one before ({kind.max_gap_ms:g} ms)")
    before, during = report["token_gap_p99_ms"]["before"], report["token_gap_p99_ms"]["during"]
    if kind.max_p99_ratio is not None and before and during and during > kind.max_p99_ratio * before:
        found.append(f"gap p99 went from {before:.0f} to {during:.0f} ms ({kind.max_p99_ratio:g} x)")
    if report["hedged_share"] > HEDGED_SHARE:
        found.append(f"{report['hedged_share']:.1%} of the calls were sent twice ({HEDGED_SHARE:.0%})")
    if report["recovery_s"] is None:
        found.append(f"throughput did not come back to {_RECOVERED:.0%}")
    return found


_NONE_OF = {"failed": "requests failed", "mismatched_tokens": "tokens differ", "inexact": "answers were not exact"}
