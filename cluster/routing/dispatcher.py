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

import numpy as np
import torch

from cluster.core import Clock, Deadline, GroupId, LayerCall, Order, Priority
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
from cluster.routing.prediction import chances
from cluster.routing.split import Floats, Ints, Part, add_rows, split
from cluster.telemetry.account import StepEvent
from cluster.telemetry.critical import Answer, account
from cluster.telemetry.ledger import Ledger, Stage
from cluster.telemetry.steps import LayerTimes, StepDetail
from cluster.transport.base import LayerReply

log = logging.getLogger(__name__)

Counter = Callable[[int, Ints, int], None]
"""(MoE layer, logical expert of each pair, number of tokens), of every layer call."""

RETRY_PAUSE_S = 0.05
_RETRIED = (Unavailable, MissingExperts, Overloaded, DeadlineExceeded)


@dataclass(slots=True)
class StepContext:
    """What travels beside the layer calls of one step. ``ledger`` may be one that many steps share; ``detail`` is there
    when somebody asked for every layer's times."""

    step_id: int
    priority: Priority = Priority.DECODE
    ledger: Ledger = field(default_factory=Ledger)
    events: list[StepEvent] = field(default_factory=list)
    detail: StepDetail | None = None


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
        count: Counter | None = None,
    ) -> None:
        self._count = count
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
        if self._count is not None:
            self._count(layer, experts_P, num_tokens)
        local_TH = hidden_TH.to(self._dtype)
        parts = split(self._fabric.owners(layer)[1], local_TH, rows_P, experts_P, weight_P, experts_per_token)
        times = LayerTimes(layer, started_s) if step.detail is not None else None
        traceparent = step.detail.open(times) if step.detail is not None and times is not None else ""
        failing_s = self._send(step, layer, parts, step.priority, traceparent)
        sent_s = now_s = self._clock()
        # Groups in this process have computed in the meantime: that is theirs.
        inline_s = self._account_inline(step, layer, parts)
        step.ledger.add(Stage.DISPATCH, sent_s - started_s - inline_s - failing_s)
        answers: list[Answer] = []
        combine_s = 0.0
        waiting = Deadline.after(self._call_timeout_s, self._clock)
        try:
            if meanwhile is not None:
                meanwhile()
                now_s = self._clock()
                step.ledger.add(Stage.TRUNK, now_s - sent_s)
            combined_TH = torch.zeros(local_TH.shape, dtype=torch.float32, device=hidden_TH.device)
            for part in parts:
                from_s = now_s
                try:
                    reply = self._await(step, layer, part, waiting)
                except ExpertMeshError:
                    spent_s = self._clock() - from_s
                    whose, rows = self._whose(layer, part), part.rows.hidden_TH.shape[0]
                    step.ledger.wait(whose, layer, Stage.FAILOVER, spent_s)
                    step.events.append(
                        StepEvent("failover", from_s, spent_s, whose, layer, tokens=rows, cause=part.failed)
                    )
                    account(step.ledger, layer, answers)
                    if step.detail is not None and times is not None:
                        step.detail.close(times, sent_s, answers, self._clock())
                    raise
                arrived_s = self._clock()
                add_rows(combined_TH, part.row_index, reply.partial_TH)
                now_s = self._clock()
                combine_s += now_s - arrived_s
                answers.append(self._answer_of(step, layer, part, reply, from_s, arrived_s))
                part.pending = None
                del reply  # its rows may be memory of a link
        finally:
            self._cancel_unanswered(parts)
        step.ledger.add(Stage.COMBINE, combine_s)
        if not inline_s:
            account(step.ledger, layer, answers)
        if step.detail is not None and times is not None:
            step.detail.close(times, sent_s, answers, self._clock())
        return combined_TH

    def _whose(self, layer: int, part: Part) -> GroupId:
        """The group of a part; where no living one holds its experts, the one that did last."""
        if part.group >= 0:
            return part.group
        return self._fabric.last_owner(layer, int(part.rows.pairs_3P[1, 0]))

    def _answer_of(
        self, step: StepContext, layer: int, part: Part, reply: LayerReply, from_s: float, arrived_s: float
    ) -> Answer:
        """The answer for the ledger; what is rare about it becomes an event of the step."""
        rows, group = part.rows, self._whose(layer, part)
        step.ledger.called(group, rows.hidden_TH.shape[0], rows.hidden_TH.nbytes + reply.partial_TH.nbytes)
        answered_s = part.pending.answered_s if part.pending is not None else arrived_s
        if reply.load_s > 0:
            begun_s = answered_s - reply.compute_s - reply.load_s
            step.events.append(
                StepEvent("cold_load", begun_s, reply.load_s, group, layer, reply.load_expert, reply.load_bytes)
            )
        if part.failed:
            step.events.append(
                StepEvent(
                    "failover",
                    from_s,
                    arrived_s - from_s,
                    group,
                    layer,
                    tokens=rows.hidden_TH.shape[0],
                    cause=part.failed,
                )
            )
        return Answer(
            group,
            answered_s,
            from_s,
            arrived_s,
            reply.queue_s,
            reply.compute_s,
            reply.load_s,
            failed=bool(part.failed),
        )

    def prewarm(self, step: StepContext, layer: int, index_TN: torch.Tensor, count: int) -> None:
        """Tells the groups which experts of a layer will probably be called: those that the gate chose from the hidden
        state of now, and those that it nearly chose."""
        order = Order(step.step_id, layer, chances(index_TN, count, self._fabric.num_experts(layer)))
        for link in self._fabric.store_links():
            link.order(order, at_once=layer == 0)  # no call comes before that one

    # -- sending -------------------------------------------------------------------------------------

    def _send(
        self, step: StepContext, layer: int, parts: list[Part], priority: Priority, traceparent: str = ""
    ) -> float:
        """Sends what can be sent; seconds that were spent on groups that could not be reached."""
        table, _ = self._fabric.owners(layer)
        failing_s = 0.0
        for part in parts:
            began_s = self._clock()
            call = LayerCall(
                call_id=next(self._call_ids),
                step_id=step.step_id,
                layer=layer,
                table_epoch=table.epoch,
                table_version=table.version,
                priority=priority,
                timeout_ms=int(self._call_timeout_s * 1000),
                traceparent=traceparent,
            )
            try:
                if part.group < 0:
                    raise Unavailable(f"no living group holds {self._names(layer, part)}")
                part.link = self._fabric.link(part.group)
                part.pending = part.link.submit(call, part.rows, Deadline.after(self._call_timeout_s, self._clock))
            except ExpertMeshError as exc:
                part.error = exc
                if not part.failed:  # one that is sent again is waited for, and that wait is booked
                    spent_s = self._clock() - began_s
                    step.ledger.wait(self._whose(layer, part), layer, Stage.FAILOVER, spent_s)
                    failing_s += spent_s
        return failing_s

    def _names(self, layer: int, part: Part) -> str:
        experts = sorted(set(part.rows.pair_expert_P.tolist()))
        shown = ", ".join(str(expert) for expert in experts[:8]) + (", ..." if len(experts) > 8 else "")
        return f"experts {shown} of MoE layer {layer}"

    # -- waiting and trying again ----------------------------------------------------------------------------------

    def _await(self, step: StepContext, layer: int, part: Part, waiting: Deadline) -> LayerReply:
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
        part.failed = f"{type(error).__name__}: {error}"
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
    def _cancel_unanswered(parts: list[Part]) -> None:
        """Nobody waits for these any more: their groups need not compute them."""
        for part in parts:
            if part.pending is not None and part.link is not None and not part.pending.done():
                part.link.cancel(part.pending)

    def _again(self, step: StepContext, layer: int, part: Part) -> LayerReply:
        """Sends the pairs of a failed part anew; the sum over its rows as one reply."""
        rows = part.rows
        pieces = split(
            self._fabric.owners(layer)[1],
            rows.hidden_TH,
            rows.pairs_3P[0].astype(np.int64),
            rows.pairs_3P[1].astype(np.int64),
            rows.pairs_3P[2].view(np.float32),
            1,
        )
        self.resent_calls += len(pieces)
        for piece in pieces:
            piece.failed = part.failed
        self._send(step, layer, pieces, Priority.RESENT)
        total_TH = torch.zeros(rows.hidden_TH.shape, dtype=torch.float32, device=rows.hidden_TH.device)
        queue_s = compute_s = load_s = 0.0
        limit = Deadline.after(self._call_timeout_s, self._clock)
        try:
            for piece in pieces:
                if piece.error is not None:
                    raise piece.error
                assert piece.pending is not None
                reply = piece.pending.wait(limit)
                add_rows(total_TH, piece.row_index, reply.partial_TH)
                queue_s, compute_s = max(queue_s, reply.queue_s), max(compute_s, reply.compute_s)
                load_s = max(load_s, reply.load_s)
        finally:
            self._cancel_unanswered(pieces)
        part.pending = None
        return LayerReply(total_TH, queue_s, compute_s, load_s)

    @staticmethod
    def _account_inline(step: StepContext, layer: int, parts: list[Part]) -> float:
        """Books what groups in this very process computed inside `submit`; 0 where a link leads elsewhere."""
        spent_s = 0.0
        for part in parts:
            if part.pending is None or part.link is None or part.link.kind != "inproc" or not part.pending.done():
                return 0.0
            spent_s += part.pending.compute_s()
        for part in parts:
            assert part.pending is not None
            compute_s, load_s = part.pending.compute_s(), part.pending.load_s()
            step.ledger.wait(part.group, layer, Stage.GROUP_COMPUTE, compute_s - load_s)
            step.ledger.wait(part.group, layer, Stage.COLD_LOAD, load_s)
        return spent_s
