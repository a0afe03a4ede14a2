"""Commands that start and end their own system."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cluster.bench.damage import KINDS
from tests.conftest import MakeTiny
from tests.e2e.processes import COMMAND, ServeProcess, descendants, free_port, last_json, run, run_here, survivors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster with three logical GPUs, as an operator would have started it."""
    port = free_port()
    log = (tmp_path_factory.mktemp("ray") / "log").open("w")
    ray = str(Path(COMMAND[0]).parent / "ray")
    arguments = [
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=4",
        "--num-gpus=3",
        "--disable-usage-stats",
    ]
    process = subprocess.Popen(
        [ray, *arguments, "--include-dashboard=false"], stdout=log, stderr=log, start_new_session=True
    )
    limit = time.monotonic() + 120
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.2)
    yield f"127.0.0.1:{port}"
    left = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    _, slow = psutil.wait_procs([psutil.Process(process.pid), *left], timeout=5)  # some take half a minute to notice
    for daemon in slow:
        daemon.kill()
    psutil.wait_procs(slow, timeout=10)
    log.close()


def plant(source: Path, out: Path, kind: str) -> Path:
    """A copy of a qwen3_moe checkpoint with one error in it."""
    shutil.copytree(source, out)
    state = load_file(out / "model.safetensors")
    experts = "model.layers.1.mlp.experts"
    for name in [n for n in state if n.startswith(experts) or n == "model.layers.1.mlp.gate.weight"]:
        if kind == "zeroed" and name.startswith(f"{experts}.5."):
            state[name] = state[name] * 0
        if kind == "wrong" and name.startswith(f"{experts}.3."):
            state[name] = state[name.replace(".3.", ".4.")].clone()
        if kind == "swapped" and name.endswith("gate.weight"):
            state[name] = state[name][[1, 0, *range(2, len(state[name]))]].contiguous()
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_verify_passes_on_a_joined_cluster_over_a_mix_of_links_and_each_process_has_its_own_gpu(
    ray_address: str, tiny: MakeTiny
) -> None:
    done = run(
        "verify",
        "--model",
        str(tiny("qwen3_moe")),
        "--groups",
        "2",
        "--transport",
        "shm,gloo",
        "--address",
        ray_address,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    result = last_json(done)
    assert result["ok"] is True
    assert [r["groups"] for r in result["runs"]] == [2]
    assert result["links"] == ["shm", "gloo"]
    assert result["fallbacks"] == 0
    assert all(
        r["tokens_compared"] == 256 and r["mismatched_tokens"] == 0 and r["max_batch"] >= 2 for r in result["runs"]
    )
    assert all(len(set(r["visible_devices"])) == r["groups"] + 1 for r in result["runs"])


@pytest.mark.full
@pytest.mark.parametrize(
    "kind",  # what `compare` says of each is an integration test
    ["wrong", "zeroed", "swapped"],
)
def test_verify_exits_1_on_a_planted_error(kind: str, ray_address: str, tiny: MakeTiny, tmp_path: Path) -> None:
    served = plant(tiny("qwen3_moe"), tmp_path / "served", kind)
    flags = ["--groups", "0", "--prompts", "4", "--tokens", "16", "--in-flight", "2", "--address", ray_address]
    done = run("verify", "--model", str(served), "--reference", str(tiny("qwen3_moe")), *flags, "--json")
    assert done.returncode == 1, done.stderr
    assert last_json(done)["problems"]


@pytest.mark.full
def test_what_a_killed_serve_leaves_on_a_joined_cluster_is_seen_and_removed(
    ray_address: str, tiny: MakeTiny, tmp_path: Path
) -> None:
    model = str(tiny("qwen3_moe"))
    process = ServeProcess("--model", model, "--groups", "1", "--address", ray_address, log=tmp_path / "log")
    process.process.kill()
    process.process.wait(30)
    done = run("verify", "--model", model, "--groups", "1", "--address", ray_address)
    assert done.returncode == 2
    assert "experts-0" in done.stderr
    done = run("stop", "--address", ray_address, "--json")
    assert last_json(done)["stopped"] == ["expertmesh", "experts-0"]
    assert last_json(run("stop", "--address", ray_address, "--json"))["stopped"] == []


@pytest.mark.parametrize(
    "kind",
    ["kill-group", *(pytest.param(k, marks=pytest.mark.full) for k in KINDS if k != "kill-group")],
)
def test_a_drill_ends_with_every_answer_right(kind: str) -> None:
    flags = ["--before", "5", "--damage", "4", "--streams", "4", "--new", "32"]
    done = run("drill", kind, *flags, "--json")
    assert done.returncode in (0, 1), done.stderr  # gaps are this machine's: they are shown, not asserted
    report = last_json(done)
    print(report)
    assert report["requests"] >= 4
    assert report["failed"] == report["mismatched_tokens"] == report["inexact"] == 0, report
    assert report["groups"] == KINDS[kind].groups
    assert report["layer_calls"] > 0
    if kind == "kill-group":
        assert report["resent_calls"] > 0
        assert report["recovery_s"] is not None


def test_more_gpus_than_the_cluster_has_is_refused_with_numbers(ray_address: str, tiny: MakeTiny) -> None:
    done = run("verify", "--model", str(tiny("qwen3_moe")), "--groups", "3", "--address", ray_address)
    assert done.returncode == 2
    assert "4 GPUs are needed" in done.stderr
    assert "the cluster has 3" in done.stderr


WRONG: list[tuple[list[str], list[str]]] = [
    (["serve", "--model", "/nowhere"], ["--model", "/nowhere"]),
    (["serve", "--groups", "99"], ["groups", "99", "16 experts"]),
    (["serve", "--groups", "-1"], ["groups", "-1"]),
    (["serve", "--dtype", "fp8"], ["dtype", "fp8"]),
    (["serve", "--transport", "carrier-pigeon"], ["data_plane.transport", "carrier-pigeon", "shm"]),
    (["serve", "--groups", "3", "--transport", "shm,grpc"], ["data_plane.transport", "2 transports for 3 groups"]),
    (["bench", "dispatch", "--transport", "nccl"], ["--transport", "nccl", "shm, grpc, gloo"]),
    (["bench", "dispatch", "--tokens", "1,x"], ["--tokens", "1,x"]),
    (["serve", "--listen", "nonsense"], ["listen", "nonsense"]),
    (["verify", "--prompts", "0"], ["--prompts", "0"]),
    (["verify", "--groups", "3", "--transport", "shm,grpc"], ["data_plane.transport", "2 transports for 3 groups"]),
    (["zoo", "make", "--arch", "gpt5", "--out", "/tmp/x"], ["--arch", "gpt5", "mixtral"]),
    (["zoo", "make", "--arch", "mixtral", "--preset", "bench-700m", "--out", "/tmp/x"], ["--arch", "qwen3_moe"]),
    (["zoo", "make", "--arch", "mixtral", "--out", str(ROOT)], ["--out", "empty"]),
    (["generate"], ["PROMPT"]),
    (["generate", "--ids", "1,x"], ["--ids", "1,x"]),
    (["nonsense"], ["nonsense"]),
    (["serve", "--expert-memory", "much"], ["expert_memory", "much", "512M"]),
    (["serve", "--numa", "maybe"], ["numa", "maybe", "strict"]),
    (["trace", "blame", "--quantile", "2"], ["--quantile", "2"]),
    (["trace", "export", "00", "--format", "zipkin", "--out", "/tmp/x"], ["--format", "zipkin", "jaeger"]),
    (["trace", "list", "--store", "/nowhere"], ["--store", "/nowhere"]),
    (["bench", "trace-cost", "--pairs", "0"], ["--pairs", "0"]),
    (["numa", "show", "--sysfs", "/nowhere"], ["--sysfs", "/nowhere"]),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_a_wrong_command_line_is_one_line_and_exit_status_2(number: int) -> None:
    line, words = WRONG[number]
    done = (run if number % 12 == 0 else run_here)(*line)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert all(word in last for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_said_before_anything_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("serve", "--listen", address)
    assert done.returncode == 2
    assert address in done.stderr
    assert "in use" in done.stderr


@pytest.mark.full
def test_what_does_not_fit_is_refused_with_numbers_for_each_process() -> None:
    # The budget is of no consequence elsewhere: nothing is allocated before it is used.
    done = subprocess.run(
        [*COMMAND, "serve", "--listen", "127.0.0.1:0"],
        env={**__import__("os").environ, "EXPERTMESH_ENGINE__KV_CACHE_BYTES": str(2**50)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(r"does not fit .*GiB needed.*router .*key-value cache, group 0 .*group 1 ", done.stderr), (
        done.stderr
    )


def test_demo_prints_text_and_stages_and_leaves_nothing() -> None:
    process = subprocess.Popen([*COMMAND, "demo", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen: dict[int, psutil.Process] = {}
    while process.poll() is None:
        seen.update({p.pid: p for p in descendants(process.pid)} if psutil.pid_exists(process.pid) else {})
        time.sleep(0.5)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    assert len(result["text"].split()) >= 8
    assert result["exact"] is True
    assert {"trunk", "dispatch", "wire", "expert.compute"} <= set(result["stages_s"])
    assert sum(result["stages_s"].values()) <= result["wall_s"]
    assert len(seen) > 5
    assert not survivors(list(seen.values()))


@pytest.mark.full
def test_ctrl_c_while_it_starts_leaves_nothing() -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    seen: dict[int, psutil.Process] = {}
    limit = time.monotonic() + 120
    while not any("ServeReplica" in " ".join(p.cmdline()) for p in seen.values() if p.is_running()):
        assert process.poll() is None
        assert time.monotonic() < limit
        seen.update({p.pid: p for p in descendants(process.pid)})
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert not survivors(list(seen.values()))


def test_commands_in_the_readme_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [re.findall(r"^(?:\.venv/bin/)?expertmesh ([\w ]*?)(?= [^a-z]|$)(.*)", line) for line in lines]
    found = [match for matches in commands for match in matches]
    assert len(found) >= 6
    monkeypatch.setenv("COLUMNS", "200")
    for names, rest in found:
        parts = names.split()
        words = parts[:2] if parts[0] in ("zoo", "bench", "trace", "numa", "loads") else parts[:1]
        shown = run_here(*words, "--help").stdout
        for flag in re.findall(r"(--[a-z-]+)", rest):
            assert flag in shown, f"{names} {flag}"
    targets = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(lines), re.MULTILINE):
        assert f"\n{target}:" in targets, target


@pytest.mark.full
def test_bench_dispatch_measures_beside_ray() -> None:
    shapes = ["--tokens", "2", "--hidden", "64", "--samples", "20", "--seconds", "0.2"]
    done = run("bench", "dispatch", *shapes, "--transport", "shm", "--transport", "grpc", "--json")
    assert done.returncode == 0, done.stderr
    result = last_json(done)
    assert [row["transport"] for row in result["results"]] == ["shm", "grpc"]
    assert result["serve_handle_p50_us"] > 0
    assert result["ray_actor_p50_us"] > 0
    assert {row["transport"] for row in result["beside_ray"]} == {"shm", "grpc"}
    assert result["machine"]["cores"] >= 1
