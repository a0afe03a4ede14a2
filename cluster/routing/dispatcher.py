"""The dispatcher: splits one layer's tokens by group, sends one layer call to each, and combines the answers.

A token row goes to a group at most once a layer. Answers are added in group order whoever answered first, so the
result does not depend on arrival. What happens to a call that fails is `cluster.routing.caller`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cluster.core import Clock, Deadline, Order, Priority
from cluster.errors import ExpertMeshError
from cluster.kernels.exchange import IDLE, Outcome
from cluster.routing.alone import Pairs, alone, cold_load
from cluster.routing.caller import Caller, cancel_unanswered
from cluster.routing.exchange import Chosen, Exchanges, Sent
from cluster.routing.fabric import Fabric
from cluster.routing.prediction import chances
from cluster.routing.split import Floats, Ints, Part, add_rows, split
from cluster.routing.step import StepContext
from cluster.telemetry.account import StepEvent
from cluster.telemetry.critical import Answer, account
from cluster.telemetry.ledger import Stage
from cluster.telemetry.steps import LayerTimes
from cluster.transport.base import LayerReply, PendingReply, Transport
from cluster.transport.exchange import ShmExchange

Counter = Callable[[int, Ints, int, Priority], None]
"""(MoE layer, logical expert of each pair, number of tokens, what kind of step), of every layer call."""


_LOAD_S = Outcome._fields.index("load_s")


class _Waits(NamedTuple):
    """What a layer waits for, until when at most, bytes of a row there and back, and what has come."""

    step: StepContext
    layer: int
    decode: bool
    limit: Deadline
    row_bytes: int
    answers: list[Answer]


class _Owed(NamedTuple):
    """Answers to exchanged calls that have been added and not booked: over which links they came, what is told of each
    (`Outcome`), when they were sent, since when they were waited for, and since when somebody read."""

    waits: _Waits
    links: Sequence[Transport]
    told: list[list[float]]
    sent_s: float
    from_s: float
    began_s: float


class Dispatcher:
    """Splits, sends, waits, combines. One thread, the engine's, calls it."""

    def __init__(
        self,
        fabric: Fabric,
        dtype: torch.dtype,
        caller: Caller,
        clock: Clock = time.monotonic,
        count: Counter | None = None,
    ) -> None:
        self._fabric, self._dtype, self._caller, self._clock, self._count = fabric, dtype, caller, clock, count
        self._exchanges = Exchanges(fabric, caller)
        self._owed: list[_Owed] = []
        self._uncounted: list[tuple[int, torch.Tensor, Priority]] = []
        self._rows_of: tuple[int, int, Ints] = 0, 0, np.empty(0, np.int64)

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
        if self._owed and self._owed[0].waits.step is not step:
            self._settle()  # of a step that has been given up
        num_tokens, experts_per_token = index_TK.shape
        rows_P = self._rows(num_tokens, experts_per_token)
        local_TH = hidden_TH.to(self._dtype)
        caller, decode = self._caller, step.priority is Priority.DECODE
        times = LayerTimes(layer, started_s) if step.detail is not None else None
        traceparent = step.detail.open(times) if step.detail is not None and times is not None else ""
        parts: list[Part] = []
        inline_s = failing_s = 0.0
        sent = self._exchanges.send(step, layer, Chosen(local_TH, index_TK, weight_TK, rows_P), traceparent)
        if sent is None and decode and times is None:
            pairs = Pairs(rows_P, index_TK, weight_TK)
            computed = alone(self._fabric, caller, step, layer, local_TH, pairs, self._clock)
            if computed is not None:
                self._uncounted.append((layer, index_TK, step.priority))
                self._settle()
                self._book_alone(step, started_s, computed.seconds, meanwhile)
                return computed.total_TH.to(hidden_TH.device)
        if sent is None:
            experts_P = _experts(index_TK)
            owner_E = caller.owners(layer, experts_P, decode)
            weight_P: Floats = weight_TK.detach().reshape(-1).float().cpu().numpy()
            parts = split(owner_E, local_TH, rows_P, experts_P, weight_P, experts_per_token)
            failing_s = caller.send(step, layer, parts, step.priority, traceparent)
            # Groups in this process have computed in the meantime: that is theirs.
            inline_s = self._account_inline(step, layer, parts)
        try:
            sent_s = now_s = self._clock()
            step.ledger.add(Stage.DISPATCH, sent_s - started_s - inline_s - failing_s)
            self._uncounted.append((layer, index_TK, step.priority))
            if sent is None or times is not None or self._is_last(layer):
                # While the groups compute, and for all layers of a step at once: between layers nothing of it is in the
                # caches, and a group that shares this core waits for it.
                self._settle()
            row_bytes = local_TH.shape[1] * (local_TH.itemsize + 4)
            limit = Deadline.after(caller.call_timeout_s, self._clock)
            waits = _Waits(step, layer, decode, limit, row_bytes, [])
            if meanwhile is not None:
                meanwhile()
                now_s = self._clock()
                step.ledger.add(Stage.TRUNK, now_s - sent_s)
            try:
                if sent is not None and sent.wait(caller.patience_s(sent.links, decode, num_tokens)):
                    combined_TH = self._added(waits, sent, now_s)
                else:
                    if sent is not None:
                        parts = sent.parts()
                        caller.adopted(layer, parts)
                        unsent = [part for part in parts if part.pending is None]
                        caller.send(step, layer, unsent, step.priority, traceparent)
                    # A group in this process gives what is nobody else's, and where it is the only one that is the sum.
                    only = bool(inline_s) and len(parts) == 1 and parts[0].row_index is None
                    shape = (0,) if only else local_TH.shape
                    combined_TH = torch.zeros(shape, dtype=torch.float32, device=hidden_TH.device)
                    combined_TH = self._combined(waits, parts, combined_TH, only, now_s)
                    if not inline_s:
                        account(step.ledger, layer, waits.answers)
            except ExpertMeshError:
                account(step.ledger, layer, waits.answers)
                self._settle()
                raise
            finally:
                if times is not None and step.detail is not None:
                    self._settle()
                    step.detail.close(times, sent_s, waits.answers, self._clock())
        finally:
            if sent is not None:
                sent.end()
            cancel_unanswered(parts)
        return combined_TH

    def _added(self, waits: _Waits, sent: Sent, from_s: float) -> torch.Tensor:
        """The sum of answers that are there and were waited for since ``from_s``. Their times are booked while the last
        layer's groups compute, and these when that is done."""
        exchange = sent.exchange
        owed = _Owed(waits, sent.links, exchange.answers(), sent.sent_s, from_s, exchange.began_s)
        self._owed.append(owed)
        if self._is_last(waits.layer) or any(told[_LOAD_S] > 0 for told in owed.told):
            self._settle(exchange)
        return sent.total_TH

    def _is_last(self, layer: int) -> bool:
        return layer + 1 >= self._fabric.num_layers()

    def _settle(self, exchange: ShmExchange | None = None) -> None:
        """Counts what was wanted, and books the answers that have been added. ``exchange`` is the last ones', if it has
        not been used again."""
        uncounted, self._uncounted = self._uncounted, []
        for layer, index_TK, priority in uncounted if self._count is not None else ():
            assert self._count is not None
            self._count(layer, _experts(index_TK), len(index_TK), priority)
        owed, self._owed = self._owed, []
        for number, each in enumerate(owed, 1):
            self._book(each, exchange if number == len(owed) else None)

    def _book(self, owed: _Owed, exchange: ShmExchange | None) -> None:
        waits, links, all_told, sent_s, from_s, read_s = owed
        step, combine_s, speeds = waits.step, 0.0, self._caller.speeds
        for number, told in enumerate(all_told):
            outcome = Outcome(*told)
            if outcome.state == IDLE:
                continue
            group, num_rows, compute_s = links[number].group, int(outcome.num_rows), outcome.compute_s
            speeds.sent()
            # Both clocks are one: an answer that lay in the socket before anybody read came when the group says.
            answered_s = outcome.answered_s if sent_s <= outcome.answered_s < read_s else outcome.arrived_s
            step.ledger.called(group, num_rows, num_rows * waits.row_bytes)
            if self._caller.watches:
                trip_s = answered_s - sent_s
                speeds.answered(group, waits.decode, num_rows, int(outcome.num_experts), compute_s, trip_s)
            if outcome.load_s > 0 and exchange is not None:
                begun_s, (load_bytes, expert) = answered_s - compute_s - outcome.load_s, exchange.load_of(number)
                step.events.append(
                    StepEvent("cold_load", begun_s, outcome.load_s, group, waits.layer, expert, load_bytes)
                )
            waits.answers.append(
                Answer(group, answered_s, from_s, outcome.arrived_s, outcome.queue_s, compute_s, outcome.load_s)
            )
            from_s = read_s = outcome.added_s
            combine_s += from_s - outcome.arrived_s
        step.ledger.add(Stage.COMBINE, combine_s)
        account(step.ledger, waits.layer, waits.answers)

    def _combined(
        self, waits: _Waits, parts: list[Part], combined_TH: torch.Tensor, only: bool, now_s: float
    ) -> torch.Tensor:
        """The sum of the answers to all parts, each waited for; ``only`` one is the sum itself."""
        step, layer = waits.step, waits.layer
        combine_s = 0.0
        for part in parts:
            from_s, num_rows = now_s, len(part.rows.hidden_TH)
            try:
                reply = self._caller.reply(step, layer, part, waits.decode, waits.limit)
            except ExpertMeshError:
                spent_s, whose = self._clock() - from_s, self._caller.whose(layer, part)
                step.ledger.wait(whose, layer, Stage.FAILOVER, spent_s)
                step.events.append(
                    StepEvent("failover", from_s, spent_s, whose, layer, tokens=num_rows, cause=part.failed)
                )
                raise
            arrived_s = self._clock()
            if only:
                combined_TH = reply.partial_TH.to(combined_TH.device)
            else:
                add_rows(combined_TH, part.row_index, reply.partial_TH)
            now_s = self._clock()
            combine_s += now_s - arrived_s
            waits.answers.append(self._answer_of(waits, part, reply, from_s, arrived_s))
            part.pending = None
            del reply  # its rows may be memory of a link
        step.ledger.add(Stage.COMBINE, combine_s)
        return combined_TH

    def _book_alone(
        self, step: StepContext, started_s: float, inline_s: float, meanwhile: Callable[[], None] | None
    ) -> None:
        ended_s = self._clock()
        step.ledger.add(Stage.DISPATCH, ended_s - started_s - inline_s)
        if meanwhile is not None:
            meanwhile()
            step.ledger.add(Stage.TRUNK, self._clock() - ended_s)

    def _rows(self, num_tokens: int, experts_per_token: int) -> Ints:
        """0, 0, ..., 1, 1, ...: the same for all layers of a step."""
        if self._rows_of[:2] != (num_tokens, experts_per_token):
            rows_P = np.repeat(np.arange(num_tokens), experts_per_token)
            self._rows_of = num_tokens, experts_per_token, rows_P
        return self._rows_of[2]

    def _answer_of(self, waits: _Waits, part: Part, reply: LayerReply, from_s: float, arrived_s: float) -> Answer:
        """The answer for the ledger; what is rare about it becomes an event of the step."""
        step, layer = waits.step, waits.layer
        rows, group = part.rows, self._caller.whose(layer, part)
        step.ledger.called(group, rows.hidden_TH.shape[0], rows.hidden_TH.nbytes + reply.partial_TH.nbytes)
        answered_s = part.pending.answered_s if part.pending is not None else arrived_s
        if self._caller.watches and part.pending is not None and not part.failed:
            self._learn(step, part, part.pending, reply)
        if reply.load_s > 0:
            step.events.append(cold_load(reply, answered_s, group, layer))
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

    def _learn(self, step: StepContext, part: Part, pending: PendingReply, reply: LayerReply) -> None:
        if not pending.done() or pending.failed():
            return  # another copy answered
        self._caller.speeds.answered(
            part.group,
            step.priority is Priority.DECODE,
            part.rows.hidden_TH.shape[0],
            part.count_experts(),
            reply.compute_s,
            pending.answered_s - pending.sent_s,
        )

    def prewarm(self, step: StepContext, layer: int, index_TN: torch.Tensor, count: int) -> None:
        """Tells the groups which experts of a layer will probably be called: those that the gate chose from the hidden
        state of now, and those that it nearly chose."""
        order = Order(step.step_id, layer, chances(index_TN, count, self._fabric.num_experts(layer)))
        for link in self._fabric.store_links():
            link.order(order, at_once=layer == 0)  # no call comes before that one

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


def _experts(index_TK: torch.Tensor) -> Ints:
    """Of each pair."""
    experts_P: Ints = index_TK.reshape(-1).cpu().numpy().astype(np.int64, copy=False)
    return experts_P
