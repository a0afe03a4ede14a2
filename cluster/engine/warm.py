"""Synthetic requests, before a router says that it is ready: who comes first pays for nothing that is set up once.

They go through an engine of their own, so that nobody counts them: scheduler, trunk, every link, every group, sampler,
and text. Alone, and many at a time, with prompts from one token to a whole chunk, so that kernels have met what real
batches look like.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import NamedTuple

from cluster.core import Deadline, Request, SamplingParams, StopParams
from cluster.engine.engine import Engine
from cluster.engine.events import TokenEvent
from cluster.engine.scheduler import STRETCH
from cluster.engine.text import Tokenizer
from cluster.errors import DeadlineExceeded, ExpertMeshError
from cluster.model.kv import KvStore
from cluster.model.trunk import Trunk
from cluster.settings import EngineConfig

TIMEOUT_S = 300.0
_NEW = 3
_LONGEST = 1024


class Wave(NamedTuple):
    """So many prompts at once, of so many tokens."""

    streams: int
    prompt: int


def waves(config: EngineConfig, context_length: int) -> list[Wave]:
    """One long prompt, and then more and more at a time, as far as the limits let them."""
    chunk = min(STRETCH * config.prefill_chunk, config.step_token_budget)
    longest = max(1, min(chunk, _LONGEST, context_length - _NEW))
    most = min(config.max_running, config.step_token_budget)
    shapes = [Wave(1, longest), Wave(2, 16), Wave(4, 4), Wave(8, 2), Wave(16, 1)]
    return [Wave(min(streams, most), min(prompt, longest)) for streams, prompt in shapes]


def warm_up(
    trunk: Trunk,
    tokenizer: Tokenizer | None,
    config: EngineConfig,
    context_length: int,
    kv_bytes_per_token: int,
    threads: int,
) -> None:
    """Runs the waves; the trunk's store is to be replaced afterwards.

    Raises:
        ExpertMeshError: whatever a request failed with.
    """
    size, shapes = config.block_size, waves(config, context_length)
    blocks = max(streams * -(-(prompt + _NEW) // size) for streams, prompt in shapes)
    small = dataclasses.replace(
        config,
        max_waiting=max(wave.streams for wave in shapes),
        kv_cache_bytes=blocks * size * max(1, kv_bytes_per_token),
        prefix_caching=False,
        admission_headroom=0,
    )
    trunk.store = KvStore(blocks, size)
    engine = Engine(trunk.forward, tokenizer, small, kv_bytes_per_token, threads)
    try:
        for streams, prompt in shapes:
            answers = [_Answer() for _ in range(streams)]
            for number, answer in enumerate(answers):
                # Different tokens, for different experts.
                ids = tuple((number * prompt + place) % trunk.vocab_size for place in range(prompt))
                name = f"warm-up-{streams}-{number}"
                request = Request(name, ids, SamplingParams(), StopParams(_NEW), Deadline.after(TIMEOUT_S))
                engine.submit(request, answer.hear)
            for answer in answers:
                answer.wait()
    finally:
        engine.close()


class _Answer:
    """The end of a request."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._error: ExpertMeshError | None = None

    def hear(self, event: TokenEvent) -> None:
        if event.last:
            self._error = event.error
            self._ended.set()

    def wait(self) -> None:
        if not self._ended.wait(TIMEOUT_S):
            raise DeadlineExceeded(f"a synthetic request did not end within {TIMEOUT_S:g} s")
        if self._error is not None:
            raise self._error
