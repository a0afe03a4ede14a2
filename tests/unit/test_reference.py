"""The oracle itself: what it says must not depend on how it was asked."""

from __future__ import annotations

import json
import random

import torch

from cluster.bench.reference import Reference
from tests.conftest import MakeTiny


def test_a_padding_token_in_a_prompt_is_a_token_like_any_other(tiny: MakeTiny) -> None:
    path = tiny("deepseek_v3")
    pad = json.loads((path / "config.json").read_text())["pad_token_id"]
    assert isinstance(pad, int)
    oracle = Reference(path, torch.float32)
    for _ in range(3):
        prompt = [random.randrange(512) for _ in range(9)]
        prompt[random.randrange(9)] = pad
        tokens = oracle.greedy(prompt, 8)
        assert oracle.logits(prompt, tokens).argmax(-1).tolist() == tokens
