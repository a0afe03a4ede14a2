"""A served model that wants TLS and tokens, used by the commands as their users use them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.processes import COMMAND, ServeProcess, descendants, last_json, run, run_here
from tests.pki import Pki


class Secured:
    """The server, and what its clients need."""

    def __init__(self, folder: Path) -> None:
        mesh, people = Pki(folder, "mesh"), Pki(folder, "people")
        self.tokens = folder / "tokens.yaml"
        self.token_files = {name: self._token(folder, name, *flags) for name, flags in USERS.items()}
        cert, key = mesh.issue("127.0.0.1")
        own_cert, own_key = people.issue("alice@example.test")
        os.environ["EXPERTMESH_DATA_PLANE__SECRET"] = SECRET
        self.client = {"CA": mesh.ca, "CERT": own_cert, "KEY": own_key}
        self.process = ServeProcess(
            *("--groups", "2", "--dtype", "fp32", "--transport", "grpc"),
            *("--cert", cert, "--key", key, "--ca", mesh.ca, "--client-ca", people.ca, "--tokens", str(self.tokens)),
            log=folder / "log",
        )
        del os.environ["EXPERTMESH_DATA_PLANE__SECRET"]
        self.log = folder / "log"

    def _token(self, folder: Path, name: str, *flags: str) -> str:
        done = run_here("token", name, "--file", str(self.tokens), *flags, "--json")
        assert done.returncode == 0, done.stderr
        file = folder / f"{name}.token"
        file.write_text(last_json(done)["token"] + "\n")
        return str(file)

    def call(self, user: str | None, *arguments: str, **without: bool) -> subprocess.CompletedProcess[str]:
        shown = {name: path for name, path in self.client.items() if not without.get(name.lower())}
        if user is not None:
            shown["TOKEN_FILE"] = self.token_files[user]
        environ = {**os.environ, **{f"EXPERTMESH_CLIENT_{name}": value for name, value in shown.items()}}
        return subprocess.run(
            [*COMMAND, *arguments, "--server", self.process.address],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=environ,
        )


SECRET = "a-secret-that-no-log-may-have"
USERS = {"alice": (), "root": ("--control",), "late": ("--expires", "2020-01-01")}


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    made = Secured(tmp_path_factory.mktemp("secured"))
    yield made
    status, left = made.process.stop()
    assert status == 0, made.log.read_text()
    assert not left


def test_commands_show_what_the_server_wants(secured: Secured) -> None:
    done = secured.call("alice", "generate", "ROMEO.", "--max-new-tokens", "8", "--json")
    assert done.returncode == 0, done.stderr
    assert last_json(done)["completion_tokens"] == 8
    refused = [
        (secured.call(None, "status"), "a token is needed"),
        (secured.call("late", "status"), "expired on 2020-01-02"),
        (secured.call("alice", "scale", "--groups", "3"), "may ask, but not change"),
        (secured.call("alice", "status", cert=True, key=True), "do not agree on certificates"),
        (run("status", "--server", secured.process.address), "set EXPERTMESH_CLIENT_CA"),
    ]
    for wrong, message in refused:
        assert wrong.returncode == 1, wrong.stderr
        assert message in wrong.stderr
    status = last_json(secured.call("root", "status", "--json"))
    assert status["security"]["tls"]
    assert status["security"]["refused"] == {"UNAUTHENTICATED": 2, "PERMISSION_DENIED": 1}
    assert {group["transport"] for group in status["groups"]} == {"grpc"}


def test_nothing_secret_is_shown(secured: Secured) -> None:
    secrets = [Path(file).read_text().strip() for file in secured.token_files.values()]
    shown = secured.call("root", "status").stdout + json.dumps(last_json(secured.call("root", "status", "--json")))
    shown += secured.log.read_text() + secured.tokens.read_text()
    assert "client port: TLS, clients' certificates, tokens" in shown
    assert not any(secret in shown for secret in [*secrets, SECRET])
    # Logs of all processes: Ray's daemons, Serve's controller, router and groups.
    session = next(
        argument.partition("=")[2]
        for process in descendants(secured.process.process.pid)
        for argument in process.cmdline()
        if argument.startswith("--session_dir=")
    )
    logs = [file for file in (Path(session) / "logs").rglob("*") if file.is_file()]
    texts = [file.read_text(errors="replace") for file in logs]
    assert any("refused a call" in text for text in texts), "these are the logs"
    found = [str(file) for file, text in zip(logs, texts, strict=True) if any(s in text for s in [*secrets, SECRET])]
    assert not found
