"""A decode step's rows written straight into the memory of the links that carry them, by one compiled call.

What `cluster.routing.split` and a link's own copy do one after the other, and for each group anew, is done at once
where all groups of a layer are reached over shared memory: a step does it once a layer, and nothing of the interpreter
is in the caches then. Between two copies the call chooses itself, unless a group is known to be slower than another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cluster.core import GroupId, LayerCall
from cluster.kernels.rows import Owners, can_divide, divide_into
from cluster.routing.choice import LayerCopies
from cluster.routing.fabric import Fabric
from cluster.routing.speeds import Speeds
from cluster.routing.split import Ints, Part
from cluster.transport.base import Room, Transport

ROOMY = frozenset({"shm"})
"""Links that have memory for what is sent."""


@dataclass(slots=True)
class _Place:
    """A group that may get some of the rows: the call that its link has been told of, and where its payload goes."""

    link: Transport
    call: LayerCall
    room: Room


def place(
    fabric: Fabric,
    speeds: Speeds,
    layer: int,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows_P: Ints,
    decode: bool,
    new_call: Callable[[], LayerCall],
) -> list[Part] | None:
    """Parts in group order, as `split` makes them, that have their links and calls; None, and nothing done, where it
    cannot be done. ``rows`` are hidden [T, H], index [T, K] and weight [T, K]; ``rows_P`` is the row of each pair."""
    hidden_TH, index_TK, weight_TK = rows
    copies = fabric.copies(layer)
    num_groups = 1 + copies.groups[-1] if copies.groups else 0
    if not (copies.complete and num_groups and can_divide(hidden_TH, num_groups)):
        return None
    if index_TK.dtype is not torch.int64 or weight_TK.dtype is not torch.float32:
        return None
    if not (index_TK.is_cpu and weight_TK.is_cpu and index_TK.is_contiguous() and weight_TK.is_contiguous()):
        return None
    places = _places(fabric, copies.groups, hidden_TH, len(rows_P), new_call)
    if places is None:
        return None
    try:
        owners = _owners(copies, speeds, index_TK, decode)
        return _fill(places, owners, num_groups, rows, rows_P)
    except BaseException:
        _leave(places)
        raise


def _places(
    fabric: Fabric,
    groups: tuple[GroupId, ...],
    hidden_TH: torch.Tensor,
    num_pairs: int,
    new_call: Callable[[], LayerCall],
) -> dict[GroupId, _Place] | None:
    places: dict[GroupId, _Place] = {}
    num_tokens, hidden_size = hidden_TH.shape
    try:
        for group in groups:
            link = fabric.up(group)
            room = None
            if link is not None and link.kind in ROOMY:
                call = new_call()
                room = link.room(call, num_tokens, hidden_size, num_pairs)
            if link is None or room is None:
                _leave(places)
                return None
            places[group] = _Place(link, call, room)
    except BaseException:
        _leave(places)
        raise
    return places


def _leave(places: dict[GroupId, _Place]) -> None:
    for each in places.values():
        each.room.leave()


def _owners(copies: LayerCopies, speeds: Speeds, index_TK: torch.Tensor, decode: bool) -> Owners:
    """Whom to ask for each expert, or between which two groups to choose on the way."""
    if not copies.any_choice:
        return Owners(copies.owner_E, None)
    cost, handicaps = speeds.cost(), speeds.handicaps()
    if decode and copies.second_E is not None and not cost and not handicaps:
        return Owners(copies.owner_E, copies.second_E)
    # Of these copies, whoever is trusted again meanwhile: others were given no room.
    return Owners(copies.choose(index_TK.reshape(-1).numpy(), decode, cost, handicaps), None)


def _fill(
    places: dict[GroupId, _Place],
    owners: Owners,
    num_groups: int,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows_P: Ints,
) -> list[Part]:
    hidden_TH, index_TK, weight_TK = rows
    num_tokens = len(hidden_TH)
    numbers_GT = torch.empty((num_groups, num_tokens), dtype=torch.int64)
    numbers_at = numbers_GT.data_ptr()
    where = [0] * (3 * num_groups + 3)  # from nobody's on, who gets nothing
    for group, each in places.items():
        at = 3 * group + 3
        where[at : at + 3] = numbers_at + 8 * num_tokens * group, each.room.rows_at, each.room.pairs_at
    pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
    shares = divide_into(owners, hidden_TH, pairs_at, len(rows_P), where)
    parts = []
    for group, each in places.items():
        num_pairs, num_rows, num_experts = shares[group + 1]
        if not num_pairs:
            each.room.leave()
            continue
        index = None if num_rows == num_tokens else numbers_GT[group, :num_rows]
        part = Part(group, index, each.room.rows(num_rows, num_pairs), each.link, num_experts=num_experts)
        part.call = each.call
        parts.append(part)
    return parts
