"""Experts in compiled steps: the sums are right for any pairs, and what does not exist is noticed before anything."""

from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels import experts
from cluster.kernels.experts import GatedExperts, Scratch, Weights
from cluster.kernels.team import team
from cluster.kernels.tiles import DTYPES, INPUTS
from cluster.transport.base import LayerRows

pytestmark = pytest.mark.skipif(team("experts_compiled", "gated") is None, reason="nothing can be compiled here")


def silu(hidden: torch.Tensor) -> torch.Tensor:
    gate, through = hidden.chunk(2, dim=-1)
    return F.silu(gate) * through


def module(**other: Any) -> Any:
    return SimpleNamespace(**{"has_gate": True, "is_transposed": False, "_apply_gate": silu, **other})


def weights(dtype: torch.dtype, *shape: int) -> tuple[Weights, torch.Tensor]:
    """Random ones, and what they stand for."""
    if dtype is not torch.int8:
        plain = (0.1 * torch.randn(shape)).to(dtype)
        return Weights(plain), plain.float()
    whole, scale = torch.randint(-128, 128, shape, dtype=torch.int8), 0.002 * torch.rand(shape[:2])
    return Weights(whole, scale), whole.float() * scale[..., None]


class Case:
    """Random experts in the slots of a layer with some more, and pairs that name them in any order."""

    def __init__(
        self, slots: int, hidden: int, inner: int, tokens: int, pairs: int, dtype: torch.dtype = torch.float32
    ) -> None:
        up, self.up = weights(dtype, slots, 2 * inner, hidden)
        down, self.down = weights(dtype, slots, hidden, inner)
        self.held = random.sample(range(slots + 2), slots)
        self.slot_of_E = np.full(slots + 2, -1, np.int64)
        self.slot_of_E[self.held] = np.arange(slots)
        self.hidden_TH = torch.randn(tokens, hidden)
        self.rows_P = [random.randrange(tokens) for _ in range(pairs)]
        self.experts_P = [random.choice(self.held) for _ in range(pairs)]
        self.weight_P = np.random.rand(pairs).astype(np.float32)
        self.experts = GatedExperts.of(module(), up, down)

    @property
    def rows(self) -> LayerRows:
        return LayerRows.of(self.hidden_TH, self.rows_P, self.experts_P, self.weight_P)

    def run(self, scratch: Scratch, total: torch.Tensor | None = None) -> torch.Tensor | None:
        assert self.experts is not None
        return self.experts.run(self.hidden_TH, self.rows.pairs_3P, self.slot_of_E, scratch, total)

    def expected(self) -> torch.Tensor:
        total = torch.zeros(self.hidden_TH.shape, dtype=torch.float64)
        for row, expert, weight in zip(self.rows_P, self.experts_P, self.weight_P, strict=True):
            slot = int(self.slot_of_E[expert])
            inner = silu(self.up[slot].double() @ self.hidden_TH[row].double())
            total[row] += float(weight) * (self.down[slot].double() @ inner)
        return total.float()


SCRATCH = Scratch()  # one for all, as a bank has: what a call leaves in it must not matter


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 90),
    st.sampled_from(DTYPES),
)
def test_any_pairs(slots: int, hidden: int, inner: int, tokens: int, pairs: int, dtype: torch.dtype) -> None:
    case = Case(slots, hidden * INPUTS, inner * INPUTS, tokens, pairs, dtype)
    got = case.run(SCRATCH)
    assert got is not None
    assert torch.allclose(got, case.expected(), rtol=1e-4, atol=1e-5)
    before = torch.randn_like(got)
    added = case.run(SCRATCH, before.clone())
    assert added is not None
    assert torch.allclose(added, before + got, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(2, 40),
    st.integers(1, 250),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
)
def test_pairs_whose_rows_are_laid_out(
    slots: int, hidden: int, inner: int, tokens: int, pairs: int, threads: int, dtype: torch.dtype
) -> None:
    case = Case(slots, hidden * INPUTS, inner * INPUTS, tokens, pairs, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experts, "SMALL", 0)  # as if there were more than one thread moves
            got = case.run(Scratch())
    finally:
        torch.set_num_threads(before)
    assert got is not None
    assert torch.allclose(got, case.expected(), rtol=1e-4, atol=1e-5)


