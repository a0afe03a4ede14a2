"""Experts read straight into place are those that the conversion gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from cluster.errors import CheckpointError
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.direct import DirectFile
from cluster.weights.layouts import LAYOUTS
from cluster.weights.mapping import WeightMap
from cluster.weights.reader import ExpertReader
from cluster.weights.skeleton import MoeLayer, build_skeleton
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny


def weights_of(path: Path) -> WeightMap:
    checkpoint = Checkpoint(path)
    return WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", architectures())
def test_every_expert_comes_straight_from_the_files(
    arch: str, layout: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of(tiny(arch, layout))
    for dtype in (torch.float32, torch.bfloat16)[: 2 if layout == "per-expert" else 1]:
        reader = ExpertReader(weights, dtype)
        for layer in weights.skeleton.moe_layers:
            chosen = [5, 0, 3]
            wanted = weights.read_experts(layer, chosen, dtype)
            with monkeypatch.context() as patch:
                patch.setattr(weights, "read_experts", _long_way)
                found = reader.read(layer, chosen, threads=2)
            assert wanted.keys() == found.keys()
            for key, tensor in wanted.items():
                assert found[key].dtype is dtype
                assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])
def test_reading_past_the_page_cache_gives_the_same(arch: str, layout: str, tiny: MakeTiny) -> None:
    weights = weights_of(tiny(arch, layout))
    mapped, direct = ExpertReader(weights, torch.float32), ExpertReader(weights, torch.float32, direct=True)
    for layer in weights.skeleton.moe_layers:
        chosen = [5, 0, 3, 5]
        wanted, found = mapped.read(layer, chosen), direct.read(layer, chosen)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    if not direct.is_direct and layout in ("per-expert", "fused"):
        pytest.skip("this file system cannot be read past the page cache")


def test_a_file_that_became_shorter_is_a_typed_error(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny("mixtral") / path.name).read_bytes())
    file = DirectFile.open(path)
    if file is None:
        pytest.skip("this file system cannot be read past the page cache")
    name = max((name for name in weights_of(tiny("mixtral")).checkpoint.tensors), key=lambda name: file.range_of(name))
    reading = file.prepare([file.range_of(name)])
    file.read(reading)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="shorter"):
        file.read(reading)
    file.close()


def _long_way(*_: object) -> None:
    raise AssertionError("converted, where a copy would do")


def test_what_is_no_block_goes_through_the_conversion(tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(tiny("mixtral"))
    layer = weights.skeleton.moe_layers[0]
    wanted = weights.read_experts(layer, [2], torch.float32)
    convert = weights.convert_expert

    def shuffled(layer: MoeLayer, key: str, expert: int, read: object) -> torch.Tensor:
        outcome = convert(layer, key, expert, read)  # type: ignore[arg-type]
        return outcome.reshape(-1)[torch.randperm(outcome.numel())].reshape(outcome.shape)

    monkeypatch.setattr(weights, "convert_expert", shuffled)
    found = ExpertReader(weights, torch.float32).read(layer, [2])
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_experts_of_another_shape_than_the_config_says_are_refused(tiny: MakeTiny) -> None:
    weights = weights_of(tiny("mixtral"))
    layer = weights.skeleton.moe_layers[0]
    module = torch.nn.Module()
    for key, parameter in layer.module.named_parameters():
        module.register_parameter(key, torch.nn.Parameter(torch.empty((*parameter.shape[:-1], 3), device="meta")))
    wrong = MoeLayer(layer.layer, layer.prefix, module, layer.num_experts)
    with pytest.raises(CheckpointError, match="the config says"):
        ExpertReader(weights, torch.float32).read(wrong, [1])
