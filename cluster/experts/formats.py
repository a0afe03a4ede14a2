"""What is common to all ways in which a layer's experts lie in memory and rows go through them.

Dense experts (`cluster.experts.dense`) are the checkpoint's values in plain tensors, which all devices understand;
reduced ones (`cluster.experts.reduced`) have fewer bytes and other values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from cluster.kernels.experts import GatedExperts, Weights
from cluster.kernels.tiles import tiled_product

Product = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(rows, 0 for the up-projection or 1 for the down-projection, slot) -> rows, without bias."""
Breathe = Callable[[], None]
"""Called between two pieces of work of a thread that others should hardly notice; it may wait."""
CALL_ROWS = 3.0
"""An expert costs what so many rows cost, and its rows: its weights are read."""


def no_pause() -> None:
    """Nobody else is to be spared."""


class Source(NamedTuple):
    """Where an expert of a new set of slots comes from: a slot of the old set, or a place in fresh tensors."""

    old: bool
    place: int


class LayerExperts(Protocol):
    """The experts of one layer in one group, by slot (the order in which they were loaded)."""

    num_bytes: int

    def with_slots(
        self, fresh: dict[str, torch.Tensor], sources: Sequence[Source], breathe: Breathe = no_pause
    ) -> LayerExperts:
        """The experts of another set of slots: each from a slot of these, or from the tensors ``fresh``. ``breathe`` is
        called after each piece of the work."""
        ...

    def at_once(self, num_tokens: int) -> GatedExperts | None:
        """What computes whole calls of so many rows, from pairs to sums; None where `run` has to."""
        ...

    def order(self, counts_S: Any) -> Any:
        """Slots that have rows, in the order in which `run` wants them. ``counts_S``: rows of each slot."""
        ...

    def run(self, rows_PH: torch.Tensor, slots: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """[P, H]: the first ``counts[0]`` rows through expert ``slots[0]``, and so on."""
        ...

    def shared(self, counts: Sequence[int]) -> int:
        """So many of the first experts, in this order, are best run together by all threads of the caller; the others
        are split among threads."""
        ...


def gathered(now: torch.Tensor, fresh: torch.Tensor, sources: Sequence[Source], breathe: Breathe) -> torch.Tensor:
    """Of a tensor [S, ...], the slots of ``sources``, one after the other."""
    found = torch.empty((len(sources), *now.shape[1:]), dtype=now.dtype, device=now.device)
    for slot, source in enumerate(sources):
        found[slot].copy_((now if source.old else fresh)[source.place])
        breathe()
    return found


def run_tiled(
    module: Any,
    x_PH: torch.Tensor,
    slots: Sequence[int],
    counts: Sequence[int],
    parts: Sequence[Weights],
    biases: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Through tiles, the experts of a call together."""

    def product(x_PK: torch.Tensor, part: int) -> torch.Tensor:
        output = tiled_product(x_PK, parts[part].weight_SNK, slots, counts, parts[part].scale_SN)
        bias = biases[part]
        return output if bias is None else output + bias[np.repeat(slots, counts)]

    return product(gated(module, product(x_PH, 0)), 1)


def run_each(
    module: Any,
    x_PH: torch.Tensor,
    slots: Sequence[int],
    counts: Sequence[int],
    product: Product,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
) -> torch.Tensor:
    """One product an expert; the activation once for all."""
    counts = list(counts)

    def layer(rows: torch.Tensor, part: int) -> torch.Tensor:
        bias = biases[part]
        outputs = [product(x, part, slot) for x, slot in zip(rows.split(counts), slots, strict=True)]
        if bias is not None:
            outputs = [output + bias[slot] for output, slot in zip(outputs, slots, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return layer(gated(module, layer(x_PH, 0)), 1)


def gated(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """What a module's gate, or its activation alone, makes of the first product."""
    result: torch.Tensor = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    return result
