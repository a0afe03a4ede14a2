from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import Config, load_config, split_address
from cluster.errors import ConfigError


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("groups: 3\ndtype: bf16\nengine:\n  max_running: 7\n  max_waiting: 9\n")
    config = load_config(
        file,
        {"dtype": "fp16", "listen": None},
        {"EXPERTMESH_GROUPS": "4", "EXPERTMESH_ENGINE__MAX_RUNNING": "8", "OTHER": "1"},
    )
    assert (config.groups, config.dtype, config.listen) == (4, "fp16", Config().listen)
    assert (config.engine.max_running, config.engine.max_waiting) == (8, 9)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"group": 3}, ["unknown key group", "did you mean groups"]),
        ({"engine": {"max_runing": 3}}, ["engine.max_runing", "engine.max_running"]),
        ({"groups": -1}, ["groups", "-1", "at least 0"]),
        ({"groups": 1.5}, ["groups", "1.5", "int"]),
        ({"groups": True}, ["groups", "True", "int"]),
        ({"dtype": "fp8"}, ["dtype", "fp8", "fp32"]),
        ({"listen": "9000"}, ["listen", "9000", "HOST:PORT"]),
        ({"listen": "127.0.0.1:99999"}, ["listen", "99999"]),
        ({"drain_s": float("nan")}, ["drain_s", "nan"]),
        ({"verify": "perhaps"}, ["verify", "perhaps", "bool"]),
        ({"engine": 3}, ["engine", "section"]),
    ],
)
def test_a_wrong_value_names_key_value_and_limit(flags: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags=flags, environ={})
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- 1"])
def test_a_file_that_is_no_yaml_mapping_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(file, environ={})


def test_split_address() -> None:
    assert split_address("listen", "[::1]:80") == ("[::1]", 80)
