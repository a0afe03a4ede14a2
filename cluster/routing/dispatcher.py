"""The dispatcher: splits one layer's tokens by group, sends one layer call to each, and combines the answers.

A token row goes to a group at most once a layer. Answers are added in group order whoever answered first, so the
result does not depend on arrival. A call that fails is sent again, to whoever the newest table names, until the
step's patience is over; the result is the same, since expert calls are pure functions.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall, Priority
from cluster.errors import (
    DeadlineExceeded,
    ExpertMeshError,
    InternalError,
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


@dataclass(slots=True)
class StepContext:
    """What travels beside the layer calls of one step."""

    step_id: int
    priority: Priority = Priority.DECODE
    traceparent: str = ""
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(slots=True)
class _Part:
    """One group's share of a layer: rows of the layer's batch, and pairs that index into these rows."""

    group: GroupId
    row_index: torch.Tensor
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
        self, step: StepContext, layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """Output of the layer's routed experts, fp32 [T, H], on the device of ``hidden_TH``.

        ``index_TK`` are logical experts, ``weight_TK`` their gate weights.

        Raises:
            Unavailable: an expert had no answering copy for ``group_wait_s`` seconds.
            InternalError: a group failed to compute.
        """
        started_s = self._clock()
        num_tokens, experts_per_token = index_TK.shape
        rows_P = torch.arange(num_tokens).repeat_interleave(experts_per_token)
        experts_P = index_TK.reshape(-1).cpu().long()
        weight_P = weight_TK.reshape(-1).float().cpu()
        local_TH = hidden_TH.to(self._dtype).cpu()
        parts = self._split(layer, local_TH, rows_P, experts_P, weight_P, experts_per_token)
        self._send(step, layer, parts)
        sent_s = self._clock()
        step.ledger.add(Stage.DISPATCH, sent_s - started_s)
        combined_TH = torch.zeros(local_TH.shape, dtype=torch.float32)
        waiting = Deadline.after(self._call_timeout_s, self._clock)
        combine_s = 0.0
        replies: list[tuple[float, LayerReply]] = []
        try:
            for part in parts:
                reply = self._await(step, layer, part, waiting)
                arrived_s = self._clock()
                combined_TH.index_add_(0, part.row_index, reply.partial_TH)
                combine_s += self._clock() - arrived_s
                replies.append((part.pending.answered_s if part.pending is not None else arrived_s, reply))
        finally:
            self._cancel_unanswered(parts)
        self._account(step.ledger, sent_s, combine_s, replies)
        return combined_TH.to(hidden_TH.device)

    # -- splitting and sending -------------------------------------------------------------------------------------

    def _split(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        rows_P: torch.Tensor,
        experts_P: torch.Tensor,
        weight_P: torch.Tensor,
        experts_per_token: int,
    ) -> list[_Part]:
        """Parts in group order; a part of group -1 has no living copy."""
        _, owner_E = self._fabric.owners(layer)
        owner_P = owner_E[experts_P]
        limit = max_rows(hidden_TH.shape[1], experts_per_token)
        parts = []
        for group in torch.unique(owner_P).tolist():
            pairs = torch.nonzero(owner_P == group).flatten()
            row_index, pair_row = torch.unique(rows_P[pairs], return_inverse=True)
            for first in range(0, row_index.numel(), limit):
                chunk = row_index[first : first + limit]
                inside = torch.nonzero((pair_row >= first) & (pair_row < first + limit)).flatten()
                chosen = pairs[inside]
                rows = LayerRows(
                    hidden_TH[chunk], (pair_row[inside] - first).int(), experts_P[chosen].int(), weight_P[chosen]
                )
                parts.append(_Part(int(group), chunk, rows))
        return parts

    def _send(self, step: StepContext, layer: int, parts: list[_Part]) -> None:
        for part in parts:
            table, _ = self._fabric.owners(layer)
            call = LayerCall(
                call_id=next(self._call_ids),
                step_id=step.step_id,
                layer=layer,
                table_epoch=table.epoch,
                table_version=table.version,
                priority=step.priority,
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
        while True:
            self._sleep(min(RETRY_PAUSE_S, patience.remaining_s()))
            last_try = patience.expired()
            try:
                self._fabric.refresh()
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
            layer, rows.hidden_TH, rows.pair_row_P.long(), rows.pair_expert_P.long(), rows.pair_weight_P, 1
        )
        self.resent_calls += len(pieces)
        self._send(step, layer, pieces)
        total_TH = torch.zeros(rows.hidden_TH.shape, dtype=torch.float32)
        queue_s = compute_s = 0.0
        limit = Deadline.after(self._call_timeout_s, self._clock)
        try:
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                assert piece.pending is not None
                reply = piece.pending.wait(limit)
                total_TH.index_add_(0, piece.row_index, reply.partial_TH)
                queue_s, compute_s = max(queue_s, reply.queue_s), max(compute_s, reply.compute_s)
        finally:
            self._cancel_unanswered(pieces)
        part.pending = None
        return LayerReply(total_TH, queue_s, compute_s)

    @staticmethod
    def _account(ledger: Ledger, sent_s: float, combine_s: float, replies: list[tuple[float, LayerReply]]) -> None:
        """Time until the first answer by what that group says of it, and from there to the last as straggler."""
        if not replies:
            return
        first_s, first = min(replies, key=lambda item: item[0])
        last_s = max(answered for answered, _ in replies)
        ledger.add(Stage.GROUP_QUEUE, first.queue_s)
        ledger.add(Stage.GROUP_COMPUTE, first.compute_s)
        ledger.add(Stage.WIRE, first_s - sent_s - first.queue_s - first.compute_s)
        ledger.add(Stage.STRAGGLER, last_s - max(first_s, sent_s))
        ledger.add(Stage.COMBINE, combine_s)
