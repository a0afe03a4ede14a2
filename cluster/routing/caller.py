"""One layer's calls: sending them, and getting an answer to each, whatever fails on the way.

A call that fails, or is not answered in the time that its group should take, is sent to the other copies of its experts
at once: expert calls are pure functions, so the result is the same. The group is asked for nothing more until it has
answered a probe (`Fabric`). A decode call that takes much longer than usual is sent to other copies too, and the first
answer wins, as long as not more than one call in twenty is. Where an expert has no other copy, its group is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cluster.core import Clock, Deadline, ExpertId, GroupId, LayerCall, Priority
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
from cluster.routing.speeds import Speeds
from cluster.routing.split import Ints, Part, add_rows, split
from cluster.routing.step import StepContext
from cluster.telemetry.ledger import Stage
from cluster.transport.base import LayerReply, PendingReply, Transport

log = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.05
RETRIED = (Unavailable, MissingExperts, Overloaded, DeadlineExceeded)
_TRIES = 3
"""Further tries without a pause where nobody is waited for."""
_TOGETHER_S = 0.25
"""Calls that were sent together are waited for one by one after so long."""
_TURN_S = 0.002
"""A call that was sent twice is waited for in turns of this length."""


WAIT, FAIL, DEGRADE = "wait", "fail", "degrade"


class Caller:
    """Calls of one router. One thread, the engine's.

    ``fail_over`` off: nothing is sent to other copies while a group is in the table.
    ``policy`` is for experts without a living copy: wait for one, ``group_wait_s`` at most; fail at once; or degrade,
    which leaves them out and says so in the step's ``missing``.
    """

    def __init__(
        self,
        fabric: Fabric,
        call_timeout_s: float,
        group_wait_s: float,
        clock: Clock = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        policy: str = WAIT,
        fail_over: bool = True,
    ) -> None:
        self._policy = policy
        self.fail_over = fail_over
        self._fabric, self._clock, self._sleep = fabric, clock, sleep
        self.call_timeout_s, self._group_wait_s = call_timeout_s, group_wait_s
        self._call_ids = itertools.count(1)
        self.speeds = Speeds()
        self.resent_calls = self.hedges_won = 0

    @property
    def watches(self) -> bool:
        """Calls have other copies to go to, and how long they take is of interest."""
        return self.fail_over and self._fabric.has_copies

    def owners(self, layer: int, experts_P: Ints, decode: bool) -> Ints:
        """Whom to ask for each expert."""
        cost = self.speeds.cost()
        return self._fabric.choose(layer, experts_P, decode, cost, self.speeds.handicaps())

    def whose(self, layer: int, part: Part) -> GroupId:
        """The group of a part; where no living one holds its experts, the one that did last."""
        if part.group >= 0:
            return part.group
        return self._fabric.last_owner(layer, int(part.rows.pairs_3P[1, 0]))

    def call(self, step: StepContext, layer: int, priority: Priority, traceparent: str = "") -> LayerCall:
        """A new call under the newest table."""
        table = self._fabric.membership.table
        timeout_ms = int(self.call_timeout_s * 1000)
        call_id, step_id = next(self._call_ids), step.step_id
        return LayerCall(call_id, step_id, layer, table.epoch, table.version, priority, timeout_ms, traceparent)

    def send(
        self, step: StepContext, layer: int, parts: list[Part], priority: Priority, traceparent: str = ""
    ) -> float:
        """Sends what can be sent; seconds that were spent on groups that could not be reached."""
        failing_s = 0.0
        for part in parts:
            began_s = self._clock()
            call = part.call or self.call(step, layer, priority, traceparent)
            self.speeds.sent()
            try:
                if part.group < 0:
                    raise Unavailable(f"no living group holds {_names(layer, part)}")
                if self.watches:
                    part.covered = self._fabric.covered(layer, part.rows.pairs_3P[1], part.group)
                if part.link is None:
                    part.link = self._fabric.link(part.group)
                part.pending = part.link.submit(call, part.rows, self._limit(part))
            except ExpertMeshError as exc:
                part.error = exc
                if not part.failed:  # one that is sent again is waited for, and that wait is booked
                    spent_s = self._clock() - began_s
                    step.ledger.wait(self.whose(layer, part), layer, Stage.FAILOVER, spent_s)
                    failing_s += spent_s
        return failing_s

    def patience_s(self, links: Sequence[Transport], decode: bool, num_rows: int) -> float:
        """How long calls over these links are waited for, and nobody else reads there, before anybody looks at each of
        them."""
        speeds, seconds = self.speeds, min(self.call_timeout_s, _TOGETHER_S)
        if not self.watches:
            return seconds
        for link in links:
            hedge_s = speeds.hedge_after_s(link.group, decode)
            seconds = min(seconds, speeds.lost_after_s(link.group, num_rows), seconds if hedge_s is None else hedge_s)
        return seconds

    def adopted(self, layer: int, parts: list[Part]) -> None:
        """These have been sent already."""
        for part in parts:
            if part.pending is None:
                continue
            self.speeds.sent()
            part.covered = self.watches and self._fabric.covered(layer, part.rows.pairs_3P[1], part.group)

    def _limit(self, part: Part) -> Deadline:
        """When a call counts as lost: soon where its experts have other copies."""
        seconds = self.call_timeout_s
        if part.covered:
            seconds = min(seconds, self.speeds.lost_after_s(part.group, len(part.rows.hidden_TH)))
        return Deadline.after(seconds, self._clock)

    def reply(self, step: StepContext, layer: int, part: Part, decode: bool, waiting: Deadline) -> LayerReply:
        """The part's reply, from its group or, when that fails, from other copies and whoever the newest table names.

        Raises:
            Unavailable: an expert had no answering copy for ``group_wait_s`` seconds.
            InternalError: a group failed to compute.
        """
        error = part.error
        if part.pending is not None:
            try:
                if not part.covered:
                    return part.pending.wait(waiting)
                return self._from_any_copy(step, layer, part, part.pending, decode, waiting)
            except ExpertMeshError as exc:
                error = exc
        assert error is not None
        if not isinstance(error, RETRIED):
            raise InternalError(f"{_names(layer, part)}: {error}") from error
        part.keep_rows()
        cancel_unanswered([part])
        part.failed = f"{type(error).__name__}: {error}"
        log.warning("layer %d: call to group %d failed (%s); sending it again", layer, part.group, error)
        # Where only one of a link's transports broke, the group is there and the other one carries the call at once.
        at_once = part.covered or (isinstance(error, LinkBroken) and part.link is not None and part.link.healthy())
        self._doubt(part, error)
        if isinstance(error, MissingExperts):  # the table is old: with the next one this does not happen again
            with contextlib.suppress(ExpertMeshError):
                self._fabric.refresh()
            at_once = True
        patience = Deadline.after(self._group_wait_s, self._clock)
        for tries in itertools.count():
            waits = self._policy == WAIT or isinstance(error, Overloaded)
            if not at_once and waits:
                self._sleep(min(RETRY_PAUSE_S, patience.remaining_s()))
            last_try = patience.expired() if waits else tries >= _TRIES
            try:
                if not at_once:
                    self._fabric.refresh()
                at_once = False
                return self._again(step, layer, part, decode, patience)
            except RETRIED as exc:
                error = exc
            if last_try:
                waited = f" for {self._group_wait_s:g} s" if waits else ""
                raise Unavailable(f"{_names(layer, part)} did not answer{waited}: {error}") from error

        raise AssertionError("unreachable")

    def _doubt(self, part: Part, error: ExpertMeshError) -> None:
        """Nobody who has a choice asks this group again before it has answered a probe."""
        if part.group >= 0 and isinstance(error, (LinkBroken, DeadlineExceeded)):
            self._fabric.suspect(part.group, part.rows.hidden_TH)
            self.speeds.gone(part.group)

    def _again(self, step: StepContext, layer: int, part: Part, decode: bool, patience: Deadline) -> LayerReply:
        """Sends the pairs of a failed part anew; the sum over its rows as one reply."""
        owner_E = self.owners(layer, part.rows.pairs_3P[1].astype(np.int64), decode)
        pieces = self._pieces(part, owner_E)
        self.resent_calls += len(pieces)
        for piece in pieces:
            piece.failed = part.failed
        self.send(step, layer, pieces, Priority.RESENT)
        # Longer than patience, if that is short: a call that was sent again deserves an answer.
        limit = Deadline(max(patience.at_s, self._clock() + self.call_timeout_s), self._clock)
        limits = [limit.earlier(self._limit(piece)) for piece in pieces]
        replies = []
        try:
            for piece, within in zip(pieces, limits, strict=True):
                try:
                    if piece.error is not None:
                        raise piece.error
                    assert piece.pending is not None
                    replies.append(piece.pending.wait(within))
                except RETRIED as exc:
                    self._doubt(piece, exc)
                    others_E = self._fabric.elsewhere(layer, piece.group)
                    if (
                        self._policy != DEGRADE
                        or isinstance(exc, Overloaded)
                        or (others_E[piece.rows.pairs_3P[1]] >= 0).any()
                    ):
                        raise
                    replies.append(_nothing(step, layer, piece))
        finally:
            cancel_unanswered(pieces)
        part.pending = None
        return _sum(part, pieces, replies)

    @staticmethod
    def _pieces(part: Part, owner_E: Ints) -> list[Part]:
        rows = part.rows
        return split(
            owner_E,
            rows.hidden_TH,
            rows.pairs_3P[0].astype(np.int64),
            rows.pairs_3P[1].astype(np.int64),
            rows.pairs_3P[2].view(np.float32),
            1,
        )

    # -- sent twice ---------------------------------------------------------------------------------------------------

    def _from_any_copy(
        self,
        step: StepContext,
        layer: int,
        part: Part,
        pending: PendingReply,
        decode: bool,
        waiting: Deadline,
    ) -> LayerReply:
        """The reply of a part whose experts all have other copies."""
        lost_s = self.speeds.lost_after_s(part.group, len(part.rows.hidden_TH))
        limit = waiting.earlier(Deadline(pending.sent_s + lost_s, self._clock))
        hedge_s = self.speeds.hedge_after_s(part.group, decode)
        if hedge_s is None:
            return pending.wait(limit)
        try:
            return pending.wait(limit.earlier(Deadline(pending.sent_s + hedge_s, self._clock)))
        except DeadlineExceeded:
            if pending.done():  # it has come a moment later, or the group says so
                return pending.wait(limit)
            if limit.expired():
                raise
        return self._race(step, layer, part, pending, limit)

    def _race(self, step: StepContext, layer: int, part: Part, pending: PendingReply, limit: Deadline) -> LayerReply:
        """Sends the call to other copies too; whichever answer is whole first."""
        pieces = self._pieces(part, self._fabric.elsewhere(layer, part.group))
        self.speeds.hedged(len(pieces))
        self.send(step, layer, pieces, Priority.RESENT)
        lost = any(piece.error is not None for piece in pieces)
        try:
            while True:
                try:
                    return pending.wait(limit.earlier(Deadline.after(_TURN_S, self._clock)))
                except ExpertMeshError:
                    if lost and pending.done():
                        return pending.wait(limit)
                    if lost and limit.expired():
                        raise
                if lost:
                    continue
                try:
                    turn = Deadline.after(_TURN_S, self._clock)
                    replies = [piece.pending.wait(turn) for piece in pieces if piece.pending is not None]
                except ExpertMeshError:
                    # Not there yet, or failed; or, since a whole deadline has passed, not to be waited for any more.
                    lost = any(p.pending is not None and p.pending.failed() for p in pieces) or limit.expired()
                    continue
                self.hedges_won += len(pieces)
                cancel_unanswered([part])
                if self.speeds.beaten(part.group):
                    self._fabric.suspect(part.group, part.rows.hidden_TH)
                return _sum(part, pieces, replies)
        finally:
            cancel_unanswered(pieces)


def _nothing(step: StepContext, layer: int, part: Part) -> LayerReply:
    """What experts that are missing add to their rows."""
    part.pending = None
    step.missing += [ExpertId(layer, expert) for expert in sorted(set(part.rows.pair_expert_P.tolist()))]
    return LayerReply(torch.zeros(part.rows.hidden_TH.shape, dtype=torch.float32, device=part.rows.hidden_TH.device))


def _sum(part: Part, pieces: list[Part], replies: list[LayerReply]) -> LayerReply:
    """What several groups answered to the pairs of one part, as if one had."""
    hidden_TH = part.rows.hidden_TH
    total_TH = torch.zeros(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
    for piece, reply in zip(pieces, replies, strict=True):
        add_rows(total_TH, piece.row_index, reply.partial_TH)
    queue_s, compute_s, load_s = (
        max((getattr(reply, name) for reply in replies), default=0.0) for name in ("queue_s", "compute_s", "load_s")
    )
    return LayerReply(total_TH, queue_s, compute_s, load_s)


def cancel_unanswered(parts: list[Part]) -> None:
    """Nobody waits for these any more: their groups need not compute them."""
    for part in parts:
        if part.pending is not None and part.link is not None and not part.pending.done():
            part.link.cancel(part.pending)


def _names(layer: int, part: Part) -> str:
    experts = sorted(set(part.rows.pair_expert_P.tolist()))
    shown = ", ".join(str(expert) for expert in experts[:8]) + (", ..." if len(experts) > 8 else "")
    return f"experts {shown} of MoE layer {layer}"
