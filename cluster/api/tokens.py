"""Bearer tokens of clients: the file that names them, and what each may still do. Pure but for reading the file.

Tokens are random and long, so a plain SHA-256 keeps them; the file has no secret that helps whoever reads it.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.core import Clock
from cluster.errors import ConfigError, Forbidden, Overloaded, Unauthenticated

PREFIX = "emt_"
"""Begins each token, so that scanners of repositories and logs find those that were leaked."""
CHECK_PERIOD_S = 1.0
MAX_FILE_BYTES = 1024**2
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_KEYS = ("name", "sha256", "expires", "requests_per_minute", "concurrent", "control")


@dataclass(frozen=True, slots=True)
class Grant:
    """Who a token belongs to, and its limits; 0 is none. ``expires_s`` is in Unix time."""

    name: str
    sha256: str
    expires_s: float = float("inf")
    requests_per_minute: int = 0
    concurrent: int = 0
    control: bool = False
    """It may change the system: placement, tracing, fail-over."""


def new_token() -> str:
    """A fresh one, of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(token: str) -> str:
    """What the file keeps of a token."""
    return hashlib.sha256(token.encode()).hexdigest()


def parse_grants(text: str, where: str) -> dict[str, Grant]:
    """Grants by digest.

    Raises:
        ConfigError: names entry and key that are wrong.
    """
    try:
        content = yaml.load(text, _LOADER)
    except yaml.MarkedYAMLError as exc:  # its own text shows the line, and there may be a token in it
        line = exc.problem_mark.line + 1 if exc.problem_mark else 0
        raise ConfigError(f"security.tokens: {where} is not YAML: line {line}: {exc.problem}") from exc
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as exc:  # of dates that there are not, too
        raise ConfigError(f"security.tokens: {where} is not YAML ({type(exc).__name__})") from exc
    entries = content.get("tokens") if isinstance(content, Mapping) else None
    if not isinstance(entries, list):
        raise ConfigError(f"security.tokens: {where} must hold a list named tokens")
    grants: dict[str, Grant] = {}
    for number, entry in enumerate(entries):
        grant = _grant(entry, f"security.tokens: {where}: entry {number}")
        if grant.sha256 in grants:
            other = grants[grant.sha256].name
            raise ConfigError(f"security.tokens: {where}: {grant.name!r} has the token of {other!r}")
        grants[grant.sha256] = grant
    return grants


def _grant(entry: Any, where: str) -> Grant:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: must have the keys name and sha256")
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{where}: unknown key {key!r}; known keys: {', '.join(_KEYS)}")
    name, sha256, control = entry.get("name"), entry.get("sha256"), entry.get("control", False)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}: name: got {name!r}; must be a text")
    where = f"{where} ({name})"
    if not isinstance(sha256, str) or len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef"):
        raise ConfigError(f"{where}: sha256: must be 64 hexadecimal digits")  # not shown: it may be the token itself
    if not isinstance(control, bool):
        raise ConfigError(f"{where}: control: got {control!r}; must be true or false")
    counts: list[int] = []
    for key in ("requests_per_minute", "concurrent"):
        count = entry.get(key, 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"{where}: {key}: got {count!r}; must be a number from 0 up, 0 for no limit")
        counts.append(count)
    per_minute, concurrent = counts
    return Grant(name, sha256.lower(), _expiry(entry.get("expires"), where), per_minute, concurrent, control)


def _expiry(value: Any, where: str) -> float:
    """A date ends with its last second. Without a zone it is UTC."""
    if value is None:
        return float("inf")
    if isinstance(value, str):
        for read in (datetime.date.fromisoformat, datetime.datetime.fromisoformat):
            with suppress(ValueError):
                value = read(value)
                break
    if isinstance(value, datetime.date) and value.year >= datetime.MAXYEAR:
        return float("inf")
    if isinstance(value, datetime.date) and value.year > 1:
        if isinstance(value, datetime.datetime):
            return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
        day = datetime.datetime.combine(value, datetime.time(), datetime.UTC) + datetime.timedelta(days=1)
        return day.timestamp()
    raise ConfigError(f"{where}: expires: must be a date or time, such as 2030-01-31 or 2030-01-31T12:00:00Z")


