"""Products in tiles, compiled: right for every shape and number of threads, and on processors with other registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels.registers import shape_for
from cluster.kernels.tiles import DTYPES, INPUTS, OUTPUTS, PIECE, can_tile, tiled_product

MANY_ROWS = 700  # more than what stays in a cache together, with the inputs below


def reference(x_PK: torch.Tensor, weight_SNK: torch.Tensor, slots: list[int], counts: list[int]) -> torch.Tensor:
    parts = [x.double() @ weight_SNK[slot].double().T for x, slot in zip(x_PK.split(counts), slots, strict=True)]
    return torch.cat(parts).float()


def check(slots: list[int], counts: list[int], outputs: int, inputs: int) -> None:
    weight_SNK, x_PK = torch.randn(5, outputs, inputs), torch.randn(sum(counts), inputs)
    got = tiled_product(x_PK, weight_SNK, slots, counts)
    assert torch.allclose(got, reference(x_PK, weight_SNK, slots, counts), atol=1e-5 * inputs**0.5, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_experts_with_any_rows(data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
    counts = [data.draw(st.one_of(st.integers(0, 20), st.integers(0, 150))) for _ in slots]
    outputs, inputs = data.draw(st.integers(1, 3 * PIECE // OUTPUTS)), data.draw(st.integers(1, 9))
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 4)))
    try:
        check(slots, counts, outputs * OUTPUTS, inputs * INPUTS)
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 50), st.integers(1, 3 * PIECE // OUTPUTS), st.integers(1, 21), st.sampled_from(DTYPES))
def test_weights_of_fewer_bytes_with_scales(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    shape = 3, outputs * OUTPUTS, inputs * INPUTS
    whole = torch.randint(-128, 128, shape, dtype=torch.int8)
    weight_SNK, scale_SN = whole if dtype is torch.int8 else torch.randn(shape).to(dtype), torch.rand(shape[:2])
    assert can_tile(weight_SNK, dtype)
    x_PK = torch.randn(2 * rows, shape[2])
    for scale in (scale_SN, None):
        got = tiled_product(x_PK, weight_SNK, [2, 0], [rows, rows], scale)
        values = weight_SNK.float() * (1.0 if scale is None else scale[..., None])
        expected = reference(x_PK, values, [2, 0], [rows, rows])
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * shape[2] ** 0.5 * float(values.abs().max()))


def test_every_value_of_a_byte_and_of_bf16_is_exactly_itself() -> None:
    one = torch.ones(1, INPUTS)
    for values in (
        torch.arange(-128, 128).to(torch.int8),
        torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16),
    ):
        values = values[values.float().isfinite()]
        weight = torch.zeros(1, len(values) // OUTPUTS * OUTPUTS, INPUTS, dtype=values.dtype)
        weight[0, :, 3] = values[: weight.shape[1]]
        assert torch.equal(tiled_product(one, weight, [0], [1])[0], weight[0, :, 3].float())


def test_scales_that_do_not_fit_are_refused() -> None:
    weight, x = torch.zeros(2, 8, 16, dtype=torch.int8), torch.randn(1, 16)
    for bad in (torch.rand(2, 7), torch.rand(1, 8), torch.rand(8), torch.rand(2, 8).double(), torch.rand(8, 2).T):
        with pytest.raises(ValueError, match="scales: got"):
            tiled_product(x, weight, [0], [1], bad)


def test_more_rows_than_a_cache_holds() -> None:
    check([3, 1], [MANY_ROWS, 5], 40, 512)


@pytest.mark.parametrize("rows", [7, 40])
def test_what_is_not_finite_stays_in_its_row(rows: int) -> None:
    weight_SNK, x_PK = torch.randn(1, 8, 32), torch.randn(rows, 32)
    bad, worse = rows // 3, rows // 2 + 1
    x_PK[bad, 5], x_PK[worse, 0] = float("nan"), float("inf")
    got = tiled_product(x_PK, weight_SNK, [0], [rows])
    assert got[bad].isnan().all()
    assert not got[worse].isfinite().any()
    assert got[[row for row in range(rows) if row not in (bad, worse)]].isfinite().all()


def test_rows_that_do_not_lie_one_behind_the_other() -> None:
    weight, wide = torch.randn(1, 12, 32), torch.randn(2, 50, 80)
    for x_PK in (wide[0, :, 7:39], wide[0, ::2, 7:39], wide[1, 3, 20:52].expand(50, 32), wide[1, :32].T[:50]):
        got = tiled_product(x_PK, weight, [0], [len(x_PK)])
        assert torch.allclose(got, x_PK @ weight[0].T, atol=1e-4)


def test_threads_side_by_side_do_not_disturb_each_other() -> None:
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                check([0, 2], [3, 9], 64, 64)
        except BaseException as exc:  # noqa: BLE001 - raised below
            failed.append(exc)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed


@pytest.mark.parametrize(
    ("slots", "counts", "shape", "message"),
    [
        ([5], [3], (3, 32), "below 5"),
        ([-1], [3], (3, 32), "below 5"),
        ([0], [4], (3, 32), r"must be \[4, 32\]"),
        ([0], [3], (3, 16), r"must be \[3, 32\]"),
        ([0, 1], [4, -1], (3, 32), "below 5"),
    ],
)
def test_what_would_read_elsewhere_is_refused(
    slots: list[int], counts: list[int], shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiled_product(torch.randn(shape), torch.randn(5, 8, 32), slots, counts)


def test_weights_that_have_no_tiles() -> None:
    assert can_tile(torch.randn(2, 8, 32))
    assert can_tile(torch.randn(8, 32))
    assert not can_tile(torch.randn(8, 32).bfloat16())
    assert not can_tile(torch.randn(6, 32)), "outputs"
    assert not can_tile(torch.randn(8, 24)), "inputs"
    assert not can_tile(torch.randn(32, 8).t()), "laid out the other way round"


_OTHER = """
import json, sys
from types import SimpleNamespace
from llvmlite import binding
wanted = type(binding.get_host_cpu_features())(json.loads(sys.argv[1]))
binding.get_host_cpu_features = lambda: wanted
import numpy as np
import torch
import torch.nn.functional as F
from cluster.kernels import experts, registers
from cluster.kernels.tiles import DTYPES, TiledWeights, panel_rows, tiled_product
errors = []
for outputs in (44, 100):
    for dtype in DTYPES:
        x, w, scale = torch.randn(63, 96), torch.randn(3, outputs, 96), torch.rand(3, outputs)
        w = torch.randint(-9, 9, w.shape, dtype=dtype) if dtype is torch.int8 else w.to(dtype)
        full = w.float() * scale[..., None]
        got = tiled_product(x, w, (2, 0), (40, 23), scale)
        errors.append(got - torch.cat((x[:40] @ full[2].T, x[40:] @ full[0].T)))
    each = [torch.randn(size, 96) for size in (outputs, 8)]
    errors += [got - x @ weight.T for weight, got in zip(each, TiledWeights(each).products(x))]
