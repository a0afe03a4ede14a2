"""The project's files tell the same story."""

from __future__ import annotations

import re
from pathlib import Path

import cluster
from tests import protos

ROOT = Path(__file__).resolve().parents[2]


def test_generated_code_is_in_sync_with_the_proto_files(tmp_path: Path) -> None:
    protos.generate(tmp_path)
    made = {file.name: file.read_text() for file in (tmp_path / "cluster/rpc/v1").iterdir()}
    kept = {file.name: file.read_text() for file in (ROOT / "cluster/rpc/v1").glob("*_pb2*")}
    assert made.keys() == kept.keys(), "run `make protos`"
    assert made == kept, "run `make protos`"


def test_every_proto_field_has_a_comment() -> None:
    for file in (ROOT / "protos").rglob("*.proto"):
        lines = file.read_text().splitlines()
        commented = False
        for line in lines:
            text = line.strip()
            if text.startswith("//"):
                commented = True
            elif re.match(r"(optional |repeated )?[\w.]+ \w+ = \d+;", text):
                assert commented, f"{file.name}: {text}"
            elif not text or text.startswith(("message", "enum", "service")):
                commented = False


def test_the_changelog_knows_this_version() -> None:
    assert f"## {cluster.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_file_names_in_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = set(re.findall(r"`((?:cluster|protos|tests|deploy)/[\w/.]+\.\w+)`", text))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_files_stay_readable() -> None:
    for file in [*(ROOT / "cluster").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if "_pb2" not in file.name:
            assert len(file.read_text().splitlines()) <= 420, f"{file.name}: a noun in it wants a file of its own"
