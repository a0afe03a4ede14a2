"""The scheduler: which tokens of which sequences make the next step. Pure Python; no torch, no clock of its own.

*Decode first.* Every running sequence that decodes is in every step. What is left of the budget goes to prefill chunks.
While anything decodes they are bounded, so that gaps between tokens are: to ``prefill_chunk`` tokens while little
waits, a small rest included, and with a longer queue to more, since weights are read once a step and small chunks cost
throughput. A token
counts for more the longer the history that it attends to, so that chunks of a long prompt take as long as those of
short ones.

*Fair.* Prefills, running or waiting for a place, are served by what is left of them over how long they have waited:
highest response ratio next (P. Brinch Hansen, "An analysis of response ratio scheduling", IFIP 1971), with an urgency
for near deadlines. Short prompts overtake long ones, and nobody is overtaken for ever. A quarter of the prefill budget
belongs to the prefill that has waited longest; where places are few, so does the next one after three others were
admitted before it. Whoever cannot have a usual answer before its deadline comes behind all who can: where too much
comes, all would else be served when it is just too late (C. D. Locke, "Best-effort decision making", 1986).

*Cold-aware.* Where experts are loaded when they are called for, what a prompt will probably make them load counts as
tokens that take as long, less what prefills of the same step bring anyway: prompts that want the same experts go
together, and those whose experts are there go first.

*Lazy.* A sequence gets key-value blocks as it grows. When they run out, the running sequence that came last gives its
blocks back, waits, and is computed again (preemption by recomputation). The sequence that came first never does, so
something always goes on; and alone it fits, which the engine checks before it accepts a request.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.core import Clock, Request
from cluster.engine.blocks import BlockPool, BlockTable
from cluster.engine.colds import ColdCosts
from cluster.errors import ConfigError, Overloaded
from cluster.settings import EngineConfig

FAIR_PART = 4
"""One part in so many of the prefill budget, and one admission in so many, go to who has waited longest."""
BACKLOG_PART = 2
"""While anything decodes, one part in so many of what waits for prefill is a step's, if that is more than a chunk."""
REST_PART = 2
"""What waits goes in one step if it is no more than a chunk and one part in so many of one: the rest would read all
weights once more. Prompts of 128 tokens at 1.5 a second, in a model of bench-700m's steps on two Zen 4 cores: the
median first token came after 267 instead of 376 ms, the last percentile after 1,302 instead of 1,470, and that of gaps
was 280 instead of 274 ms."""
STRETCH = 2
"""It is so many chunks at most. bench-700m on two cores, eight sequences decoding: a chunk of 64 tokens took 1.9 times
what the step takes without, 128 tokens 2.8 times, 256 tokens 5 times."""
_SETTLE_S = 10.0
"""Waiting counts from here: twice as long a prompt may be overtaken for so many more seconds of it, and so on. Where
more comes than can be served, a shorter time lets long prompts that have waited hold up all short ones."""
_URGENT_S = 10.0
"""A deadline nearer than this makes a sequence more urgent, down to first of all."""
_URGENT_TOKENS = 512
"""So many tokens of a prompt count for nothing when its deadline is there. With more, where too much comes, long
prompts that nearly ran out of time would hold up all short ones."""
_GROWTH_TOKENS = 1024
"""Room to grow in that a new run of blocks looks for: few answers are longer, and more would cost cached prefixes."""
_LAST = 1e12
"""Score of whoever comes behind all others."""
_COMPARED = 16
"""So many prefills that are next in line are weighed by what they share with those of the step."""
_SMOOTH = 1 / 8
"""Weight of the newest step in what a prefill token takes."""


