"""Layers whose calls a group's door computes by itself, without coming back to Python: functions by address."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

LAYER, HIDDEN, TOKENS, WIDTH, PAIRS, NUM_PAIRS, OUT, SCRATCH, SCRATCH_BYTES, STATUS = range(10)
"""Numbers of a call: the address of the layer's own; address, number and width of its rows (fp32); address and number
of its pairs, as in a `LayerRows`; where the sums go; memory that is free meanwhile; and what became of it: 0, or
nothing was done."""
CALL = 10
NOT_HERE = -1
"""Whoever asked has to have it computed otherwise, or told what is wrong with it."""


class ServedLayer(NamedTuple):
    """A compiled function of a call's numbers, and the numbers of the layer (int64), by address; ``kept`` is what has
    to stay where it is. ``scratch_bytes`` is what any call needs that the function takes."""

    function: int
    numbers: int
    scratch_bytes: int
    kept: Any


class ServedLayers:
    """By layer. Changed before anybody serves, or by who serves."""

    def __init__(self, layers: list[ServedLayer | None]) -> None:
        self._table = np.zeros((len(layers), 2), np.int64)
        self._scratch = np.empty(0, np.uint8)
        self._kept: list[ServedLayer | None] = [None] * len(layers)
        for number, layer in enumerate(layers):
            self.put(number, layer)

    def put(self, number: int, layer: ServedLayer | None) -> None:
        """From now on the layer is this one; None is computed otherwise."""
        if layer is not None and layer.scratch_bytes + 8 * CALL > self._scratch.size:
            self._scratch = np.empty(layer.scratch_bytes + 8 * CALL, np.uint8)
        self._table[number] = (0, 0) if layer is None else (layer.function, layer.numbers)
        self._kept[number] = layer

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def places(self) -> tuple[int, int, int]:
        """Addresses of the functions and numbers, and of the memory of a call's numbers and scratch, and its size."""
        return self._table.ctypes.data, self._scratch.ctypes.data, self._scratch.size
