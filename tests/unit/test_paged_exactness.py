"""Through the whole engine: shared prefixes, preemption and company in the batch change no token."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.bench.engine import Generator
from cluster.model.together import Bundle
from cluster.weights.zoo import WINDOW, architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router

NEW = 14


CASES = [
    *((arch, True, False) for arch in architectures()),
    *((arch, False, False) for arch in ("deepseek_v3", "gpt_oss")),
    # As on a GPU: all sequences that decode in one call of attention.
    *((arch, True, True) for arch in architectures()),
]


@pytest.mark.parametrize(("arch", "caching", "together"), CASES)
def test_a_cache_too_small_for_all_and_shared_prefixes_give_the_oracles_tokens(
    arch: str, caching: bool, together: bool, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles: list[int] = []
    monkeypatch.setattr(Bundle, "put", lambda bundle, *rows, put=Bundle.put: (bundles.append(1), put(bundle, *rows)))
    # So few that bundles are cut into several, with rows of each between those of others.
    monkeypatch.setattr("cluster.model.together.MAX_POSITIONS", 300)
    monkeypatch.setattr("cluster.model.together.MAX_PADDING", 20)
    path = tiny(arch, seed=random.randrange(10_000))
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prefix = [random.randrange(512) for _ in range(2 * WINDOW + 3)]
    prompts = [
        (prefix if number % 3 else []) + [random.randrange(512) for _ in range(random.randint(1, 40))]
        for number in range(10)
    ]
    longest = max(len(prompt) for prompt in prompts) + NEW
    with in_process_router(path, num_groups=2) as probe:
        per_token = probe.status().engine.kv_limit_bytes // (probe.status().engine.kv_blocks * 16)
    # Room for two of ten; blocks of 4 so that sequences are in pieces.
    settings = {
        "kv_cache_bytes": per_token * 2 * (longest + 8),
        "block_size": 4,
        "prefix_caching": caching,
        "admission_headroom": 0,
    }
    with in_process_router(path, num_groups=2, engine=settings) as router:
        router._trunk.together = together
        bundles.clear()
        tokens = Generator(router)(prompts, NEW)["tokens"]
        tokens_again = Generator(router)(prompts[:3], NEW)["tokens"]
        status = router.status().engine
    assert status.preemptions > 0
    assert (status.prefix_hit_tokens > 0) == caching
    assert status.kv_blocks_used == 0
    assert bool(bundles) == together
    for prompt, chosen in zip([*prompts, *prompts[:3]], [*tokens, *tokens_again], strict=True):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([prompt + chosen[:-1]])).logits[0, len(prompt) - 1 :]
        assert wanted.argmax(-1).tolist() == chosen
