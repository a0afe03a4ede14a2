"""Attention on blocks, compiled: what torch's gives, for every shape, number of threads and place in the store."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cluster.bench.engine import Generator
from cluster.kernels.attention import Histories, attend, can_attend
from cluster.kernels.chunks import attend_causal
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router


def pieces(total: int, cuts: list[int], room: int) -> list[tuple[int, int]]:
    """Ranges of ``total`` positions in all, apart from each other, in no order."""
    edges = [0, *sorted({cut % total for cut in cuts} - {0}), total]
    lengths = [b - a for a, b in itertools.pairwise(edges)]
    starts, at = {}, room
    for number in reversed(range(len(lengths))):
        starts[number] = at
        at += lengths[number] + 3
    return [(starts[number], starts[number] + length) for number, length in enumerate(lengths)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_what_torch_computes(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 13))
    dim, v_dim = (16 * data.draw(st.integers(1, 12)) for _ in range(2))
    threads, scale = data.draw(st.integers(1, 3)), data.draw(st.floats(0.1, 3.0)) / dim**0.5
    rows = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=5, unique=True))
    runs, room = [], 0
    for _ in rows:
        total = data.draw(st.integers(1, 90))
        runs.append(pieces(total, data.draw(st.lists(st.integers(1, 90), max_size=3)), room))
        room = max(last for _, last in runs[-1]) + 5
    keys, values = torch.randn(room, kv_heads, dim), torch.randn(room, kv_heads, v_dim)
    query = torch.randn(1, 8, kv_heads * group, dim).transpose(1, 2)
    result = torch.full((1, 8, kv_heads * group, v_dim), 7.0)
    assert can_attend(query, keys, values)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attend(query, keys, values, Histories(rows, runs), scale, result)
    finally:
        torch.set_num_threads(before)
    for row, parts in zip(rows, runs, strict=True):
        at = torch.cat([torch.arange(first, last) for first, last in parts])
        own, k, v = query[:, :, row : row + 1].double(), keys[at].double(), values[at].double()
        wanted = F.scaled_dot_product_attention(
            own, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=scale, enable_gqa=True
        )
        assert torch.allclose(result[:, row].double(), wanted[:, :, 0], atol=2e-5, rtol=1e-5)
    others = [row for row in range(8) if row not in rows]
    assert (result[:, others] == 7.0).all()


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_what_torch_computes_for_many_tokens(data: st.DataObject) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dim, v_dim = (16 * data.draw(st.integers(1, 9)) for _ in range(2))
    threads, scale = data.draw(st.integers(1, 3)), data.draw(st.floats(0.1, 3.0)) / dim**0.5
    total = data.draw(st.integers(1, 300))
    rows = data.draw(st.integers(1, min(total, 90)))
    runs = pieces(total, data.draw(st.lists(st.integers(1, 300), max_size=4)), 2)
    room = max(last for _, last in runs) + 5
    keys, values = torch.full((room, kv_heads, dim), torch.nan), torch.full((room, kv_heads, v_dim), torch.nan)
    at = torch.cat([torch.arange(first, last) for first, last in runs])
    keys[at], values[at] = torch.randn(total, kv_heads, dim), torch.randn(total, kv_heads, v_dim)
    query = torch.randn(1, rows, kv_heads * group, dim).transpose(1, 2)
    whole = torch.full((1, rows + 2, kv_heads * group, v_dim), 7.0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        attend_causal(query, keys, values, runs, scale, whole[:, 1:-1])
    finally:
        torch.set_num_threads(before)
    k, v = (t[at].double().transpose(0, 1)[None] for t in (keys, values))
    allowed = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)
    wanted = F.scaled_dot_product_attention(query.double(), k, v, allowed, scale=scale, enable_gqa=True)
    # Where scores are far apart fp32 is off by up to 9e-6 here (400 random ones).
    assert torch.allclose(whole[:, 1:-1].double(), wanted.transpose(1, 2), atol=2e-5, rtol=1e-5)
    assert (whole[:, [0, -1]] == 7.0).all()


def test_many_tokens_that_do_not_fit_are_refused() -> None:
    keys, query, result = torch.randn(30, 2, 16), torch.randn(1, 4, 20, 16), torch.empty(1, 20, 4, 16)
    attend_causal(query, keys, keys, [(0, 20)], 1.0, result)
    for runs, scale, into in (
        ([(0, 31)], 1.0, result),
        ([(-1, 25)], 1.0, result),
        ([(5, 4), (0, 25)], 1.0, result),
        ([(0, 19)], 1.0, result),  # fewer than there are queries
        ([(0, 20)], 0.0, result),
        ([(0, 20)], 1.0, torch.empty(1, 20, 4, 32)),
    ):
        with pytest.raises(ValueError, match="attention of"):
            attend_causal(query, keys, keys, runs, scale, into)


def test_scores_far_apart_and_what_is_not_finite() -> None:
    keys, values = torch.zeros(6, 1, 16), torch.randn(6, 1, 16)
    keys[:, 0, 0] = torch.tensor([0.0, 1e4, -1e4, 1e4, 3.0, float("nan")])
    query = torch.zeros(1, 1, 2, 16)
    query[..., 0] = 1.0
    result = torch.empty(1, 2, 1, 16)
    attend(query, keys, values, Histories([0, 1], [[(0, 5)], [(2, 6)]]), 1.0, result)
    assert torch.allclose(result[0, 0, 0], (values[1, 0] + values[3, 0]) / 2, atol=1e-6)
    assert result[0, 1].isnan().all()


def test_what_would_read_elsewhere_is_refused() -> None:
    keys, query, result = torch.randn(10, 2, 16), torch.randn(1, 4, 3, 16), torch.empty(1, 3, 4, 16)
    for histories, scale in (
        (Histories([0], [[(4, 11)]]), 1.0),
        (Histories([3], [[(0, 4)]]), 1.0),
        (Histories([0], [[(0, 4)]]), 0.0),
    ):
        with pytest.raises(ValueError, match="attention of"):
            attend(query, keys, keys, histories, scale, result)
    with pytest.raises(ValueError, match="attention of"):
        attend(query, keys, keys, Histories([0], [[(0, 4)]]), 1.0, torch.empty(1, 3, 4, 32))
    apart = torch.randn(1, 4, 3, 32)[..., ::2]
    with pytest.raises(ValueError, match="attention of"):
        attend(apart, keys, keys, Histories([0], [[(0, 4)]]), 1.0, result)


def test_tensors_that_it_does_not_take() -> None:
    keys, query = torch.randn(10, 2, 16), torch.randn(1, 4, 3, 16)
    assert can_attend(query, keys, keys)
    assert not can_attend(query.bfloat16(), keys, keys)
    assert not can_attend(query, torch.randn(10, 2, 24), keys)
    assert not can_attend(torch.randn(1, 5, 3, 16), keys, keys), "heads that do not divide"
    assert not can_attend(query, keys.transpose(0, 1).contiguous().transpose(0, 1), keys), "laid out by head"


OTHER_WAYS = {"deepseek_v2", "deepseek_v3", "gpt_oss", "mixtral", "phimoe", "qwen3_moe"}
"""Latents that the layer makes keys of, and sinks, keep the model's own attention; windows, which these tiny models
have, torch's."""


