"""`expertmesh bench engine` and `bench compare`: engines in processes of their own, asked in turns.

Every engine gets the same checkpoint, prompts, precision and number of threads. Rounds are interleaved, so that all
meet the same machine; a ratio is of two engines in the same round, and its spread is over the rounds.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.children import end
from cluster.bench.peers.environments import Peer
from cluster.config import COMPUTE_ENVIRONMENT
from cluster.errors import InternalError, InvalidArgument

Progress = Callable[[str], None]
ROUNDS = 3
INPROC, GROUPS = "expertmesh-inproc", "expertmesh-groups"
_DISPATCH = ("dispatch", "wire", "combine", "expert.straggler")
_EXPERTS = ("expert.queue", "expert.compute")


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts of random tokens, ``batch`` at once, and how many tokens each gets."""

    batches: Sequence[int]
    prompt: int
    new: int
    rounds: int
    seed: int

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1:
            raise InvalidArgument("--batch", list(self.batches), "must be numbers from 1")
        if self.prompt < 1:
            raise InvalidArgument("--prompt", self.prompt, "must be at least 1")
        if self.new < 2:
            raise InvalidArgument("--new", self.new, "must be at least 2: the first token is the prefill's")
        if self.rounds < 1:
            raise InvalidArgument("--rounds", self.rounds, "must be at least 1")


@dataclass(slots=True)
class Asked:
    """What one engine took in all rounds of one batch size."""

    prefill_ms: list[float] = field(default_factory=list)
    decode_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    dispatch_ms: list[float] = field(default_factory=list)
    experts_ms: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class Process:
    """An engine's process."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process
        self.versions: dict[str, str] = {}

    def wait_until_ready(self) -> None:
        """Returns when it has loaded."""
        self.versions = self._read()["versions"]

    def generate(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """See `cluster.bench.engine.Generator`; peers tell ``seconds`` and ``tokens`` only."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "new": new}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InternalError(f"{self.name} ended; the end of its log is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def engine_process(name: str, command: list[str], environment: dict[str, str], log: Path) -> Iterator[Process]:
    """The process of an engine, whose standard error goes to ``log``; the end of it is shown if it fails."""
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **environment},
        )
    assert process.stdin is not None
    try:
        yield Process(name, process)
    except InternalError:
        sys.stderr.write(f"--- {name}: {log}\n" + "\n".join(log.read_text("utf-8").splitlines()[-15:]) + "\n")
        raise
    finally:
        end(process)


def own_command(settings: dict[str, Any]) -> list[str]:
    """The command of one of our own engines."""
    return [sys.executable, "-m", "cluster.bench.engine", json.dumps(settings)]