class TokenFile:
    """The grants of a file, read again when it changes (looked at once a second). A change that cannot be read leaves
    those of before in use; ``problem`` says so.

    Raises (constructor):
        ConfigError: the file cannot be used.
    """

    def __init__(self, path: str, clock: Clock = time.monotonic) -> None:
        self._path, self._clock = Path(path), clock
        self._seen: tuple[int, int, int] | None = None
        self._looked_s = clock()
        self.problem = ""
        self._grants = self._read()

    def grant(self, token: str) -> Grant | None:
        """Whose token it is."""
        if self._clock() - self._looked_s >= CHECK_PERIOD_S:
            self._looked_s = self._clock()
            try:
                self._grants = self._read()
            except ConfigError as exc:
                self.problem = str(exc)
        # Looked up by digest: how long that takes tells nothing about tokens.
        return self._grants.get(digest(token))

    def _read(self) -> dict[str, Grant]:
        try:
            about = self._path.stat()
            stamp = about.st_ino, about.st_size, about.st_mtime_ns
            if stamp == self._seen:  # good or bad, it is what it was
                return self._grants
            self._seen = stamp
            if about.st_size > MAX_FILE_BYTES:
                raise ConfigError(f"security.tokens: {self._path} has {about.st_size} bytes; at most {MAX_FILE_BYTES}")
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise ConfigError(f"security.tokens: cannot read {str(self._path)!r}: {exc}") from exc
        grants = parse_grants(text, str(self._path))
        self.problem = ""
        return grants


@dataclass(slots=True)
class _Use:
    """Of one name: calls that run, and a bucket that a minute's requests fit into."""

    running: int = 0
    left: float = 0.0
    filled_s: float = 0.0


class Limits:
    """What each name uses, in this router. Not thread-safe: one event loop asks."""

    def __init__(self, clock: Clock = time.monotonic, wall: Clock = time.time) -> None:
        self._clock, self._wall = clock, wall
        self._uses: dict[str, _Use] = {}

    def admit(self, grant: Grant | None, sent: bool, control: bool) -> Grant:
        """Whose call it is that wants to come in.

        Raises:
            Unauthenticated: nothing was ``sent``, or nobody's token, or one that has expired.
            Forbidden: it changes the system (``control``) and the token may not.
            Overloaded: too many in this minute, or at once.
        """
        if grant is None:
            raise Unauthenticated(
                "nobody has this token" if sent else "a token is needed: send metadata 'authorization: Bearer TOKEN'"
            )
        if self._wall() >= grant.expires_s:
            when = datetime.datetime.fromtimestamp(grant.expires_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            raise Unauthenticated(f"the token of {grant.name} expired on {when}")
        if control and not grant.control:
            raise Forbidden(f"the token of {grant.name} may ask, but not change the system (control: true)")
        now_s = self._clock()
        use = self._uses.get(grant.name)
        if use is None:
            use = self._uses[grant.name] = _Use(left=grant.requests_per_minute, filled_s=now_s)
        self._check_running(grant, use)
        if grant.requests_per_minute:
            per_s = grant.requests_per_minute / 60
            use.left = min(float(grant.requests_per_minute), use.left + (now_s - use.filled_s) * per_s)
            use.filled_s = now_s
            if use.left < 1:
                raise Overloaded(
                    f"{grant.name} may send {grant.requests_per_minute} requests a minute; retry in "
                    f"{(1 - use.left) / per_s:.1f} s"
                )
            use.left -= 1
        return grant

    def enter(self, grant: Grant) -> None:
        """A call that was admitted begins; `leave` must follow.

        Raises:
            Overloaded: others of the same name began meanwhile.
        """
        use = self._uses[grant.name]
        self._check_running(grant, use)
        use.running += 1

    @staticmethod
    def _check_running(grant: Grant, use: _Use) -> None:
        if grant.concurrent and use.running >= grant.concurrent:
            raise Overloaded(f"{grant.name} has {use.running} calls running, which is its limit; retry later")

    def leave(self, grant: Grant) -> None:
        """A call that entered is over."""
        self._uses[grant.name].running -= 1
