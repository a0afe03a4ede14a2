"""What cannot be served right is refused by name, before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from cluster.errors import UnsupportedModel
from cluster.model.kv import KvStore
from cluster.model.packed import Chunk, PackedBatch
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.skeleton import build_skeleton
from tests.conftest import MakeTiny


def checkpoint(path: Path, model_type: str, **settings: Any) -> Checkpoint:
    path.mkdir()
    AutoConfig.for_model(model_type, **settings).save_pretrained(path)
    save_file({"x": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("qwen3_next", "LinearAttention"), ("jamba", "LinearAttention"), ("llama", "no routed experts"), ("bert", "bert")],
)
def test_refused_by_name(model_type: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        build_skeleton(checkpoint(tmp_path / "m", model_type, num_hidden_layers=4), torch.float32)
    assert model_type in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rotary_scaling_that_depends_on_the_batch_limits_the_context(tiny: MakeTiny, tmp_path: Path) -> None:
    source = tiny("phimoe")
    path = tmp_path / "m"
    path.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    skeleton = build_skeleton(Checkpoint(path), torch.float32)
    assert skeleton.context_length == 128
    assert "longrope" in skeleton.context_why
    assert build_skeleton(Checkpoint(source), torch.float32).context_length == 512


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_attention_to_later_tokens_is_refused(arch: str, tiny: MakeTiny, tmp_path: Path) -> None:
    path = shutil.copytree(tiny(arch), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "is_causal": False}))
    with pytest.raises(UnsupportedModel, match="later tokens"):
        build_skeleton(Checkpoint(path), torch.float32)


def test_a_mask_that_shows_later_tokens_is_refused_whatever_the_config_says() -> None:
    batch = PackedBatch([Chunk([1, 2, 3], 0, [0])], KvStore(1, 4), torch.device("cpu"))
    batch.mask(lambda _b, _h, query, key: key <= query, torch.float32)
    with pytest.raises(UnsupportedModel, match="later tokens"):
        batch.mask(lambda _b, _h, query, key: (key - query).abs() < 2, torch.float32)
