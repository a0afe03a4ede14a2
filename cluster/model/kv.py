"""Keys and values of all sequences, in blocks: what the model's attention layers store and read.

Which blocks a sequence has is the engine's matter (`cluster.engine.blocks`). Here a layer's blocks lie one behind the
other in one buffer, so a sequence whose blocks are consecutive is read without a copy. What a model caches is what is
stored: DeepSeek's latents stay compressed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Runs = list[tuple[int, int]]
"""Where a sequence's tokens are: (first, last) positions in the buffers, in order."""


class KvStore:
    """Room for ``num_blocks`` blocks of ``block_size`` tokens in every layer. Used by one thread.

    Buffers are made when a layer stores its first tokens, which is when their shapes are known, and the memory behind
    them comes as it is used; or before, with `followed_by`.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Of all layers that have stored something."""
        return sum(t.nbytes for pair in self._layers.values() for t in pair) // (self.num_blocks * self.block_size)

    def followed_by(self, num_blocks: int, block_size: int, bytes_touched: int) -> KvStore:
        """An empty store for the same layers, so many bytes of which, from the first blocks on, are there already.

        The first touch of a page can take long: a virtual machine's host may have to find it. On such a machine 2 MiB
        took 0.2 to 5 ms, all layers come to their next 2 MiB in the same step, and a prefill of 512 tokens of
        bench-700m spent 25 to 50 of 700 ms there.
        """
        store = KvStore(num_blocks, block_size)
        tokens = min(num_blocks * block_size, bytes_touched // max(1, self.bytes_per_token))
        for layer, pair in self._layers.items():
            keys, values = (old.new_empty((num_blocks * block_size, *old.shape[1:])) for old in pair)
            for buffer in (keys, values):
                buffer[:tokens].zero_()
            store._layers[layer] = keys, values
        return store

    def positions(self, blocks: Sequence[int], first: int, last: int) -> Any:
        """Positions in the buffers of tokens ``first`` to ``last`` of a sequence, int64."""
        tokens = np.arange(first, last)
        return np.asarray(blocks, np.int64)[tokens // self.block_size] * self.block_size + tokens % self.block_size

    def runs(self, blocks: Sequence[int], num_tokens: int) -> Runs:
        """Where the first ``num_tokens`` tokens of a sequence are."""
        size = self.block_size
        used = np.asarray(blocks[: -(-num_tokens // size)], np.int64)
        breaks = (np.flatnonzero(used[1:] != used[:-1] + 1) + 1).tolist()
        edges = [0, *breaks, len(used)]
        runs = []
        for start, end in itertools.pairwise(edges):
            tokens = min(end * size, num_tokens) - start * size
            first = int(used[start]) * size
            runs.append((first, first + tokens))
        return runs

    def store(self, layer: int, at_T: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts ``keys`` and ``values`` [1, heads, T, dim] to the positions ``at_T``."""
        if layer not in self._layers:
            self._layers[layer] = (self._buffer(keys), self._buffer(values))
        for buffer, new in zip(self._layers[layer], (keys, values), strict=True):
            buffer.index_copy_(0, at_T, new[0].transpose(0, 1))

    def _buffer(self, new: torch.Tensor) -> torch.Tensor:
        return new.new_empty((self.num_blocks * self.block_size, new.shape[1], new.shape[3]))

    def has(self, layer: int) -> bool:
        """It has stored something."""
        return layer in self._layers

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [tokens, heads, dim] of the whole store."""
        return self._layers[layer]

    def read(self, layer: int, runs: Runs) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1, heads, S, dim] of one sequence: views where it has one run, copies otherwise."""
        keys, values = self._layers[layer]
        return _gather(keys, runs), _gather(values, runs)

    def read_at(self, layer: int, at_BS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, S, dim] of several sequences, copied from positions ``at_BS`` of the buffers."""
        keys, values = self._layers[layer]
        return keys[at_BS].transpose(1, 2), values[at_BS].transpose(1, 2)


def _gather(buffer: torch.Tensor, runs: Runs) -> torch.Tensor:
    if len(runs) == 1:
        ((first, last),) = runs
        return buffer[first:last].transpose(0, 1)[None]
    return torch.cat([buffer[first:last] for first, last in runs]).transpose(0, 1)[None]
