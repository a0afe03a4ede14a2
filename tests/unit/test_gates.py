"""Gates found by looking at a model's own calls, and what they say of the next layer."""

from __future__ import annotations

import random

import pytest
import torch

from cluster.errors import InvalidArgument
from cluster.model.packed import Chunk
from cluster.model.trunk import Prewarm
from cluster.routing.dispatcher import StepContext
from cluster.transport.codec import decode_order, encode_order
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
            assert chosen.shape == index.shape
            for row, wanted in zip(chosen.tolist(), index.tolist(), strict=True):
                agreed.append(len(set(row) & set(wanted)) / len(wanted))
            return hook(step, layer, hidden, index, *rest)  # type: ignore[arg-type]

        trunk._dispatch = compare  # type: ignore[assignment]
        ids = [random.randrange(512) for _ in range(8)]
        trunk.forward([Chunk(ids, 0, [0])], StepContext(1))
        assert len(agreed) == 8 * layers
        assert sum(agreed) / len(agreed) > 0.5
        assert trunk.gates.choose(layers, torch.zeros(1, 1)) is None


def test_the_next_layers_experts_are_ordered_while_this_one_is_computed(tiny: MakeTiny) -> None:
    orders: list[tuple[int, torch.Tensor]] = []
    with in_process_router(tiny("mixtral"), 2) as router:
        trunk = router._trunk
        trunk.prewarm = Prewarm(lambda: True, lambda layer, index: orders.append((layer, index)))
        trunk.forward([Chunk(range(5), 0, [0])], StepContext(1))
        layers = router.served.info.num_moe_layers
        assert [layer for layer, _ in orders] == list(range(1, layers))
        assert all(index.shape == (5, router.served.info.experts_per_token) for _, index in orders)


def test_orders_are_frames_whose_lengths_are_checked() -> None:
    for _ in range(50):
        layer, experts = random.randrange(1000), random.sample(range(5000), random.randrange(20))
        frame = encode_order(layer, experts)
        assert decode_order(frame) == (layer, experts)
        for bad in (frame[:-1], frame + b"x", frame[: random.randrange(12)]):
            with pytest.raises(InvalidArgument):
                decode_order(bad)
