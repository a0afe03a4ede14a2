"""Which copy of an expert a layer call goes to. Pure: arrays, and a loop over the experts that have a choice.

Experts with one copy are where they are. The others go, one by one, to whichever of their groups would be least busy
with them: by tokens when the call is prefill, which computes, and something for each expert; and by experts when it is
decode, which reads each expert's weights once however few tokens it has (the number of activated experts is what
balances it: METRO, Janus arXiv 2512.13525). In prefill the busiest experts choose first (longest processing time first,
R. L. Graham, "Bounds on multiprocessing timing anomalies", SIAM Journal on Applied Mathematics 17(2), 1969).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.core import GroupId

Owners = np.ndarray[Any, np.dtype[np.int64]]

EXPERT_ROWS = 6
"""What reading an expert costs, in rows of it. Measured on one core, 1,024 x 512, fp32: 0.25 ms + 0.042 ms a row."""


class LayerCopies:
    """The living copies of one layer's experts under one table: ``owners[e]`` are the groups of logical expert ``e``.
    ``owner_E`` is the first group of each expert, -1 where there is none; ``complete``: there is one for each."""

    def __init__(self, owners: Sequence[Sequence[GroupId]]) -> None:
        self._owners = owners
        self.owner_E: Owners = np.array([groups[0] if groups else -1 for groups in self._owners], np.int64)
        self.complete = bool((self.owner_E >= 0).all())
        several_E = np.array([len(groups) > 1 for groups in self._owners], bool)
        self.any_choice = bool(several_E.any())
        self._groups = 1 + max((max(groups, default=0) for groups in self._owners), default=0)
        # A place more than there are groups, for experts without one: their load is nobody's.
        self._fixed_E = np.where(several_E, self._groups, np.where(self.owner_E < 0, self._groups, self.owner_E))
        self._several_E = several_E
        self._all_several = bool(several_E.all())
        self._second_E = np.array([groups[1] if len(groups) > 1 else -1 for groups in self._owners], np.int64)
        self._pairs_only = max((len(groups) for groups in self._owners), default=0) <= 2
        self.groups = tuple(sorted({group for groups in self._owners for group in groups}))
        """That hold any."""
        self.second_E = self._second_E if self._pairs_only else None
        """The second group of each expert, -1 where there is none; None where one has more."""

    def choose(
        self,
        experts_P: Owners,
        decode: bool,
        cost: Mapping[GroupId, float],
        handicaps: Mapping[GroupId, float] | None = None,
    ) -> Owners:
        """The group of each expert that some pair names, int64 [E]; what it says of others means nothing.

        ``cost`` is what a token, or an expert, costs a group relative to the others; 1 for those that it leaves out.
        ``handicaps`` are experts' worth of time that a decode call to a group takes beside them.
        """
        if not self.any_choice:
            return self.owner_E
        counts_E = np.bincount(experts_P, minlength=len(self.owner_E))
        free_F = counts_E.nonzero()[0]
        busy: list[float] = [0.0] * (self._groups + 1)
        if not self._all_several:
            several_A = self._several_E[free_F]
            fixed_A = free_F[~several_A]
            sizes_A = None if decode else counts_E[fixed_A] + EXPERT_ROWS
            busy = np.bincount(self._fixed_E[fixed_A], sizes_A, self._groups + 1).tolist()
            free_F = free_F[several_A]
        price = [1.0] * (self._groups + 1)
        for group, factor in cost.items():
            if group < self._groups:
                price[group] = factor
                busy[group] *= factor
        for group, extra in handicaps.items() if decode and handicaps else ():
            if group < self._groups:
                busy[group] += extra
        if not decode:
            free_F = free_F[np.argsort(counts_E[free_F])[::-1]]
        sizes = [1] * free_F.size if decode else (counts_E[free_F] + EXPERT_ROWS).tolist()
        if not self._pairs_only:
            chosen = self._among_many(free_F.tolist(), sizes, busy, price)
        else:
            firsts, seconds = self.owner_E[free_F].tolist(), self._second_E[free_F].tolist()
            if decode and not cost:
                chosen = _evenly(firsts, seconds, busy)
            else:
                chosen = _among_two(firsts, seconds, sizes, busy, price)
        owner_E = self.owner_E.copy()
        owner_E[free_F] = chosen
        return owner_E

    def _among_many(self, free: list[int], sizes: list[int], busy: list[float], price: list[float]) -> list[GroupId]:
        owners, chosen = self._owners, []
        for expert, size in zip(free, sizes, strict=True):
            best, least = -1, float("inf")
            for group in owners[expert]:
                then = busy[group] + size * price[group]
                if then < least:
                    best, least = group, then
            busy[best] = least
            chosen.append(best)
        return chosen


# With two copies each, as a plan for the death of one host has, these loops are what a decode step pays in each layer.


def _evenly(firsts: list[int], seconds: list[int], busy: list[float]) -> list[GroupId]:
    """As `_among_two` where all groups are as fast and all sizes 1."""
    chosen: list[GroupId] = []
    choose = chosen.append
    for group, second in zip(firsts, seconds, strict=True):
        if busy[second] < busy[group]:
            group = second
        busy[group] += 1.0
        choose(group)
    return chosen


def _among_two(
    firsts: list[int], seconds: list[int], sizes: list[int], busy: list[float], price: list[float]
) -> list[GroupId]:
    chosen = []
    for first, second, size in zip(firsts, seconds, sizes, strict=True):
        here, there = busy[first] + size * price[first], busy[second] + size * price[second]
        if here <= there:
            busy[first] = here
            chosen.append(first)
        else:
            busy[second] = there
            chosen.append(second)
    return chosen
