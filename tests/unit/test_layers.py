"""Decoder layers in a few compiled calls give what their modules give, and others are left as they are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen3_moe import modeling_qwen3_moe

from cluster.experts import group
from cluster.kernels.attention import Histories
from cluster.kernels.decode import Buffers, DecodeLayer, LayerParts
from cluster.kernels.linear import ROWS, FastLinear, FastNorm, KernelTable
from cluster.model import trunk
from cluster.model.faster import speed_up
from cluster.model.kv import KvStore
from cluster.model.layers import FastLayer, speed_up_layers
from cluster.model.packed import Chunk
from cluster.routing.step import StepContext
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router

TILES = KernelTable(dict.fromkeys(ROWS, (1.0, 0.5)))
BUILT_SO = {"mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
"""Of the zoo. Others have latents, sinks, parallel or other norms, partly turned heads."""


def linear(outputs: int, inputs: int, bias: bool) -> FastLinear:
    return FastLinear(torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs) if bias else None, TILES)


def norm(size: int) -> FastNorm:
    return FastNorm(1 + 0.3 * torch.randn(size), 1e-5)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_what_torch_computes(data: st.DataObject) -> None:
    kv_heads, shared, dim = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 4)),
        16 * data.draw(st.integers(1, 4)),
    )
    heads, hidden, rows = kv_heads * shared, 16 * data.draw(st.integers(1, 70)), data.draw(st.integers(1, 64))
    bias, output_bias, normed = (data.draw(st.booleans()) for _ in range(3))
    each, threads = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    sizes = (dim, dim) if each else (heads * dim, kv_heads * dim)
    parts = LayerParts(
        norm(hidden),
        linear(heads * dim, hidden, bias),
        linear(kv_heads * dim, hidden, bias),
        linear(kv_heads * dim, hidden, bias),
        linear(hidden, heads * dim, output_bias),
        norm(sizes[0]) if normed else None,
        norm(sizes[1]) if normed else None,
        dim,
        data.draw(st.floats(0.1, 2.0)) / dim**0.5,
        norm(hidden),
    )
    layer = DecodeLayer.of(parts, Buffers())
    assert layer is not None
    assert layer.most == 64
    for number in (rows, max(1, rows // 2)):  # what was there before does not matter
        totals = [data.draw(st.integers(1, 30)) for _ in range(number)]
        firsts = [sum(totals[:i]) + i for i in range(number)]
        room = sum(totals) + number
        keys, values = torch.randn(room, kv_heads, dim), torch.randn(room, kv_heads, dim)
        own_keys, own_values = keys.clone(), values.clone()
        at_T = torch.tensor([first + total - 1 for first, total in zip(firsts, totals, strict=True)])
        runs = [[(first, first + total)] for first, total in zip(firsts, totals, strict=True)]
        x, cos, sin = torch.randn(1, number, hidden), torch.randn(1, number, dim), torch.randn(1, number, dim)
        given_x = x.clone()
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            residual, after = layer(x, cos, sin, at_T, (keys, values), Histories(range(number), runs))
        finally:
            torch.set_num_threads(before)
        y = F.rms_norm(x, (hidden,), parts.before.weight, 1e-5)
        q, k, v = (F.linear(y[0], each.weight, each.bias) for each in (parts.query, parts.key, parts.value))
        if parts.query_norm is not None and parts.key_norm is not None:
            q = F.rms_norm(q.view(-1, sizes[0]), (sizes[0],), parts.query_norm.weight, 1e-5)
            k = F.rms_norm(k.reshape(-1, sizes[1]), (sizes[1],), parts.key_norm.weight, 1e-5)
        own_keys[at_T] = turned(k.reshape(number, kv_heads, dim), cos[0][:, None], sin[0][:, None])
        own_values[at_T] = v.view(number, kv_heads, dim)
        q = turned(q.reshape(number, heads, dim), cos[0][:, None], sin[0][:, None])
        mixed = torch.empty(number, heads, dim)
        for row, (first, total) in enumerate(zip(firsts, totals, strict=True)):
            seen = [t[first : first + total].transpose(0, 1)[None] for t in (own_keys, own_values)]
            mixed[row] = F.scaled_dot_product_attention(
                q[row][None, :, None], *seen, scale=parts.scale, enable_gqa=True
            )[0, :, 0]
        wanted = x + F.linear(mixed.view(1, number, -1), parts.output.weight, parts.output.bias)
        assert torch.allclose(residual, wanted, atol=3e-5, rtol=1e-4)
        assert torch.allclose(after, F.rms_norm(wanted, (hidden,), parts.after.weight, 1e-5), atol=3e-5, rtol=1e-4)
        assert torch.allclose(keys, own_keys, atol=2e-5)
        assert torch.allclose(values, own_values, atol=2e-5)
        assert torch.equal(x, given_x)


def test_what_does_not_fit_is_refused() -> None:
    parts = LayerParts(
        *(norm(64), linear(64, 64, False), linear(32, 64, False), linear(32, 64, False), linear(64, 64, False)),
        *(None, None, 16, 0.25, norm(64)),
    )
    layer = DecodeLayer.of(parts, Buffers())
    assert layer is not None
    stored = torch.zeros(9, 2, 16), torch.zeros(9, 2, 16)
    x, angles, at_T, histories = (
        torch.randn(1, 2, 64),
        torch.randn(1, 2, 16),
        torch.tensor([3, 8]),
        [[(0, 4)], [(4, 9)]],
    )
    layer(x, angles, angles, at_T, stored, Histories([0, 1], histories))
    for given_ in (
        (torch.randn(1, 2, 32), angles, angles, at_T, stored, Histories([0, 1], histories)),
        (torch.randn(1, 65, 64), angles, angles, at_T, stored, Histories([0, 1], histories)),
        (x, angles[:, :1], angles, at_T, stored, Histories([0, 1], histories)),
        (x, angles, angles, at_T[:1], stored, Histories([0, 1], histories)),
        (x, angles, angles, at_T, (stored[0], torch.zeros(9, 2, 32)), Histories([0, 1], histories)),
        (x, angles, angles, at_T, stored, Histories([0, 1], [[(0, 4)], [(4, 10)]])),
        (x, angles, angles, at_T, stored, Histories([0], histories[:1])),
        (x, angles, angles, at_T, (stored[0].bfloat16(), stored[1]), Histories([0, 1], histories)),
        (x, angles, angles.double(), at_T, stored, Histories([0, 1], histories)),
        (x, angles, angles, at_T.int(), stored, Histories([0, 1], histories)),
        (torch.randn(1, 2, 128)[..., ::2], angles, angles, at_T, stored, Histories([0, 1], histories)),
    ):
        with pytest.raises(ValueError, match="a layer of 64 and heads of 16"):
            layer(*given_)


def tiny_layer(modeling: Any, name: str, **more: Any) -> Any:
    config = getattr(modeling, f"{name}Config")(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        vocab_size=64,
        **more,
    )
    config._attn_implementation = "eager"
    model = nn.ModuleList([getattr(modeling, f"{name}DecoderLayer")(config, 0)]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    speed_up(model, TILES)
    return model


def found(model: Any) -> int:
    """Layers that were given the fast forward function."""
    speed_up_layers(model)
    return sum(isinstance(module.__dict__.get("forward"), FastLayer) for module in model.modules())


def test_layers_that_are_built_otherwise_are_left_as_they_are() -> None:
    assert found(tiny_layer(modeling_qwen3_moe, "Qwen3Moe", head_dim=16, num_experts=4)) == 1
    assert found(tiny_layer(modeling_mixtral, "Mixtral", head_dim=16)) == 1
    assert found(tiny_layer(modeling_mixtral, "Mixtral", head_dim=8)) == 0, "not whole registers"
    assert found(tiny_layer(modeling_olmoe, "Olmoe", clip_qkv=1.0)) == 0


def test_a_layer_that_adds_something_else_is_left_as_it_is() -> None:
    for wanted, total, angles in (
        (1, lambda x, a, b: x + a + b, lambda given: given),
        (0, lambda x, a, b: x + a + 2 * b, lambda given: given),
        (0, lambda x, a, b: x + 0.3 * a + 0.3 * b, lambda given: given),
        (0, lambda x, a, b: x + b, lambda given: given),
        (0, lambda x, a, b: a + b, lambda given: given),
        (0, lambda x, a, b: x + a + b, lambda given: None),
        (0, lambda x, a, b: x + a + b, lambda given: given["local"]),
    ):
        model = tiny_layer(modeling_mixtral, "Mixtral", head_dim=16)

        class Other(type(model[0])):  # type: ignore[misc]
            def forward(
                self, hidden_states: torch.Tensor, total: Any = total, angles: Any = angles, **kwargs: Any
            ) -> torch.Tensor:
                kwargs["position_embeddings"] = angles(kwargs["position_embeddings"])
                attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
                computed = self.mlp(self.post_attention_layernorm(hidden_states + attended))
                result: torch.Tensor = total(hidden_states, attended, computed)
                return result

        model[0].__class__ = Other
        assert found(model) == wanted


def fast_layers(router: Any) -> list[FastLayer]:
    found = (module.__dict__.get("forward") for module in router._trunk.model.modules())
    return [layer for layer in found if isinstance(layer, FastLayer)]


def decode_a_little(router: Any) -> None:
    """Windows of these tiny models are shorter than what they are warmed up with."""
    router._trunk.store = KvStore(8, 4)
    router._trunk.forward([Chunk(list(range(9)), 0, range(8))], StepContext(1))
    for start in (9, 10):
        router._trunk.forward([Chunk([7], start, range(8))], StepContext(1))


@pytest.mark.parametrize("arch", architectures())
def test_layers_of_the_zoo_that_are_built_so_are_used_once_they_are_proven(
    arch: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "SMALL_BYTES", 0)
    monkeypatch.setattr(group, "SMALL_BYTES", 0)
    monkeypatch.setattr(KernelTable, "measure", lambda: TILES)
    path = tiny(arch, seed=random.randrange(10_000))
    used: list[int] = []
    decode = DecodeLayer.__call__

    def note(self: DecodeLayer, hidden: torch.Tensor, *rest: Any) -> Any:
        used.append(hidden.shape[1])
        return decode(self, hidden, *rest)

    monkeypatch.setattr(DecodeLayer, "__call__", note)
    with in_process_router(path) as router:
        found = fast_layers(router)
        assert bool(found) == (arch in BUILT_SO)
        decode_a_little(router)
        assert all(layer.proofs == 2 and not layer.refuted for layer in found)
        used.clear()
        for number in (1, 3):
            router._trunk.store = KvStore(8 * number, 4)
            blocks = [list(range(8 * i, 8 * i + 8)) for i in range(number)]
            chunks = [Chunk([random.randrange(512) for _ in range(11 + i)], 0, blocks[i]) for i in range(number)]
            router._trunk.forward(chunks, StepContext(1))
            assert not used, "prompts are not for it"
            router._trunk.forward([Chunk([7], 11 + i, blocks[i]) for i in range(number)], StepContext(2))
            assert used == [number] * len(found)
            used.clear()
            mixed = [Chunk([7], 12, blocks[0]), Chunk([7, 8], 0, blocks[-1])][:number]
            router._trunk.forward(mixed, StepContext(3))
            assert used == ([] if number > 1 else [1] * len(found))
            used.clear()


@pytest.mark.parametrize("part", ["residual", "keys", "values"])
def test_a_layer_that_gives_something_else_is_not_used_and_leaves_nothing_behind(
    part: str, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trunk, "SMALL_BYTES", 0)
    monkeypatch.setattr(KernelTable, "measure", lambda: TILES)
    decode = DecodeLayer.__call__

    def spoil(self: DecodeLayer, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        residual, normed = decode(self, *args)
        at_T, (keys, values) = args[3], args[4]
        if part == "residual":
            residual *= 1.001
        for name, kept in (("keys", keys), ("values", values)):
            if name == part:
                kept[at_T] *= 1.001
        return residual, normed

    monkeypatch.setattr(DecodeLayer, "__call__", spoil)
    with in_process_router(tiny("qwen3_moe")) as router:
        found = fast_layers(router)
        decode_a_little(router)
        assert found
        assert all(layer.refuted for layer in found)
        with_spoilt = [kept.clone() for kept in router._trunk.store.layer(1)]
        decode_a_little(router)  # all of it by the modules
        for kept, own in zip(with_spoilt, router._trunk.store.layer(1), strict=True):
            assert torch.equal(kept[:11], own[:11])
        asked: list[int] = []
        monkeypatch.setattr(DecodeLayer, "__call__", lambda self, hidden, *_: asked.append(1))
        router._trunk.store = KvStore(8, 4)
        router._trunk.forward([Chunk(list(range(12)), 0, list(range(8)))], StepContext(1))
        router._trunk.forward([Chunk([7], 12, list(range(8)))], StepContext(2))
        assert not asked
