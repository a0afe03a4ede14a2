"""EPLB's plan: copies for the busiest experts, then packed so that groups are about equally busy.

The algorithm is that of DeepSeek's Expert Parallelism Load Balancer (github.com/deepseek-ai/EPLB, described in the
DeepSeek-V3 technical report, arXiv 2412.19437), written anew for all layers at once. It knows neither where experts are
now nor which copies share a host: `cluster.placement.survivable` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cluster.errors import InvalidArgument
from cluster.placement.shape import Loads, Shape, Slots


def balanced(loads_LE: Loads, shape: Shape, expert_groups: int = 1) -> Slots:
    """The expert of each slot, [L, S].

    Where the hosts divide ``expert_groups`` (a model's own groups of consecutive experts, of which a token chooses
    some), each group's experts and all their copies stay on one host; otherwise hosts do not matter.

    Raises:
        InvalidArgument: ``expert_groups`` does not divide the experts.
    """
    experts = loads_LE.shape[1]
    if expert_groups < 1 or experts % expert_groups:
        raise InvalidArgument("--expert-groups", expert_groups, f"must divide the {experts} experts of a layer")
    if expert_groups % shape.hosts == 0:
        return _hierarchical(loads_LE, shape, expert_groups, shape.hosts)
    return _hierarchical(loads_LE, shape, 1, 1)


def _hierarchical(loads_LE: Loads, shape: Shape, expert_groups: int, nodes: int) -> Slots:
    layers, experts = loads_LE.shape
    size = experts // expert_groups
    # Groups of experts to nodes.
    group_loads = loads_LE.reshape(layers, expert_groups, size).sum(-1)
    node, rank = pack(group_loads, nodes)
    first = (node * (expert_groups // nodes) + rank) * size
    place_LE = (first[:, :, None] + np.arange(size)).reshape(layers, experts)
    expert_at = _inverse(place_LE)
    # Copies within each node.
    by_node = np.take_along_axis(loads_LE, expert_at, -1).reshape(layers * nodes, experts // nodes)
    copy_of, copies = replicate(by_node, shape.slots // nodes)
    # Copies to the node's groups.
    each = np.take_along_axis(by_node / copies, copy_of, -1)
    group, rank = pack(each, shape.groups // nodes)
    copy_at = _inverse(group * shape.slots_each + rank)
    in_node = np.take_along_axis(copy_of, copy_at, -1).reshape(layers, nodes, -1)
    in_layer = in_node + (np.arange(nodes) * (experts // nodes))[None, :, None]
    slots_LS: Slots = np.take_along_axis(expert_at, in_layer.reshape(layers, -1), -1)
    return slots_LS


def pack(weights_XN: Loads, packs: int) -> tuple[Slots, Slots]:
    """The pack of each item and its place there, both [X, N]: heaviest first, into the lightest pack with room. All
    packs get equally many."""
    rows, count = weights_XN.shape
    room = count // packs
    if room == 1:
        return np.tile(np.arange(count), (rows, 1)), np.zeros((rows, count), np.int64)
    every = np.arange(rows)
    order = np.argsort(-weights_XN, axis=-1, kind="stable")
    pack_of, rank_of = np.empty((rows, count), np.int64), np.empty((rows, count), np.int64)
    weight, used = np.zeros((rows, packs)), np.zeros((rows, packs), np.int64)
    for item in order.T:
        chosen = weight.argmin(-1)  # full ones weigh infinitely much
        pack_of[every, item] = chosen
        rank_of[every, item] = used[every, chosen]
        used[every, chosen] += 1
        weight[every, chosen] += weights_XN[every, item]
        weight[every, chosen] = np.where(used[every, chosen] == room, np.inf, weight[every, chosen])
    return pack_of, rank_of


def replicate(weights_XN: Loads, slots: int) -> tuple[Slots, Slots]:
    """The item of each copy, [X, slots], and the copies of each item, [X, N]: one more always goes to the item with
    the most weight a copy."""
    rows, count = weights_XN.shape
    every = np.arange(rows)
    copies = np.ones((rows, count), np.int64)
    copy_of = np.empty((rows, slots), np.int64)
    copy_of[:, :count] = np.arange(count)
    each = weights_XN.astype(float).copy()
    for slot in range(count, slots):
        busiest = each.argmax(-1)
        copy_of[:, slot] = busiest
        copies[every, busiest] += 1
        each[every, busiest] = weights_XN[every, busiest] / copies[every, busiest]
    return copy_of, copies


def _inverse(permutation_XN: Any) -> Slots:
    inverse: Slots = np.empty_like(permutation_XN)
    np.put_along_axis(inverse, permutation_XN, np.arange(permutation_XN.shape[1])[None, :], -1)
    return inverse
