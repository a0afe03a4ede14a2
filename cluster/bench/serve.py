"""`expertmesh bench serve`: an open-loop load through a server's real port, from client processes of their own.

This drives: it finds out what is served, deals the load out to the processes, starts them together, and collects what
they saw. What a load is: `load.py`. What a process does: `client.py`. What comes of it: `figures.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.api.client import Client
from cluster.bench import figures
from cluster.bench.load import Arrival, Outcome
from cluster.config import split_address
from cluster.errors import ExpertMeshError, InternalError, InvalidArgument, Unavailable

START_S, HEAD_START_S, SLACK_S, PROGRESS_S, END_S = 60.0, 0.5, 15.0, 5.0, 10.0
PROTOCOLS = ("grpc", "openai")

Progress = Callable[[str], None]
Inbox = queue.SimpleQueue[tuple[int, dict[str, Any] | None]]


@dataclass(frozen=True, slots=True)
class Target:
    """A running server, and what it told about itself."""

    protocol: str
    address: str
    model: str
    vocab_size: int
    context_length: int | None
    """None: it does not tell."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More keys of the result."""


@dataclass(frozen=True, slots=True)
class Generator:
    """Who sends: how many processes, how long a request may take, how many requests come before and are not counted."""

    clients: int = 2
    timeout_s: float = 120.0
    warmup: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= 64:
            raise InvalidArgument("--clients", self.clients, "must be from 1 to 64 processes")
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            raise InvalidArgument("--timeout", self.timeout_s, "must be more than 0 seconds")
        if not 0 <= self.warmup <= 1000:
            raise InvalidArgument("--warmup", self.warmup, "must be from 0 to 1000 requests")


# -- what is measured ----------------------------------------------------------------------------------------------


def grpc_target(address: str) -> Target:
    """One of our own servers.

    Raises:
        Unavailable: nobody answers.
    """
    split_address("--server", address)
    with Client(address, timeout_s=30) as client:
        info, status = client.model_info(), client.status()
    facts = {
        "arch": info.arch,
        "dtype": info.dtype,
        "groups": info.num_groups,
        "links": [group.transport for group in status.groups],
    }
    return Target("grpc", address, info.name, info.vocab_size, info.context_length, facts)


def openai_target(address: str, model: str | None, vocab_size: int) -> Target:
    """An OpenAI-compatible server; ``model`` is the first that it lists if not given. It does not tell its vocabulary.

    Raises:
        Unavailable: nobody answers, or not like such a server.
    """
    split_address("--server", address)
    if vocab_size < 1:
        raise InvalidArgument(
            "--vocab-size", vocab_size, "must be the number of token ids, which the server does not tell"
        )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/v1/models", timeout=30) as reply:
            listed = {entry["id"]: entry for entry in json.load(reply)["data"]}
    except (OSError, urllib.error.URLError, ValueError, KeyError, TypeError) as exc:
        raise Unavailable(f"--server: http://{address}/v1/models does not answer as it should: {exc}") from exc
    if not listed or (model is not None and model not in listed):
        raise InvalidArgument("--openai-model", model, f"the server has {', '.join(listed) or 'no models'}")
    name = model if model is not None else next(iter(listed))
    length = listed[name].get("max_model_len")
    return Target("openai", address, name, vocab_size, length if isinstance(length, int) else None)


# -- client processes ----------------------------------------------------------------------------------------------


class ClientProcess:
    """A process of `cluster.bench.client`. What it says arrives in ``inbox`` as (number, line), then (number, None)."""

    def __init__(self, number: int, job: dict[str, Any], folder: Path, inbox: Inbox) -> None:
        self.number = number
        file = folder / f"job-{number}.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        self._errors = folder / f"errors-{number}"
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.bench.client", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        threading.Thread(target=self._read, args=(inbox,), daemon=True).start()

    def _read(self, inbox: Inbox) -> None:
        assert self._process.stdout is not None
        try:
            with self._process.stdout as lines:
                for line in lines:
                    inbox.put((self.number, json.loads(line)))
        finally:
            inbox.put((self.number, None))

    def start(self, zero_s: float) -> None:
        """Lets it send. A process that is gone is noticed where its lines are read."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{zero_s!r}\n")
            self._process.stdin.flush()

    def last_words(self) -> str:
        """The last line of its standard error."""
        lines = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def hang_up(self) -> None:
        """The end of its standard input, which ends it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait(self) -> None:
        """Waits for its end, and makes one after a while."""
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_S)


