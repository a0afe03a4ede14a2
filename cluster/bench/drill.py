"""`expertmesh drill`: steady load of known answers, damage, and what clients saw of it.

Streams ask one request after another, for prompts whose greedy answers single-process transformers gave before. Times
of all tokens are kept; whatever is reported is worked out afterwards. The load runs in the command's own process, which
does nothing else meanwhile.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cluster.api.client import Client
from cluster.bench.damage import Kind, damaged
from cluster.bench.drill_report import RECOVERED, Answered, calls_between, mismatches, problems_of, report_of
from cluster.bench.reference import Reference
from cluster.errors import ConfigError, ExpertMeshError, InvalidArgument, Unavailable
from cluster.rpc.v1 import control_pb2, inference_pb2
from cluster.telemetry.memory import process_facts

Progress = Callable[[str], None]

_WINDOW_S, _STEP_S = 2.0, 0.1
_CHANGE_S, _LOOK_S = 180.0, 1.0
"""For a change of the placement at most, and between two looks at it: each is work for the router that is measured."""
_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Work:
    """``streams`` at a time; ``before`` seconds of quiet, ``damage`` seconds of damage (of kinds that last), and up to
    ``after`` seconds more until throughput is back."""

    streams: int = 8
    prompts: int = 16
    new: int = 48
    before: float = 10.0
    damage: float = 6.0
    after: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("prompts", 1), ("new", 2), ("before", 3), ("damage", 0.1), ("after", 3)):
            if getattr(self, name) < least:
                raise InvalidArgument(f"--{name}", getattr(self, name), f"must be at least {least}")


@dataclass(frozen=True, slots=True)
class System:
    """What is drilled: its routers' addresses, and how to get at what has no address of its own."""

    addresses: Sequence[str]
    coordinator: Callable[[], int]
    controller: Callable[[], int]
    drop_links: Callable[[int], None]


