"""Bearer tokens: the file, and what each name may still do, on a clock of the test's own."""

from __future__ import annotations

import datetime
import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.tokens import Grant, Limits, digest, new_token, parse_grants
from cluster.errors import ConfigError, Forbidden, Overloaded, Unauthenticated

SHA = "ab" * 32


def entry(**fields: object) -> str:
    return "tokens:\n- " + "\n  ".join(
        f"{key}: {value}" for key, value in {"name": "a", "sha256": SHA, **fields}.items()
    )


def test_entries_are_read() -> None:
    token = new_token()
    text = entry(
        sha256=digest(token).upper(), expires="2030-01-31", requests_per_minute=6, concurrent=2, control="true"
    )
    (grant,) = parse_grants(text, "file").values()
    ends = datetime.datetime(2030, 2, 1, tzinfo=datetime.UTC).timestamp()
    assert grant == Grant("a", digest(token), ends, 6, 2, True)
    assert parse_grants("tokens: []", "file") == {}
    (grant,) = parse_grants(entry(expires="2030-01-31T12:00:00+01:00"), "file").values()
    assert grant.expires_s == datetime.datetime(2030, 1, 31, 11, tzinfo=datetime.UTC).timestamp()
    (grant,) = parse_grants(entry(expires="'2030-01-31T12:00:00'"), "file").values()  # UTC where no zone is given
    assert grant.expires_s == datetime.datetime(2030, 1, 31, 12, tzinfo=datetime.UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list named tokens"),
        ("tokens: 5", "list named tokens"),
        ("tokens: [5]", "entry 0"),
        ("tokens: [", "not YAML"),
        (entry(name=5), "name"),
        (entry(sha256="emt_secret"), "sha256"),
        (entry(sha256="zz" * 32), "sha256"),
        (entry(expires="soon"), "expires"),
        (entry(expires="[]"), "expires"),
        (entry(requests_per_minute=-1), "requests_per_minute"),
        (entry(concurrent="true"), "concurrent"),
        (entry(control=1), "control"),
        (entry(colour="red"), "unknown key 'colour'"),
        (entry() + f"\n- name: b\n  sha256: {SHA}", "'b' has the token of 'a'"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_grants(text, "file")
    assert "secret" not in str(error.value)


def test_tokens_are_long_and_differ() -> None:
    made = {new_token() for _ in range(100)}
    assert len(made) == 100
    assert min(map(len, made)) > 40


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_expiry_and_control() -> None:
    clock = Clock()
    limits = Limits(clock, clock)
    grant = Grant("a", SHA, expires_s=1010.0)
    limits.enter(grant, True, control=False)
    with pytest.raises(Forbidden):
        limits.enter(grant, True, control=True)
    clock.now = 1010.0
    with pytest.raises(Unauthenticated, match="expired"):
        limits.enter(grant, True, control=False)
    for sent, message in ((True, "nobody"), (False, "needed")):
        with pytest.raises(Unauthenticated, match=message):
            limits.enter(None, sent, control=False)


@given(st.integers(0, 2**32))
def test_no_minute_has_more_than_two_minutes_worth(seed: int) -> None:
    """A bucket that starts full: in any span no more than its size and what flows in meanwhile."""
    rng, clock = random.Random(seed), Clock()
    rate = rng.choice((1, 6, 60, 600))
    limits, grant = Limits(clock, clock), Grant("a", SHA, requests_per_minute=rate)
    entered: list[float] = []
    for _ in range(300):
        clock.now += rng.choice((0.0, 0.01, 0.5, 20.0)) * rng.random()
        with suppress(Overloaded):
            limits.enter(grant, True, control=False)
            entered.append(clock.now)
            limits.leave(grant)
    for first in range(0, len(entered), 7):
        for last in range(first, len(entered), 5):
            assert last - first + 1 <= rate + (entered[last] - entered[first]) * rate / 60 + 1e-6
    # Who waits as long as it says gets in.
    clock.now += 60 / rate
    limits.enter(grant, True, control=False)


def test_calls_at_a_time_are_counted_by_name() -> None:
    limits = Limits(Clock(), Clock())
    one, other = Grant("a", SHA, concurrent=2), Grant("b", "cd" * 32, concurrent=1)
    limits.enter(one, True, control=False)
    limits.enter(one, True, control=False)
    limits.enter(other, True, control=False)
    with pytest.raises(Overloaded, match="2 calls running"):
        limits.enter(one, True, control=False)
    limits.leave(one)
    limits.enter(one, True, control=False)
