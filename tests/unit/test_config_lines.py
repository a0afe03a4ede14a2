"""Every problem of a configuration file, with its line and key."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config_lines import MAX_BYTES, Problem, find_problems, locate

FILE = """\
groups: -2
copies: two
engine:
  max_runing: 4
  max_waiting: 0
  block_size: 16
  block_size: 17
listen: nonsense
security:
  cert: a.pem
telemetry: 7
placement:
  autoscale: "5"
  balance: true
"""


def problems(tmp_path: Path, text: str) -> list[Problem]:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return find_problems(file)[0]


def test_all_problems_are_told_with_line_and_key(tmp_path: Path) -> None:
    found = problems(tmp_path, FILE)
    assert [(problem.line, problem.key) for problem in found] == [
        (1, "groups"),
        (2, "copies"),
        (4, "engine.max_runing"),
        (5, "engine.max_waiting"),
        (7, "engine.block_size"),
        (8, "listen"),
        (10, "security.cert"),
        (11, "telemetry"),
        (13, "placement.autoscale"),
    ]
    assert "did you mean engine.max_running?" in found[2].message
    assert "line 6" in found[4].message


def test_what_does_not_go_together_is_told_where_it_stands(tmp_path: Path) -> None:
    text = "groups: 2\nsecurity:\n  tokens: tokens.yaml\nfront_door: serve\n"
    assert [(problem.line, problem.key) for problem in problems(tmp_path, text)] == [(4, "front_door")]
    # One of a pair alone is a problem; together they are none.
    assert problems(tmp_path, "security:\n  cert: a\n  key: b\n  ca: c\n") == []


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("groups: [1\n", 2, "is not YAML"),
        ("- a\n- b\n", 1, "must hold keys"),
        ("groups: 2\n\tcopies: 1\n", 2, "is not YAML"),
        ("groups: !!python/object/apply:os.system [true]\n", 1, "is not YAML"),
        ("engine: {max_running: {a: 1}}\n", 1, "max_running"),
        ("groups: 2\nmodel: 2030-13-01\n", 2, "month"),
        ("groups: 2\nengine:\n", 2, "must be a section"),
        ("groups:\n", 1, "must be of type int"),
    ],
)
def test_what_is_no_configuration_is_told(tmp_path: Path, text: str, line: int, message: str) -> None:
    (found,) = problems(tmp_path, text)
    assert found.line == line
    assert message in found.message + found.key


def test_files_for_serve_deploy_are_looked_at_too(tmp_path: Path) -> None:
    text = """\
proxy_location: Disabled
x-config: &config
  groups: 2
  coppies: 2
applications:
- name: experts-0
  args: {group: 0, config: *config}
- name: expertmesh
  args:
    config: *config
- name: other
  args:
    config:
      listen: nowhere
"""
    assert [(problem.line, problem.key) for problem in problems(tmp_path, text)] == [(4, "coppies"), (14, "listen")]
    merged = text.replace("coppies", "copies").replace("listen: nowhere", "<<: *config\n      copies: 0")
    assert [(problem.line, problem.key) for problem in problems(tmp_path, merged)] == [(15, "copies")]
    assert problems(tmp_path, merged.replace("copies: 0", "copies: 1")) == []
    assert problems(tmp_path, text.replace("coppies", "copies").replace("nowhere", "0.0.0.0:9000")) == []


def test_a_good_file_has_none_and_an_empty_one_neither(tmp_path: Path) -> None:
    assert problems(tmp_path, "groups: 3\nengine:\n  max_running: 8\n") == []
    assert problems(tmp_path, "") == []
    assert problems(tmp_path, "# nothing\n") == []
    (found,) = problems(tmp_path, "a" * (MAX_BYTES + 1))
    assert "bytes" in found.message
    file = tmp_path / "serve.yaml"
    file.write_text("groups: 2\nmodel: nowhere\n")
    assert locate("model: got 'nowhere'; no such directory", file).line == 2
    assert locate("memory is short", file) == Problem(0, "", "memory is short")


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_any_text_ends_in_an_answer(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Lines of good and bad files, shuffled and cut."""
    rng = random.Random(seed)
    lines = [line[rng.randrange(3) :] for line in rng.choices(FILE.splitlines(), k=rng.randrange(12))]
    text = "\n".join(lines) + rng.choice(["", "\n&a [*a, *a]", "\n? [x]\n: y", "\nx: &x {y: *x}", "\n<<: 5"])
    for problem in problems(tmp_path_factory.mktemp("fuzz"), text):
        assert problem.message
