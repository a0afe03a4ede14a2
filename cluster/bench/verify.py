"""`expertmesh verify`: the served system against the oracle, token by token and logit by logit.

Prompts go through the real client port with several in flight; the server gives the full logits of every token. The
reference is forced along the served tokens, so that one difference does not hide the rest.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.api.client import Client
from cluster.bench.reference import Reference
from cluster.errors import InvalidArgument
from cluster.rpc.v1 import control_pb2, inference_pb2

MIN_PROMPT, MAX_PROMPT = 8, 96
LOGIT_LIMIT = 1e-4
"""Largest difference allowed, as a multiple of the standard deviation of the reference's logits. Honest error of fp32
is about 2e-6; one wrong expert or two swapped gate weights make at least 2e-4 on the zoo's models."""
NEAR_TIE = 1e-5
NEAR_TIE_SHARE = 0.005


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: ``prompts`` random prompts of 8 to 96 tokens, ``tokens`` new ones each, ``in_flight`` at once."""

    prompts: int
    tokens: int
    in_flight: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("prompts", "tokens", "in_flight"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"--{name.replace('_', '-')}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt, the tokens that were served for it, and their logits, fp32 [tokens, V]."""

    prompt: list[int]
    tokens: list[int]
    logits_NV: torch.Tensor


def ask(address: str, load: Load, progress: Callable[[str], None]) -> tuple[list[Answer], control_pb2.StatusReply]:
    """The served answers, and the system's status after them."""
    with Client(address) as client:
        info = client.model_info()
        longest = min(MAX_PROMPT, info.context_length - load.tokens)
        if longest < MIN_PROMPT:
            raise InvalidArgument(
                "--tokens", load.tokens, f"must leave {MIN_PROMPT} tokens of the context of {info.context_length}"
            )
        rng = random.Random(load.seed)
        prompts = [
            [rng.randrange(info.vocab_size) for _ in range(rng.randint(MIN_PROMPT, longest))]
            for _ in range(load.prompts)
        ]
        started_s = time.monotonic()
        with ThreadPoolExecutor(load.in_flight) as pool:
            answers = list(pool.map(lambda prompt: _ask_one(client, prompt, load.tokens), prompts))
        progress(f"served {load.prompts} x {load.tokens} tokens in {time.monotonic() - started_s:.1f} s")
        return answers, client.status()


def _ask_one(client: Client, prompt: list[int], num_tokens: int) -> Answer:
    request = inference_pb2.GenerateRequest(
        prompt_ids=inference_pb2.TokenIds(ids=prompt), max_new_tokens=num_tokens, ignore_eos=True, return_logits=True
    )
    tokens: list[int] = []
    rows: list[Any] = []
    for chunk in client.generate(request):
        for token in chunk.tokens:
            tokens.append(token.id)
            rows.append(np.frombuffer(token.logits_f32, dtype="<f4"))
    return Answer(prompt, tokens, torch.from_numpy(np.stack(rows)))


def compare(reference: Reference, answers: list[Answer], expected_tokens: int) -> dict[str, Any]:
    """Counts and differences over all answers (see the README for the keys)."""
    compared = mismatched = near_ties = 0
    worst = 0.0
    total = total_squares = count = 0.0
    for answer in answers:
        wanted_NV = reference.logits(answer.prompt, answer.tokens)
        compared += len(answer.tokens)
        # A missing token is a wrong one.
        mismatched += max(0, expected_tokens - len(answer.tokens))
        mismatched += int((wanted_NV.argmax(-1) != torch.tensor(answer.tokens)).sum())
        difference = float((wanted_NV - answer.logits_NV).abs().max())
        worst = max(worst, difference) if difference == difference else sys.float_info.max  # NaN is no pass
        top_N2 = wanted_NV.topk(2, dim=-1).values
        near_ties += int((top_N2[:, 0] - top_N2[:, 1] < NEAR_TIE).sum())
        exact = wanted_NV.double()
        total += float(exact.sum())
        total_squares += float((exact * exact).sum())
        count += exact.numel()
    deviation = max(0.0, total_squares / count - (total / count) ** 2) ** 0.5
    return {
        "tokens_compared": compared,
        "mismatched_tokens": mismatched,
        "max_abs_logit_diff": worst,
        "logit_std": deviation,
        "near_ties": near_ties,
    }


def problems(report: dict[str, Any], load: Load) -> list[str]:
    """Why a report is no pass; empty for a pass."""
    found = []
    if report["tokens_compared"] != load.prompts * load.tokens:
        found.append(f"{report['tokens_compared']} tokens were served, {load.prompts * load.tokens} were asked for")
    if report["mismatched_tokens"]:
        found.append(f"{report['mismatched_tokens']} tokens differ")
    limit = LOGIT_LIMIT * report["logit_std"]
    if not report["max_abs_logit_diff"] <= limit:
        found.append(f"logits differ by {report['max_abs_logit_diff']:.3g}, more than {limit:.3g}")
    if report["near_ties"] > NEAR_TIE_SHARE * report["tokens_compared"]:
        found.append(f"{report['near_ties']} near ties: these prompts prove too little")
    if min(load.in_flight, load.prompts) > 1 and report["max_batch"] < 2:
        found.append("no two requests ever shared a step")
    return found


def link_problems(wanted: Sequence[str], status: control_pb2.StatusReply) -> list[str]:
    """Groups that were not reached over the transport that was asked for, or not all the time."""
    found = []
    for kind, group in zip(wanted, status.groups, strict=True) if wanted else ():
        if kind not in ("auto", group.transport):
            found.append(f"group {group.group} is reached over {group.transport}, not {kind}: {group.link.why}")
        elif group.link.fallbacks:
            found.append(f"the link to group {group.group} fell back: {group.link.last_failure}")
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """All runs, and at the top level the one run's figures, or for several the sums and the worst."""
    ok = all(run["ok"] for run in runs)
    if len(runs) == 1:
        return {**runs[0], "ok": ok, "runs": runs}
    worst = max(
        runs, key=lambda run: run["max_abs_logit_diff"] / run["logit_std"] if run["logit_std"] else float("inf")
    )
    sums = {key: sum(run[key] for run in runs) for key in ("tokens_compared", "mismatched_tokens", "near_ties")}
    return {
        "ok": ok,
        "arch": sorted({run["arch"] for run in runs}),
        "groups": sorted({run["groups"] for run in runs}),
        "transport": runs[0]["transport"],
        "prompts": sum(run["prompts"] for run in runs),
        **sums,
        "max_abs_logit_diff": worst["max_abs_logit_diff"],
        "logit_std": worst["logit_std"],
        "max_batch": min(run["max_batch"] for run in runs),
        "runs": runs,
    }
