"""Rows to groups that are all reached over shared memory: a layer's calls are sent, and answered, together.

What `split`, `Caller.send` and `Caller.reply` do one after the other, and for each group anew, is two compiled calls
here. Between two copies of an expert the first of them chooses by itself when it is decode and no group is known to be
slower than another. Where it does not end well, what was sent becomes parts that `Caller.reply` goes on with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cluster.core import GroupId, LayerCall, Priority
from cluster.kernels.rows import FEW, MANY, Owners, can_divide
from cluster.routing.caller import Caller
from cluster.routing.choice import LayerCopies
from cluster.routing.fabric import Fabric
from cluster.routing.split import Ints, Part
from cluster.routing.step import StepContext
from cluster.transport.base import Transport
from cluster.transport.exchange import ShmExchange
from cluster.transport.link import Link
from cluster.transport.shm import ShmTransport

MAX_SETS, MAX_KEPT = 16, 16
"""Sets of groups whose exchanges are kept, and sizes of each."""


class Chosen(NamedTuple):
    """Hidden [T, H]; index [T, K] and weight [T, K], as the gate gave them; and the row of each pair."""

    hidden_TH: torch.Tensor
    index_TK: torch.Tensor
    weight_TK: torch.Tensor
    rows_P: Ints


class Sent:
    """A layer's calls on their way. `wait` once; then ``exchange.answers`` if it ended well, else `parts`;
    `end` in any case."""

    __slots__ = ("_well", "call", "exchange", "links", "sent_s", "total_TH")

    def __init__(
        self, exchange: ShmExchange, links: Sequence[Transport], call: LayerCall, total_TH: torch.Tensor, sent_s: float
    ) -> None:
        self.exchange, self.links, self.call = exchange, links, call
        self.total_TH, self.sent_s = total_TH, sent_s
        self._well = False

    def wait(self, seconds: float) -> bool:
        """Waits for the answers, at most so long; whether all are there, and added to ``total_TH``."""
        self._well = self.exchange.wait(seconds)
        return self._well

    def parts(self) -> list[Part]:
        """What was sent, in group order; some of it may have been answered, and what a link did not take has no
        ``pending``. Only `end` may follow."""
        parts = []
        for left in self.exchange.left(self.call):
            link = self.links[left.number]
            part = Part(link.group, left.row_index, left.rows, link, left.pending, num_experts=left.num_experts)
            part.call = None if left.pending is None else self.call
            parts.append(part)
        self.exchange.leave()  # whoever waits for them reads
        return parts

    def end(self) -> None:
        """Nobody waits for it any more. A call that is still on its way is cancelled."""
        try:
            if not self._well and not self.exchange.spent:
                for left in self.exchange.left(self.call):
                    if left.pending is not None:
                        self.exchange.links[left.number].cancel(left.pending)
        finally:
            self.exchange.leave()


class _Ready(NamedTuple):
    """What a layer's rows are sent with, as long as the fabric's view and the sizes are the same. ``exchange`` is None
    where they cannot be sent so; ``owners`` where whom to ask depends on what is wanted."""

    view: object
    num_tokens: int
    num_pairs: int
    copies: LayerCopies
    exchange: ShmExchange | None = None
    links: tuple[Transport, ...] = ()
    owners: Owners | None = None


class Exchanges:
    """Those of a dispatcher, by groups and sizes. One thread's."""

    def __init__(self, fabric: Fabric, caller: Caller) -> None:
        self._fabric, self._caller = fabric, caller
        self._kept: dict[tuple[GroupId, ...], tuple[list[ShmTransport], dict[tuple[int, ...], ShmExchange]]] = {}
        self._ready: dict[int, _Ready] = {}

    def send(self, step: StepContext, layer: int, rows: Chosen, traceparent: str) -> Sent | None:
        """Sends a layer's rows; None, and nothing done, where that cannot be done here."""
        hidden_TH, index_TK, weight_TK, rows_P = rows
        ready = self._ready.get(layer)
        num_tokens, num_pairs = len(hidden_TH), len(rows_P)
        if (
            ready is None
            or ready.view is not self._fabric.view
            or ready.num_tokens != num_tokens
            or ready.num_pairs != num_pairs
            or (ready.exchange is not None and ready.exchange.spent)
        ):
            ready = self._ready[layer] = self._find(layer, hidden_TH, num_pairs)
        exchange = ready.exchange
        if exchange is None or not can_divide(hidden_TH, 1, MANY):
            return None
        # Most of them will be called, and soon: while many rows are written they would go to sleep again.
        if len(ready.links) <= num_pairs and hidden_TH.numel() <= FEW:
            exchange.wake()
        if index_TK.dtype is not torch.int64 or weight_TK.dtype is not torch.float32:
            return None
        if not (index_TK.is_cpu and weight_TK.is_cpu and index_TK.is_contiguous() and weight_TK.is_contiguous()):
            return None
        decode = step.priority is Priority.DECODE
        owners = ready.owners if decode else None
        if owners is None or (ready.copies.any_choice and self._caller.speeds.uneven()):
            owners = self._owners(ready.copies, index_TK, decode)
        if not exchange.enter():
            del self._ready[layer]
            return None
        try:
            call = self._caller.call(step, layer, step.priority, traceparent)
            pairs_at = rows_P.ctypes.data, index_TK.data_ptr(), weight_TK.data_ptr()
            total_TH, sent_s = exchange.send(call, owners, hidden_TH, pairs_at, num_pairs)
        except BaseException:
            exchange.leave()
            raise
        return Sent(exchange, ready.links, call, total_TH, sent_s)

    def _find(self, layer: int, hidden_TH: torch.Tensor, num_pairs: int) -> _Ready:
        view = self._fabric.view  # before what may change meanwhile
        copies = self._fabric.copies(layer)
        num_tokens, width = hidden_TH.shape
        none = _Ready(view, num_tokens, num_pairs, copies)
        if not (copies.complete and num_pairs and can_divide(hidden_TH, 1 + copies.groups[-1], MANY)):
            return none
        links: list[Transport] = []
        carriers: list[ShmTransport] = []
        for group in copies.groups:
            link = self._fabric.up(group)
            carrier = link.carrier if isinstance(link, Link) else link
            if link is None or not isinstance(carrier, ShmTransport) or carrier.broken is not None:
                self._drop(copies.groups)
                return none
            links.append(link)
            carriers.append(carrier)
        known, kept = self._kept.get(copies.groups, ([], {}))
        if known != carriers:
            self._drop(copies.groups)
            for groups in list(self._kept) if len(self._kept) >= MAX_SETS else ():
                self._drop(groups)
            kept = {}
            self._kept[copies.groups] = carriers, kept
        num_experts = len(copies.owner_E)
        most = min(_up(num_tokens), MANY // width)  # no seat is larger than the largest layer
        key = most, width, -(-num_pairs // num_tokens) * most, num_experts
        exchange = kept.get(key)
        if exchange is None or exchange.spent:
            if len(kept) >= MAX_KEPT:
                _give_back(kept)
            exchange = ShmExchange.over(carriers, *key)
            if exchange is None:  # others have the memory: those that are used make theirs again
                for _, others in self._kept.values():
                    _give_back(others)
                exchange = ShmExchange.over(carriers, *key)
            if exchange is None:
                return none
            kept[key] = exchange
        owners = None
        if not copies.any_choice:
            owners = Owners(copies.owner_E, None)
        elif copies.second_E is not None:
            owners = Owners(copies.owner_E, copies.second_E)
        return none._replace(exchange=exchange, links=tuple(links), owners=owners)

    def _drop(self, groups: tuple[GroupId, ...]) -> None:
        _, kept = self._kept.pop(groups, ([], {}))
        _give_back(kept)

    def _owners(self, copies: LayerCopies, index_TK: torch.Tensor, decode: bool) -> Owners:
        """Whom to ask for each expert."""
        speeds = self._caller.speeds
        cost, handicaps = speeds.cost(), speeds.handicaps()
        return Owners(copies.choose(index_TK.reshape(-1).numpy(), decode, cost, handicaps), None)


def _give_back(kept: dict[tuple[int, ...], ShmExchange]) -> None:
    for each in kept.values():
        each.give_back()
    kept.clear()


def _up(number: int) -> int:
    return 1 << (number - 1).bit_length()
