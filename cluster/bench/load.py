"""What a load is: which requests arrive when (`Arrival`), and what became of each (`Outcome`).

Pure: no sockets, no clock; the same seed gives the same load. Light to import: client processes import it too.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.errors import InvalidArgument

MAIN = "main"
LENGTHS = "must be N, fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MAX], in tokens from 1"


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is sent ``at_s`` seconds after the start of the load, whatever the server does."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    kind: str = MAIN
    """Class of traffic, for the report."""
    prompt_ids: tuple[int, ...] | None = None
    """None: drawn from the seed (`prompt_of`)."""

    def to_json(self) -> dict[str, Any]:
        """As a line of a replay file."""
        prompt: dict[str, Any] = {"prompt_tokens": self.prompt_tokens}
        if self.prompt_ids is not None:
            prompt = {"prompt_ids": list(self.prompt_ids)}
        return {"at_s": self.at_s, **prompt, "new_tokens": self.new_tokens, "class": self.kind}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a client process saw of one request. Times are seconds since the start of the load, on the host's monotonic
    clock."""

    index: int
    kind: str
    prompt_tokens: int
    new_tokens: int
    planned_s: float
    sent_s: float | None
    """None: never sent."""
    arrivals: tuple[tuple[float, int], ...]
    """(when, how many tokens) of each message that brought tokens."""
    end_s: float | None
    code: str
    """OK, or the name of a gRPC status code, HTTP_<status>, INCOMPLETE (the stream ended early) or LOST (the client
    process did not tell)."""
    detail: str
    tokens: int

    @property
    def ok(self) -> bool:
        """Every token that was asked for came."""
        return self.code == "OK"

    @classmethod
    def lost(cls, index: int, arrival: Arrival) -> Outcome:
        """Of a request that no client process reported."""
        detail = "the client process ended before it told"
        return cls(
            index,
            arrival.kind,
            arrival.prompt_tokens,
            arrival.new_tokens,
            arrival.at_s,
            None,
            (),
            None,
            "LOST",
            detail,
            0,
        )


# -- lengths -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, cut off at ``largest`` (None: where the model's context ends)."""

    flag: str
    text: str
    low: int
    sigma: float
    """0: uniform from ``low`` to ``largest``. Otherwise log-normal with median ``low``."""
    largest: int | None

    def draw(self, rng: random.Random) -> int:
        """One length, at least 1. Of a log-normal draw beyond ``largest``, ``largest`` is left."""
        assert self.largest is not None
        if not self.sigma:
            return rng.randint(self.low, self.largest)
        # The exponent is cut too: a float cannot hold e to the power of anything.
        drawn = self.low * math.exp(min(rng.gauss(0.0, self.sigma), 50.0))
        return max(1, min(self.largest, round(drawn)))

    def cut_at(self, limit: int | None) -> Lengths:
        """With ``limit`` as largest, if it has no own one.

        Raises:
            InvalidArgument: there is neither, or the median is beyond it.
        """
        if self.largest is not None:
            return self
        if limit is None:
            raise InvalidArgument(self.flag, self.text, "needs a MAX: the server does not tell its context length")
        if limit < self.low:
            raise InvalidArgument(
                self.flag, self.text, f"its median must be at most the {limit} tokens of context left"
            )
        return replace(self, largest=limit)


def parse_lengths(flag: str, text: str) -> Lengths:
    """A distribution from the command line.

    Raises:
        InvalidArgument: it is none; names ``flag``.
    """
    name, *values = text.split(":")
    if not values:
        name, values = "fixed", [name]
    try:
        if name == "fixed" and len(values) == 1:
            lengths = Lengths(flag, text, int(values[0]), 0.0, int(values[0]))
        elif name == "uniform" and len(values) == 2:
            lengths = Lengths(flag, text, int(values[0]), 0.0, int(values[1]))
        elif name == "lognormal" and len(values) in (2, 3):
            largest = int(values[2]) if len(values) == 3 else None
            lengths = Lengths(flag, text, int(values[0]), float(values[1]), largest)
            if not 0 < lengths.sigma <= 10:
                raise InvalidArgument(flag, text, "SIGMA must be more than 0, at most 10")
        else:
            raise InvalidArgument(flag, text, LENGTHS)
    except ValueError as exc:
        raise InvalidArgument(flag, text, LENGTHS) from exc
    if lengths.low < 1:
        raise InvalidArgument(flag, text, LENGTHS)
    if lengths.largest is not None and lengths.largest < lengths.low:
        raise InvalidArgument(flag, text, "its largest length must not be below the other one")
    return lengths


