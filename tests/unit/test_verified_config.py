from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.commands.verify import verified_config
from cluster.config import Config

NOT_GIVEN: dict[str, Any] = dict.fromkeys(
    ("model", "groups", "copies", "front_door", "address", "expert_dtype", "expert_memory")
) | {"data_plane": {"transport": None}}


def test_a_file_says_what_is_verified_as_it_says_what_is_served(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "groups: 3\ncopies: 2\nmodel: /m\nexpert_dtype: int8\nexpert_memory: 512M\nfront_door: serve\n"
        "dtype: bf16\ndata_plane:\n  transport: grpc\n  call_timeout_s: 7\n"
    )
    config = verified_config(file, NOT_GIVEN)
    assert (config.groups, config.copies, config.model, config.front_door) == (3, 2, "/m", "serve")
    assert (config.expert_dtype, config.expert_memory) == ("int8", "512M")
    assert (config.data_plane.transport, config.data_plane.call_timeout_s) == ("grpc", 7.0)
    assert config.verify
    assert config.dtype == "fp32"


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("groups: 3\ncopies: 2\ndata_plane:\n  transport: grpc\n")
    config = verified_config(file, {**NOT_GIVEN, "groups": 4, "copies": 1, "data_plane": {"transport": "shm"}})
    assert (config.groups, config.copies, config.data_plane.transport) == (4, 1, "shm")


@pytest.mark.parametrize(("address", "interface"), [("", "127.0.0.1"), ("ray-head:6379", "0.0.0.0")])
def test_it_listens_on_a_port_of_its_own_where_its_cluster_can_reach_it(address: str, interface: str) -> None:
    config = verified_config(None, {**NOT_GIVEN, "address": address})
    assert config.listen == f"{interface}:0"
    assert config.data_plane.bind == interface
    assert (config.groups, config.copies, config.model) == (Config().groups, Config().copies, Config().model)