class Fleet:
    """The client processes of a run, one a job. Use as a context manager: it ends them."""

    def __init__(self, jobs: Sequence[dict[str, Any]]) -> None:
        self._jobs = jobs
        self._inbox: Inbox = queue.SimpleQueue()
        self._folder = tempfile.TemporaryDirectory(prefix="expertmesh-bench-")
        self.processes: list[ClientProcess] = []

    def __enter__(self) -> Fleet:
        try:
            for number, job in enumerate(self._jobs):
                self.processes.append(ClientProcess(number, job, Path(self._folder.name), self._inbox))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self.processes:
            process.hang_up()
        for process in self.processes:
            process.wait()
        self._folder.cleanup()

    def next(self, until_s: float) -> tuple[int, dict[str, Any] | None] | None:
        """What a process said; None if nobody does until a time of the monotonic clock."""
        try:
            return self._inbox.get(timeout=max(0.0, until_s - time.monotonic()))
        except queue.Empty:
            return None


# -- a run ---------------------------------------------------------------------------------------------------------


def warmup_of(arrivals: Sequence[Arrival], number: int) -> list[Arrival]:
    """Requests of every class in turn, of the lengths that the load has."""
    by_class: dict[str, list[Arrival]] = {}
    for item in arrivals:
        by_class.setdefault(item.kind, []).append(item)
    kinds = list(by_class.values())
    chosen = [kinds[i % len(kinds)] for i in range(number)]
    # Prompts of their own, or a server with a prefix cache would know some of those that are measured.
    return [replace(kind[i // len(kinds) % len(kind)], prompt_ids=None) for i, kind in enumerate(chosen)]


def run_load(
    target: Target, arrivals: Sequence[Arrival], seed: int, generator: Generator, progress: Progress
) -> tuple[list[Outcome], dict[str, int]]:
    """Every request's outcome, one for each arrival and in their order, and how the warm-up went.

    Raises:
        Unavailable: nobody answers, or no request of the warm-up was answered.
        InternalError: a client process did not start.
    """
    number = min(generator.clients, len(arrivals))
    progress(f"starting {number} client processes")
    warmup = warmup_of(arrivals, generator.warmup)
    jobs = [_job(target, arrivals, warmup, seed, generator, i, number) for i in range(number)]
    with Fleet(jobs) as fleet:
        if warmup:
            progress(f"warming up with {len(warmup)} requests")
        slowest = max(len(job["warmup"]) for job in jobs)
        told = _until_ready(fleet, time.monotonic() + START_S + slowest * (generator.timeout_s + SLACK_S))
        failed = [item for item in told if item["code"] != "OK"]
        if warmup and len(failed) == len(told):
            raise Unavailable(f"no request of the warm-up was answered: {failed[0]['code']}: {failed[0]['detail']}")
        found = _send(fleet, arrivals, generator, progress)
    outcomes = [
        _outcome(i, arrival, found[i]) if i in found else Outcome.lost(i, arrival) for i, arrival in enumerate(arrivals)
    ]
    return outcomes, {"requests": len(told), "failed": len(failed)}


def _job(
    target: Target,
    arrivals: Sequence[Arrival],
    warmup: Sequence[Arrival],
    seed: int,
    generator: Generator,
    number: int,
    of: int,
) -> dict[str, Any]:
    # Every n-th request: a burst is shared by all processes.
    return {
        "protocol": target.protocol,
        "address": target.address,
        "model": target.model,
        "vocab_size": target.vocab_size,
        "seed": seed,
        "timeout_s": generator.timeout_s,
        "requests": [{"index": i, **_lengths(arrivals[i])} for i in range(number, len(arrivals), of)],
        "warmup": [{"index": -1 - i, **_lengths(warmup[i])} for i in range(number, len(warmup), of)],
    }


def _lengths(arrival: Arrival) -> dict[str, Any]:
    return {"prompt_tokens": arrival.prompt_tokens, **arrival.to_json()}


def _until_ready(fleet: Fleet, until_s: float) -> list[dict[str, Any]]:
    warmup: list[dict[str, Any]] = []
    waiting = {process.number for process in fleet.processes}
    while waiting:
        item = fleet.next(until_s)
        if item is None:
            raise InternalError(f"{len(waiting)} client processes were not ready in time")
        number, line = item
        if line is None:
            raise InternalError(f"a client process ended: {fleet.processes[number].last_words()}")
        if "fatal" in line:
            raise Unavailable(line["fatal"])
        warmup += line["warmup"]
        waiting.discard(number)
    return warmup


def _send(
    fleet: Fleet, arrivals: Sequence[Arrival], generator: Generator, progress: Progress
) -> dict[int, dict[str, Any]]:
    """Starts all processes at one time and collects what they tell, by index."""
    zero_s = time.monotonic() + HEAD_START_S
    for process in fleet.processes:
        process.start(zero_s)
    last_s = arrivals[-1].at_s
    progress(f"sending {len(arrivals)} requests in {last_s:.0f} s")
    until_s = zero_s + last_s + generator.timeout_s + SLACK_S
    found: dict[int, dict[str, Any]] = {}
    failed = 0
    running = {process.number for process in fleet.processes}
    tell_s = zero_s + PROGRESS_S
    while running and time.monotonic() < until_s:
        item = fleet.next(min(until_s, tell_s))
        if time.monotonic() >= tell_s:
            planned = sum(arrival.at_s <= time.monotonic() - zero_s for arrival in arrivals)
            progress(
                f"{planned} of {len(arrivals)} requests sent, {planned - len(found)} in flight, {failed} failed, "
                f"{time.monotonic() - zero_s:.0f} s"
            )
            tell_s = time.monotonic() + PROGRESS_S
        if item is None:
            continue
        number, line = item
        if line is None:
            running.discard(number)
        elif "index" in line:
            found[line["index"]] = line
            failed += line["code"] != "OK"
    return found


def _outcome(index: int, arrival: Arrival, line: dict[str, Any]) -> Outcome:
    return Outcome(
        index,
        arrival.kind,
        arrival.prompt_tokens,
        arrival.new_tokens,
        arrival.at_s,
        line["sent_s"],
        tuple((at_s, number) for at_s, number in line["arrivals"]),
        line["end_s"],
        line["code"],
        line["detail"],
        line["tokens"],
    )


def measure(
    target: Target, arrivals: Sequence[Arrival], seed: int, generator: Generator, progress: Progress
) -> tuple[dict[str, Any], list[Outcome]]:
    """Runs a load; the figures (see the README for the keys), and the outcomes that they are of."""
    outcomes, warmup = run_load(target, arrivals, seed, generator, progress)
    result = {
        "protocol": target.protocol,
        "server": target.address,
        "model": target.model,
        **target.facts,
        "seed": seed,
        "clients": min(generator.clients, len(arrivals)),
        "timeout_s": generator.timeout_s,
        "warmup": warmup,
        **figures.summary(outcomes),
    }
    result["problems"] = figures.problems(result)
    if target.protocol == "grpc":
        result |= _status_after(target, result["problems"])
    return result, outcomes


def _status_after(target: Target, found: list[str]) -> dict[str, Any]:
    """The most sequences that shared a step since the server's start, and how often its links fell back."""
    try:
        with Client(target.address, timeout_s=30) as client:
            status = client.status()
    except ExpertMeshError as exc:
        found.append(f"the server gave no status afterwards: {exc}")
        return {"max_batch": None, "fallbacks": None}
    return {
        "max_batch": status.engine.max_batch,
        "fallbacks": sum(group.link.fallbacks for group in status.groups),
    }