# -- traffic -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Traffic:
    """One class of requests: Poisson arrivals at ``rate_per_s``, or one every ``period_s`` (the first after half of
    it). Exactly one of the two is set."""

    kind: str
    prompt: Lengths
    new: Lengths
    rate_per_s: float | None = None
    period_s: float | None = None

    def arrivals(self, seed: int, context_length: int | None) -> Iterator[Arrival]:
        """Without end. The draws depend on the seed and the class's name alone: another class changes nothing here.

        Raises:
            InvalidArgument: prompt and answer together do not fit the context.
        """
        new = self.new.cut_at(None if context_length is None else max(1, context_length // 2))
        assert new.largest is not None
        prompt = self.prompt.cut_at(None if context_length is None else context_length - new.largest)
        assert prompt.largest is not None
        if context_length is not None and prompt.largest + new.largest > context_length:
            limit = f"with {new.largest} new tokens it must fit the context of {context_length} tokens"
            raise InvalidArgument(self.prompt.flag, self.prompt.text, limit)
        return self._endless(random.Random(f"{seed}/{self.kind}"), prompt, new)

    def _endless(self, rng: random.Random, prompt: Lengths, new: Lengths) -> Iterator[Arrival]:
        at_s = 0.0
        for number in itertools.count():
            if self.rate_per_s is not None:
                at_s += rng.expovariate(self.rate_per_s)
            else:
                assert self.period_s is not None
                at_s = (number + 0.5) * self.period_s
            yield Arrival(round(at_s, 6), prompt.draw(rng), new.draw(rng), self.kind)


def make_load(
    traffic: Sequence[Traffic], duration_s: float, seed: int, max_requests: int, context_length: int | None
) -> list[Arrival]:
    """Arrivals of all classes before ``duration_s``, in order of time; the first ``max_requests`` of them.

    Raises:
        InvalidArgument: there are none, or some do not fit the context.
    """
    for flag, value in (("--duration", duration_s), ("--max-requests", max_requests)):
        if not (math.isfinite(value) and value > 0):
            raise InvalidArgument(flag, value, "must be more than 0")
    names = [item.kind for item in traffic]
    for name in names:
        if names.count(name) > 1:
            raise InvalidArgument("--also", name, "two classes have this name; give one another with name=...")
    merged = heapq.merge(*(item.arrivals(seed, context_length) for item in traffic), key=lambda item: item.at_s)
    within = itertools.takewhile(lambda item: item.at_s < duration_s, merged)
    arrivals = list(itertools.islice(within, max_requests))
    if not arrivals:
        raise InvalidArgument("--duration", duration_s, "no request arrives in that time; make it or the rate larger")
    return arrivals


def main_traffic(rate_per_s: float, prompt: str, new: str) -> Traffic:
    """The class ``main``, from ``--rate``, ``--prompt-dist`` and ``--new-tokens``."""
    if not (math.isfinite(rate_per_s) and rate_per_s > 0):
        raise InvalidArgument("--rate", rate_per_s, "must be more than 0 requests a second")
    return Traffic(
        MAIN, parse_lengths("--prompt-dist", prompt), parse_lengths("--new-tokens", new), rate_per_s=rate_per_s
    )


def parse_also(text: str, number: int) -> Traffic:
    """Another class, such as ``every:5s,prompt=fixed:2000,new=32,name=long`` or ``rate:0.2,prompt=...``. ``number``
    counts from 1; it makes the name where none is given.

    Raises:
        InvalidArgument: a part is unknown, twice there, missing or no number.
    """
    usage = "must be like every:5s,prompt=fixed:2000,new=32,name=long, or rate:0.2,prompt=..."
    first, *rest = (part.strip() for part in text.split(","))
    timing, _, amount = first.partition(":")
    try:
        value = float(amount.removesuffix("s") if timing == "every" else amount)
    except ValueError as exc:
        raise InvalidArgument("--also", text, usage) from exc
    if timing not in ("every", "rate") or not (math.isfinite(value) and value > 0):
        raise InvalidArgument("--also", text, usage)
    given: dict[str, str] = {}
    for part in rest:
        key, equals, setting = part.partition("=")
        if not equals or not setting or key not in ("prompt", "new", "name") or key in given:
            raise InvalidArgument("--also", part, usage)
        given[key] = setting
    if "prompt" not in given:
        raise InvalidArgument("--also", text, "needs prompt=..., such as prompt=fixed:2000")
    name = given.get("name", "also" if number == 1 else f"also-{number}")
    prompt, new = parse_lengths("--also prompt", given["prompt"]), parse_lengths("--also new", given.get("new", "32"))
    if timing == "every":
        return Traffic(name, prompt, new, period_s=value)
    return Traffic(name, prompt, new, rate_per_s=value)


def prompt_of(index: int, arrival: Arrival, seed: int, vocab_size: int) -> list[int]:
    """Token ids of the request number ``index`` of a load."""
    if arrival.prompt_ids is not None:
        return list(arrival.prompt_ids)
    return random.Random(f"{seed}/prompt/{index}").choices(range(vocab_size), k=arrival.prompt_tokens)


# -- replay --------------------------------------------------------------------------------------------------------


def read_replay(path: Path, max_requests: int, vocab_size: int, context_length: int | None) -> list[Arrival]:
    """Arrivals from a file of JSON lines ``{"at_s", "prompt_tokens" or "prompt_ids", "new_tokens", "class"}``, sorted
    by time; the first ``max_requests`` of them.

    Raises:
        InvalidArgument: the file cannot be read or a line is wrong; names the line.
    """
    if max_requests < 1:
        raise InvalidArgument("--max-requests", max_requests, "must be more than 0")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidArgument("--replay", str(path), f"cannot be read: {' '.join(str(exc).split())}") from exc
    arrivals = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                arrivals.append(_read_line(json.loads(line), vocab_size, context_length))
            except (ValueError, TypeError, KeyError) as exc:
                reason = f"{exc} is missing" if isinstance(exc, KeyError) else str(exc)
                raise InvalidArgument(f"--replay {path} line {number}", line, reason) from exc
    if not arrivals:
        raise InvalidArgument("--replay", str(path), "must hold at least one arrival, one JSON object a line")
    return sorted(arrivals, key=lambda item: item.at_s)[:max_requests]


def _read_line(fields: Any, vocab_size: int, context_length: int | None) -> Arrival:
    if not isinstance(fields, dict):
        raise TypeError("must be a JSON object")
    unknown = fields.keys() - {"at_s", "prompt_tokens", "prompt_ids", "new_tokens", "class"}
    if unknown:
        raise ValueError(f"unknown key {min(unknown)!r}")
    at_s, ids = fields["at_s"], fields.get("prompt_ids")
    if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not (math.isfinite(at_s) and at_s >= 0):
        raise ValueError("at_s must be seconds from 0")
    if ids is not None:
        if (
            not isinstance(ids, list)
            or not ids
            or not all(type(item) is int and 0 <= item < vocab_size for item in ids)
        ):
            raise ValueError(f"prompt_ids must be token ids from 0 to {vocab_size - 1}")
        if fields.get("prompt_tokens", len(ids)) != len(ids):
            raise ValueError("prompt_tokens must be the number of prompt_ids")
    length = len(ids) if ids is not None else fields["prompt_tokens"]
    new, kind = fields["new_tokens"], fields.get("class", MAIN)
    for name, value in (("prompt_tokens", length), ("new_tokens", new)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a whole number from 1")
    if context_length is not None and length + new > context_length:
        raise ValueError(f"{length} and {new} tokens do not fit the context of {context_length}")
    if not isinstance(kind, str) or not kind:
        raise ValueError("class must be a name")
    return Arrival(float(at_s), length, new, kind, None if ids is None else tuple(ids))


def write_record(path: Path, arrivals: Iterable[Arrival], seed: int, vocab_size: int) -> None:
    """The load as a replay file, with the token ids of every prompt: replayed, it is the same load."""
    with path.open("w", encoding="utf-8") as file:
        for index, arrival in enumerate(arrivals):
            ids = tuple(prompt_of(index, arrival, seed, vocab_size))
            file.write(json.dumps(replace(arrival, prompt_ids=ids).to_json()) + "\n")