@dataclass(slots=True, eq=False)
class Scheduled:
    """A sequence as the scheduler sees it. ``tokens`` are prompt and answer so far; keys and values of the first
    ``computed`` of them are in the cache, or will be when the step that runs is over."""

    request: Request
    tokens: list[int] = field(init=False)
    computed: int = 0
    table: BlockTable = field(default_factory=BlockTable)
    running: bool = False
    preemptions: int = 0
    cached_tokens: int = 0
    """Of its prompt, found in the cache when it got its first place."""
    degraded: bool = False
    """An expert was left out of what is in its cache: nobody else may use that."""
    need: Any = None
    """What `ColdCosts.need` says of its prompt."""
    cold_bytes: int = 0
    """What it would probably make groups load, when it got its first place."""
    number: int = 0
    due_s: float = float("inf")
    came_s: float = 0.0
    """Time of arrival; for a near deadline an earlier one."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.received_ids]

    @property
    def max_tokens(self) -> int:
        """Tokens that the sequence may grow to."""
        return len(self.request.prompt_ids) + self.request.stop.max_new_tokens

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def decoding(self) -> bool:
        """One token, sampled before, is all that has to be computed. False again after a preemption."""
        length = len(self.tokens)
        return length - self.computed == 1 and length > len(self.request.prompt_ids)


class Share(NamedTuple):
    """One sequence's part of a step: ``ids`` from position ``start`` on, and the sequence's ``blocks``, which have room
    for all up to the last of them. ``samples`` is False for a chunk that is not the last of what is to be computed."""

    sequence: Scheduled
    ids: tuple[int, ...]
    start: int
    blocks: tuple[int, ...]
    samples: bool
    decoding: bool


def _nearer(average: float, newest: float) -> float:
    return average + (newest - average) * _SMOOTH if average else newest


def _rank(sequence: Scheduled) -> tuple[float, int]:
    """Who goes first when there is not room for all; fixed for life."""
    return sequence.came_s, sequence.number


class Scheduler:
    """Waiting and running sequences of one engine. Not thread-safe: the engine's lock is around it.

    ``pool`` must be able to hold any one sequence at its full length.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, clock: Clock, colds: ColdCosts | None = None) -> None:
        if config.step_token_budget < 1 or config.prefill_chunk < 1:
            raise ConfigError("engine.step_token_budget: is by device, which nobody has said: see EngineConfig.sized")
        self._config, self._pool, self._clock, self._colds = config, pool, clock, colds
        self._token_s = self._step_s = 0.0  # what a prefill token takes, and a step that decodes; 0 until one was seen
        self._chunk_s = 0.0  # what a prefill token takes in steps of a whole chunk or more, which is less
        self._answer = 0.0  # tokens of an answer
        # One token each must fit into a step, or running sequences would stall.
        self._max_running = min(config.max_running, config.step_token_budget)
        self._waiting: list[Scheduled] = []
        self._running: list[Scheduled] = []  # by rank
        self._number = 0
        self._overtakes = 0  # admissions past the one that has waited longest, since it does
        self._owed = 0  # what rounding kept from the fair part, in tokens times FAIR_PART
        self._taken: dict[Scheduled, int] = {}  # tokens in the step that is being made
        self._history = 0  # tokens of it that make a prefill token of this step count twice
        self.preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch, preempted ones included."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    def add(self, sequence: Scheduled) -> None:
        """Queues a sequence.

        Raises:
            Overloaded: ``max_waiting`` requests wait already.
        """
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(
                f"the queue is full: {len(self._waiting)} requests wait (engine.max_waiting); retry later or elsewhere"
            )
        now_s = self._clock()
        self._number += 1
        sequence.number = self._number
        sequence.due_s = now_s + sequence.request.deadline.remaining_s()
        sequence.came_s = min(now_s, sequence.due_s - _URGENT_S)
        self._waiting.append(sequence)

    def remove(self, sequence: Scheduled) -> None:
        """Forgets a sequence, wherever it is, and releases its blocks. Does nothing when it is not here."""
        if sequence.running:
            if sequence.num_generated:
                self._answer = _nearer(self._answer, sequence.num_generated)
            self._leave(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)

    def sampled(self, sequence: Scheduled, token: int) -> None:
        """One more token of the answer: the next step of the sequence starts from it."""
        sequence.tokens.append(token)

    def ran(self, shares: Sequence[Share], took_s: float = 0.0) -> None:
        """The step has run, and took so long: its full blocks can be found by other sequences from now on. Without this
        call, as after a step that failed, nothing of it is."""
        size = self._pool.block_size
        num_tokens = sum(len(share.ids) for share in shares)
        if took_s and num_tokens > len(shares):  # some of it is prefill
            self._token_s = _nearer(self._token_s, took_s / num_tokens)
            if num_tokens - len(shares) >= self._config.prefill_chunk // 2:
                self._chunk_s = _nearer(self._chunk_s, took_s / num_tokens)
        if took_s and shares and shares[0].decoding:
            self._step_s = _nearer(self._step_s, took_s)
        for sequence, ids, start, _, _, _ in shares:
            end = start + len(ids)
            if end // size > sequence.table.registered and sequence.running and not sequence.degraded:
                self._pool.register(sequence.table, sequence.tokens, end)

    def next_step(self) -> list[Share]:
        """The next step's shares, decode tokens first; empty when there is nothing to do. What they hold counts as
        computed in the next call. May preempt."""
        self._taken = {}
        self._take_decodes()
        num_decoding = len(self._taken)
        if self._waiting or num_decoding < len(self._running):
            budget = self._prefill_budget(num_decoding)
            if budget > 0:
                self._history = self._config.history_tokens if num_decoding else 0
                self._take_prefills(budget)
        shares = []
        for number, (sequence, count) in enumerate(self._taken.items()):
            tokens, start = sequence.tokens, sequence.computed
            sequence.computed = end = start + count
            ids, blocks = tuple(tokens[start:end]), sequence.table.view()
            shares.append(Share(sequence, ids, start, blocks, end == len(tokens), number < num_decoding))
        return shares

    # -- what shares a step ----------------------------------------------------------------------------------------

    def _prefill_budget(self, num_decoding: int) -> int:
        """Prefill tokens that the step may hold beside its decode tokens."""
        left = self._config.step_token_budget - num_decoding
        if not num_decoding:
            return left
        chunk = self._config.prefill_chunk
        backlog = sum(len(s.tokens) - s.computed for s in self._waiting)
        backlog += sum(len(s.tokens) - s.computed for s in self._running if s not in self._taken)
        with_rest = chunk + chunk // REST_PART
        wanted = with_rest if backlog <= with_rest else max(chunk, backlog // BACKLOG_PART)
        return min(left, wanted, STRETCH * chunk)

    def _take_decodes(self) -> None:
        size = self._pool.block_size
        for sequence in [sequence for sequence in self._running if sequence.decoding]:
            if sequence.computed < len(sequence.table.blocks) * size:
                # A lower-ranked one that was preempted a moment ago has no blocks, and does not come here.
                self._taken[sequence] = 1
            elif sequence.running:
                self._take(sequence, 1, preempts=True)

    def _take_prefills(self, budget: int) -> None:
        now_s = self._clock()
        fair, self._owed = divmod(self._owed + budget, FAIR_PART)
        prefills = [s for s in self._running if s not in self._taken and s.computed < len(s.tokens)]
        oldest = self._first_of(prefills, now_s)
        full = False  # nobody else is admitted in this step
        places, its_turn = self._max_running - len(self._running), self._overtakes >= FAIR_PART - 1
        if places > 0 and self._waiting and (its_turn or len(self._waiting) <= places):
            first = min(self._waiting, key=lambda sequence: (self._too_late(sequence, now_s), *_rank(sequence)))
            if oldest is None or self._precedes(first, oldest, now_s):
                if self._admit(first, fair):
                    oldest = first
                    prefills.append(first)
                else:
                    full = its_turn  # what becomes free is for this one
        if oldest is not None:
            budget -= self._spend(oldest, fair, preempts=True)
        order = [(True, self._score(sequence, now_s), sequence.number, sequence) for sequence in prefills]
        order += self._next_admissions(now_s)
        order.sort(key=lambda entry: entry[:3])
        while order and budget > 0:
            sequence = order.pop(self._next_of(order, now_s))[3]
            if not sequence.running:
                if full or len(self._running) >= self._max_running:
                    continue
                full = not self._admit(sequence, budget)
                if full:
                    continue
            budget -= self._spend(sequence, budget, preempts=False)
        if oldest is not None and not self._taken:  # a budget of less than FAIR_PART tokens, and no blocks
            self._take(oldest, budget, preempts=True)

    def _first_of(self, sequences: Sequence[Scheduled], now_s: float) -> Scheduled | None:
        """The first by rank, which they are in, that is not too late; the first if all are."""
        return next(
            (each for each in sequences if not self._too_late(each, now_s)), sequences[0] if sequences else None
        )

    def _precedes(self, one: Scheduled, other: Scheduled, now_s: float) -> bool:
        late, others = self._too_late(one, now_s), self._too_late(other, now_s)
        return _rank(one) < _rank(other) if late == others else others

    def _too_late(self, sequence: Scheduled, now_s: float) -> bool:
        """At the pace of now, and with all prefill for itself, it would not have as long an answer as others have had
        before its deadline."""
        if math.isinf(sequence.due_s):
            return False
        left = len(sequence.tokens) - sequence.computed
        answer = min(self._answer, sequence.max_tokens - len(sequence.tokens))
        return now_s + left * self._chunk_s + answer * self._step_s > sequence.due_s

    def _next_admissions(self, now_s: float) -> list[tuple[bool, float, int, Scheduled]]:
        """Those that wait and there are places for, with their sort keys. Preempted ones go first: somebody has read
        the beginning of their answers."""
        places = self._max_running - len(self._running)
        if places <= 0 or not self._waiting:
            return []
        keys = [(s.preemptions == 0, self._score(s, now_s), s.number, s) for s in self._waiting]
        return heapq.nsmallest(places, keys, key=lambda entry: entry[:3]) if places < len(keys) else keys

    def _next_of(self, order: Sequence[tuple[bool, float, int, Scheduled]], now_s: float) -> int:
        """Which of the sorted prefills is next: the first, or one that is ahead of it for what it shares with those in
        the step."""
        if self._colds is None or len(order) == 1 or order[0][3].need is None:
            return 0
        beside = [s.need for s in self._taken if s.need is not None and not s.decoding]
        if not beside:
            return 0
        near = [(entry[0], self._score(entry[3], now_s, beside), entry[2]) for entry in order[:_COMPARED]]
        return near.index(min(near))

    def _score(self, sequence: Scheduled, now_s: float, beside: Sequence[Any] = ()) -> float:
        """Lowest first: tokens to compute and loads to wait for, over seconds waited, less the nearer the deadline."""
        left = len(sequence.tokens) - sequence.computed + self._cold_tokens(sequence, beside)
        if self._too_late(sequence, now_s):
            return _LAST + left
        urgency = min(1.0, max(0.0, sequence.due_s - now_s) / _URGENT_S)
        left -= min(left, _URGENT_TOKENS) * (1.0 - urgency)
        return left / (_SETTLE_S + now_s - sequence.came_s)

    def _cold_tokens(self, sequence: Scheduled, beside: Sequence[Any] = ()) -> float:
        """Prefill tokens that take as long as what a prompt makes groups load."""
        if self._colds is None or sequence.need is None or sequence.running or not self._token_s:
            return 0.0
        return self._colds.seconds(self._colds.cold_bytes(sequence.need, beside)) / self._token_s

    def _spend(self, sequence: Scheduled, budget: int, preempts: bool) -> int:
        """Puts a prefill chunk into the step that costs no more than ``budget``, of one token at
        least; what it costs, or the budget if that is less."""
        if not self._history or budget <= 0:
            return self._take(sequence, budget, preempts)
        start = sequence.computed + self._taken.get(sequence, 0)
        each = 1.0 + start / self._history
        count = self._take(sequence, max(1, int(budget / each)), preempts)
        return min(budget, math.ceil(count * each))

    def _take(self, sequence: Scheduled, wanted: int, preempts: bool) -> int:
        """Puts up to ``wanted`` more tokens of a running sequence into the step, as far as there are blocks; how many.
        With ``preempts`` those that came after it, and are not in the step yet, make room for the first one."""
        start = sequence.computed + self._taken.get(sequence, 0)
        wanted = min(wanted, len(sequence.tokens) - start)
        while wanted > 0:
            count = min(wanted, self._pool.reach(sequence.table) - start)
            if count > 0:
                covered = self._pool.extend(sequence.table, start + count)
                assert covered, "within reach"
                self._taken[sequence] = self._taken.get(sequence, 0) + count
                return count
            if not preempts or not self._preempt_for(sequence):
                return 0
        return 0

    # -- places and blocks -----------------------------------------------------------------------------------------

    def _admit(self, sequence: Scheduled, wanted: int) -> bool:
        """Gives a waiting sequence a place and its cached prefix, if there are blocks for its next ``wanted`` tokens
        beside the headroom. A preempted one needs room for all its tokens: it would soon be back."""
        pool, table = self._pool, sequence.table
        wanted = len(sequence.tokens) if sequence.preemptions else max(1, wanted)
        if not pool.fits(table, sequence.tokens, wanted, spare=self._headroom()):
            return False
        longest = min(self._waiting, key=_rank) is sequence
        self._overtakes = 0 if longest else self._overtakes + 1
        expected = min(sequence.max_tokens, len(sequence.tokens) + _GROWTH_TOKENS)
        table.expected = -(-expected // pool.block_size)
        sequence.computed = pool.match(table, sequence.tokens, count=not sequence.preemptions)
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
            if self._colds is not None and sequence.need is not None:
                sequence.cold_bytes = round(self._colds.cold_bytes(sequence.need))
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=_rank)
        sequence.running = True
        return True

    def _headroom(self) -> int:
        """Blocks that running sequences are about to need; none when nobody runs, so that somebody always can."""
        size, blocks = self._pool.block_size, 0
        for sequence in self._running:
            ahead = min(sequence.max_tokens, len(sequence.tokens) + self._config.admission_headroom)
            blocks += max(0, -(-ahead // size) - len(sequence.table.blocks))
        return blocks

    def _preempt_for(self, sequence: Scheduled) -> bool:
        """Takes the blocks of the running sequence that came last, maybe of ``sequence`` itself; False when it cannot
        be helped in this step."""
        victim = next(s for s in reversed(self._running) if s not in self._taken)
        if victim is sequence and not sequence.decoding:
            return False  # a prefill keeps what it has until somebody with a better claim wants it
        self._leave(victim)
        victim.preemptions += 1
        self.preemptions += 1
        self._waiting.append(victim)
        return victim is not sequence

    def _leave(self, sequence: Scheduled) -> None:
        self._pool.release(sequence.table)
        self._running.remove(sequence)
        sequence.running, sequence.computed = False, 0
