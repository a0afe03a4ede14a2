"""A scheduler under a model clock and a model cache, checked in every respect at every step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cluster.core import Deadline, Request, SamplingParams, StopParams
from cluster.engine.blocks import BlockPool
from cluster.engine.colds import ColdCosts
from cluster.engine.scheduler import STRETCH, Scheduled, Scheduler, Share
from cluster.settings import EngineConfig

NEVER = float("inf")


class World:
    """A scheduler, a clock that moves with each step, and a model of the cache: what each slot of each block holds is
    a number that stands for the token and everything before it. The next token follows from that number."""

    def __init__(
        self,
        num_blocks: int = 10_000,
        block_size: int = 4,
        step_s: float | Callable[[Sequence[Share]], float] = 0.01,
        colds: ColdCosts | None = None,
        **config: int,
    ) -> None:
        self.prefix_caching = bool(config.pop("prefix_caching", True))
        limits = {"max_running": 64, "max_waiting": 10_000, "admission_headroom": 64, **config}
        self.config = EngineConfig(**limits).sized(on_gpu=False)
        self.now_s, self._step_s = 100.0, step_s
        self.pool = BlockPool(num_blocks, block_size, self.prefix_caching)
        self.scheduler = Scheduler(self.config, self.pool, lambda: self.now_s, colds)
        self.colds = colds
        self.slots: list[list[int]] = [[0] * block_size for _ in range(num_blocks)]
        self.pasts: dict[Scheduled, list[int]] = {}
        self.ends: dict[Scheduled, tuple[int, int]] = {}
        self.first: dict[Scheduled, int] = {}
        self.steps = 0

    def add(self, prompt: Sequence[int], new: int, deadline_s: float = NEVER) -> Scheduled:
        deadline = Deadline(self.now_s + deadline_s, lambda: self.now_s)
        item = Scheduled(Request("r", tuple(prompt), SamplingParams(), StopParams(new), deadline))
        self.scheduler.add(item)
        item.need = self.colds.need(prompt) if self.colds is not None else None
        self.pasts[item] = []
        return item

    def remove(self, item: Scheduled) -> None:
        self.scheduler.remove(item)
        del self.pasts[item]

    def step(self, fails: bool = False) -> list[Share]:
        """One step, checked in every respect. Sequences that have all their tokens leave."""
        decoding = [item for item in self.pasts if item.running and item.decoding]
        shares = self.scheduler.next_step()
        took_s = self._step_s(shares) if callable(self._step_s) else self._step_s
        self.now_s += took_s
        self.steps += 1
        self._check_limits(shares, decoding)
        for share in shares:
            self._compute(share)
        if fails:
            for share in shares:
                self.remove(share.sequence)
            return shares
        self.scheduler.ran(shares, took_s)
        for item, _, _, _, samples, _ in shares:
            if samples:
                self.first.setdefault(item, self.steps)
                if item.num_generated + 1 >= item.request.stop.max_new_tokens:
                    self.remove(item)
                else:
                    self.scheduler.sampled(item, self.pasts[item][-1] % 7)
        self.check_blocks()
        return shares

    def _check_limits(self, shares: list[Share], decoding: list[Scheduled]) -> None:
        config = self.config
        assert len({share.sequence for share in shares}) == len(shares) <= config.max_running
        assert sum(len(share.ids) for share in shares) <= config.step_token_budget
        assert self.scheduler.num_running <= config.step_token_budget, "they could not all decode"
        kinds = [share.decoding for share in shares]
        assert kinds == sorted(kinds, reverse=True), "decode tokens come first"
        prefilled = sum(len(share.ids) for share in shares if not share.decoding)
        assert prefilled <= STRETCH * config.prefill_chunk or not any(kinds)
        taken = {share.sequence for share in shares}
        assert all(item in taken or not item.running for item in decoding), "a running stream was left out"
        assert shares or not self.pasts, "something always goes on"

    def _compute(self, share: Share) -> None:
        item, ids, start, blocks, samples, _ = share
        size, past = self.pool.block_size, self.pasts[item]
        end = start + len(ids)
        assert ids == tuple(item.tokens[start:end])
        assert blocks == tuple(item.table.blocks)
        assert len(blocks) == -(-end // size)
        assert samples == (end == len(item.tokens))
        for token in item.tokens[len(past) :]:
            past.append(hash((past[-1] if past else 0, token)) & 0xFFFFFFFF)
        for position in range(start, end):
            block = blocks[position // size]
            assert self.pool.num_references(block) == 1, "a shared block is written to"
            self.slots[block][position % size] = past[position]
        for number, block in enumerate(blocks):
            known = past[number * size : min(end, (number + 1) * size)]
            assert self.slots[block][: len(known)] == known, "the cache does not hold this sequence's past"
        last_end, last_preemptions = self.ends.get(item, (0, -1))
        # Each token once: a start elsewhere means that the sequence has just got its place.
        assert start == last_end or (last_preemptions < item.preemptions and start % size == 0)
        self.ends[item] = (end, item.preemptions)

    def check_blocks(self) -> None:
        held = Counter(block for item in self.pasts for block in item.table.blocks)
        assert self.pool.num_used == len(held)
        assert all(self.pool.num_references(block) == count for block, count in held.items())
        assert self.prefix_caching or all(count == 1 for count in held.values())
        assert len(self.pasts) == self.scheduler.num_running + self.scheduler.num_waiting

    def run(self, max_steps: int) -> None:
        start = self.steps
        while self.pasts:
            self.step()
            assert self.steps - start <= max_steps, "this does not end"
