"""A served embedded model, through both front doors, used as its users use it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.api.client import Client, Refused
from cluster.config import EMBEDDED_MODEL
from cluster.rpc.v1 import inference_pb2 as pb
from tests.e2e.processes import ServeProcess, last_json, run
from tests.trace_lint import from_jaeger, lint

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [
    "ROMEO.\nBut soft,",
    "1:1 In the beginning",
    "KING HENRY.\nOnce more",
    "And the LORD said unto",
    "Enter the Ghost",
    "He that believeth",
    "What, ho!",
    "Blessed are the",
]


@pytest.fixture(scope="module", params=["router", "serve"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    log = tmp_path_factory.mktemp("serve") / "log"
    groups = "2" if request.param == "router" else "1"
    process = ServeProcess("--groups", groups, "--front-door", request.param, "--dtype", "fp32", log=log)
    yield process
    if process.process.poll() is None:
        status, left = process.stop()
        assert status == 0, log.read_text()
        assert not left


@pytest.fixture(scope="module")
def right_answers() -> list[str]:
    """What single-process transformers makes of the prompts, greedily."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    answers = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def text(client: Client, prompt: str) -> str:
    return "".join(c.text for c in client.generate(pb.GenerateRequest(prompt=prompt, max_new_tokens=24)))


def test_sixteen_clients_at_once_get_sixteen_right_answers(served: ServeProcess, right_answers: list[str]) -> None:
    def one(number: int) -> str:
        with Client(served.address) as client:
            return text(client, PROMPTS[number % len(PROMPTS)])

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(16)))
    assert answers == right_answers * 2


def test_the_command_line_generates_and_reports(served: ServeProcess, right_answers: list[str]) -> None:
    done = run("generate", PROMPTS[0], "--max-new-tokens", "24", "--server", served.address, "--json", "--stream")
    assert done.returncode == 0, done.stderr
    result = last_json(done)
    assert result["text"] == right_answers[0]
    assert result["text"] in done.stderr, "--json streams to standard error"
    assert result["exact"] is True
    assert result["finish_reason"] == "length"
    plain = run("generate", PROMPTS[0], "--max-new-tokens", "24", "--server", served.address)
    assert plain.stdout == right_answers[0] + "\n"
    status = last_json(run("status", "--server", served.address, "--json"))
    assert status["state"] == "serving"
    assert status["arch"] == "deepseek_v3"
    held = [sorted(e for g in status["groups"] for e in g["holdings"][layer]["experts"]) for layer in range(4)]
    assert held == [list(range(16))] * 4
    assert all(group["healthy"] and group["process"]["rss_bytes"] > 0 for group in status["groups"])
    assert status["engine"]["finished"] >= 2
    assert all(group["transport"] == "shm" for group in status["groups"])
    shown = run("status", "--server", served.address)
    assert "group 0: shm, because same host" in shown.stdout


def test_messages_go_through_the_chat_template(served: ServeProcess) -> None:
    message = pb.Message(role="user", content="Who art thou?")
    with Client(served.address) as client:
        chunks = list(client.generate(pb.GenerateRequest(messages=[message], max_new_tokens=6)))
    assert chunks[-1].usage.prompt_tokens > 5


def test_bad_input_gets_invalid_argument_and_no_stack_trace(served: ServeProcess) -> None:
    bad = [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature"),
        ({"prompt": "x", "top_p": 1.5}, "top_p"),
        ({"prompt": "x", "max_new_tokens": -3}, "max_new_tokens"),
        ({"prompt": "x", "stop": ["y" * 10240]}, "stop"),
        ({"prompt": "x", "top_k": 5000}, "top_k"),
        ({"prompt_ids": pb.TokenIds(ids=[4096])}, "prompt_ids"),
        ({"prompt": "word " * 4000}, "prompt"),
    ]
    with Client(served.address) as client:
        for fields, name in bad:
            with pytest.raises(Refused) as caught:
                list(client.generate(pb.GenerateRequest(**fields)))  # type: ignore[arg-type]
            assert str(caught.value).startswith(name), str(caught.value)
            assert "Traceback" not in str(caught.value)
    with grpc.insecure_channel(served.address) as channel:
        raw = channel.unary_unary("/cluster.rpc.v1.Inference/GenerateOnce")
        with pytest.raises(grpc.RpcError) as error:
            raw(b"\x0a\x02\xff\xfe", timeout=30)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    done = run("generate", "", "--server", served.address)
    assert done.returncode == 2
    assert done.stderr.startswith("error: prompt")


CLIENT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import grpc
from cluster.rpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
assert inference_pb2.__file__.startswith(sys.argv[1]), inference_pb2.__file__
channel = grpc.insecure_channel(sys.argv[2])
inference = inference_pb2_grpc.InferenceStub(channel)
control = control_pb2_grpc.ControlStub(channel)
status = lambda: control.Status(control_pb2.StatusRequest()).engine
chunks = list(inference.Generate(inference_pb2.GenerateRequest(prompt="ROMEO.", max_new_tokens=12)))
print("".join(chunk.text for chunk in chunks).encode())
before = status()
stream = inference.Generate(inference_pb2.GenerateRequest(prompt="JULIET.", max_new_tokens=1500, ignore_eos=True))
for _ in range(5):
    next(stream)
