"""The dispatch benchmark measures real calls: no figure is asserted, only that there are some and what they are of."""

from __future__ import annotations

import json
import os

import pytest
import torch

from cluster.bench.dispatch import FLOOR_OF, Caller, Shapes, connect, echo_process, interleave, layer_rows, measure
from cluster.errors import InternalError, InvalidArgument
from cluster.transport.base import LayerReply, LayerRows, PendingReply


def test_every_transport_is_measured_beside_its_floor_at_every_shape() -> None:
    told: list[str] = []
    result = measure(["shm", "grpc", "gloo"], Shapes([1, 4], [64], 25, 1.0), told.append)
    json.dumps(result, allow_nan=False)
    assert [(row["transport"], row["tokens"]) for row in result["results"]] == [
        (kind, tokens) for tokens in (1, 4) for kind in ("shm", "grpc", "gloo")
    ]
    for row in result["results"]:
        assert row["floor_kind"] == FLOOR_OF[row["transport"]]
        assert row["samples"] >= 20
        assert 0 < row["p50_us"] <= row["p99_us"]
        assert 0 < row["floor_us"] <= row["floor_p99_us"]
        assert row["ratio_low"] <= row["ratio_high"]
    assert result["copy"]["tokens"] == 4
    assert len(told) == 2
    assert len(os.sched_getaffinity(0)) == os.cpu_count(), "the process has its cores back"


def test_a_transport_that_does_not_bring_the_rows_back_is_no_result() -> None:
    class Wrong:
        kind, group, address = "wrong", 0, ""

        def room(self, *_: object) -> None:
            return None

        def submit(self, call: object, rows: LayerRows, deadline: object) -> PendingReply:
            pending = PendingReply(0, call)  # type: ignore[arg-type]
            pending.resolve(LayerReply(torch.zeros_like(rows.hidden_TH)))
            return pending

    with pytest.raises(InternalError, match="wrong did not bring the rows back"):
        Caller(Wrong(), layer_rows(2, 4)).check()  # type: ignore[arg-type]


def test_the_echo_ends_with_its_parent_s_pipe_and_carries_any_shape() -> None:
    with echo_process("group", -1) as group:
        link = connect("shm", group)
        Caller(link, layer_rows(300, 17)).check()
        link.close()


def test_turns_are_taken_within_the_time_and_enough_samples_come_in_any_case() -> None:
    order: list[str] = []
    times = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 100, 60.0)
    assert {len(values) for values in times.values()} == {100}
    assert order.index("b") < 30
    assert order[-1] == "b"
    assert min(len(values) for values in interleave({"a": lambda: None}, 10**6, 0.001).values()) >= 20


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (([], [8], 50, 1.0), "--tokens"),
        (([1], [0], 50, 1.0), "--hidden"),
        (([1], [8], 5, 1.0), "--samples"),
        (([1], [8], 50, 0.0), "--seconds"),
    ],
)
def test_shapes_that_make_no_sense_are_refused_by_name(values: tuple[object, ...], name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        Shapes(*values)  # type: ignore[arg-type]