def test_more_rows_than_one_thread_moves_and_more_than_a_cache_holds() -> None:
    case = Case(3, 256, 64, 900, 1800)
    got = case.run(SCRATCH)
    assert got is not None
    assert torch.allclose(got, case.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [-1, 1000])
def test_pairs_that_name_nothing_are_refused(place: int, number: int) -> None:
    case = Case(3, 32, 16, 4, 9)
    (case.rows_P if place == 0 else case.experts_P)[5] = number
    assert case.run(SCRATCH) is None


def test_an_expert_that_is_not_held_is_refused() -> None:
    case = Case(3, 32, 16, 4, 9)
    case.experts_P[-1] = next(expert for expert in range(5) if expert not in case.held)
    total = torch.zeros(4, 32)
    assert case.run(SCRATCH, total) is None
    assert not total.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_what_is_not_finite_stays_in_its_row(bad: float) -> None:
    case = Case(2, 32, 16, 5, 15)
    case.rows_P = [pair % 5 for pair in range(15)]
    case.hidden_TH[2] = bad
    got = case.run(SCRATCH)
    assert got is not None
    assert not got[2].isfinite().any()
    others = [0, 1, 3, 4]
    case.hidden_TH[2] = 0.0
    assert torch.allclose(got[others], case.expected()[others], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other",
    [
        {"has_gate": False},
        {"_apply_gate": lambda hidden: F.gelu(hidden.chunk(2, dim=-1)[0]) * hidden.chunk(2, dim=-1)[1]},
        {"_apply_gate": lambda hidden: silu(hidden.clamp(max=7.0))},
        {"_apply_gate": lambda hidden: silu(torch.cat(hidden.chunk(2, dim=-1)[::-1], dim=-1))},
    ],
)
def test_other_experts_are_left_to_others(other: dict[str, Any]) -> None:
    up, down = Weights(torch.randn(2, 64, 64)), Weights(torch.randn(2, 64, 32))
    assert GatedExperts.of(module(), up, down) is not None
    assert GatedExperts.of(module(**other), up, down) is None


def test_weights_that_tiles_cannot_take_are_left_to_others() -> None:
    def taken(up: torch.Tensor, down: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
        return GatedExperts.of(module(), Weights(up, scale), Weights(down)) is not None

    up, down = torch.randn(2, 64, 64), torch.randn(2, 64, 32)
    assert taken(up, down, torch.rand(2, 64))
    assert not taken(torch.randn(2, 24, 64), torch.randn(2, 64, 12))
    assert not taken(up.double(), down)
    assert not taken(up, down.half())
    assert not taken(torch.empty(0, 64, 64), torch.empty(0, 64, 32))
    for bad in (torch.rand(2, 63), torch.rand(1, 64), torch.rand(2, 64).double(), torch.rand(64, 2).T):
        assert not taken(up, down, bad)


def test_threads_beside_each_other_have_memory_of_their_own() -> None:
    """A group in its router's process is probed by another thread than the one that computes."""
    wrong = []

    def work() -> None:
        case = Case(3, 256, 128, 9, 60)
        expected = case.expected()
        for _ in range(200):
            got = case.run(SCRATCH)
            if got is None or not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                wrong.append(got)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


@pytest.mark.parametrize("length", [16, 48])
def test_rows_of_another_length_are_refused_before_anything_is_read(length: int) -> None:
    case = Case(3, 32, 16, 4, 9)
    case.hidden_TH = torch.randn(4, length)
    for total in (None, torch.zeros(4, length), torch.zeros(4, 32)):
        with pytest.raises(ValueError, match="rows: got"):
            case.run(SCRATCH, total)
    case.hidden_TH = torch.randn(4, 32)
    with pytest.raises(ValueError, match="rows: got"):
        case.run(SCRATCH, torch.zeros(4, length))