assert status().running == 1
stream.cancel()
limit = time.monotonic() + 20
while status().running and time.monotonic() < limit:
    time.sleep(0.01)
after = status()
assert after.cancelled == before.cancelled + 1, after
assert after.running == 0 and after.max_steps_after_cancel <= 1, after
assert "torch" not in sys.modules and "ray" not in sys.modules
print("ok")
"""


def test_a_client_made_from_the_proto_files_alone_streams_and_cancels(served: ServeProcess, tmp_path: Path) -> None:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    protos = [str(path) for path in (ROOT / "protos").rglob("*.proto")]
    tool = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    subprocess.run([*tool, f"--python_out={stubs}", f"--grpc_python_out={stubs}", *protos], check=True, timeout=60)
    for folder in ("cluster", "cluster/rpc", "cluster/rpc/v1"):
        (stubs / folder / "__init__.py").touch()  # or the installed package of the same name would come first
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(stubs), served.address],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


def test_a_group_that_is_killed_comes_back_and_no_request_fails(served: ServeProcess, right_answers: list[str]) -> None:
    with Client(served.address) as client:
        before = client.status().groups[0]
        psutil.Process(before.process.pid).kill()
        answers = [text(client, prompt) for prompt in PROMPTS]
        after = client.status()
    assert answers == right_answers
    assert after.groups[0].incarnation != before.incarnation
    assert after.groups[0].healthy
    assert after.engine.failed == 0
    time.sleep(1.0)
    told = last_json(run("trace", "blame", "--last", "8", "--quantile", "0.5", "--json"))
    assert (told["causes"][0]["cause"], told["causes"][0]["group"]) == ("failover", 0)
    assert told["attributed_share_min"] > 0.9


def test_a_request_can_be_traced_at_once_with_no_collector(served: ServeProcess, tmp_path: Path) -> None:
    done = run("generate", PROMPTS[1], "--max-new-tokens", "12", "--server", served.address, "--json")
    trace_id = last_json(done)["trace_id"]
    shown = last_json(run("trace", "show", trace_id[:12], "--json", "--svg", str(tmp_path / "t.svg")))
    names = [span["name"] for span in shown["spans"]]
    assert names[0] == "expertmesh.client.generate"
    assert {"moe.request", "moe.queue", "moe.prefill", "moe.decode", "moe.expert_batch"} <= set(names)
    assert shown["attributed_share"] > 0.9
    assert "moe.request"[4:] in (tmp_path / "t.svg").read_text()
    listed = last_json(run("trace", "list", "--last", "50", "--json"))["traces"]
    assert trace_id in [row["trace_id"] for row in listed]
    for form in ("jaeger", "otlp"):
        out = tmp_path / f"{form}.json"
        assert last_json(run("trace", "export", trace_id, "--format", form, "--out", str(out), "--json"))[
            "spans"
        ] == len(names)
        assert trace_id in out.read_text()
    jaeger = json.loads((tmp_path / "jaeger.json").read_text())
    assert lint(from_jaeger(jaeger), slack_ns=4_000) == []
    # Layers, through Ray, of router and groups.
    done = run("generate", PROMPTS[2], "--max-new-tokens", "3", "--trace-layers", "--server", served.address, "--json")
    request_id = last_json(done)["trace_id"]
    request = last_json(run("trace", "show", request_id, "--json"))
    [span] = [span for span in request["spans"] if span["name"] == "moe.request"]
    step = last_json(run("trace", "show", span["attributes"]["moe.step.traces"][-1], "--json"))
    assert {"moe.step", "moe.layer", "moe.expert.compute"} <= {span["name"] for span in step["spans"]}
    with Client(served.address) as client:
        told = client.status().telemetry
        assert told.spans_exported > 0
        assert told.spans_dropped == 0
        assert client.set_tracing(False)
        untraced = list(client.generate(pb.GenerateRequest(prompt="x", max_new_tokens=2)))[-1].trace_id
        assert not client.set_tracing(True)
    with urllib.request.urlopen(f"http://{told.metrics_address}/metrics", timeout=10) as reply:
        assert b"gen_ai_server_time_to_first_token_seconds_bucket" in reply.read()
    missing = run("trace", "show", untraced)
    assert missing.returncode == 2
    assert "no such trace" in missing.stderr


def test_stop_drains_running_requests_and_leaves_nothing(served: ServeProcess, request: pytest.FixtureRequest) -> None:
    """Last in this file: it ends the server."""
    with Client(served.address) as client:
        stream = client.generate(pb.GenerateRequest(prompt="MACBETH.", max_new_tokens=150, ignore_eos=True))
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(served.stop, by_command="[serve]" in request.node.name)
            count = 1 + sum(len(chunk.tokens) for chunk in stream)
            status, left = stopping.result(120)
    assert count >= 150
    assert status == 0
    assert not left
    done = run("generate", "x", "--server", served.address)
    assert done.returncode == 1
    assert "nobody answers" in done.stderr
    started = time.monotonic()
    assert run("stop", "--server", served.address).returncode == 2
    assert time.monotonic() - started < 60
