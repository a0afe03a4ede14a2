"""`expertmesh verify`: the served system against the oracle, token by token and logit by logit.

Prompts go through the real client port with several in flight; the server gives the full logits of every token. The
reference is forced along the served tokens, so that one difference does not hide the rest.
"""

from __future__ import annotations

import math
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
from cluster.config import EMBEDDED_MODEL
from cluster.engine.text import Tokenizer
from cluster.errors import InvalidArgument
from cluster.rpc.v1 import control_pb2, inference_pb2

MIN_PROMPT, MAX_PROMPT = 8, 96
LOGIT_LIMIT = 1e-4
"""Largest difference allowed, as a multiple of the standard deviation of the reference's logits. Honest error of fp32
is about 2e-6; one wrong expert or two swapped gate weights make at least 2e-4 on the zoo's models."""
WINDOW, FIRST_POSITION, NUM_WINDOWS, IN_FLIGHT = 128, 16, 10, 8
PERPLEXITY_LIMIT = 0.01
"""How much perplexity may rise with expert weights of fewer bits."""
_UNEXPLAINED = 2
"""Wrong answers after which nobody looks for ties any more."""
_COUNTS = ("tokens_compared", "mismatched_tokens", "near_ties", "routing_ties")
NEAR_TIE = 1e-5
NEAR_TIE_SHARE = 0.005
ROUTING_TIE_SHARE = 0.005
"""Of the answers, but one is always let pass: of 325 sequences of bench-700m, 160 tokens each, one had such a tie."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: ``prompts`` random prompts of 8 to 96 tokens, ``tokens`` new ones each, ``in_flight`` at once.

    Two of three prompts begin with the same ``shared_prefix`` tokens, beside their own.
    """

    prompts: int
    tokens: int
    in_flight: int
    seed: int
    shared_prefix: int = 0

    def __post_init__(self) -> None:
        if self.shared_prefix < 0:
            raise InvalidArgument("--shared-prefix", self.shared_prefix, "must be 0 or more")
        for name in ("prompts", "tokens", "in_flight"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"--{name.replace('_', '-')}", getattr(self, name), "must be at least 1")


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt, the tokens that were served for it, and their logits, fp32 [tokens, V]."""

    prompt: list[int]
    tokens: list[int]
    logits_NV: torch.Tensor
    said_exact: bool = True


def ask(address: str, load: Load, progress: Callable[[str], None]) -> tuple[list[Answer], control_pb2.StatusReply]:
    """The served answers, and the system's status after them."""
    with Client(address) as client:
        info = client.model_info()
        longest = min(MAX_PROMPT, info.context_length - load.tokens - load.shared_prefix)
        if longest < MIN_PROMPT:
            raise InvalidArgument(
                "--tokens", load.tokens, f"must leave {MIN_PROMPT} tokens of the context of {info.context_length}"
            )
        rng = random.Random(load.seed)
        prefix = [rng.randrange(info.vocab_size) for _ in range(load.shared_prefix)]
        prompts = [
            (prefix if number % 3 else [])
            + [rng.randrange(info.vocab_size) for _ in range(rng.randint(MIN_PROMPT, longest))]
            for number in range(load.prompts)
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
    exact = False
    for chunk in client.generate(request):
        exact = chunk.exact
        for token in chunk.tokens:
            tokens.append(token.id)
            rows.append(np.frombuffer(token.logits_f32, dtype="<f4"))
    return Answer(prompt, tokens, torch.from_numpy(np.stack(rows)), exact)


def compare(
    reference: Reference, answers: list[Answer], expected_tokens: int, look_for_ties: bool = True
) -> dict[str, Any]:
    """Counts and differences over all answers (see the README for the keys).

    An answer that is not the reference's may be that of the reference where two experts tie (`Reference.others`): then
    all of its tokens and logits are compared with that one, by the same limits, and it counts as a routing tie.
    """
    compared = mismatched = near_ties = routing_ties = unexplained = 0
    worst = 0.0
    total = total_squares = count = 0.0
    for answer in answers:
        wanted_NV = reference.logits(answer.prompt, answer.tokens)
        if look_for_ties and unexplained <= _UNEXPLAINED and not _same(wanted_NV, answer):
            unexplained += 1
            for other_NV in reference.others(answer.prompt, answer.tokens):
                if _same(other_NV, answer):
                    wanted_NV, routing_ties, unexplained = other_NV, routing_ties + 1, unexplained - 1
                    break
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
        "routing_ties": routing_ties,
        "exact": all(answer.said_exact for answer in answers),
    }


