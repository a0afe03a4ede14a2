"""Gates found by looking at a model's own calls, and what they say of the next layer."""

from __future__ import annotations

import random

import pytest
import torch

from cluster.core import LayerCall, Order, Priority, StoreFacts
from cluster.errors import InvalidArgument
from cluster.model.packed import Chunk
from cluster.model.trunk import Prewarm
from cluster.routing.prediction import CHOSEN, MAX_DEPTH, NEARLY, chances, look_ahead
from cluster.routing.step import StepContext
from cluster.transport.codec import decode_order, encode_order
from cluster.transport.orders import WaitingOrders
from cluster.weights.zoo import architectures
from tests.conftest import MakeTiny
from tests.systems import in_process_router


@pytest.mark.parametrize("arch", architectures())
def test_every_layers_gate_is_found_and_chooses_as_the_layer_itself_does(arch: str, tiny: MakeTiny) -> None:
    """Given a layer's own input, it must mostly choose the layer's own experts; the rest of a model may have its say
    (groups, biases), so scores alone need not be all."""
    with in_process_router(tiny(arch), 1) as router:
        trunk = router._trunk
        layers = router.served.info.num_moe_layers
        assert trunk.gates.found == layers
        agreed: list[float] = []
        hook = trunk._dispatch

        def compare(step: object, layer: int, hidden: torch.Tensor, index: torch.Tensor, *rest: object) -> torch.Tensor:
            chosen = trunk.gates.choose(layer, hidden)
            assert chosen is not None
            assert chosen.chosen == index.shape[1]
            assert chosen.index_TN.shape == (len(index), 2 * index.shape[1])
            for row, wanted in zip(chosen.index_TN[:, : chosen.chosen].tolist(), index.tolist(), strict=True):
                agreed.append(len(set(row) & set(wanted)) / len(wanted))
            return hook(step, layer, hidden, index, *rest)  # type: ignore[arg-type]

        trunk._dispatch = compare  # type: ignore[assignment]
        ids = [random.randrange(512) for _ in range(8)]
        trunk.forward([Chunk(ids, 0, [0])], StepContext(1))
        assert len(agreed) == 8 * layers
        assert sum(agreed) / len(agreed) > 0.5
        assert trunk.gates.choose(layers, torch.zeros(1, 1)) is None


def test_the_next_layers_experts_are_ordered_while_this_one_is_computed(tiny: MakeTiny) -> None:
    orders: list[tuple[int, torch.Tensor, int]] = []
    with in_process_router(tiny("mixtral"), 2) as router:
        trunk = router._trunk
        trunk.follow(Prewarm(lambda: 1, lambda _, *order: orders.append(order)))
        trunk.forward([Chunk(range(5), 0, [0])], StepContext(1))
        layers, each = router.served.info.num_moe_layers, router.served.info.experts_per_token
        assert [layer for layer, *_ in orders] == list(range(layers))
        assert all(chosen == each and index.shape == (5, 2 * each) for _, index, chosen in orders)
        orders.clear()
        trunk.follow(Prewarm(lambda: 0, lambda _, *order: orders.append(order)))
        trunk.forward([Chunk(range(5), 0, [0])], StepContext(2))
        assert not orders, "nobody wants to know"


def test_orders_are_frames_whose_lengths_are_checked() -> None:
    for _ in range(50):
        order = Order(random.randrange(1 << 60), random.randrange(1000), random.randbytes(random.randrange(300)))
        frame = encode_order(order)
        assert decode_order(frame) == (order, b"")
        assert decode_order(frame + b"behind") == (order, b"behind")
        for bad in (frame[:-1], frame[: random.randrange(12)]):
            with pytest.raises(InvalidArgument):
                decode_order(bad)


def test_orders_wait_for_the_next_call_and_are_forgotten_when_stale() -> None:
    waiting = WaitingOrders()
    call = LayerCall(1, step_id=7, layer=3, table_epoch=0, table_version=0, priority=Priority.DECODE, timeout_ms=0)
    fresh, next_one = Order(7, 4, b"abc"), Order(7, 5, b"d")
    for order in (Order(6, 5, b"old"), Order(7, 3, b"now"), fresh, next_one):
        waiting.add(order)
    assert waiting.take(call) == encode_order(fresh) + encode_order(next_one)
    assert waiting.take(call) == b""
    for step in range(1000):
        waiting.add(Order(step, 4, b"nobody calls"))
    assert len(waiting._orders) == 1


def test_chances_rise_with_every_row_that_chooses_or_nearly_does() -> None:
    index_TN = torch.tensor([[0, 1, 2, 3], [0, 4, 1, 5]])
    chance = chances(index_TN, 2, 8)
    assert len(chance) == 8
    assert chance[0] > chance[1] > chance[4] > chance[2] == chance[3] == chance[5] > chance[6] == chance[7] == 0
    assert chance[4] == round(255 * CHOSEN)
    assert chance[1] == round(255 * (1 - (1 - CHOSEN) * (1 - NEARLY)))


def test_slow_loads_are_ordered_from_further_away() -> None:
    def facts(load_s: float, gap_s: float) -> StoreFacts:
        return StoreFacts(1, 1, 1, loads=10, loads_s=10 * load_s, gap_s=gap_s)

    assert look_ahead([]) == 0
    assert look_ahead([StoreFacts(1, 1, 1)]) == 1
    assert look_ahead([facts(0.001, 0.01)]) == 1
    assert look_ahead([facts(0.001, 0.01), facts(0.015, 0.01)]) == 2
    assert look_ahead([facts(1.0, 0.01)]) == MAX_DEPTH
