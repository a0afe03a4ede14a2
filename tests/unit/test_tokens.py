"""Bearer tokens: the file, and what each name may still do, on a clock of the test's own."""

from __future__ import annotations

import datetime
import random
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.api import tokens as module
from cluster.api.tokens import Grant, Limits, TokenFile, digest, new_token, parse_grants
from cluster.commands.token import token
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
    assert limits.admit(grant, True, control=False) is grant
    with pytest.raises(Forbidden):
        limits.admit(grant, True, control=True)
    clock.now = 1010.0
    with pytest.raises(Unauthenticated, match="expired"):
        limits.admit(grant, True, control=False)
    for sent, message in ((True, "nobody"), (False, "needed")):
        with pytest.raises(Unauthenticated, match=message):
            limits.admit(None, sent, control=False)


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
            limits.admit(grant, True, control=False)
            entered.append(clock.now)
    for first in range(0, len(entered), 7):
        for last in range(first, len(entered), 5):
            assert last - first + 1 <= rate + (entered[last] - entered[first]) * rate / 60 + 1e-6
    # Who waits as long as it says gets in.
    clock.now += 60 / rate
    limits.admit(grant, True, control=False)


def test_calls_at_a_time_are_counted_by_name() -> None:
    limits = Limits(Clock(), Clock())
    one, other = Grant("a", SHA, concurrent=2), Grant("b", "cd" * 32, concurrent=1)
    for grant in (one, one, other):
        limits.admit(grant, True, control=False)
        limits.enter(grant)
    with pytest.raises(Overloaded, match="2 calls running"):
        limits.admit(one, True, control=False)
    limits.leave(one)
    limits.admit(one, True, control=False)
    limits.admit(one, True, control=False)  # both may, and then the first to begin does
    limits.enter(one)
    with pytest.raises(Overloaded):
        limits.enter(one)


def test_dates_end_with_their_last_second_however_they_are_written() -> None:
    ends = datetime.datetime(2030, 2, 1, tzinfo=datetime.UTC).timestamp()
    for text in ("2030-01-31", "'2030-01-31'", '"2030-01-31"'):
        (grant,) = parse_grants(entry(expires=text), "file").values()
        assert grant.expires_s == ends, text
    for text in ("9999-12-31", "'9999-12-31'", "9999-12-31T23:59:59-12:00"):
        (grant,) = parse_grants(entry(expires=text), "file").values()
        assert grant.expires_s == float("inf"), text
    for text in ("0001-01-01", "'0001-01-01'", "0001-01-01T00:00:00+12:00"):
        with pytest.raises(ConfigError):
            parse_grants(entry(expires=text), "file")


def test_no_line_of_a_damaged_file_is_shown() -> None:
    with pytest.raises(ConfigError, match="line 2") as error:
        parse_grants("tokens:\n- name: a: emt_secret\n", "file")
    assert "secret" not in str(error.value)


def test_a_damaged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, reads = Clock(), []
    file = tmp_path / "tokens.yaml"
    token = new_token()
    file.write_text(entry(sha256=digest(token)))
    tokens = TokenFile(str(file), clock)
    monkeypatch.setattr(module, "parse_grants", lambda *given: reads.append(1) or parse_grants(*given))
    file.write_text("tokens: [")
    for _ in range(5):
        clock.now += 2.0
        assert tokens.grant(token) is not None
    assert len(reads) == 1
    assert tokens.problem
    file.write_text(entry(sha256=digest(new_token())))
    clock.now += 2.0
    assert tokens.grant(token) is None
    assert not tokens.problem


@pytest.mark.parametrize(
    "before",
    [
        "",
        "tokens: []\n",
        f"# mine\ntokens:\n- name: b\n  sha256: {SHA}\n",
        f"tokens:\n  - name: b\n    sha256: {SHA}\n",
    ],
)
def test_the_command_adds_to_files_of_any_indentation(tmp_path: Path, before: str) -> None:
    file = tmp_path / "real.yaml"
    link = tmp_path / "tokens.yaml"
    file.write_text(before)
    file.chmod(0o640)
    link.symlink_to(file)
    token("a", file=link, expires="2030-01-31", requests_per_minute=0, concurrent=0, control=False, as_json=True)
    grants = parse_grants(file.read_text(), "file")
    assert {grant.name for grant in grants.values()} == {"a"} | ({"b"} if "name: b" in before else set())
    assert ("# mine" in file.read_text()) == ("# mine" in before)
    assert link.is_symlink()
    assert file.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ConfigError, match="has a token"):
        token("a", file=link, expires=None, requests_per_minute=0, concurrent=0, control=False, as_json=True)
