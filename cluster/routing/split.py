"""Splits one layer's tokens by group, and adds the groups' rows together again. Pure array work."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.core import GroupId, LayerCall
from cluster.errors import ExpertMeshError
from cluster.kernels.rows import FEW, add, can_add, can_divide, divide
from cluster.transport.base import LayerRows, PendingReply, Transport
from cluster.transport.codec import max_rows

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(slots=True)
class Part:
    """One group's share of a layer: rows of the layer's batch (None: all of them), and pairs that index into these."""

    group: GroupId
    row_index: torch.Tensor | None
    rows: LayerRows
    link: Transport | None = None
    pending: PendingReply | None = None
    error: ExpertMeshError | None = None
    covered: bool = False
    """When it was sent, all its experts had another copy that answers."""
    failed: str = ""
    """Why the call was sent again."""
    num_experts: int = 0
    """That its pairs name; 0 where nobody has counted."""
    call: LayerCall | None = None
    """Where its link has been told of it already: its rows are memory of this link then, and another call's once this
    one has been answered or cancelled."""

    def count_experts(self) -> int:
        """That its pairs name."""
        return self.num_experts or int(np.count_nonzero(np.bincount(self.rows.pairs_3P[1])))

    def keep_rows(self) -> None:
        """Makes the rows the part's own. To be called before its call is cancelled, if they are wanted afterwards."""
        if self.call is not None:
            self.rows = LayerRows(self.rows.hidden_TH.clone(), self.rows.pairs_3P.copy())
            self.call = None


def split(
    owner_E: Ints,
    hidden_TH: torch.Tensor,
    rows_P: Ints,
    experts_P: Ints,
    weight_P: Floats,
    experts_per_token: int,
) -> list[Part]:
    """Parts in group order; a part of group -1 has no living copy. ``owner_E`` is the group of each logical expert,
    and pair p wants expert ``experts_P[p]`` on row ``rows_P[p]``; ``rows_P`` ascends."""
    owner_P = owner_E[experts_P]
    limit = max_rows(hidden_TH.shape[1], experts_per_token)
    parts = []
    if owner_P.size:
        num_rows, group = hidden_TH.shape[0], int(owner_P[0])
        # One group for everything, as where groups live in this process: nothing to sort out.
        whole = num_rows <= limit and rows_P.size == num_rows * experts_per_token
        if whole and bool((owner_P == group).all()):
            return [Part(group, None, LayerRows.of(hidden_TH, rows_P, experts_P, weight_P))]
    num_groups = int(owner_E.max(initial=-1)) + 1
    if hidden_TH.shape[0] <= limit and can_divide(hidden_TH, num_groups):
        divided = divide(owner_E, hidden_TH, rows_P, experts_P, weight_P, num_groups)
        return [Part(group, index, LayerRows(rows_TH, pairs_3P)) for group, index, rows_TH, pairs_3P in divided]
    for group, pairs in _by_value(owner_P):
        row_P = rows_P[pairs]
        starts = np.ones(row_P.size, dtype=bool)
        np.not_equal(row_P[1:], row_P[:-1], out=starts[1:])
        row_index, pair_row = row_P[starts], np.cumsum(starts) - 1
        for first in range(0, row_index.size, limit):
            chunk, inside = row_index[first : first + limit], slice(None)
            if row_index.size > limit:
                inside = slice(*np.searchsorted(pair_row, (first, first + limit)))
            index = torch.from_numpy(chunk) if chunk.size != hidden_TH.shape[0] else None
            chosen = pairs[inside]
            rows = LayerRows.of(
                hidden_TH if index is None else hidden_TH[index],
                pair_row[inside] - first,
                experts_P[chosen],
                weight_P[chosen],
            )
            parts.append(Part(group, index, rows))
    return parts


def _by_value(values_P: Ints) -> Iterator[tuple[int, Ints]]:
    """Each value that occurs, ascending, with the indices where it does, ascending."""
    if not values_P.size:
        return
    order_P = np.argsort(values_P, kind="stable")
    sorted_P = values_P[order_P]
    edges = [0, *(np.flatnonzero(sorted_P[1:] != sorted_P[:-1]) + 1).tolist(), sorted_P.size]
    for first, last in itertools.pairwise(edges):
        yield int(sorted_P[first]), order_P[first:last]


def add_rows(total_TH: torch.Tensor, row_index: torch.Tensor | None, partial_TH: torch.Tensor) -> None:
    """Adds rows to the rows of ``total_TH`` that they belong to (None: all)."""
    partial_TH = partial_TH.to(total_TH.device)
    # A sum of all rows is torch's best, with all threads; one by index its worst.
    if can_add(total_TH, partial_TH) and (row_index is not None or total_TH.numel() <= FEW):
        add(total_TH, row_index, partial_TH)
    elif row_index is None:
        total_TH.add_(partial_TH)
    else:
        total_TH.index_add_(0, row_index.to(total_TH.device), partial_TH)
