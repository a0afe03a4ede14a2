"""The dispatcher: splits one layer's tokens by group, sends one layer call to each, and combines the answers.

A token row goes to a group at most once a layer. Answers are added in group order whoever answered first, so the
result does not depend on arrival. A call that fails is sent again, to whoever the newest table names, until the
step's patience is over; the result is the same, since expert calls are pure functions.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall, Priority
from cluster.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
    LinkBroken,
    MissingExperts,
    Overloaded,
    Unavailable,
)
from cluster.routing.fabric import Fabric
from cluster.telemetry.ledger import Ledger, Stage
from cluster.transport.base import LayerReply, LayerRows, PendingReply, Transport
from cluster.transport.codec import max_rows

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05
_RETRIED = (Unavailable, MissingExperts, Overloaded, DeadlineExceeded)

Ints = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(slots=True)
class StepContext:
    """What travels beside the layer calls of one step."""

    step_id: int
    priority: Priority = Priority.DECODE
    traceparent: str = ""
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(slots=True)
class _Part:
    """One group's share of a layer: rows of the layer's batch (None: all of them), and pairs that index into these."""

    group: GroupId
    row_index: torch.Tensor | None
    rows: LayerRows
    link: Transport | None = None
    pending: PendingReply | None = None
    error: ExpertMeshError | None = None


class Dispatcher:
    """Splits, sends, waits, combines. One thread, the engine's, calls it."""

    def __init__(
        self,
        fabric: Fabric,
        dtype: torch.dtype,
        call_timeout_s: float,
        group_wait_s: float,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._fabric, self._dtype, self._clock, self._sleep = fabric, dtype, clock, sleep
        self._call_timeout_s, self._group_wait_s = call_timeout_s, group_wait_s
        self._call_ids = itertools.count(1)
        self.resent_calls = 0

    def __call__(
        self,
        step: StepContext,
        layer: int,
        hidden_TH: torch.Tensor,
        index_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        meanwhile: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """Output of the layer's routed experts, fp32 [T, H], on the device of ``hidden_TH``.

        ``index_TK`` are logical experts, ``weight_TK`` their gate weights. ``meanwhile`` is the router's own work that
        can be done while the groups compute; it counts as the trunk's.

        Raises:
            Unavailable: an expert had no answering copy for ``group_wait_s`` seconds.
            InternalError: a group failed to compute.
        """
        started_s = self._clock()
        num_tokens, experts_per_token = index_TK.shape
        rows_P = np.repeat(np.arange(num_tokens), experts_per_token)
        experts_P: Ints = index_TK.reshape(-1).cpu().numpy().astype(np.int64, copy=False)
        weight_P: Floats = weight_TK.detach().reshape(-1).float().cpu().numpy()
        local_TH = hidden_TH.to(self._dtype)
        parts = self._split(layer, local_TH, rows_P, experts_P, weight_P, experts_per_token)
        self._send(step, layer, parts, step.priority)
        sent_s = self._clock()
        inline_s = _computed_while_sending(parts)
        step.ledger.add(Stage.DISPATCH, sent_s - started_s - inline_s)
        replies: list[tuple[float, float, float]] = []
        free_s = sent_s
        combine_s = 0.0
        waiting = Deadline.after(self._call_timeout_s, self._clock)
        try:
            if meanwhile is not None:
                meanwhile()
                free_s = self._clock()
                step.ledger.add(Stage.TRUNK, free_s - sent_s)
            combined_TH = torch.zeros(local_TH.shape, dtype=torch.float32, device=hidden_TH.device)
            for part in parts:
                reply = self._await(step, layer, part, waiting)
                arrived_s = self._clock()
                _add(combined_TH, part.row_index, reply.partial_TH)
                combine_s += self._clock() - arrived_s
                answered_s = part.pending.answered_s if part.pending is not None else arrived_s
                replies.append((answered_s, reply.queue_s, reply.compute_s))
                part.pending = None
                del reply  # its rows may be memory of a link
        finally:
            self._cancel_unanswered(parts)
        if inline_s:
            step.ledger.add(Stage.GROUP_COMPUTE, inline_s)
            step.ledger.add(Stage.COMBINE, combine_s)
        else:
            self._account(step.ledger, sent_s, free_s, combine_s, replies)
        return combined_TH

    # -- splitting and sending -------------------------------------------------------------------------------------

    def _split(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        rows_P: Ints,
        experts_P: Ints,
        weight_P: Floats,
        experts_per_token: int,
    ) -> list[_Part]:
        """Parts in group order; a part of group -1 has no living copy. ``rows_P`` ascends."""
        _, owner_E = self._fabric.owners(layer)
        owner_P = owner_E[experts_P]
        limit = max_rows(hidden_TH.shape[1], experts_per_token)
        parts = []
        if owner_P.size:
            num_rows, group = hidden_TH.shape[0], int(owner_P[0])
            # One group for everything, as where groups live in this process: nothing to sort out.
            whole = num_rows <= limit and rows_P.size == num_rows * experts_per_token
            if whole and bool((owner_P == group).all()):
                return [_Part(group, None, LayerRows.of(hidden_TH, rows_P, experts_P, weight_P))]
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
                parts.append(_Part(group, index, rows))
        return parts

    def _send(self, step: StepContext, layer: int, parts: list[_Part], priority: Priority) -> None:
        table, _ = self._fabric.owners(layer)
        for part in parts:
            call = LayerCall(
                call_id=next(self._call_ids),
                step_id=step.step_id,
                layer=layer,
                table_epoch=table.epoch,
                table_version=table.version,
                priority=priority,
                timeout_ms=int(self._call_timeout_s * 1000),
                traceparent=step.traceparent,
            )
            try:
                if part.group < 0:
                    raise Unavailable(f"no living group holds {self._names(layer, part)}")
                part.link = self._fabric.link(part.group)
                part.pending = part.link.submit(call, part.rows, Deadline.after(self._call_timeout_s, self._clock))
            except ExpertMeshError as exc:
                part.error = exc

    def _names(self, layer: int, part: _Part) -> str:
        experts = sorted(set(part.rows.pair_expert_P.tolist()))
        shown = ", ".join(str(expert) for expert in experts[:8]) + (", ..." if len(experts) > 8 else "")
        return f"experts {shown} of MoE layer {layer}"

    # -- waiting and trying again ----------------------------------------------------------------------------------

    def _await(self, step: StepContext, layer: int, part: _Part, waiting: Deadline) -> LayerReply:
        """The part's reply, from its group or, when that fails, from whoever the newest table names."""
        error = part.error
        if part.pending is not None:
            try:
                return part.pending.wait(waiting)
            except ExpertMeshError as exc:
                error = exc
        assert error is not None
        if not isinstance(error, _RETRIED):
            raise InternalError(f"{self._names(layer, part)}: {error}") from error
        self._cancel_unanswered([part])
        log.warning("layer %d: call to group %d failed (%s); sending it again", layer, part.group, error)
        patience = Deadline.after(self._group_wait_s, self._clock)
        # Where only one of a link's transports broke, the group is there and the other one carries the call at once.
        at_once = isinstance(error, LinkBroken) and part.link is not None and part.link.healthy()
        while True:
            if not at_once:
                self._sleep(min(RETRY_PAUSE_S, patience.remaining_s()))
            last_try = patience.expired()
            try:
                if not at_once:
                    self._fabric.refresh()
                at_once = False
                return self._again(step, layer, part)
            except _RETRIED as exc:
                error = exc
            if last_try:
                what = self._names(layer, part)
                raise Unavailable(f"{what} did not answer for {self._group_wait_s:g} s: {error}") from error

    @staticmethod
    def _cancel_unanswered(parts: list[_Part]) -> None:
        """Nobody waits for these any more: their groups need not compute them."""
        for part in parts:
            if part.pending is not None and part.link is not None and not part.pending.done():
                part.link.cancel(part.pending)

    def _again(self, step: StepContext, layer: int, part: _Part) -> LayerReply:
        """Sends the pairs of a failed part anew; the sum over its rows as one reply."""
        rows = part.rows
        pieces = self._split(
            layer,
            rows.hidden_TH,
            rows.pairs_3P[0].astype(np.int64),
            rows.pairs_3P[1].astype(np.int64),
            rows.pairs_3P[2].view(np.float32),
            1,
        )
        self.resent_calls += len(pieces)
        self._send(step, layer, pieces, Priority.RESENT)
        total_TH = torch.zeros(rows.hidden_TH.shape, dtype=torch.float32, device=rows.hidden_TH.device)
        queue_s = compute_s = 0.0
        limit = Deadline.after(self._call_timeout_s, self._clock)
        try:
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                assert piece.pending is not None
                reply = piece.pending.wait(limit)
                _add(total_TH, piece.row_index, reply.partial_TH)
                queue_s, compute_s = max(queue_s, reply.queue_s), max(compute_s, reply.compute_s)
        finally:
            self._cancel_unanswered(pieces)
        part.pending = None
        return LayerReply(total_TH, queue_s, compute_s)

    @staticmethod
    def _account(
        ledger: Ledger, sent_s: float, free_s: float, combine_s: float, replies: list[tuple[float, float, float]]
    ) -> None:
        """Time until the first answer by what that group says of it, and from there to the last as straggler.

        Time counts from ``free_s``, when the router's own work was done: what the groups did before cost nothing.
        """
        if not replies:
            return
        first_s, queue_s, compute_s = min(replies)
        last_s = max(answered for answered, _, _ in replies)
        hidden_s = min(free_s, first_s) - sent_s  # it passed while the router computed: the wire first
        for stage, spent_s in (
            (Stage.WIRE, first_s - sent_s - queue_s - compute_s),
            (Stage.GROUP_QUEUE, queue_s),
            (Stage.GROUP_COMPUTE, compute_s),
        ):
            ledger.add(stage, spent_s - hidden_s)
            hidden_s = max(0.0, hidden_s - max(0.0, spent_s))
        ledger.add(Stage.STRAGGLER, last_s - max(first_s, free_s))
        ledger.add(Stage.COMBINE, combine_s)


def _computed_while_sending(parts: list[_Part]) -> float:
    """Seconds that groups in this very process computed inside `submit`; 0 where a link leads elsewhere."""
    spent_s = 0.0
    for part in parts:
        if part.pending is None or part.link is None or part.link.kind != "inproc" or not part.pending.done():
            return 0.0
        spent_s += part.pending.compute_s()
    return spent_s


def _by_value(values_P: Ints) -> Iterator[tuple[int, Ints]]:
    """Each value that occurs, ascending, with the indices where it does, ascending."""
    if not values_P.size:
        return
    order_P = np.argsort(values_P, kind="stable")
    sorted_P = values_P[order_P]
    edges = [0, *(np.flatnonzero(sorted_P[1:] != sorted_P[:-1]) + 1).tolist(), sorted_P.size]
    for first, last in itertools.pairwise(edges):
        yield int(sorted_P[first]), order_P[first:last]


def _add(total_TH: torch.Tensor, row_index: torch.Tensor | None, partial_TH: torch.Tensor) -> None:
    """Adds rows to the rows of ``total_TH`` that they belong to (None: all)."""
    partial_TH = partial_TH.to(total_TH.device)
    if row_index is None:
        total_TH.add_(partial_TH)
    else:
        total_TH.index_add_(0, row_index.to(total_TH.device), partial_TH)
