"""The trunk over a packed, ragged, chunked batch gives the oracle's logits; a planted error does not."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cluster.api.router import Router
from cluster.experts import group
from cluster.kernels.linear import ROWS, KernelTable
from cluster.model import attention, trunk
from cluster.model.kv import KvStore
from cluster.model.packed import Chunk
from cluster.routing.step import StepContext
from cluster.weights.zoo import WINDOW, architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router

PROMPT_LENGTHS = (9, 3 * WINDOW + 5, 30)
NEW = 12
EAGER_ONLY = ("deepseek_v2", "deepseek_v3", "gpt_oss")
"""Keys and values of different widths; sinks."""


def serve_ragged(router: Router, prompts: list[list[int]], chunk: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens and logits when sequences join one step after another and prompts go in pieces, with keys and
    values in scattered blocks of 4 tokens (one sequence has them in a row)."""
    size = 4
    need = [-(-(len(prompt) + NEW) // size) for prompt in prompts]
    free = random.sample(range(sum(need)), sum(need))
    blocks = [[free.pop() for _ in range(count)] for count in need]
    blocks[0] = [sum(need) + i for i in range(need[0])]
    router._trunk.store = KvStore(sum(need) + need[0], size)
    done = [0] * len(prompts)
    pending = [list(prompt) for prompt in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    for step in range(1000):
        chunks, members = [], []
        for number in range(len(prompts)):
            if step < number or len(tokens[number]) == NEW:
                continue
            piece, pending[number] = pending[number][:chunk], pending[number][chunk:]
            chunks.append(Chunk(piece, done[number], blocks[number]))
            done[number] += len(piece)
            members.append(number)
        if not chunks:
            return tokens, [torch.stack(rows) for rows in logits]
        result = router._trunk.forward(chunks, StepContext(step))
        for row, number in enumerate(members):
            if not pending[number]:
                token = int(result[row].argmax())
                tokens[number].append(token)
                logits[number].append(result[row])
                pending[number] = [token]
    raise AssertionError("did not end")


@pytest.mark.parametrize("way", ["fast", "eager"])
@pytest.mark.parametrize("arch", architectures())
def test_ragged_chunked_batches_give_the_oracles_tokens_and_logits(
    arch: str, way: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "eager":
        monkeypatch.setattr(attention, "TOLERANCE", -1.0)  # nothing is close enough
        monkeypatch.setattr(attention, "PIECE_LIMIT", 100)
    else:
        monkeypatch.setattr(trunk, "SMALL_BYTES", 0)
        monkeypatch.setattr(group, "SMALL_BYTES", 0)
        tiles = KernelTable(dict.fromkeys(ROWS, (1.0, 0.5)))
        monkeypatch.setattr(KernelTable, "measure", lambda: tiles)
    path = tiny(arch, seed=random.randrange(10_000))
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [[random.randrange(512) for _ in range(length)] for length in PROMPT_LENGTHS]
    with in_process_router(path, num_groups=3) as router:
        known = router._trunk._layers
        assert set(known.fast.values()) == {way == "fast" and arch not in EAGER_ONLY}
        assert set(known.direct.values()) == {not arch.startswith("deepseek")}
        tokens, logits = serve_ragged(router, prompts, chunk=17)
    for prompt, chosen, got in zip(prompts, tokens, logits, strict=True):
        with torch.inference_mode():
            wanted = oracle(torch.tensor([prompt + chosen[:-1]])).logits[0, len(prompt) - 1 :]
        assert wanted.argmax(-1).tolist() == chosen
        assert (wanted - got).abs().max() <= 1e-4 * wanted.std()


def test_a_head_that_is_said_to_be_tied_and_stored_apart_is_the_stored_one(tiny: MakeTiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny("mixtral"), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    oracle = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompt = [random.randrange(512) for _ in range(20)]
    with in_process_router(path) as router:
        tokens, logits = serve_ragged(router, [prompt], chunk=7)
    with torch.inference_mode():
        wanted = oracle(torch.tensor([prompt + tokens[0][:-1]])).logits[0, len(prompt) - 1 :]
    assert (wanted - logits[0]).abs().max() <= 1e-4 * wanted.std()


def test_switches_that_change_what_a_model_returns_are_turned_off(tiny: MakeTiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny("qwen3_moe"), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    switches = {"return_dict": False, "output_router_logits": True, "output_attentions": True, "use_cache": False}
    (path / "config.json").write_text(json.dumps({**config, **switches}))
    prompt = [random.randrange(512) for _ in range(20)]
    with in_process_router(path) as router, in_process_router(tiny("qwen3_moe")) as plain:
        assert serve_ragged(router, [prompt], chunk=7)[0] == serve_ragged(plain, [prompt], chunk=7)[0]


def logits_of(path: Path, state: dict[str, torch.Tensor] | None = None, **config: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()
    if state is not None:
        model.load_state_dict(state)
    torch.manual_seed(5)
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.randint(0, 512, (4, 64))).logits
    return logits


@pytest.mark.parametrize("arch", architectures())
def test_every_expert_gate_and_window_of_the_zoo_changes_the_output(arch: str, tiny: MakeTiny) -> None:
    path = tiny(arch)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    right = logits_of(path)
    limit = 1e-3 * float(right.std())

    def differs(changed: dict[str, torch.Tensor]) -> bool:
        return float((logits_of(path, changed) - right).abs().max()) > limit

    def with_change(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**state, name: tensor}

    downs = [name for name in state if name.endswith("experts.down_proj")]
    assert downs
    for name in downs:
        for expert in range(state[name].shape[0]):
            zeroed = state[name].clone()
            zeroed[expert] = 0
            assert differs(with_change(name, zeroed)), f"{name}[{expert}] does nothing"
    for name in [n for n in state if n.endswith(("mlp.gate.weight", "router.weight"))]:
        swapped = state[name][[1, 0, *range(2, state[name].shape[0])]]
        assert differs(with_change(name, swapped)), f"swapped rows of {name} do nothing"
    if getattr(model.config, "sliding_window", None):
        other = logits_of(path, sliding_window=WINDOW - 1)
        assert float((other - right).abs().max()) > limit, "the window does nothing"