class _Streams:
    """The load."""

    def __init__(self, addresses: Sequence[str], prompts: Sequence[list[int]], work: Work) -> None:
        self._addresses, self._prompts, self._work = list(addresses), prompts, work
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._next = 0
        self.answers: list[Answered] = []
        self.resumed = 0
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(work.streams)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        first = number % len(self._addresses)  # each has a router that it asks first
        order = self._addresses[first:] + self._addresses[:first]
        with Client(",".join(order), timeout_s=_GRACE_S) as client:
            while not self._stop.is_set():
                with self._lock:
                    # Of different lengths, so that prefills of some meet decoding of others.
                    new = self._work.new - self._next * 7 % (self._work.new // 2)
                    answer = Answered(self._next % len(self._prompts), new, time.monotonic(), router=first)
                    self._next += 1
                    self.answers.append(answer)
                ids = inference_pb2.TokenIds(ids=self._prompts[answer.prompt])
                request = inference_pb2.GenerateRequest(prompt_ids=ids, max_new_tokens=answer.new, ignore_eos=True)
                try:
                    for chunk in client.generate(request):
                        answer.exact = chunk.exact  # the last one says it
                        answer.tokens += [token.id for token in chunk.tokens]
                        answer.times_s += [time.monotonic()] * len(chunk.tokens)
                except ExpertMeshError as exc:
                    answer.error = f"{type(exc).__name__}: {exc}"
                    self._stop.wait(0.1)
            with self._lock:
                self.resumed += client.resumed

    def rate(self, since_s: float, until_s: float) -> float:
        """Tokens a second of a stretch of time."""
        count = sum(since_s <= at < until_s for answer in list(self.answers) for at in list(answer.times_s))
        return count / (until_s - since_s)

    def end(self) -> None:
        """Lets the requests that run finish."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _GRACE_S)


class _Targets:
    """See `cluster.bench.damage.Targets`."""

    def __init__(self, system: System, client: Client, group: int) -> None:
        self._system, self._client, self._number = system, client, group
        self._known: set[int] = set()
        self.span: tuple[float, float] | None = None
        """When a change of the placement was carried out."""

    def group(self) -> int:
        status = self._client.status()
        process = next((item.process for item in status.groups if item.group == self._number), None)
        return _reachable(f"group {self._number}", process)

    def router(self) -> int:
        with Client(self._system.addresses[0], timeout_s=10) as client:
            return _reachable("the router", client.status().router)

    def coordinator(self) -> int:
        return self._system.coordinator()

    def controller(self) -> int:
        return self._system.controller()

    def drop_links(self) -> None:
        self._system.drop_links(self._number)

    def scale(self) -> None:
        count, begun_s = len(self._client.status().groups), time.monotonic()
        for groups in (count + 1, count):
            self._wait_for_change(self._client.change_placement(groups=groups))
        self.span = begun_s, time.monotonic()

    def balance(self) -> None:
        self._known = {receipt.number for receipt in self._client.placement().receipts}
        was_on = self._client.placement().balance
        self._client.change_placement(balance=True)
        try:
            self._wait_for_change(None)
        finally:
            self._client.change_placement(balance=was_on)

    def _wait_for_change(self, number: int | None) -> None:
        """Until it has been carried out; the first rebalance where no number is given.

        Raises:
            Unavailable: it failed, or was not carried out in time.
        """
        until_s = time.monotonic() + _CHANGE_S
        while time.monotonic() < until_s:
            for receipt in self._client.placement().receipts:
                if number is not None and receipt.number != number:
                    continue
                if number is None and (receipt.kind != "rebalance" or receipt.number in self._known):
                    continue
                if receipt.state in ("watching", "done", "rolled back"):
                    begun_s = time.monotonic() - (time.time() - receipt.began_unix_s)
                    self.span = begun_s, begun_s + receipt.duration_s
                    return
                if receipt.state in ("failed", "nothing to do"):
                    raise Unavailable(f"change {receipt.number} ({receipt.why}): {receipt.state}; {receipt.problem}")
            time.sleep(_LOOK_S)
        raise Unavailable(f"no change of the placement within {_CHANGE_S:g} s")


def _reachable(what: str, process: control_pb2.ProcessStatus | None) -> int:
    if process is None or not process.pid:
        raise Unavailable(f"{what} is not there")
    if process.host != process_facts().host:
        raise ConfigError(f"{what} is on {process.host}; a drill reaches processes of its own host only")
    return int(process.pid)


def prompts_of(work: Work, vocab_size: int) -> list[list[int]]:
    """Prompts of random tokens, the same for the same seed."""
    rng = random.Random(work.seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(4, 24))] for _ in range(work.prompts)]


def skewed_plan(addresses: Sequence[str], work: Work, groups: int, progress: Progress) -> list[list[int]]:
    """A placement that has the hottest experts of each layer in one group and the coldest in another: slots by layer,
    after the load has run for a while. Slots that are too many hold what their group holds already."""
    with Client(addresses[0]) as client:
        progress("finding out which experts are hot")
        streams = _Streams(addresses, prompts_of(work, client.model_info().vocab_size), work)
        time.sleep(work.before)
        streams.end()
        layers = [list(layer.activations) for layer in client.loads().layers]
    plan = []
    for loads in layers:
        hottest = sorted(range(len(loads)), key=lambda expert: -loads[expert])
        each = -(-len(loads) // groups)
        held: list[list[int]] = []
        for later in reversed(range(groups)):  # as many as one can hold, and one for each of the later groups
            count = min(each, len(hottest) - later)
            held.append(hottest[:count])
            hottest = hottest[count:]
        plan.append([expert for experts in held for expert in (experts * each)[:each]])
    return plan


def run(kind: Kind, system: System, model: Path, work: Work, group: int, progress: Progress) -> dict[str, Any]:
    """The report; ``pass`` says whether everything is within its limits, ``problems`` what is not."""
    if len(system.addresses) < kind.routers:
        raise InvalidArgument("--routers", len(system.addresses), f"must be at least {kind.routers} for {kind.name}")
    # Asks the routers that are not damaged first.
    with Client(",".join(reversed(system.addresses))) as client:
        info, status = client.model_info(), client.status()
        if group not in {found.group for found in status.groups}:
            raise InvalidArgument("--group", group, f"must be one of the {len(status.groups)} groups, from 0")
        prompts = prompts_of(work, info.vocab_size)
        progress("computing the answers with transformers")
        reference = Reference(model, torch.float32)
        known = [reference.greedy(prompt, work.new) for prompt in prompts]
        targets = _Targets(system, client, group)
        streams = _Streams(system.addresses, prompts, work)
        try:
            progress(f"{work.streams} streams; damage in {work.before:g} s")
            time.sleep(work.before)
            first = client.status()
            begun_s = time.monotonic()
            known_routers = {router.pid for router in client.placement().routers} if kind.routers > 1 else set()
            progress(f"{kind.name}: {kind.what}")
            with damaged(kind, targets):
                time.sleep(max(work.damage, kind.least_s) if kind.lasts else 0.0)
            ended_s = time.monotonic()
            if targets.span is not None:
                begun_s, ended_s = targets.span
            before = streams.rate(begun_s - work.before + 1.0, begun_s)
            if kind.restarts:
                if kind.routers > 1:
                    _wait_for_router(client, len(system.addresses), known_routers, work.after)
                else:
                    _wait_until_back(client, group, first, work.after)
                progress(f"it is back {time.monotonic() - ended_s:.1f} s after the damage")
                ended_s = time.monotonic()
            recovered_s = _wait_for(streams, before, ended_s, work.after, progress)
            if kind.must_improve:
                time.sleep(work.before)
        finally:
            streams.end()
        last = client.status()
        receipts = [as_receipt(receipt) for receipt in client.placement().receipts] if targets.span else []
    until_s = ended_s if recovered_s is None or targets.span else max(recovered_s, ended_s)
    report = report_of(streams.answers, begun_s, until_s)
    report |= mismatches(reference, prompts, known, streams.answers)
    report |= {
        "drill": kind.name,
        "group": group,
        "routers": len(system.addresses),
        "resumed_streams": streams.resumed,
        "tokens_per_s_before": before,
        "tokens_per_s_after": streams.rate(until_s, until_s + _WINDOW_S),
        "recovery_s": None if recovered_s is None else max(0.0, recovered_s - begun_s),
        **calls_between(first, last),
        "seed": work.seed,
        "streams": work.streams,
        "groups": len(last.groups),
        "changes": receipts,
    }
    report["problems"] = problems_of(kind, report)
    report["pass"] = not report["problems"]
    return report


def as_receipt(receipt: control_pb2.PlacementReceipt) -> dict[str, Any]:
    """What the report says of a change."""
    names = ("kind", "state", "duration_s", "copies_loaded", "copies_dropped", "bytes_loaded")
    return {name: getattr(receipt, name) for name in names} | {
        field.name: value for field, value in receipt.ListFields() if field.has_presence
    }


def _wait_until_back(client: Client, group: int, first: control_pb2.StatusReply, limit_s: float) -> None:
    """Until another process serves as the group and the router asks it again.

    Raises:
        Unavailable: not within ``limit_s``.
    """
    was = next(item.incarnation for item in first.groups if item.group == group)
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        now = client.status()
        if group not in now.dispatch.suspects and any(
            item.group == group and item.healthy and item.incarnation != was for item in now.groups
        ):
            return
        time.sleep(0.2)
    raise Unavailable(f"group {group} did not come back within {limit_s:g} s")


def _wait_for_router(client: Client, count: int, known: set[int], limit_s: float) -> None:
    """Until there are as many routers as before, one of them new. Raises as `_wait_until_back`."""
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        pids = {router.pid for router in client.placement().routers}
        if len(pids) >= count and pids - known:
            return
        time.sleep(0.2)
    raise Unavailable(f"no router came in the place of the dead one within {limit_s:g} s")


def _wait_for(streams: _Streams, before: float, ended_s: float, limit_s: float, progress: Progress) -> float | None:
    """When throughput was back for a whole window; None if it never was."""
    at_s = ended_s
    while at_s < ended_s + limit_s:
        time.sleep(max(0.0, at_s + _WINDOW_S - time.monotonic()))
        if streams.rate(at_s, at_s + _WINDOW_S) >= RECOVERED * before:
            progress(f"throughput is back {at_s - ended_s:.1f} s later")
            return at_s
        at_s += _STEP_S
    return None
