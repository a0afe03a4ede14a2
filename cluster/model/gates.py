"""Which experts the next layer will probably want: its gate, applied to the hidden state at hand.

Residual streams change little from one layer to the next, so a gate given the layer before's input chooses mostly what
it will choose itself. Which module of a block is its gate, and what of its output are the experts, is seen in the
model's own calls and not known by name: the block's module that was given the experts' own input, and whose output
has either the experts' index itself or one number for each expert (of which the largest are taken). It is a hint: a
wrong one costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Chooser = Callable[[torch.Tensor], torch.Tensor]
"""Hidden [T, H] -> experts [T, K]."""


class Gates:
    """One chooser a MoE layer, found in one step under `watching`; None where there is none to find."""

    def __init__(self, model: Any, experts_modules: list[tuple[Any, int]]) -> None:
        """``experts_modules``: each MoE layer's experts module and its number of experts."""
        self._blocks = [(_block_of(model, module), module, number) for module, number in experts_modules]
        self._choosers: list[Chooser | None] = [None] * len(experts_modules)

    @property
    def found(self) -> int:
        """Layers whose gate is known."""
        return sum(chooser is not None for chooser in self._choosers)

    @contextmanager
    def watching(self) -> Iterator[Callable[[int, torch.Tensor, torch.Tensor], None]]:
        """For the time of one step. Call what it gives with (layer, hidden, index) as a layer's experts are called."""
        calls: dict[int, list[tuple[Any, torch.Tensor, Any]]] = {layer: [] for layer in range(len(self._blocks))}
        handles = []

        def hook(layer: int) -> Callable[..., None]:
            def remember(module: Any, inputs: Any, output: Any) -> None:
                if inputs and isinstance(inputs[0], torch.Tensor):
                    calls[layer].append((module, inputs[0].detach().clone(), output))

            return remember

        for layer, (block, experts, _) in enumerate(self._blocks):
            if block is not None:
                for child in block.modules():
                    if child is not block and child is not experts:
                        handles.append(child.register_forward_hook(hook(layer)))

        def seen(layer: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> None:
            number = self._blocks[layer][2]
            self._choosers[layer] = _find(calls[layer], hidden_TH, index_TK, number)

        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def choose(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor | None:
        """Experts that a layer's gate would choose for these rows, [T, K]; None where its gate is not known."""
        chooser = self._choosers[layer] if 0 <= layer < len(self._choosers) else None
        return None if chooser is None else chooser(hidden_TH)


def _block_of(model: Any, experts_module: Any) -> Any | None:
    for block in model.modules():
        if any(child is experts_module for child in block.children()):
            return block
    return None


def _find(calls: list[Any], hidden_TH: torch.Tensor, index_TK: torch.Tensor, number: int) -> Chooser | None:
    for module, given, output in calls:
        if given.numel() != hidden_TH.numel() or not torch.equal(given.reshape(hidden_TH.shape), hidden_TH):
            continue
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        for place, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and part.shape == index_TK.shape and torch.equal(part.long(), index_TK):
                return _from_index(module, given.shape, place, isinstance(output, (tuple, list)))
        for place, part in enumerate(parts):
            if isinstance(part, torch.Tensor) and part.is_floating_point() and part.shape[-1:] == (number,):
                count = index_TK.shape[1]
                return _from_scores(module, given.shape, place, isinstance(output, (tuple, list)), count)
    return None


def _asked(module: Any, shape: torch.Size, hidden_TH: torch.Tensor) -> Any:
    """Calls a gate with rows in the number of dimensions that its block gives it."""
    return module(hidden_TH.reshape(*([1] * (len(shape) - 2)), *hidden_TH.shape))


def _from_index(module: Any, shape: torch.Size, place: int, several: bool) -> Chooser:
    def choose(hidden_TH: torch.Tensor) -> torch.Tensor:
        output = _asked(module, shape, hidden_TH)
        index: torch.Tensor = output[place] if several else output
        return index.reshape(hidden_TH.shape[0], -1)

    return choose


def _from_scores(module: Any, shape: torch.Size, place: int, several: bool, count: int) -> Chooser:
    def choose(hidden_TH: torch.Tensor) -> torch.Tensor:
        output = _asked(module, shape, hidden_TH)
        scores: torch.Tensor = output[place] if several else output
        return scores.reshape(hidden_TH.shape[0], -1).topk(count, dim=-1).indices

    return choose
