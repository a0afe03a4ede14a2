"""One of our own engines in a process of its own, asked over standard input and output as peers are.

Run as ``python -m cluster.bench.engine '{"model": DIR, "groups": N, ...}'`` (fields of the configuration). With groups,
each is a process too, reached over the real links; there is no Ray, whose part is life cycle. Answers as
`cluster.bench.peers.program` does, with the seconds of each stage beside.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from cluster.api.router import Router
from cluster.bench.children import end
from cluster.config import COMPUTE_ENVIRONMENT, Config, load_config
from cluster.core import Deadline, GroupInfo, Membership, Request, SamplingParams, StopParams, StoreFacts
from cluster.engine.engine import Engine
from cluster.engine.events import TokenEvent
from cluster.errors import InternalError
from cluster.experts.group import ExpertGroup
from cluster.placement.planner import plan_copies, table_from_groups
from cluster.transport.base import Transport
from cluster.transport.inproc import InprocTransport
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import build_skeleton

START_TIMEOUT_S = 300.0
GENERATE_TIMEOUT_S = 600.0
_GROUP = "--group"
QUIET = {"traces": "off", "metrics_listen": "off"}
"""Peers tell nobody either; what traces cost is `bench trace-cost`."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def router_of(config: Config) -> Iterator[Router]:
    """A router with its groups, in this process or in processes of their own."""
    with system_of(config) as (router, _):
        yield router


@contextmanager
def system_of(config: Config) -> Iterator[tuple[Router, Callable[[], list[GroupInfo]]]]:
    """The same, and what asks its groups how they are."""
    checkpoint = Checkpoint(config.model)
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    per_layer = [layer.num_experts for layer in weights.skeleton.moe_layers]
    holdings = plan_copies(per_layer, max(1, config.groups), config.copies)
    threads = config.threads or cores()
    with ExitStack() as stack:
        connect: Callable[[GroupInfo, Deadline], Transport] | None = None
        if config.groups == 0:
            group = ExpertGroup(0, holdings[0], config, threads, listen=False)
            stack.callback(group.close)
            infos = {0: group.info()}

            def ask() -> list[GroupInfo]:
                return [group.info()]

            def connect(info: GroupInfo, _deadline: Deadline) -> Transport:
                return InprocTransport(info.group, group.host)
        else:
            infos, asking = {}, threading.Lock()
            started = [stack.enter_context(_group_process(config, number)) for number in range(config.groups)]
            for number, process in enumerate(started):
                infos[number] = _read_info(process)

            def ask() -> list[GroupInfo]:
                with asking:  # the router's own thread does too
                    return [_asked_again(process) for process in started]

        table = table_from_groups(1, 1, per_layer, infos.values())
        router = Router(config, lambda: Membership(table, {info.group: info for info in ask()}), threads, connect)
        stack.callback(router.close)
        yield router, ask


@contextmanager
def _group_process(config: Config, number: int) -> Iterator[subprocess.Popen[str]]:
    settings = {"model": config.model, "groups": config.groups, "dtype": config.dtype, "threads": config.threads}
    settings |= {"expert_dtype": config.expert_dtype}
    settings["data_plane"] = {"secret": config.data_plane.secret}
    settings |= {"telemetry": QUIET, "expert_memory": config.expert_memory}
    settings |= {"predict_experts": config.predict_experts, "expert_reads": config.expert_reads}
    settings |= {"warm_up": config.warm_up, "copies": config.copies}
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.bench.engine", _GROUP, str(number), json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **COMPUTE_ENVIRONMENT},
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        end(process)


def _read_info(process: subprocess.Popen[str]) -> GroupInfo:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise InternalError("an expert group's process did not start")
    fields = json.loads(line)
    fields["holdings"] = tuple(tuple(experts) for experts in fields["holdings"])
    if fields["store"] is not None:
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields["store"].items()}
        fields["store"] = StoreFacts(**facts)
    return GroupInfo(**fields)


def _asked_again(process: subprocess.Popen[str]) -> GroupInfo:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return _read_info(process)


def _serve_group(number: int, config: Config) -> None:
    checkpoint = Checkpoint(config.model)
    weights = WeightMap(checkpoint, build_skeleton(checkpoint, torch.float32))
    per_layer = [layer.num_experts for layer in weights.skeleton.moe_layers]
    holdings = plan_copies(per_layer, config.groups, config.copies)
    threads = config.threads or max(1, cores() // config.groups)
    group = ExpertGroup(number, holdings[number], config, threads)
    while True:
        sys.stdout.write(json.dumps(dataclasses.asdict(group.info())) + "\n")
        sys.stdout.flush()
        if not sys.stdin.readline():
            break
    group.close()


class Generator:
    """Greedy tokens for several prompts at once, through the engine; nothing of gRPC."""

    def __init__(self, router: Router) -> None:
        self._engine = router.engine
        self._count = 0

    def __call__(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """``seconds`` until the last token of all; ``tokens``; when the first ones came (``first_s``, by
        `time.perf_counter`); and from the first token of the prompt that began last,
        from when on every step only decodes, to its last: ``gaps_s`` between tokens, and ``stages_s`` of the steps."""
        started_s = time.perf_counter()
        deadline = Deadline.after(GENERATE_TIMEOUT_S)
        streams = []
        for prompt in prompts:
            self._count += 1
            stream = Stream(self._engine)
            request = Request(f"bench-{self._count}", tuple(prompt), SamplingParams(), StopParams(new), deadline)
            self._engine.submit(request, stream.hear)
            streams.append(stream)
        for stream in streams:
            stream.wait(GENERATE_TIMEOUT_S)
        last = max(streams, key=lambda stream: stream.times_s[0])
        return {
            "seconds": max(stream.times_s[-1] for stream in streams) - started_s,
            "tokens": [stream.tokens for stream in streams],
            "gaps_s": [later - earlier for earlier, later in itertools.pairwise(last.times_s)],
            "stages_s": last.stages_s,
            "first_s": [stream.times_s[0] for stream in streams],
        }


class Stream:
    """Tokens of one prompt and when they came."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.stages_s: dict[str, float] = {}
        self._before_s: dict[str, float] = {}
        self._error: Exception | None = None
        self._ended = threading.Event()

    def hear(self, event: TokenEvent) -> None:
        if event.token is not None:
            self.tokens.append(event.token.token)
            self.times_s.append(time.perf_counter())
            self._before_s = self._before_s or self._engine.spent()
        if event.last:
            self._error = event.error
            self.stages_s = {
                name: spent - self._before_s.get(name, 0.0) for name, spent in self._engine.spent().items()
            }
            self._ended.set()

    def wait(self, timeout_s: float) -> None:
        if not self._ended.wait(timeout_s):
            raise InternalError(f"the engine did not finish within {timeout_s:g} s")
        if self._error is not None:
            raise self._error


def main() -> None:
    """Serves an engine, or one group of one, until standard input ends."""
    if sys.argv[1] == _GROUP:
        _serve_group(int(sys.argv[2]), load_config(flags=json.loads(sys.argv[3]), environ={}))
        return
    settings = json.loads(sys.argv[1])
    if settings.get("data_plane", {}).get("secret") is None:
        settings["data_plane"] = {**settings.get("data_plane", {}), "secret": "bench"}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings.setdefault("telemetry", QUIET)
    with router_of(load_config(flags=settings, environ={})) as router:
        generate = Generator(router)
        answers.write(json.dumps({"versions": {"torch": torch.__version__}}) + "\n")
        answers.flush()
        for line in sys.stdin:
            asked = json.loads(line)
            answers.write(json.dumps(generate(asked["prompts"], asked["new"])) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
