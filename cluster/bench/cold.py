"""`expertmesh bench cold`: what too little memory for experts costs, and what prediction gives back.

Three systems of the same model are there at once, and the same prompts go to each in turn: all experts resident, a
budget with loads on demand, and the same budget with prediction. All must give the same tokens. Groups are processes
behind the real links. Cold is on the disk, or mapped files that the system has in its page cache (they were read a
moment ago); a cold stall is a layer call that waited for a load.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.api.router import Router
from cluster.bench.engine import QUIET, Stream, cores, system_of
from cluster.bench.trace_cost import cost_of
from cluster.config import load_config
from cluster.core import Deadline, GroupInfo, Request, SamplingParams, StopParams, StoreFacts
from cluster.engine.events import TokenEvent
from cluster.errors import InvalidArgument

RESIDENT, ON_DEMAND, PREDICTED = "resident", "on_demand", "predicted"
MODES = (RESIDENT, ON_DEMAND, PREDICTED)
TIMEOUT_S = 600.0
_TURNS = ("off", "on", "control")
_TURN_STEPS, _COST_TOKENS = 4, 200

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """``share``: of a group's experts that the budget holds. ``streams`` prompts at once, ``rounds`` times."""

    share: float = 0.5
    rounds: int = 16
    streams: int = 8
    prompt: int = 24
    new: int = 24
    seed: int = 0
    disk: bool = True
    """Cold is on the disk; otherwise in the page cache."""
    pairs: int = 0
    """Runs in which prediction is switched on and off where the budget holds all experts."""

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise InvalidArgument("--budget", self.share, "must be more than 0 and less than 1: a share of the experts")
        for name in ("rounds", "streams", "prompt", "new"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"--{name}", getattr(self, name), "must be at least 1")


@dataclass(slots=True)
class _System:
    router: Router
    ask: Callable[[], list[GroupInfo]]
    before: list[StoreFacts] = field(default_factory=list)
    firsts_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)

    def run(self, prompts: list[list[int]], new: int, counts: bool) -> list[list[int]]:
        """The answers; their times too, if they count."""
        deadline = Deadline.after(TIMEOUT_S)
        streams = []
        for prompt in prompts:
            stream, sent_s = Stream(self.router.engine), time.perf_counter()
            request = Request(f"cold-{id(stream)}", tuple(prompt), SamplingParams(), StopParams(new), deadline)
            self.router.engine.submit(request, stream.hear)
            streams.append((stream, sent_s))
        for stream, sent_s in streams:
            stream.wait(TIMEOUT_S)
            if counts:
                self.firsts_s.append(stream.times_s[0] - sent_s)
                self.gaps_s += np.diff(stream.times_s).tolist()
        return [stream.tokens for stream, _ in streams]

    def stores(self) -> list[StoreFacts]:
        return [info.store for info in self.ask() if info.store is not None]


def measure(model: Path, groups: int, load: Load, progress: Progress) -> dict[str, Any]:
    """The figures of all three, and whether their tokens are the same."""
    rng = random.Random(load.seed)
    with ExitStack() as stack:
        progress("starting the resident system")
        systems = {RESIDENT: _start(stack, model, groups, "all", load, predict=False)}
        infos = systems[RESIDENT].ask()
        budget = int(load.share * max(info.expert_bytes for info in infos))
        for mode in (ON_DEMAND, PREDICTED):
            progress(f"starting the {mode} system, {budget} bytes a group")
            systems[mode] = _start(stack, model, groups, str(budget), load, mode == PREDICTED)
        vocab = systems[RESIDENT].router.served.info.vocab_size
        same = True
        for number in range(load.rounds + 1):  # the first is to warm up
            prompts = [[rng.randrange(vocab) for _ in range(load.prompt)] for _ in range(load.streams)]
            answers = {}
            for turn in range(len(MODES)):
                mode = MODES[(number + turn) % len(MODES)]
                answers[mode] = systems[mode].run(prompts, load.new, counts=number > 0)
            same = same and answers[RESIDENT] == answers[ON_DEMAND] == answers[PREDICTED]
            if number == 0:
                for system in systems.values():
                    system.before = system.stores()
            progress(f"round {number} of {load.rounds}")
        found: dict[str, Any] = {mode: _figures(system) for mode, system in systems.items()}
        if load.pairs:
            progress("starting a system that predicts, with a budget for all")
            full = _start(stack, model, groups, str(max(info.expert_bytes for info in infos)), load, predict=True)
            found["full_budget"] = _cost(full, load, rng, progress)
    stalls = found[ON_DEMAND]["cold_stalls"], found[PREDICTED]["cold_stalls"]
    return {
        **found,
        "same_tokens": same,
        "budget_bytes": budget,
        "expert_bytes": [info.expert_bytes for info in infos],
        "stalls_fewer": stalls[0] / stalls[1] if stalls[1] else None,
        "cold": "disk" if systems[PREDICTED].before[0].direct else "page cache",
        "requests": load.rounds * load.streams,
        "seed": load.seed,
    }


