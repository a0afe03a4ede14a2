"""`expertmesh token`."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from cluster.commands.common import Json, emit, stderr, stdout
from cluster.errors import ConfigError, InvalidArgument


def token(
    name: Annotated[str, typer.Argument(help="Who gets it.")],
    file: Annotated[Path, typer.Option(help="Where its hash goes; made when it is not there.")] = Path("tokens.yaml"),
    expires: Annotated[
        str | None, typer.Option(help="Last day, such as 2030-01-31, or a time; never by default.")
    ] = None,
    requests_per_minute: Annotated[int, typer.Option(help="Requests that it may begin a minute; 0: no limit.")] = 0,
    concurrent: Annotated[int, typer.Option(help="Calls that it may have running; 0: no limit.")] = 0,
    control: Annotated[bool, typer.Option("--control", help="It may change the system: scale, drain, ...")] = False,
    as_json: Json = False,
) -> None:
    """Make a bearer token for a client. It is shown once; the file has only its hash."""
    from cluster.api.tokens import digest, new_token, parse_grants

    for flag, value in (("--requests-per-minute", requests_per_minute), ("--concurrent", concurrent)):
        if value < 0:
            raise InvalidArgument(flag, value, "must be at least 0")
    made = new_token()
    entry: dict[str, Any] = {"name": name, "sha256": digest(made)}
    for key, given in (
        ("expires", expires),
        ("requests_per_minute", requests_per_minute),
        ("concurrent", concurrent),
        ("control", control),
    ):
        if given:
            entry[key] = given
    before = ""
    try:
        if file.exists():
            before = file.read_text(encoding="utf-8")
            known = parse_grants(before, str(file)) if before.strip() else {}
            if any(grant.name == name for grant in known.values()):
                raise ConfigError(f"NAME: {name!r} has a token in {file} already; take that entry out first")
        text = _appended(before, entry)
        try:
            parse_grants(text, str(file))
        except ConfigError as exc:
            raise ConfigError(
                f"--file: {file} must be a list with one entry below the other to be added to: {exc}"
            ) from exc
        _replace(file.resolve(), text)
    except OSError as exc:
        raise ConfigError(f"--file: cannot write {str(file)!r}: {exc.strerror}") from exc
    if as_json:
        emit({"name": name, "token": made, "file": str(file)})
        return
    stdout.print(made, markup=False)
    stderr.print(
        f"that is the token of {name}; it is not kept anywhere. {file} has its hash: "
        "serve with --tokens, call with EXPERTMESH_CLIENT_TOKEN_FILE",
        markup=False,
    )


def _appended(before: str, entry: dict[str, Any]) -> str:
    """As text, so that comments of whoever keeps the file stay, indented as its last entry is."""
    added = yaml.safe_dump([entry], sort_keys=False)
    if not before.strip() or before.split() == ["tokens:", "[]"]:
        return "tokens:\n" + added
    starts = [line for line in before.splitlines() if line.lstrip().startswith("- ")]
    indent = starts[-1][: len(starts[-1]) - len(starts[-1].lstrip())] if starts else ""
    return before.rstrip("\n") + "\n" + textwrap.indent(added, indent)


def _replace(file: Path, text: str) -> None:
    """In one step: servers that read the file now see all of it or nothing of it."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}")
    about = file.stat() if file.exists() else None
    try:
        scratch.touch(about.st_mode & 0o777 if about else 0o600)
        scratch.write_text(text, encoding="utf-8")
        if about is not None:  # the server's user must still be able to read it
            os.chown(scratch, about.st_uid, about.st_gid)
        scratch.replace(file)
    finally:
        scratch.unlink(missing_ok=True)
