"""Our plan: any one host may die. Copies on different hosts first, then where the load is, with few moves.

1. *Copies.* Every expert gets a second copy, the busiest first where there is not room for all; what is left goes to
   whoever has most load a copy. Counts that are there already change only for a clear gain.
2. *Places.* Copies that are there and still wanted stay. Others go, heaviest first, to the least busy group with room
   on a host that has fewest copies of the expert.
3. *Exchange.* As long as it helps clearly, the busiest group exchanges a copy with one of the least busy ones, never
   bringing two copies of an expert to one host that were on two.

A plan that would not be clearly better than the one that is there is not made. All layers are planned at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.errors import InvalidArgument
from cluster.placement.shape import Loads, Shape, Slots, count_copies, slot_loads

MAX_EXCHANGES = 64
_LIGHTEST = 4
"""Groups that the busiest one may exchange with."""
_EVEN = 0.002
"""A busiest group that is busier than the average one by no more than this is left as it is."""
_SAME_HOST, _SAME_GROUP = 1e6, 1e12
"""More than any load (loads are scaled to a mean of 1 a group)."""


@dataclass(frozen=True, slots=True)
class Hysteresis:
    """What a change must be worth, where there is a plan already: a copy more for an expert, in load a copy over that
    of who gives it up; an exchange, in loads of an average group; and all of it, in balancedness.

    ``doubt``: how much of a load's distance from the mean is taken for chance (as in shrinkage estimators, James and
    Stein 1961). A window is a sample, and what was far from the mean in one is nearer to it in the next. Figures of the
    embedded model's windows chose all four; plans of any window alone want them lower, those for the next one higher.
    """

    copy: float = 0.4
    exchange: float = 0.02
    plan: float = 0.04
    doubt: float = 0.3


def survivable(
    loads_LE: Loads, shape: Shape, current_LS: Slots | None = None, hysteresis: Hysteresis | None = None
) -> Slots:
    """The expert of each slot, [L, S]: on two hosts at least where slots and hosts permit.

    Raises:
        InvalidArgument: the current plan has another shape.
    """
    hysteresis = hysteresis or Hysteresis()
    if current_LS is not None and current_LS.shape != (len(loads_LE), shape.slots):
        raise InvalidArgument(
            "--current", current_LS.shape, f"must be of {len(loads_LE)} layers with {shape.slots} slots"
        )
    # Only proportions matter; what nobody asks for counts as a little, so that its copies are spread too.
    mean_L1 = loads_LE.mean(-1, keepdims=True)
    counted_LE = loads_LE
    if current_LS is not None:
        loads_LE = counted_LE + hysteresis.doubt * (mean_L1 - counted_LE)
    scaled_LE = (loads_LE + 1e-3 * mean_L1 + 1e-9) / (mean_L1 + 1e-9) * (shape.groups / loads_LE.shape[1])
    table = _Table(scaled_LE, shape)
    if current_LS is None:
        table.copies_LE = _copies(scaled_LE, shape)
    else:
        table.copies_LE = _kept_copies(scaled_LE, shape, count_copies(current_LS, shape.experts), hysteresis.copy)
        table.keep(current_LS)
    table.fill()
    table.repair()
    table.exchange(0.0 if current_LS is None else hysteresis.exchange)
    if current_LS is None:
        return table.slots_LS
    return _only_if_worth_it((counted_LE + 1e-9, scaled_LE), shape, current_LS, table.slots_LS, hysteresis.plan)


def _only_if_worth_it(judges: tuple[Loads, ...], shape: Shape, current_LS: Slots, new_LS: Slots, least: float) -> Slots:
    """The new plan's layers that are clearly better balanced in the eyes of every judge, or safer; the others stay as
    they are."""
    gains = [_balancedness(each, shape, new_LS) - _balancedness(each, shape, current_LS) for each in judges]
    gain_L, loads_LE = np.min(gains, axis=0), judges[-1]
    before_L, after_L = _lonely(loads_LE, shape, current_LS), _lonely(loads_LE, shape, new_LS)
    safer_L = (after_L < before_L - least * loads_LE.sum(-1)) | ((after_L == 0) & (before_L > 0))
    lacks_L = (count_copies(current_LS, loads_LE.shape[1]) == 0).any(-1)
    return np.where(((gain_L > least) | safer_L | lacks_L)[:, None], new_LS, current_LS)


def _balancedness(loads_LE: Loads, shape: Shape, slots_LS: Slots) -> Any:
    group_LG = slot_loads(loads_LE, slots_LS).reshape(len(slots_LS), shape.groups, -1).sum(-1)
    return group_LG.mean(-1) / group_LG.max(-1)


def _lonely(loads_LE: Loads, shape: Shape, slots_LS: Slots) -> Any:
    """Load of experts whose copies are all on one host, by layer."""
    hosts_LEH = np.zeros((*loads_LE.shape, shape.hosts), bool)
    host_S = shape.host_of_group()[shape.group_of_slot()]
    layer_X, slot_X = np.nonzero(slots_LS >= 0)
    hosts_LEH[layer_X, slots_LS[layer_X, slot_X], host_S[slot_X]] = True
    return np.where(hosts_LEH.sum(-1) < min(2, shape.hosts), loads_LE, 0.0).sum(-1)


def _least_copies(loads_LE: Loads, shape: Shape, bonus_LE: Any = 1.0) -> Slots:
    """One copy each, and a second one as far as there are slots, the busiest first."""
    layers, experts = loads_LE.shape
    copies_LE = np.ones((layers, experts), np.int64)
    if shape.hosts > 1:
        order = np.argsort(-(loads_LE * bonus_LE), axis=-1, kind="stable")[:, : shape.slots - experts]
        np.put_along_axis(copies_LE, order, 2, -1)
    return copies_LE


def _copies(loads_LE: Loads, shape: Shape) -> Slots:
    copies_LE = _least_copies(loads_LE, shape)
    return _spread(loads_LE, shape, copies_LE, shape.slots - int(copies_LE[0].sum()))


def _spread(loads_LE: Loads, shape: Shape, copies_LE: Slots, spare: int) -> Slots:
    """One more copy at a time for whoever has most load a copy. No expert twice in a group, so not more than groups;
    where even that leaves slots over, they get copies that help nobody."""
    every = np.arange(len(loads_LE))
    for _ in range(spare):
        each_LE = np.where(copies_LE < shape.groups, loads_LE / copies_LE, -copies_LE)
        copies_LE[every, each_LE.argmax(-1)] += 1
    return copies_LE


def _kept_copies(loads_LE: Loads, shape: Shape, now_LE: Slots, least: float) -> Slots:
    """Counts of before, changed where second copies have to be elsewhere or a copy is worth clearly more elsewhere."""
    every = np.arange(len(loads_LE))
    floor_LE = _least_copies(loads_LE, shape, np.where(now_LE > 1, 1.0 + least, 1.0))
    copies_LE = np.maximum(now_LE, floor_LE)
    for _ in range(int((copies_LE.sum(-1) - shape.slots).max())):  # too many now: those go that are missed least
        left_LE = np.where(copies_LE > floor_LE, loads_LE / np.maximum(copies_LE - 1, 1), np.inf)
        copies_LE[every, left_LE.argmin(-1)] -= copies_LE.sum(-1) > shape.slots
    for _ in range(int((shape.slots - copies_LE.sum(-1)).max())):
        each_LE = np.where(copies_LE < shape.groups, loads_LE / copies_LE, -copies_LE)
        copies_LE[every, each_LE.argmax(-1)] += copies_LE.sum(-1) < shape.slots
    for _ in range(shape.slots):
        left_LE = np.where(copies_LE > floor_LE, loads_LE / np.maximum(copies_LE - 1, 1), np.inf)
        each_LE = np.where(copies_LE < shape.groups, loads_LE / copies_LE, -1.0)
        giver, taker = left_LE.argmin(-1), each_LE.argmax(-1)
        worth = each_LE[every, taker] > (1.0 + least) * left_LE[every, giver]
        if not worth.any():
            break
        copies_LE[every, giver] -= worth
        copies_LE[every, taker] += worth
    return copies_LE


class _Table:
    """Copies in slots, while a plan is made. -1 is an empty slot."""

    def __init__(self, loads_LE: Loads, shape: Shape) -> None:
        layers = len(loads_LE)
        self._loads_LE, self._shape = loads_LE, shape
        self._every = np.arange(layers)
        self._group_S, self._host_G = shape.group_of_slot(), shape.host_of_group()
        self._host_S = self._host_G[self._group_S]
        self.copies_LE = np.ones(loads_LE.shape, np.int64)
        self.slots_LS: Slots = np.full((layers, shape.slots), -1, np.int64)
        self._in_group_LEG = np.zeros((*loads_LE.shape, shape.groups), np.int32)
        self._on_host_LEH = np.zeros((*loads_LE.shape, shape.hosts), np.int32)
        self._used_LG = np.zeros((layers, shape.groups), np.int64)

    def _each(self, layer: Any, expert: Any) -> Any:
        return self._loads_LE[layer, expert] / self.copies_LE[layer, expert]

    def _put(self, layer: int, slot: int, expert: int) -> None:
        """Fills a slot, or empties it (-1)."""
        for number, change in ((int(self.slots_LS[layer, slot]), -1), (expert, 1)):
            if number >= 0:
                self._in_group_LEG[layer, number, self._group_S[slot]] += change
                self._on_host_LEH[layer, number, self._host_S[slot]] += change
                self._used_LG[layer, self._group_S[slot]] += change
        self.slots_LS[layer, slot] = expert

    def _group_loads(self) -> Any:
        each_LS = np.where(self.slots_LS >= 0, self._each(self._every[:, None], self.slots_LS), 0.0)
        return each_LS.reshape(len(self._every), self._shape.groups, -1).sum(-1)

    # -- what is there -------------------------------------------------------------------------------------------------

    def keep(self, current_LS: Slots) -> None:
        """Takes over a plan, less the copies that are too many: those first that share a group or a host with another
        copy, then those in the busiest groups."""
        self.slots_LS = current_LS.copy()
        layer_X, slot_X = np.nonzero(current_LS >= 0)
        expert_X = current_LS[layer_X, slot_X]
        np.add.at(self._in_group_LEG, (layer_X, expert_X, self._group_S[slot_X]), 1)
        np.add.at(self._on_host_LEH, (layer_X, expert_X, self._host_S[slot_X]), 1)
        np.add.at(self._used_LG, (layer_X, self._group_S[slot_X]), 1)
        loads_LG = self._group_loads()
        surplus_LE = count_copies(current_LS, self._shape.experts) - self.copies_LE
        for layer, expert in zip(*(found.tolist() for found in np.nonzero(surplus_LE > 0)), strict=True):
            for _ in range(int(surplus_LE[layer, expert])):
                slots = np.flatnonzero(self.slots_LS[layer] == expert)
                groups, hosts = self._group_S[slots], self._host_S[slots]
                cost = (
                    _SAME_GROUP * (self._in_group_LEG[layer, expert, groups] > 1)
                    + _SAME_HOST * (self._on_host_LEH[layer, expert, hosts] > 1)
                    + loads_LG[layer, groups]
                )
                self._put(layer, int(slots[cost.argmax()]), -1)

    # -- what is missing -----------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Puts the missing copies into empty slots."""
        missing_LE = self.copies_LE - self._in_group_LEG.sum(-1)
        most = int(missing_LE.sum(-1).max())
        if not most:
            return
        layers, experts = self._loads_LE.shape
        shape = self._shape
        each_LE = self._each(self._every[:, None], np.arange(experts)[None, :])
        # Each expert as often as it is missing, heaviest copies first; -1 where a layer has nothing more to place.
        order_LE = np.argsort(-each_LE, axis=-1, kind="stable")
        todo_LM = np.full((layers, most), -1, np.int64)
        for layer in range(layers):
            todo = np.repeat(order_LE[layer], missing_LE[layer, order_LE[layer]])
            todo_LM[layer, : len(todo)] = todo
        fresh = not self._used_LG.any()
        loads_LG = self._group_loads()
        loads_LG[self._used_LG >= shape.slots_each] = np.inf
        copied_LE = self.copies_LE > 1
        for expert_L in todo_LM.T:
            live = self._every if fresh else np.flatnonzero(expert_L >= 0)
            experts_X = expert_L[live]
            cost_XG = loads_LG if fresh else loads_LG[live]
            several = np.flatnonzero(copied_LE[live, experts_X])
            if several.size:
                cost_XG = cost_XG.copy()
                whose = live[several], experts_X[several]
                cost_XG[several] += _SAME_HOST * self._on_host_LEH[whose][:, self._host_G]
                cost_XG[several] += _SAME_GROUP * self._in_group_LEG[whose]
            group_X = cost_XG.argmin(-1)
            if fresh:  # groups are filled from their first slot on
                slot_X = group_X * shape.slots_each + self._used_LG[live, group_X]
            else:
                own_XK = group_X[:, None] * shape.slots_each + np.arange(shape.slots_each)
                slot_X = own_XK[np.arange(len(live)), (self.slots_LS[live[:, None], own_XK] < 0).argmax(-1)]
            self.slots_LS[live, slot_X] = experts_X
            self._in_group_LEG[live, experts_X, group_X] += 1
            self._on_host_LEH[live, experts_X, self._host_G[group_X]] += 1
            used_X = self._used_LG[live, group_X] + 1
            self._used_LG[live, group_X] = used_X
            loads_LG[live, group_X] += np.where(used_X == shape.slots_each, np.inf, each_LE[live, experts_X])

    def repair(self) -> None:
        """Parts copies that found no better place than beside one of their own, by exchanges with whoever fits."""
        most_L1 = np.minimum(self.copies_LE, self._shape.hosts)
        spread_LE = (self._on_host_LEH > 0).sum(-1)
        apart_LE = (self._in_group_LEG > 0).sum(-1)
        wrong_LE = (spread_LE < most_L1) | (apart_LE < np.minimum(self.copies_LE, self._shape.groups))
        for layer, expert in zip(*(found.tolist() for found in np.nonzero(wrong_LE)), strict=True):
            self._part(layer, expert)

    def _part(self, layer: int, expert: int) -> None:
        for slot in np.flatnonzero(self.slots_LS[layer] == expert).tolist():
            group, host = self._group_S[slot], self._host_S[slot]
            alone_in_group = self._in_group_LEG[layer, expert, group] == 1
            alone_on_host = self._on_host_LEH[layer, expert, host] == 1
            if alone_in_group and alone_on_host:
                continue
            others = self.slots_LS[layer]
            here = self._in_group_LEG[layer, :, group] > 0
            on_host = self._on_host_LEH[layer]
            same_host = self._host_S == host
            fits = (self._in_group_LEG[layer, expert, self._group_S] == 0) & ~here[others] & (others != expert)
            # The other one must not lose a host by it, nor may this one go where it has been already.
            keeps = (on_host[others, host] == 0) | (on_host[others, self._host_S] > 1)
            fits &= same_host | (keeps & (on_host[expert, self._host_S] == 0))
            if alone_in_group:
                fits &= ~same_host
            if fits.any():
                each_S = self._each(layer, others)
                far_S = np.where(fits, np.abs(each_S - each_S[slot]), np.inf)
                partner = int(far_S.argmin())
                self._swap(layer, slot, partner)

    def _swap(self, layer: int, slot: int, other: int) -> None:
        mine, theirs = int(self.slots_LS[layer, slot]), int(self.slots_LS[layer, other])
        self._put(layer, slot, theirs)
        self._put(layer, other, mine)

    def _swap_all(self, layers_X: Any, slot_X: Any, other_X: Any) -> None:
        """An exchange in each of some layers."""
        mine_X, theirs_X = self.slots_LS[layers_X, slot_X], self.slots_LS[layers_X, other_X]
        for expert_X, from_X, to_X in ((mine_X, slot_X, other_X), (theirs_X, other_X, slot_X)):
            self._in_group_LEG[layers_X, expert_X, self._group_S[from_X]] -= 1
            self._in_group_LEG[layers_X, expert_X, self._group_S[to_X]] += 1
            self._on_host_LEH[layers_X, expert_X, self._host_S[from_X]] -= 1
            self._on_host_LEH[layers_X, expert_X, self._host_S[to_X]] += 1
            self.slots_LS[layers_X, to_X] = expert_X

    # -- exchange ------------------------------------------------------------------------------------------------------

    def exchange(self, least: float) -> None:
        """Exchanges between the busiest group of each layer and the least busy ones, as long as the busiest one gets
        lighter by more than ``least``, and nobody as heavy as it was."""
        shape = self._shape
        each_k = np.arange(shape.slots_each)
        loads_LG = self._group_loads()
        live = self._every
        for _ in range(MAX_EXCHANGES):
            if shape.groups < 2 or not live.size:
                return
            loads_XG = loads_LG[live]
            rows = np.arange(live.size)[:, None]
            busiest_X = loads_XG.argmax(-1)
            count = min(_LIGHTEST, shape.groups - 1)
            light_XD = np.argpartition(loads_XG, count - 1, axis=-1)[:, :count]
            mine_XK = busiest_X[:, None] * shape.slots_each + each_k
            other_XM = (light_XD[:, :, None] * shape.slots_each + each_k).reshape(live.size, -1)
            x_XK, y_XM = self.slots_LS[live[:, None], mine_XK], self.slots_LS[live[:, None], other_XM]
            delta_XKM = self._each(live[:, None], x_XK)[:, :, None] - self._each(live[:, None], y_XM)[:, None, :]
            group_XM = self._group_S[other_XM]
            top_X = loads_XG[rows[:, 0], busiest_X]
            new_XKM = np.maximum(top_X[:, None, None] - delta_XKM, loads_XG[rows, group_XM][:, None, :] + delta_XKM)
            new_XKM[~self._may_swap(live, busiest_X, x_XK, y_XM, group_XM)] = np.inf
            flat_XN = new_XKM.reshape(live.size, -1)
            best_X = flat_XN.argmin(-1)
            good_X = flat_XN[rows[:, 0], best_X] < top_X - max(least, 1e-9)
            good = np.flatnonzero(good_X)
            mine, other = np.divmod(best_X[good], y_XM.shape[1])
            live = live[good]
            self._swap_all(live, mine_XK[good, mine], other_XM[good, other])
            delta = delta_XKM[good, mine, other]
            loads_LG[live, busiest_X[good]] -= delta
            loads_LG[live, group_XM[good, other]] += delta
            live = live[loads_LG[live].max(-1) > (1.0 + _EVEN) * loads_LG[live].mean(-1)]

    def _may_swap(self, live: Any, busiest_X: Any, x_XK: Any, y_XM: Any, group_XM: Any) -> Any:
        """Whether x may go to the group of y and y to the busiest group, [X, K, M]."""
        at = live[:, None, None]
        host_XM, home_X = self._host_G[group_XM], self._host_G[busiest_X]
        goes = self._in_group_LEG[at, x_XK[:, :, None], group_XM[:, None, :]] == 0
        comes = self._in_group_LEG[live[:, None], y_XM, busiest_X[:, None]] == 0
        same_host = host_XM == home_X[:, None]
        # Nobody may lose a host by it.
        crowd_XK = self._on_host_LEH[live[:, None], x_XK, home_X[:, None]] > 1
        new_there = self._on_host_LEH[at, x_XK[:, :, None], host_XM[:, None, :]] == 0
        goes &= same_host[:, None, :] | new_there | crowd_XK[:, :, None]
        crowd_XM = self._on_host_LEH[live[:, None], y_XM, host_XM] > 1
        comes &= same_host | crowd_XM | (self._on_host_LEH[live[:, None], y_XM, home_X[:, None]] == 0)
        return goes & comes[:, None, :]
