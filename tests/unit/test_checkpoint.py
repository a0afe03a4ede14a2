from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cluster.bench.reference import Reference
from cluster.errors import CheckpointError, UnsupportedModel
from cluster.weights.checkpoint import Checkpoint, dequantize_blocks
from cluster.weights.layouts import LAYOUTS, quantize_blocks
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny


def copy(path: Path, to: Path) -> Path:
    shutil.copytree(path, to)
    return to


def weights(path: Path, dtype: torch.dtype = torch.float32) -> WeightMap:
    checkpoint = Checkpoint(path)
    return WeightMap(checkpoint, build_skeleton(checkpoint, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", architectures())
def test_trunk_and_slices_of_experts_are_what_transformers_loads(arch: str, layout: str, tiny: MakeTiny) -> None:
    path = tiny(arch, layout)
    map_ = weights(path)
    wanted = AutoModelForCausalLM.from_pretrained(tiny(arch), dtype=torch.float32).state_dict()
    tolerance = 0.1 if layout == "fp8" else 0.0
    trunk = map_.read_trunk(torch.float32)
    assert sum(t.numel() * 4 for t in trunk.values()) == map_.trunk_bytes(torch.float32)
    assert not any(".experts." in name for name in trunk)
    for name, tensor in trunk.items():
        assert (tensor - wanted[name]).abs().max() <= tolerance, name
    chosen = [1, 4, 5]
    for layer in map_.skeleton.moe_layers:
        experts = map_.read_experts(layer, chosen, torch.float32)
        for key, tensor in experts.items():
            assert (tensor - wanted[f"{layer.prefix}.{key}"][chosen]).abs().max() <= tolerance, key
        size = sum(t.numel() * 4 for t in experts.values())
        assert size == len(chosen) * map_.expert_bytes(layer, torch.float32)


def test_bf16_keeps_in_fp32_what_the_model_wants_in_fp32(tiny: MakeTiny) -> None:
    trunk = weights(tiny("deepseek_v3"), torch.bfloat16).read_trunk(torch.bfloat16)
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in trunk.items()}
    assert dtypes["e_score_correction_bias"] == torch.float32
    assert dtypes["weight"] == torch.bfloat16


def test_block_scaled_fp8_is_multiplied_out_as_the_format_says() -> None:
    weight = torch.randn(300, 200)
    quantized, scale = quantize_blocks(weight, (128, 128))
    assert scale.shape == (3, 2)
    got = dequantize_blocks(quantized, scale, (128, 128))
    assert torch.equal(got[:128, 128:], quantized[:128, 128:].float() * scale[0, 1])
    assert torch.equal(got[256:, :128], quantized[256:, :128].float() * scale[2, 0])
    assert (got - weight).norm() / weight.norm() < 0.04


def test_the_fingerprint_tells_models_apart(tiny: MakeTiny) -> None:
    assert Checkpoint(tiny("mixtral")).fingerprint == Checkpoint(tiny("mixtral")).fingerprint
    assert Checkpoint(tiny("mixtral")).fingerprint != Checkpoint(tiny("olmoe")).fingerprint


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    cases = [tmp_path / "nowhere", tmp_path / "config.json", tmp_path]
    for path in cases:
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(UnsupportedModel, match="no_such_model"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tiny: MakeTiny, tmp_path: Path) -> None:
    path = copy(tiny("mixtral", "sharded"), tmp_path / "m")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        Checkpoint(path)


@pytest.mark.parametrize("keep", [0, 4, 1000, -1])
def test_a_truncated_shard_is_named(tiny: MakeTiny, tmp_path: Path, keep: int) -> None:
    path = copy(tiny("mixtral"), tmp_path / "m")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*damaged or truncated"):
        Checkpoint(path)


def test_pickled_weights_are_never_loaded(tiny: MakeTiny, tmp_path: Path) -> None:
    path = copy(tiny("mixtral"), tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        Checkpoint(path)


def test_an_index_cannot_point_outside_the_directory(tiny: MakeTiny, tmp_path: Path) -> None:
    path = copy(tiny("mixtral", "sharded"), tmp_path / "m")
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = next(iter(content["weight_map"]))
    content["weight_map"][name] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint(path)


def change_tensors(path: Path, drop: str) -> None:
    file = path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if drop not in k}, file, metadata={"format": "pt"})


def test_missing_weights_are_named(tiny: MakeTiny, tmp_path: Path) -> None:
    path = copy(tiny("qwen3_moe"), tmp_path / "trunk")
    change_tensors(path, "layers.1.self_attn.q_proj")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj"):
        weights(path)
    path = copy(tiny("qwen3_moe"), tmp_path / "expert")
    change_tensors(path, "layers.1.mlp.experts.3.up_proj")
    with pytest.raises(CheckpointError, match="15 tensors"):
        weights(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_attention_heads", 0),
        ("hidden_size", "64"),
        ("hidden_size", -4),
        ("rope_parameters", [1]),
        ("max_position_embeddings", "x"),
        ("quantization_config", "x"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [0, 0]}),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": ["a", "b"]}),
    ],
)
def test_a_config_that_makes_no_sense_is_a_typed_error_in_one_line(
    key: str, value: object, tiny: MakeTiny, tmp_path: Path
) -> None:
    path = copy(tiny("mixtral"), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config[key] = value
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        weights(path)
    assert "\n" not in str(caught.value)


def test_other_quantisation_is_refused_by_name(tiny: MakeTiny, tmp_path: Path) -> None:
    path = copy(tiny("gpt_oss"), tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="mxfp4"):
        Checkpoint(path)


def test_the_oracle_multiplies_fp8_out_by_itself_and_agrees(tiny: MakeTiny) -> None:
    path = tiny("deepseek_v3", "fp8")
    wanted = Reference(path, torch.float32)._model.state_dict()
    trunk = weights(path).read_trunk(torch.float32)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in trunk.items())
    assert not torch.equal(
        wanted["model.layers.0.mlp.gate_proj.weight"],
        weights(tiny("deepseek_v3")).read_trunk(torch.float32)["model.layers.0.mlp.gate_proj.weight"],
    )
