"""Shell commands of the documents, run as they stand there but for ports, durations and ids of traces."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from cluster.config import EMBEDDED_MODEL
from tests.documents import ROOT, block, blocks
from tests.e2e.processes import ServeProcess
from tests.pki import Pki

README, TRACES, CLUSTER = "README.md", "deploy/observability/README.md", "deploy/ray/README.md"
HERE, RAY_UP = "tests/e2e/test_documents.py", "tests/cluster/test_ray_up.py"
RUN = {
    f"{README}: expertmesh serve --model": f"{HERE}::test_serve_and_ask",
    f"{README}: expertmesh generate": f"{HERE}::test_serve_and_ask",
    f"{README}: expertmesh zoo make --arch mixtral": f"{HERE}::test_verify",
    f"{README}: expertmesh verify --expert-dtype": f"{HERE}::test_verify",
    f"{README}: expertmesh bench serve": f"{HERE}::test_load_and_replay",
    f"{README}: expertmesh trace list": f"{HERE}::test_look_at_traces",
    f"{README}: expertmesh serve --expert-memory": f"{HERE}::test_serve_with_a_budget",
    f"{README}: expertmesh serve --groups 3 --copies 2 --balance": f"{HERE}::test_groups_come_and_go",
    f"{README}: expertmesh loads record": f"{HERE}::test_groups_come_and_go",
    f"{README}: expertmesh token": f"{HERE}::test_tokens_and_certificates",
    f"{TRACES}: EXPERTMESH_FAULTS": f"{HERE}::test_look_at_traces",
    f"{TRACES}: expertmesh trace blame": f"{HERE}::test_look_at_traces",
    f"{TRACES}: expertmesh trace list": f"{HERE}::test_look_at_traces",
    f"{TRACES}: expertmesh generate": f"{HERE}::test_look_at_traces",
    f"{CLUSTER}: ray get-auth-token": f"{RAY_UP}::test_it_is_exact_across_hosts",
    f"{CLUSTER}: ray exec deploy/ray/local.yaml 'RAY_AUTH_MODE=token expertmesh doctor": f"{RAY_UP}::test_the_doctor",
    f"{CLUSTER}: ray rsync-up": f"{RAY_UP}::test_serve_config",
    f"{CLUSTER}: expertmesh generate": f"{RAY_UP}::test_serve_config",
    f"{CLUSTER}: ray exec deploy/ray/local.yaml 'RAY_AUTH_MODE=token serve shutdown": f"{RAY_UP}::test_it_is_taken",
    # The same commands with smaller numbers: these take many minutes as they stand.
    f"{README}: expertmesh bench dispatch": f"{HERE}::test_benchmarks_with_smaller_numbers",
    f"{README}: expertmesh bench trace-cost": f"{HERE}::test_benchmarks_with_smaller_numbers",
    f"{README}: expertmesh bench cold": f"{HERE}::test_benchmarks_with_smaller_numbers",
    f"{README}: expertmesh bench first": f"{HERE}::test_benchmarks_with_smaller_numbers",
    f"{README}: expertmesh serve --groups 3 --copies 2": f"{HERE}::test_damage",
}
"""Which test runs a block."""
NOT_RUN = {
    f"{README}: make demo": "`make test` is what runs this; the demo has a test of its own",
    f"{README}: expertmesh zoo make --arch qwen3_moe --preset bench-700m": "peers are gigabytes from a registry",
    f"{TRACES}: docker compose": "wants a container engine",
}


def _key(name: str) -> str:
    """The longest one that fits."""
    return max((key for key in [*RUN, *NOT_RUN] if name.startswith(key)), key=len, default="")


def test_every_block_of_every_document_has_a_test_or_a_reason() -> None:
    names = [each.name for each in blocks()]
    assert len(names) > 20
    assert not [name for name in names if not _key(name)]
    assert {_key(name) for name in names} == {*RUN, *NOT_RUN}, "some are in no document any more"
    for test in RUN.values():
        file, function = test.split("::")
        assert f"def {function}" in (ROOT / file).read_text(), test


def sh(command: str, place: Path, server: str = "", instead: Mapping[str, str] | None = None) -> str:
    """Runs one command in ``place``; standard output."""
    for old, new in {"127.0.0.1:9000": server, **(instead or {})}.items():
        command = command.replace(old, new)
    verb = re.search(r"expertmesh (\w+)", command)
    if server and verb and verb[1] in ("generate", "status", "stop", "scale", "drain", "balance", "loads"):
        command += f" --server {server}"
    command = re.sub(r"(\.venv/bin/)?expertmesh ", f"{shlex.quote(sys.executable)} -m cluster ", command, count=1)
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, shell=True, cwd=place, env=environ, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


class Serving(ServeProcess):
    """`expertmesh serve` as a document has it."""

    def __init__(self, command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = shlex.split(command)
        at = next(number for number, word in enumerate(words) if word.endswith("expertmesh"))
        for word in words[:at]:
            monkeypatch.setenv(*word.split("=", 1))
        assert words[at + 1] == "serve"
        rest = words[at + 2 :]
        if "--listen" in rest:
            del rest[rest.index("--listen") : rest.index("--listen") + 2]
        monkeypatch.chdir(place)
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        super().__init__(*rest, log=place / "serve.log")
        for word in words[:at]:
            monkeypatch.delenv(word.split("=", 1)[0])

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.process.poll() is None:
            status, left = self.stop()
            assert status == 0
            assert not left


@pytest.mark.full
def test_serve_and_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-mixtral").symlink_to(EMBEDDED_MODEL)
    (serve,) = block(README, "expertmesh serve --model").commands
    generate, status, stop = block(README, "expertmesh generate").commands
    with Serving(serve, tmp_path, monkeypatch) as served:
        assert len(sh(generate, tmp_path, served.address).split()) > 8
        assert "shm" in sh(status, tmp_path, served.address)
        sh(stop, tmp_path, served.address)
        assert served.process.wait(60) == 0


@pytest.mark.full
def test_verify(tmp_path: Path) -> None:
    make, verify = block(README, "expertmesh zoo make --arch mixtral").commands
    instead = {"/tmp/mixtral": str(tmp_path / "mixtral")}
    sh(make, tmp_path, instead=instead)
    assert '"ok": true' in sh(verify, tmp_path, instead=instead)
    (quantised,) = block(README, "expertmesh verify --expert-dtype").commands
    assert "not exact (int8 experts)" in sh(quantised, tmp_path)


@pytest.mark.full
def test_load_and_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, replay = block(README, "expertmesh bench serve").commands
    sh(record, tmp_path, instead={"--duration 60": "--duration 6"})
    assert (tmp_path / "bench-serve.png").stat().st_size > 10_000
    with Serving("expertmesh serve", tmp_path, monkeypatch) as served:
        report = json.loads(sh(replay, tmp_path, served.address).splitlines()[-1])
        assert report["errors"] == {}, report["errors"]


@pytest.mark.full
def test_look_at_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_TELEMETRY__STORE", str(tmp_path / "traces"))
    serve, load = block(TRACES, "EXPERTMESH_FAULTS").commands
    with Serving(serve, tmp_path, monkeypatch) as served:
        sh(load, tmp_path, served.address, {"--duration 20": "--duration 10"})
        (blame,) = block(TRACES, "expertmesh trace blame").commands
        assert "expert.cold_load" in sh(blame, tmp_path)
        generate, everything = block(TRACES, "expertmesh generate").commands
        sh(generate, tmp_path, served.address)
        assert sh(everything, tmp_path)
        slowest, show = block(TRACES, "expertmesh trace list").commands
        listed = sh(slowest, tmp_path)
        (trace, *_) = re.findall(r"\b[0-9a-f]{8,32}\b", listed)
        assert "expert.cold_load" in sh(show, tmp_path, instead={"80cb1c77": trace[:8]})
        for command in block(README, "expertmesh trace list").commands:
            sh(command, tmp_path, instead={"4bf92f35": trace[:8]})
        assert (tmp_path / "trace.json").exists()


@pytest.mark.full
def test_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, drill = block(README, "expertmesh serve --groups 3 --copies 2").commands
    with Serving(serve, tmp_path, monkeypatch) as served:
        assert sh("expertmesh generate To --max-new-tokens 3", tmp_path, served.address)
    assert sh(f"{drill} --before 5", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize(
    ("begins", "fewer"),
    [
        ("expertmesh bench trace-cost", "--pairs 1 --requests 4 --new 8"),
        ("expertmesh bench cold", "--rounds 1 --pairs 1 --streams 2 --new 4"),
        ("expertmesh bench first", "--starts 1 --requests 3"),
        ("expertmesh bench dispatch", "--tokens 2 --hidden 64 --samples 20 --seconds 0.2"),
    ],
)
def test_benchmarks_with_smaller_numbers(begins: str, fewer: str, tmp_path: Path) -> None:
    (command,) = block(README, begins).commands
    assert sh(f"{command} {fewer}", tmp_path)


@pytest.mark.full
def test_serve_with_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, numa = block(README, "expertmesh serve --expert-memory").commands
    with Serving(serve, tmp_path, monkeypatch) as served:
        assert sh("expertmesh generate To --max-new-tokens 3", tmp_path, served.address)
    assert "node" in sh(numa, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(420)
def test_groups_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve, *changes, receipts = block(README, "expertmesh serve --groups 3 --copies 2 --balance").commands
    record, plan = block(README, "expertmesh loads record").commands
    with Serving(f"EXPERTMESH_PLACEMENT__WINDOW_S=3 {serve}", tmp_path, monkeypatch) as served:
        asking = subprocess.Popen(
            [sys.executable, "-m", "cluster", "bench", "serve", "--server", served.address, "--rate", "2"]
            + ["--duration", "10", "--prompt-dist", "fixed:16", "--new-tokens", "8", "--plot", str(tmp_path / "x.png")],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert asking.wait(120) == 0
        sh(record, tmp_path, served.address)
        assert sh(plan, tmp_path)
        for command in changes:
            sh(command, tmp_path, served.address)
        assert sh(receipts, tmp_path, served.address)


@pytest.mark.full
def test_tokens_and_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token, serve = block(README, "expertmesh token").commands
    pki = Pki(tmp_path, "mesh-ca")
    cert, key = pki.issue("127.0.0.1")
    for name, path in (("mesh.pem", cert), ("mesh-key.pem", key), ("mesh-ca.pem", pki.ca)):
        (tmp_path / name).write_bytes(Path(path).read_bytes())
    sh(token, tmp_path)
    with Serving(serve, tmp_path, monkeypatch) as served:
        monkeypatch.setenv("EXPERTMESH_CLIENT_CA", "mesh-ca.pem")
        monkeypatch.setenv("EXPERTMESH_CLIENT_TOKEN_FILE", "alice.token")
        assert sh("expertmesh generate To --max-new-tokens 3", tmp_path, served.address)