def allowed_ties(answers: int) -> int:
    """How many of so many answers may be right only because experts tied."""
    return max(1, int(ROUTING_TIE_SHARE * answers))


def _same(wanted_NV: torch.Tensor, answer: Answer) -> bool:
    tokens = torch.equal(wanted_NV.argmax(-1), torch.tensor(answer.tokens))
    return tokens and bool((wanted_NV - answer.logits_NV).abs().max() <= LOGIT_LIMIT * wanted_NV.std())


def problems(report: dict[str, Any], load: Load) -> list[str]:
    """Why a report is no pass; empty for a pass."""
    found = []
    if report["tokens_compared"] != load.prompts * load.tokens:
        found.append(f"{report['tokens_compared']} tokens were served, {load.prompts * load.tokens} were asked for")
    if not report["exact"]:
        found.append("answers say that they are not exact")
    if report["mismatched_tokens"]:
        found.append(f"{report['mismatched_tokens']} tokens differ")
    limit = LOGIT_LIMIT * report["logit_std"]
    if not report["max_abs_logit_diff"] <= limit:
        found.append(f"logits differ by {report['max_abs_logit_diff']:.3g}, more than {limit:.3g}")
    if report["near_ties"] > NEAR_TIE_SHARE * report["tokens_compared"]:
        found.append(f"{report['near_ties']} near ties: these prompts prove too little")
    if report["routing_ties"] > allowed_ties(load.prompts):
        found.append(f"{report['routing_ties']} answers are right only if experts tied: too many to be chance")
    if min(load.in_flight, load.prompts) > 1 and report["max_batch"] < 2:
        found.append("no two requests ever shared a step")
    return found


def quality_problems(report: dict[str, Any]) -> list[str]:
    """Why a report about experts of another dtype is no pass."""
    found = []
    if report["exact"]:
        found.append("answers say that they are exact, and their experts have another dtype")
    if report.get("perplexity_rise", 0.0) >= PERPLEXITY_LIMIT:
        found.append(f"perplexity rises by {report['perplexity_rise']:.2%}, {PERPLEXITY_LIMIT:.0%} or more")
    return found


def accuracy(
    address: str, reference: Reference, text: Sequence[int], progress: Callable[[str], None]
) -> dict[str, float]:
    """Perplexity of ``text`` as served and by the reference, and the largest difference of logits on it.

    The server is asked for the token after every prefix of each window from `FIRST_POSITION` on; with prefix caching
    that costs little more than reading the window once.
    """
    windows = [list(text[at : at + WINDOW]) for at in range(0, len(text) - WINDOW + 1, WINDOW)]
    served = wanted = worst = 0.0
    count = 0
    with Client(address) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
        for number, window in enumerate(windows, 1):
            progress(f"held-out text: window {number} of {len(windows)}")
            lengths = range(FIRST_POSITION, WINDOW)
            answers = list(pool.map(lambda length, ids=window: _ask_one(client, ids[:length], 1), lengths))
            got_NV = torch.cat([answer.logits_NV for answer in answers])
            right_NV = reference.logits(window[:FIRST_POSITION], window[FIRST_POSITION:])
            target_N1 = torch.tensor(window[FIRST_POSITION:])[:, None]
            served -= float(torch.log_softmax(got_NV.double(), -1).gather(1, target_N1).sum())
            wanted -= float(torch.log_softmax(right_NV.double(), -1).gather(1, target_N1).sum())
            worst = max(worst, float((got_NV - right_NV).abs().max()))
            count += len(lengths)
    perplexity, exact = math.exp(served / count), math.exp(wanted / count)
    return {
        "perplexity": perplexity,
        "perplexity_exact": exact,
        "perplexity_rise": perplexity / exact - 1.0,
        "perplexity_tokens": count,
        "max_abs_logit_diff": worst,
    }


def held_out_text(tokenizer: Tokenizer, num_windows: int) -> list[int]:
    """The start of both texts that the embedded model was not trained on, by equal parts."""
    ids: list[int] = []
    for file in sorted((EMBEDDED_MODEL.parent / "heldout").glob("*.txt")):
        ids += tokenizer.encode(file.read_text(encoding="utf-8")[:20_000])[: num_windows // 2 * WINDOW]
    return ids


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
    sums = {key: sum(run[key] for run in runs) for key in _COUNTS}
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
