"""Rows divided among groups, and the groups' answers added again: one compiled call instead of a dozen.

A decode step does it in every layer, between two products that leave nothing of the interpreter in the caches; and
torch's own sum by index is a small sum for each row: at 512 rows of 1,024 adding took ten times as long with it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cluster.kernels.team import alone, kept_waiting, team, work_of

FIRST, BAD = 1, 1
"""Where, in what a division finds, the groups' numbers begin; and what it says of arguments that make no sense."""
_COMPILED, _MOST_GROUPS = "rows_compiled", 8
FEW = 64 * 1024
"""Floats up to which rows are divided here: there is room for all of them in each group's part. Where there are more,
others have the interpreter's lock meanwhile."""
MANY = 1024 * 1024
"""Floats up to which an exchange divides them: they go where the group reads them, and that memory is kept."""

Parts = list[tuple[int, torch.Tensor | None, torch.Tensor, Any]]
"""(group, the rows' numbers or None where it has all, the rows [n, H], pairs int32 [3, p] as in a `LayerRows`)."""


@functools.cache
def _compiles() -> bool:
    return team(_COMPILED, "divide") is not None


def can_divide(hidden_TH: torch.Tensor, num_groups: int, most: int = FEW) -> bool:
    """`divide` takes rows like these, or with ``most`` of `MANY` an exchange."""
    few = hidden_TH.numel() <= most and num_groups <= _MOST_GROUPS
    fits = few and hidden_TH.is_cpu and hidden_TH.dtype is torch.float32 and hidden_TH.is_contiguous()
    return fits and _compiles()


def divide(owner_E: Any, hidden_TH: torch.Tensor, rows_P: Any, experts_P: Any, weight_P: Any, num_groups: int) -> Parts:
    """Parts in the order of groups; -1 is nobody's. ``owner_E`` (int64) is the group of each expert, pair p wants
    expert ``experts_P[p]`` (int64) on row ``rows_P[p]`` (int64, ascending) with weight ``weight_P[p]`` (fp32).

    Raises:
        IndexError: a row, an expert or a group does not exist, or rows do not ascend.
    """
    (T, H), P, places = hidden_TH.shape, len(experts_P), num_groups + 1
    if len(rows_P) != P or len(weight_P) != P:
        raise IndexError(f"{P} pairs, {len(rows_P)} rows and {len(weight_P)} weights of them")
    owner_E, rows_P, experts_P = (np.ascontiguousarray(a, np.int64) for a in (owner_E, rows_P, experts_P))
    weight_P = np.ascontiguousarray(weight_P, np.float32)
    into = [
        (torch.empty(T, dtype=torch.int64), torch.empty((T, H), dtype=torch.float32), np.empty(3 * P, np.int32))
        for _ in range(places)
    ]
    where = [at for index, rows, named in into for at in (index.data_ptr(), rows.data_ptr(), named.ctypes.data)]
    pairs_at = rows_P.ctypes.data, experts_P.ctypes.data, weight_P.ctypes.data
    shares = divide_into(Owners(owner_E, None), hidden_TH, pairs_at, P, where)
    parts: Parts = []
    for number, ((index, rows, named), (pairs, count, _)) in enumerate(zip(into, shares, strict=True)):
        if pairs:
            pairs_3P = named[: 3 * pairs].reshape(3, pairs)
            whole = count == T
            parts.append((number - 1, None if whole else index[:count], hidden_TH if whole else rows[:count], pairs_3P))
    return parts


class Owners:
    """The group of each expert (int64 [E], -1: nobody), and perhaps another one that holds it (-1: none). Where there
    are two, the experts that are wanted go one by one to whichever of both has fewer so far."""

    def __init__(self, first_E: Any, second_E: Any) -> None:
        self._kept = first_E, second_E
        self.num_experts = len(first_E)
        self.first_at: int = first_E.ctypes.data
        self.second_at: int = 0 if second_E is None else second_E.ctypes.data


def divide_into(
    owners: Owners,
    hidden_TH: torch.Tensor,
    pairs_at: tuple[int, int, int],
    num_pairs: int,
    where: Sequence[int],
) -> list[tuple[int, int, int]]:
    """As `divide`, from addresses and to addresses: ``pairs_at`` are those of rows, experts and weights of the pairs,
    and ``where`` has three for each group, from -1 on: for its rows' numbers (int64 [T]), its rows (fp32 [T, H]) and
    its pairs (int32 [3, p] of 3 P numbers), 0 where it cannot have any. Pairs, rows and experts of each group, likewise
    from -1 on.

    Raises:
        IndexError: as `divide`, or a group has pairs and no place.
    """
    (T, H), places, E = hidden_TH.shape, len(where) // 3, owners.num_experts
    found = np.empty(FIRST + 5 * places + 2 * E, np.int64)
    found_at: int = found.ctypes.data
    given = (owners.first_at, *pairs_at, E, num_pairs, places - 1, T, hidden_TH.data_ptr(), H)
    run = alone(_COMPILED, "divide")
    run((*given, found_at, owners.second_at, found_at + 8 * (FIRST + 5 * places), *where))
    state, *numbers = found[: FIRST + 3 * places].tolist()
    if state == BAD:
        raise IndexError(f"{num_pairs} pairs on {T} rows, of {E} experts in {places - 1} groups")
    return list(zip(numbers[:places], numbers[places : 2 * places], numbers[2 * places :], strict=True))


def can_add(total_TH: torch.Tensor, partial_TH: torch.Tensor) -> bool:
    """`add` takes rows like these."""
    fits = total_TH.dim() == 2 and total_TH.shape[1:] == partial_TH.shape[1:]
    return (
        fits
        and all(t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() for t in (total_TH, partial_TH))
        and _compiles()
    )


def add(total_TH: torch.Tensor, row_index: torch.Tensor | None, partial_TH: torch.Tensor) -> None:
    """Adds rows to those of ``total_TH`` that they belong to (int64, and such that exist; None: to all)."""
    (T, H), num = total_TH.shape, len(partial_TH)
    if row_index is None:
        if num != T:
            raise ValueError(f"rows: must be all {T}, got {num}")
    elif row_index.dtype is not torch.int64 or len(row_index) != num:
        raise ValueError(f"row_index: must be {num} int64, got {len(row_index)} of {row_index.dtype}")
    index = None if row_index is None else row_index.contiguous()  # it must live as long as the call
    index_at = 0 if index is None else index.data_ptr()
    numbers = total_TH.data_ptr(), T, H, index_at, partial_TH.data_ptr(), num
    if num * H <= FEW:
        alone(_COMPILED, "add")(numbers)
    else:
        kept_waiting(_COMPILED, "add")(work_of(numbers))
