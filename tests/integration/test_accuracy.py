"""Experts of fewer bits: answers say that they are not exact, and held-out text says how much that costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from cluster.api.router import Router
from cluster.bench.reference import Reference
from cluster.bench.verify import Load, accuracy, ask, compare, held_out_text, problems, quality_problems
from cluster.config import EMBEDDED_MODEL
from cluster.engine.text import load_tokenizer
from tests.door import Door
from tests.systems import in_process_router

LOAD = Load(prompts=2, tokens=6, in_flight=2, seed=3)


@contextmanager
def served(**flags: object) -> Iterator[tuple[str, Router]]:
    door = Door()
    try:
        with in_process_router(EMBEDDED_MODEL, num_groups=1, **flags) as router:
            door.open(router)
            yield door.address, router
    finally:
        door.close()


@pytest.mark.parametrize("dtype", ["int8", "bf16"])
def test_quantised_experts_are_labelled_and_cost_little_perplexity(dtype: str) -> None:
    reference = Reference(EMBEDDED_MODEL, torch.float32)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    assert tokenizer is not None
    text = held_out_text(tokenizer, 2)
    assert len(text) == 256
    with served(expert_dtype=dtype) as (address, _):
        answers, status = ask(address, LOAD, lambda _: None)
        quality = accuracy(address, reference, text, lambda _: None)
    assert status.expert_dtype == dtype
    assert status.groups[0].expert_bytes < 16 * 4 * 3 * 192 * 96 * 4 / (3.5 if dtype == "int8" else 1.9)
    report = {**compare(reference, answers, LOAD.tokens), "max_batch": status.engine.max_batch, **quality}
    assert not report["exact"]
    assert quality_problems(report) == []
    assert "answers say that they are not exact" in problems(report, LOAD)
    assert quality["perplexity_tokens"] == 2 * 112
    assert abs(quality["perplexity_rise"]) < 0.01
    # The embedded model's checkpoint is bf16 itself.
    assert (quality["max_abs_logit_diff"] > 1e-3) == (dtype == "int8")


def test_a_rise_of_perplexity_and_a_wrong_label_are_no_pass() -> None:
    assert "perplexity rises by 2.00%" in quality_problems({"exact": False, "perplexity_rise": 0.02})[0]
    assert "say that they are exact" in quality_problems({"exact": True})[0]


def test_exact_experts_have_the_references_perplexity() -> None:
    reference = Reference(EMBEDDED_MODEL, torch.float32)
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    assert tokenizer is not None
    with served() as (address, router):
        quality = accuracy(address, reference, held_out_text(tokenizer, 2), lambda _: None)
        assert router.status().expert_dtype == ""
        assert router.status().engine.prefix_hit_tokens > 0
    assert quality["perplexity"] == pytest.approx(quality["perplexity_exact"], rel=1e-4)
