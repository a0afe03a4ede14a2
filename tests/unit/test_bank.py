from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cluster.errors import ConfigError, InvalidArgument, MissingExperts
from cluster.experts.bank import ExpertBank
from cluster.experts.compute import Compute
from cluster.experts.crew import Crew
from cluster.experts.reduced import PackedExperts, RoundedExperts
from cluster.kernels.linear import ROWS, FastLinear, KernelTable
from cluster.transport.base import LayerRows
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny

CPU = torch.device("cpu")


def table(tiled_up_to: int) -> KernelTable:
    """One that says that tiles win up to so many rows."""
    return KernelTable({rows: (1.0, 0.5 if rows <= tiled_up_to else 2.0) for rows in (*ROWS, tiled_up_to)})


def bank(path: object, holdings: list[list[int]] | None = None, **how: Any) -> ExpertBank:
    checkpoint = Checkpoint(str(path))
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    held = holdings or [list(range(layer.num_experts)) for layer in weights.skeleton.moe_layers]
    return ExpertBank.load(7, weights, held, Compute(torch.float32, CPU, **how))


def pairs(index_TK: torch.Tensor, weight_TK: torch.Tensor, hidden_TH: torch.Tensor) -> LayerRows:
    num_tokens, top_k = index_TK.shape
    rows = torch.arange(num_tokens, dtype=torch.int32).repeat_interleave(top_k)
    return LayerRows.of(hidden_TH, rows, index_TK.flatten(), weight_TK.flatten())


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tiled": {"table": table(ROWS[-1])},
    "tiled-up-to-7-rows": {"table": table(7), "threads": 2},
    "three-threads": {"threads": 3},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("arch", architectures())
def test_experts_compute_what_transformers_own_experts_do(arch: str, way: str, tiny: MakeTiny) -> None:
    path = tiny(arch)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager")
    modules = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "num_experts")]
    ours = bank(path, **WAYS[way])
    hidden_TH = torch.randn(20, 64)
    for layer, module in enumerate(modules):
        index_TK = torch.stack([torch.randperm(module.num_experts)[:3] for _ in range(20)])
        weight_TK = torch.rand(20, 3)
        with torch.inference_mode():
            wanted = module(hidden_TH, index_TK, weight_TK)
        got = ours.compute(layer, pairs(index_TK, weight_TK, hidden_TH))
        assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.std()), rtol=1e-4)
    assert ours.num_bytes == sum(p.numel() * 4 for m in modules for p in m.parameters())
    ours.close()


@pytest.mark.parametrize("way", ["plain", "tiled"])
def test_a_group_never_computes_an_expert_that_it_does_not_hold(way: str, tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"), [[0, 2], [1], [0]], **WAYS[way])
    rows = pairs(torch.tensor([[0, 2], [2, 3], [5, 0]]), torch.rand(3, 2), torch.randn(3, 64))
    with pytest.raises(MissingExperts, match=r"group 7 does not hold experts \[3, 5\] of MoE layer 0"):
        ours.compute(0, rows)


@pytest.mark.parametrize("way", ["plain", "tiled"])
@pytest.mark.parametrize(
    ("field", "value"), [("pair_row_P", 3), ("pair_row_P", -1), ("pair_expert_P", 8), ("pair_expert_P", -1)]
)
def test_indices_are_checked_before_use(field: str, value: int, way: str, tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"), **WAYS[way])
    rows = pairs(torch.tensor([[0, 2], [2, 3], [5, 0]]), torch.rand(3, 2), torch.randn(3, 64))
    getattr(rows, field)[1] = value
    with pytest.raises(InvalidArgument):
        ours.compute(0, rows)
    with pytest.raises(InvalidArgument, match="layer"):
        ours.compute(99, rows)


def test_a_call_without_rows_or_pairs_has_an_answer(tiny: MakeTiny) -> None:
    ours = bank(tiny("mixtral"))
    empty = pairs(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2), torch.empty(0, 64))
    assert ours.compute(0, empty).shape == (0, 64)


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize(("dtype", "fraction", "limit"), [("int8", 4, 0.05), ("bf16", 2, 0.01)])
@pytest.mark.parametrize("packed", [False, True])
def test_quantised_experts_are_smaller_and_close(
    arch: str, dtype: str, fraction: float, limit: float, packed: bool, tiny: MakeTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packed:  # as where nothing can be compiled
        monkeypatch.setattr(RoundedExperts, "can_tile", False)
    path = tiny(arch)
    exact, ours = bank(path), bank(path, expert_dtype=dtype, threads=2)
    assert not ours.how.exact
    assert exact.how.exact
    hidden_TH = torch.randn(20, 64)
    experts = len(exact.holdings[0])
    rows = pairs(torch.stack([torch.randperm(experts)[:3] for _ in range(20)]), torch.rand(20, 3), hidden_TH)
    wanted, got = exact.compute(0, rows), ours.compute(0, rows)
    difference = float((got - wanted).std() / wanted.std())
    assert 0 < difference < limit
    # Scales weigh more in a tiny model than in one that anybody serves.
    assert ours.num_bytes < exact.num_bytes * (1.0 / fraction + 0.25)
    ours.close()


def test_weights_that_a_packed_kernel_cannot_hold_are_refused(tiny: MakeTiny) -> None:
    (module,) = [layer.module for layer in build_skeleton(Checkpoint(str(tiny("mixtral"))), torch.float32).moe_layers][
        :1
    ]
    tensors = {name: torch.randn(2, *p.shape[1:]) for name, p in module.named_parameters()}
    assert PackedExperts(module, tensors, "bf16").num_bytes * 2 == sum(t.nbytes for t in tensors.values())
    tensors["down_proj"][1, 3, 5] = 1e5
    with pytest.raises(ConfigError, match="65504"):
        PackedExperts(module, tensors, "bf16")
    assert RoundedExperts(module, tensors, "bf16").num_bytes * 2 == sum(t.nbytes for t in tensors.values())


def test_a_dtype_of_experts_that_their_device_has_not_is_refused(tiny: MakeTiny) -> None:
    checkpoint = Checkpoint(str(tiny("mixtral")))
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.bfloat16))
    with pytest.raises(ConfigError, match="expert_dtype: got 'int8' with dtype bf16"):
        ExpertBank.load(0, weights, [[0]] * 3, Compute(torch.bfloat16, CPU, "int8"))