def _cost(system: _System, load: Load, rng: random.Random, progress: Progress) -> dict[str, Any]:
    """What prediction costs where it has nothing to gain. Within each run of some streams it is switched every few
    steps: off, on, and off again as a control, so that whatever else the machine does meets all three alike. A pair is
    the median steps of one run."""
    vocab = system.router.served.info.vocab_size
    medians: dict[str, list[float]] = {name: [] for name in _TURNS}
    for number in range(load.pairs + 1):
        switch = _Switch(system.router, number)
        deadline = Deadline.after(TIMEOUT_S)
        streams = [switch, *(Stream(system.router.engine) for _ in range(load.streams - 1))]
        for stream in streams:
            prompt = tuple(rng.randrange(vocab) for _ in range(load.prompt))
            request = Request(f"cost-{id(stream)}", prompt, SamplingParams(), StopParams(_COST_TOKENS), deadline)
            system.router.engine.submit(request, stream.hear)
        for stream in streams:
            stream.wait(TIMEOUT_S)
        if number:  # the first warms up
            for name, gaps_s in switch.gaps_s().items():
                medians[name].append(float(np.median(gaps_s)))
        progress(f"pair {number} of {load.pairs}")
    speeds = {name: [1.0 / gap_s for gap_s in gaps_s] for name, gaps_s in medians.items()}
    both = [(first + second) / 2 for first, second in zip(speeds["off"], speeds["control"], strict=True)]
    percent, interval = cost_of(both, speeds["on"])
    control, control_interval = cost_of(speeds["off"], speeds["control"])
    return {
        "pairs": load.pairs,
        "steps_a_pair": _COST_TOKENS,
        "step_ms": float(np.median(medians["off"]) * 1e3),
        "prediction_cost_percent": percent,
        "prediction_cost_ci": interval,
        "control_percent": control,
        "control_ci": control_interval,
    }


class _Switch(Stream):
    """A stream that switches prediction as its tokens come: it hears of them between two steps."""

    def __init__(self, router: Router, first: int) -> None:
        super().__init__(router.engine)
        self._router, self._first = router, first
        self._names: list[str] = []

    def hear(self, event: TokenEvent) -> None:
        super().hear(event)
        name = _TURNS[(self._first + len(self.tokens) // _TURN_STEPS) % len(_TURNS)]
        self._router.predict(name == "on")
        self._names.append(name)

    def gaps_s(self) -> dict[str, list[float]]:
        """Between successive tokens, by what the step between them had. Steps right after a switch do not count, nor do
        the first ones, in which prompts of other streams are computed."""
        found: dict[str, list[float]] = {name: [] for name in _TURNS}
        for at in range(2 * _TURN_STEPS, len(self.times_s) - 1):
            if self._names[at] == self._names[at - 1]:
                found[self._names[at]].append(self.times_s[at + 1] - self.times_s[at])
        return found


def _start(stack: ExitStack, model: Path, groups: int, memory: str, load: Load, predict: bool) -> _System:
    flags = {
        "model": str(model.resolve()),
        "groups": groups,
        "dtype": "fp32",
        "threads": max(1, cores() // (groups + 1)),
        "expert_memory": memory,
        "predict_experts": predict,
        "expert_reads": "direct" if load.disk else "mapped",
        "telemetry": QUIET,
        "data_plane": {"secret": "bench"},
    }
    router, ask = stack.enter_context(system_of(load_config(flags=flags, environ={})))
    return _System(router, ask)


def _figures(system: _System) -> dict[str, Any]:
    after = system.stores()
    pairs = list(zip(after, system.before, strict=True))
    told = {
        name: sum(getattr(now, name) - getattr(then, name) for now, then in pairs)
        for name in ("ahead", "loads", "loads_s", "loaded_bytes", "stalled_s")
    }
    layers = {
        name: [
            sum(of_groups)
            for of_groups in zip(
                *(np.subtract(getattr(now, name), getattr(then, name)).tolist() for now, then in pairs), strict=True
            )
        ]
        for name in ("stalls", "found", "hits", "late", "wasted_bytes")
    }
    quantiles = {
        f"{name}_{label}_ms": float(np.quantile(values, q) * 1e3)
        for name, values in (("ttft", system.firsts_s), ("tpot", system.gaps_s))
        for label, q in (("p50", 0.5), ("p99", 0.99))
    }
    bandwidth = told["loaded_bytes"] / told["loads_s"] / 1e6 if told["loads_s"] else None
    totals = {name: sum(counts) for name, counts in layers.items()}
    stalls = totals.pop("stalls")
    return {**quantiles, "cold_stalls": stalls, **totals, **told, "load_mb_per_s": bandwidth, "by_layer": layers}
