from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cluster.core import SamplingParams
from cluster.engine.sampler import sample


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(50)
    assert sample(logits, SamplingParams(), [1]).token == int(logits.argmax())


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=4),
        SamplingParams(temperature=1.0, top_p=0.6),
        SamplingParams(temperature=0.9, top_k=6, top_p=0.8, repetition_penalty=1.5),
    ],
)
def test_drawn_tokens_follow_the_distribution_of_transformers(params: SamplingParams) -> None:
    torch.manual_seed(3)
    logits, history = torch.randn(12) * 2, [1, 5, 5, 7]
    scores = logits[None].clone()
    ids = torch.tensor([history])
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(params.temperature)(ids, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    wanted = torch.softmax(scores[0], -1)
    draws = 4000
    counts = Counter(
        sample(
            logits,
            SamplingParams(params.temperature, params.top_k, params.top_p, seed, params.repetition_penalty),
            history,
        ).token
        for seed in range(draws)
    )
    assert set(counts) <= {i for i, p in enumerate(wanted.tolist()) if p > 0}
    for token, probability in enumerate(wanted.tolist()):
        # Five standard deviations of a binomial count: a wrong distribution is off by far more.
        assert abs(counts[token] - draws * probability) <= 5 * (draws * probability * (1 - probability)) ** 0.5 + 1e-9


def test_a_seed_and_a_position_decide_the_token() -> None:
    logits = torch.zeros(1000)
    params = SamplingParams(temperature=1.0, seed=2**64 - 1)
    first = [sample(logits, params, list(range(n))).token for n in range(1, 30)]
    assert first == [sample(logits, params, list(range(n))).token for n in range(1, 30)]
    assert len(set(first)) > 15, "another position draws another number"


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = torch.randn(30)
    result = sample(logits, SamplingParams(temperature=0.5, num_logprobs=3, repetition_penalty=2.0), [4])
    wanted = torch.log_softmax(logits.double(), -1)
    assert result.logprob == pytest.approx(float(wanted[result.token]))
    assert [i for i, _ in result.top] == wanted.topk(3).indices.tolist()