def test_an_error_in_any_thread_is_raised(tiny: MakeTiny) -> None:
    crew = Crew(3)
    done: list[int] = []

    def fail() -> None:
        raise ValueError("third")

    with pytest.raises(ValueError, match="third"):
        crew.run([lambda: done.append(1), lambda: done.append(2), fail])
    crew.run([lambda: done.append(3), lambda: done.append(4)])
    assert sorted(done) == [1, 2, 3, 4]
    crew.close()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.booleans(), st.booleans())
def test_a_fast_linear_layer_computes_what_the_layer_does(rows: int, tiled: bool, bias: bool) -> None:
    layer = torch.nn.Linear(48, 20, bias=bias)
    x = torch.randn(2, rows, 48)
    fast = FastLinear(layer.weight.detach(), layer.bias.detach() if bias else None, table(80 if tiled else 0))
    with torch.inference_mode():
        assert torch.allclose(fast(x), layer(x), atol=1e-5)


def test_the_table_measures_both_kernels() -> None:
    measured = KernelTable.measure()
    assert set(measured.seconds) == set(ROWS)
    for plain, tiled in measured.seconds.values():
        assert plain > 0
        assert tiled is not None
        assert tiled > 0
    assert table(7).tiled_up_to == 7
    assert table(0).tiled_up_to == 0
    assert table(ROWS[-1]).tiled_up_to > ROWS[-1]
    assert KernelTable(dict.fromkeys(ROWS, (1.0, None))).tiled_up_to == 0


def test_one_number_of_rows_does_not_decide_for_all_others() -> None:
    # One row, one thread, a machine with little memory bandwidth: both wait for weights.
    seconds = {1: (402e-6, 440e-6), 4: (645e-6, 268e-6), 16: (720e-6, 570e-6), 64: (1.5e-3, 1.9e-3), 256: (4e-3, 6e-3)}
    assert KernelTable(seconds).tiled_up_to == 16
    assert KernelTable({**seconds, 16: (720e-6, 900e-6)}).tiled_up_to == 4
    assert KernelTable({**seconds, 4: (645e-6, 640e-6), 16: (720e-6, 730e-6)}).tiled_up_to == 16
    assert KernelTable({**seconds, 1: (402e-6, 900e-6), 4: (645e-6, 600e-6), 16: (1.0, 1.0)}).tiled_up_to == 0


@pytest.mark.parametrize("arch", architectures())
def test_experts_with_few_rows_and_many_share_a_call(arch: str, tiny: MakeTiny) -> None:
    path = tiny(arch)
    alone, together = bank(path), bank(path, table=table(3), threads=2)
    experts = together._layers[0].experts
    # Weights laid out the other way round (gpt_oss) have no tiles.
    assert experts.shared([1, 2, 3, 9]) == (0 if arch == "gpt_oss" else 3)
    hidden_TH = torch.randn(9, 64)
    index_TK = torch.tensor([[0, 1 + t % 3] for t in range(9)])  # expert 0 has nine rows, the others three
    rows = pairs(index_TK, torch.rand(9, 2), hidden_TH)
    wanted, got = alone.compute(0, rows), together.compute(0, rows)
    assert torch.allclose(got, wanted, atol=1e-5 * float(wanted.std()), rtol=1e-4)
    assert float(wanted.std()) > 0
    together.close()
