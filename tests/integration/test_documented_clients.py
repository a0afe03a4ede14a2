"""The code on docs/clients.md, run as it stands there against two servers: a plain one, and one with TLS and tokens."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.api.tokens import digest, new_token
from cluster.config import EMBEDDED_MODEL
from cluster.settings import SecurityConfig
from tests.door import Door
from tests.pki import Pki
from tests.systems import in_process_router

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/clients.md").read_text()
PLAIN, SECURE = "127.0.0.1:9000", "127.0.0.1:9443"
NPM = ("@grpc/grpc-js@1.14", "@grpc/proto-loader@0.8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory as the page supposes it, with servers; ``addresses`` in it has where they really are."""
    folder = tmp_path_factory.mktemp("client")
    (folder / "protos").symlink_to(ROOT / "protos")
    pki, token = Pki(folder, "mesh"), new_token()
    cert, key = pki.issue("127.0.0.1")
    (folder / "alice.token").write_text(token + "\n")
    (folder / "tokens.yaml").write_text(f"tokens:\n- name: alice\n  sha256: {digest(token)}\n")
    with in_process_router(EMBEDDED_MODEL) as router:
        doors = [Door(), Door(SecurityConfig(cert=cert, key=key, tokens=str(folder / "tokens.yaml")))]
        for door in doors:
            door.open(router)
        (folder / "addresses").write_text(" ".join(door.address for door in doors))
        yield folder
        for door in doors:
            door.close()


def run(place: Path, code: str, command: list[str], suffix: str) -> str:
    plain, secure = (place / "addresses").read_text().split()
    file = place / f"example{suffix}"
    file.write_text(code.replace(PLAIN, plain).replace(SECURE, secure))
    done = subprocess.run(
        [*command, str(file)], capture_output=True, text=True, timeout=120, check=False, cwd=place, env=ENVIRON
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


ENVIRON = {"PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": "/nonexistent"}


def expected(code: str, out: str) -> None:
    if SECURE in code:
        assert "deepseek_v3" in out
    else:
        assert len(out.split()) >= 5, out
        assert "UNAVAILABLE" not in out


def test_there_is_code_in_all_languages() -> None:
    assert len(blocks("python")) == 3
    assert len(blocks("js")) == 2


@pytest.mark.parametrize("number", range(3))
def test_python(place: Path, number: int) -> None:
    code = blocks("python")[number]
    expected(code, run(place, code, [sys.executable], ".py"))


@pytest.fixture(scope="module")
def node(place: Path) -> str:
    found, npm = shutil.which("node"), shutil.which("npm")
    if found is None or npm is None:
        pytest.skip("no Node.js here; the JavaScript on docs/clients.md was NOT run")
    command = [npm, "install", "--no-audit", "--no-fund", "--prefix", str(place), *NPM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {' '.join(NPM)} here; the JavaScript was NOT run: {done.stderr[-300:]}")
    return found


@pytest.mark.parametrize("number", range(2))
def test_node(place: Path, node: str, number: int) -> None:
    code = blocks("js")[number]
    # Node finds fault with servers that are named by addresses, as on this page.
    expected(code, run(place, code, [node, "--no-deprecation"], ".mjs"))
