"""Rows divided among groups and added again, compiled: what plain loops over pairs say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.kernels.rows import FEW, MANY, Owners, add, can_add, can_divide, divide, divide_into
from cluster.routing.choice import LayerCopies
from cluster.routing.split import add_rows, split


@settings(deadline=None, max_examples=120)
@given(st.data())
def test_each_pair_is_in_its_groups_part_once(data: st.DataObject) -> None:
    tokens, each, experts = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    groups, hidden = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 9))
    owner_E = np.array(data.draw(st.lists(st.integers(-1, groups - 1), min_size=experts, max_size=experts)), np.int64)
    rows_P = np.repeat(np.arange(tokens), each)
    if data.draw(st.booleans()):  # as where a part is sent again
        rows_P = rows_P[np.random.default_rng(data.draw(st.integers(0, 99))).random(len(rows_P)) < 0.6]
    experts_P = np.array(
        data.draw(st.lists(st.integers(0, experts - 1), min_size=len(rows_P), max_size=len(rows_P))), np.int64
    )
    weight_P, hidden_TH = np.random.rand(len(rows_P)).astype(np.float32), torch.randn(tokens, hidden)
    assert can_divide(hidden_TH, groups)
    parts = divide(owner_E, hidden_TH, rows_P, experts_P, weight_P, groups)
    wanted = sorted({int(owner_E[e]) for e in experts_P})
    assert [group for group, *_ in parts] == wanted
    for group, index, rows_TH, pairs_3P in parts:
        mine = [p for p in range(len(rows_P)) if owner_E[experts_P[p]] == group]
        named = sorted({int(rows_P[p]) for p in mine})
        assert (list(range(tokens)) if index is None else index.tolist()) == named
        assert torch.equal(rows_TH, hidden_TH[named])
        assert [named[at] for at in pairs_3P[0]] == [int(rows_P[p]) for p in mine]
        assert pairs_3P[1].tolist() == [int(experts_P[p]) for p in mine]
        assert pairs_3P[2].view(np.float32).tolist() == weight_P[mine].tolist()
        assert pairs_3P.flags.c_contiguous


def test_what_does_not_exist_is_refused() -> None:
    owner_E, hidden_TH, weight_P = np.array([0, 1, 0]), torch.randn(2, 4), np.ones(2, np.float32)
    for owners, rows, experts, groups in (
        (owner_E, [0, 2], [0, 1], 2),
        (owner_E, [-1, 0], [0, 1], 2),
        (owner_E, [1, 0], [0, 1], 2),
        (owner_E, [0, 1], [0, 3], 2),
        (owner_E, [0, 1], [0, -1], 2),
        (owner_E, [0, 1], [0, 1], 1),
        (np.array([0, -2, 0]), [0, 1], [0, 1], 2),
        (owner_E, [0], [0, 1], 2),
    ):
        with pytest.raises(IndexError, match="pairs"):
            divide(owners, hidden_TH, np.array(rows), np.array(experts), weight_P, groups)


@pytest.mark.parametrize("num", [1, 3, 7])
def test_rows_are_added_to_their_own(num: int) -> None:
    total, partial = torch.randn(7, 33), torch.randn(num, 33)
    index = torch.randperm(7)[:num]
    wanted = total.clone().index_add_(0, index, partial)
    assert can_add(total, partial)
    add(total, index, partial)
    assert torch.allclose(total, wanted)
    whole = torch.randn(7, 33)
    add(total, None, whole)
    assert torch.allclose(total, wanted + whole)
    with pytest.raises(ValueError, match="all 7"):
        add(total, None, whole[:6])
    with pytest.raises(ValueError, match="row_index"):
        add(total, index.int(), partial)


def test_many_rows_are_added_too() -> None:
    total, partial, index = torch.randn(FEW // 8, 16), torch.randn(FEW // 12, 16), torch.randperm(FEW // 8)[: FEW // 12]
    wanted = total.clone().index_add_(0, index, partial)
    add_rows(total, index, partial)
    assert torch.allclose(total, wanted)
    whole = torch.randn(FEW // 8, 16)
    add_rows(total, None, whole)
    assert torch.allclose(total, wanted + whole)


def test_large_ones_and_other_dtypes_go_the_other_way() -> None:
    assert not can_divide(torch.randn(2, 4).bfloat16(), 2)
    assert not can_divide(torch.randn(700, 1024), 2)
    assert can_divide(torch.randn(700, 1024), 2, MANY)
    assert not can_divide(torch.randn(1100, 1024), 2, MANY)
    assert not can_divide(torch.randn(2, 4), 9)
    assert not can_add(torch.randn(2, 4), torch.randn(2, 8)[:, ::2])
    rows_P, experts_P = np.repeat(np.arange(6), 2), np.random.default_rng(1).integers(0, 5, 12)
    owner_E, weight_P = np.array([0, 1, 1, 0, 2]), np.random.rand(12).astype(np.float32)
    hidden_TH = torch.randn(6, 8)
    few = split(owner_E, hidden_TH, rows_P, experts_P, weight_P, 2)
    many = split(owner_E, hidden_TH.double(), rows_P, experts_P, weight_P, 2)
    for a, b in zip(few, many, strict=True):
        assert a.group == b.group
        assert torch.equal(a.rows.hidden_TH.double(), b.rows.hidden_TH)
        assert np.array_equal(a.rows.pairs_3P, b.rows.pairs_3P)
        assert (a.row_index is None) == (b.row_index is None)
    total = torch.zeros(6, 8, dtype=torch.float64)
    add_rows(total, torch.tensor([1, 4]), torch.ones(2, 8, dtype=torch.float64))
    assert total.sum() == 16


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_of_two_copies_the_same_is_chosen_as_by_the_plain_loop(data: st.DataObject) -> None:
    groups, experts, tokens = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 16)), data.draw(st.integers(1, 6))
    holders = st.lists(st.integers(0, groups - 1), min_size=1, max_size=2, unique=True)
    copies = LayerCopies([data.draw(holders) for _ in range(experts)])
    each = data.draw(st.integers(1, experts))
    index_TK = torch.stack([torch.randperm(experts)[:each] for _ in range(tokens)])
    experts_P, rows_P = index_TK.reshape(-1).numpy(), np.repeat(np.arange(tokens), each)
    owner_E = copies.choose(experts_P, True, {})
    assert copies.second_E is not None
    hidden_TH, weight_TK = torch.randn(tokens, 3), torch.rand(tokens, each)
    memory = [
        (torch.zeros(tokens, dtype=torch.int64), torch.zeros(tokens, 3), np.zeros(3 * tokens * each, np.int32))
        for _ in range(groups + 1)
    ]
    where = [at for index, rows, named in memory for at in (index.data_ptr(), rows.data_ptr(), named.ctypes.data)]
    pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
    shares = divide_into(Owners(copies.owner_E, copies.second_E), hidden_TH, pairs_at, len(rows_P), where)
    for group in range(groups):
        pairs, rows, names = shares[group + 1]
        mine = experts_P[owner_E[experts_P] == group]
        assert (pairs, names) == (len(mine), len(set(mine.tolist())))
        assert rows == len({int(row) for row, e in zip(rows_P, experts_P, strict=True) if owner_E[e] == group})
        assert memory[group + 1][2][pairs : 2 * pairs].tolist() == mine.tolist()
    assert shares[0] == (0, 0, 0)


def test_a_group_that_has_no_place_is_an_error_and_nothing_is_written_anywhere() -> None:
    owner_E, index_TK, hidden_TH = np.array([0, 1]), torch.tensor([[1]]), torch.randn(1, 3)
    rows_P, weight_TK = np.zeros(1, np.int64), torch.ones(1, 1)
    pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
    with pytest.raises(IndexError, match="pairs"):
        divide_into(Owners(owner_E, None), hidden_TH, pairs_at, 1, [0] * 9)