experts.SMALL = 0
up, down = 0.1 * torch.randn(2, 160, 96), 0.1 * torch.randn(2, 96, 80)
gate = lambda hidden: F.silu(hidden.chunk(2, -1)[0]) * hidden.chunk(2, -1)[1]
module = SimpleNamespace(has_gate=True, _apply_gate=gate)
bank = experts.GatedExperts.of(module, experts.Weights(up), experts.Weights(down))
pairs = np.array([list(range(63)) * 2, [0] * 63 + [1] * 63, np.ones(126, np.float32).view(np.int32)], np.int32)
total = bank.run(x, pairs, np.arange(2), experts.Scratch())
errors.append(total - sum(gate(x @ up[slot].T) @ down[slot].T for slot in (0, 1)))
print(json.dumps([registers.LANES, registers.ROWS, panel_rows(), max(float(each.abs().max()) for each in errors)]))
"""


@pytest.mark.parametrize(("features", "shape"), [({"avx2": True, "fma": True}, (8, 3)), ({"sse2": True}, (4, 2))])
def test_processors_with_smaller_registers(features: dict[str, bool], shape: tuple[int, int]) -> None:
    command = [sys.executable, "-c", _OTHER, json.dumps(features)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": os.devnull}  # what is compiled for them is not for this one
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    lanes, rows, panel, error = json.loads(done.stdout)
    assert (lanes, rows) == shape == shape_for(features, "x86_64")
    assert panel == (16 if lanes == 8 else 0)
    assert error < 1e-3


def test_tiles_of_arm() -> None:
    assert shape_for({"neon": True}, "aarch64") == (4, 6)