@pytest.mark.parametrize("arch", architectures())
def test_sequences_that_decode_are_read_where_they_lie(
    arch: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def attend_and_note(*arguments: Any) -> None:
        sizes.append(len(arguments[3].rows))
        attend(*arguments)

    monkeypatch.setattr("cluster.model.attention.attend", attend_and_note)
    path = tiny(arch)
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [[random.randrange(512) for _ in range(random.randint(3, 30))] for _ in range(4)]
    with in_process_router(path, num_groups=2) as router:
        tokens = Generator(router)(prompts, 8)["tokens"]
    assert (max(sizes, default=0) > 1) == (arch not in OTHER_WAYS)
    for prompt, chosen in zip(prompts, tokens, strict=True):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([prompt + chosen[:-1]])).logits[0, len(prompt) - 1 :]
        assert wanted.argmax(-1).tolist() == chosen


def test_prompts_are_read_where_they_lie(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def attend_and_note(query: torch.Tensor, *others: Any) -> None:
        runs = others[2]
        seen.append((query.shape[2], sum(last - first for first, last in runs), len(runs)))
        attend_causal(query, *others)

    monkeypatch.setattr("cluster.model.attention.attend_causal", attend_and_note)
    path = tiny("olmoe")
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    shared = [random.randrange(512) for _ in range(70)]
    prompts = [shared + [random.randrange(512) for _ in range(random.randint(30, 90))] for _ in range(4)]
    with in_process_router(path, num_groups=2) as router:
        generate = Generator(router)
        generate(prompts[:1], 2)
        tokens = generate(prompts, 4)["tokens"]
    assert any(total > rows for rows, total, _ in seen), "with a history"
    assert any(runs > 1 for _, _, runs in seen), "in several places"
    for prompt, chosen in zip(prompts, tokens, strict=True):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([prompt + chosen[:-1]])).logits[0, len(prompt) - 1 :]
        assert wanted.argmax(-1).tolist() == chosen
