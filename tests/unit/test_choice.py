from __future__ import annotations

import pytest

from cluster.transport.choice import End, candidates, explain

CPU = End("cpu", shm=True, collectives=frozenset({"gloo"}))
GPUS = frozenset({"gloo", "nccl"})
ONE, OTHER = End("cuda", "0000:01:00", GPUS, shm=True), End("cuda", "0000:02:00", GPUS, shm=True)


def kinds(wanted: str, router: End, group: End) -> list[str]:
    return [candidate.kind for candidate in candidates(wanted, router, group)[0]]


def test_auto_takes_nccl_between_two_gpus_and_shared_memory_otherwise() -> None:
    assert kinds("auto", ONE, OTHER) == ["nccl", "shm"]
    assert kinds("auto", CPU, CPU) == ["shm"]
    assert kinds("auto", ONE, CPU) == ["shm"]
    assert kinds("auto", CPU, End("cpu")) == []


def test_the_path_between_two_gpus_is_told() -> None:
    found, _ = candidates("auto", ONE, OTHER, "NVLink")
    assert found[0].why == "GPUs 0000:01:00 and 0000:02:00 by NVLink"


@pytest.mark.parametrize(
    ("router", "group", "reason"),
    [
        (CPU, ONE, "nccl: router on CPU"),
        (ONE, ONE, "both ends use GPU 0000:01:00"),
        (ONE, End("cuda", "0000:02:00"), "torch of group has no nccl"),
    ],
)
def test_what_is_left_out_has_a_reason(router: End, group: End, reason: str) -> None:
    found, reasons = candidates("nccl", router, group)
    assert not found
    assert reason in explain(reasons)


def test_grpc_needs_no_candidate_and_gloo_is_never_chosen_by_itself() -> None:
    assert candidates("grpc", CPU, CPU) == ([], [])
    assert kinds("gloo", CPU, CPU) == ["gloo"]
    assert "gloo" not in kinds("auto", CPU, CPU)