def measure(
    engines: dict[str, dict[str, Any]],
    peers: Sequence[Peer],
    model: str,
    dtype: str,
    threads: int,
    load: Load,
    vocab_size: int,
    logs: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Starts all engines, asks them in turns, and compares.

    ``engines`` are our own by name, with their settings. Returns ``rows``, ``ratios`` and ``versions``.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = []
        # One after the other: loading needs the cores too.
        for name, settings in engines.items():
            command = own_command(settings)
            processes.append(
                stack.enter_context(engine_process(name, command, COMPUTE_ENVIRONMENT, logs / f"{name}.log"))
            )
            progress(f"loading {name}")
            processes[-1].wait_until_ready()
        for peer in peers:
            command = peer.command(model, dtype, threads)
            log = logs / f"{peer.name}.log"
            processes.append(stack.enter_context(engine_process(peer.name, command, peer.environment, log)))
            progress(f"loading {peer.name}")
            processes[-1].wait_until_ready()
        results = {batch: _one_batch(processes, batch, load, vocab_size, progress) for batch in load.batches}
        versions = {process.name: process.versions for process in processes}
    rows = [_row(name, dtype, batch, load, asked) for batch, by in results.items() for name, asked in by.items()]
    return {"rows": rows, "ratios": _ratios(results), "agreement": _agreement(results), "versions": versions}


def _one_batch(
    processes: Sequence[Process], batch: int, load: Load, vocab_size: int, progress: Progress
) -> dict[str, Asked]:
    asked = {process.name: Asked() for process in processes}
    draw = random.Random(load.seed * 1000 + batch)

    def prompts() -> list[list[int]]:
        return [[draw.randrange(vocab_size) for _ in range(load.prompt)] for _ in range(batch)]

    for process in processes:  # not counted: shapes that an engine has not met yet
        process.generate(prompts(), 2)
    for number in range(load.rounds):
        progress(f"batch {batch}: round {number + 1} of {load.rounds}")
        first, whole = prompts(), prompts()
        turn = [*processes[number % len(processes) :], *processes[: number % len(processes)]]
        for process in turn:
            one = process.generate(first, 1)
            all_ = process.generate(whole, load.new)
            mine = asked[process.name]
            mine.prefill_ms.append(1e3 * one["seconds"])
            gaps = all_.get("gaps_s")
            decode_s = statistics.median(gaps) if gaps else (all_["seconds"] - one["seconds"]) / (load.new - 1)
            mine.decode_ms.append(1e3 * decode_s)
            mine.tokens_per_s.append(batch * load.new / all_["seconds"])
            mine.tokens.extend(all_["tokens"])
            if "stages_s" in all_:
                for stages, into in ((_DISPATCH, mine.dispatch_ms), (_EXPERTS, mine.experts_ms)):
                    spent_s = sum(all_["stages_s"].get(stage, 0.0) for stage in stages)
                    into.append(1e3 * spent_s / (load.new - 1))
    return asked


def _row(name: str, dtype: str, batch: int, load: Load, asked: Asked) -> dict[str, Any]:
    row: dict[str, Any] = {"engine": name, "dtype": dtype, "batch": batch, "prompt": load.prompt, "new": load.new}
    for key, values in (("prefill_ms", asked.prefill_ms), ("decode_ms_per_step", asked.decode_ms)):
        row |= {key: statistics.median(values), f"{key}_low": min(values), f"{key}_high": max(values)}
    row["tokens_per_s"] = statistics.median(asked.tokens_per_s)
    for key, values in (("in_dispatch_ms", asked.dispatch_ms), ("in_experts_ms", asked.experts_ms)):
        if values:
            row[key] = statistics.median(values)
    row["samples"] = len(asked.prefill_ms)
    return row


def _ratios(results: dict[int, dict[str, Asked]]) -> list[dict[str, Any]]:
    """How much faster our engines are than each other engine: of tokens a second, so more is better."""
    found = []
    for batch, by in results.items():
        for mine in (INPROC, GROUPS):
            for other in by:
                if mine not in by or other == mine or (mine == INPROC and other == GROUPS):
                    continue
                ratio: dict[str, Any] = {"engine": mine, "than": other, "batch": batch}
                for key in ("prefill", "decode"):
                    ours, theirs = getattr(by[mine], f"{key}_ms"), getattr(by[other], f"{key}_ms")
                    each = [b / a for a, b in zip(ours, theirs, strict=True)]
                    ratio |= {key: statistics.median(each), f"{key}_low": min(each), f"{key}_high": max(each)}
                found.append(ratio)
    return found


def _agreement(results: dict[int, dict[str, Asked]]) -> dict[str, float]:
    """Share of greedy tokens that are those of the first engine (random models have near ties)."""
    shares: dict[str, list[float]] = {}
    for by in results.values():
        wanted = next(iter(by.values())).tokens
        for name, asked in by.items():
            same = [
                a == b
                for mine, theirs in zip(asked.tokens, wanted, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            ]
            shares.setdefault(name, []).append(sum(same) / max(1, len(same)))
    return {name: statistics.mean(values) for name, values in shares.items()}
