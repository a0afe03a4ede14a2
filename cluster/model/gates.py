"""Which experts a coming layer will probably want: its gate, applied to the hidden state at hand.

Residual streams change little from one layer to the next, so a layer's norm and gate, given the residual stream of the
layer before, choose mostly what they will choose themselves. Which module of a layer is its gate, what of its output
are the experts, and which module is the norm before it, is seen in the model's own calls and not known by name: the
gate is the block's module that was given the experts' own input and whose output has one number for each expert, or the
experts' index; the norm is the module of the layer whose output that input was. Where the numbers are a product with a
weight of the gate, as for all of the zoo, the product alone is computed: what else a gate does (groups, biases) takes
ten times as long and changes the order little. It is a hint: a wrong one costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from cluster.kernels.linear import FastNorm
from cluster.weights.skeleton import MoeLayer

MAX_ROWS = 32
"""Of more rows than this a sample is looked at: together they want nearly every expert anyway."""


class Choice(NamedTuple):
    """Experts that a gate would choose, best first, [T, N]: the first ``chosen`` of each row, and then those that it
    nearly would, where it tells them."""

    index_TN: torch.Tensor
    chosen: int


Chooser = Callable[[torch.Tensor], Choice]
"""Rows [T, H] as experts get them -> what the gate chooses."""


@dataclass(slots=True)
class _Layer:
    """What is known of one MoE layer: ``decoder`` holds the block, and perhaps the norm before it."""

    experts: Any
    num_experts: int
    block: Any
    decoder: Any
    norm: Any = None
    normalise: Callable[[torch.Tensor], torch.Tensor] | None = None
    scale_H: torch.Tensor | None = None
    """Weight of an RMSNorm before a gate whose choice does not depend on the length of a row."""
    chooser: Chooser | None = None
    calls: list[tuple[Any, torch.Tensor, Any]] = field(default_factory=list)


class Gates:
    """One chooser a MoE layer, found in one step under `watching`; None where there is none to find."""

    def __init__(self, model: Any, moe_layers: tuple[MoeLayer, ...]) -> None:
        self._layers = [_layer_of(model, layer) for layer in moe_layers]
        self._first = _first_of_stack(model, self._layers)
        self._residual: torch.Tensor | None = None
        self._follows = False

    @property
    def found(self) -> int:
        """Layers whose gate is known."""
        return sum(layer.chooser is not None for layer in self._layers)

    @contextmanager
    def watching(self) -> Iterator[Callable[[int, torch.Tensor, torch.Tensor], None]]:
        """For the time of one step. Call what it gives with (layer, hidden, index) as a layer's experts are called."""
        handles = []

        def hook(layer: _Layer) -> Callable[..., None]:
            def remember(module: Any, inputs: Any, output: Any) -> None:
                if inputs and isinstance(inputs[0], torch.Tensor):
                    layer.calls.append((module, inputs[0].detach().clone(), output))

            return remember

        for layer in self._layers:
            for child in (layer.decoder or layer.block).modules() if layer.block is not None else ():
                if child not in (layer.decoder, layer.block, layer.experts):
                    handles.append(child.register_forward_hook(hook(layer)))

        def seen(number: int, hidden_TH: torch.Tensor, index_TK: torch.Tensor) -> None:
            layer = self._layers[number]
            inside = set(layer.block.modules()) if layer.block is not None else set()
            calls = [call for call in layer.calls if call[0] in inside]
            layer.chooser = _find(calls, hidden_TH, index_TK, layer.num_experts)
            for module, _, output in layer.calls:
                if module not in inside and isinstance(output, torch.Tensor) and _same(output, hidden_TH):
                    layer.norm = module
                    fast = FastNorm.of(module)
                    layer.normalise = fast or module.forward  # its hooks are not for this
                    if fast is not None and isinstance(layer.chooser, _Product) and layer.chooser.bias is None:
                        layer.scale_H = fast.weight

        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
            for layer in self._layers:
                layer.calls.clear()

    def follow(self, begins: Callable[[torch.Tensor], None]) -> None:
        """From now on residual streams are kept at hand; ``begins(hidden)`` is called as a step's first layer is."""

        def keep(_module: Any, inputs: Any) -> None:
            self._residual = inputs[0]

        def first(_module: Any, inputs: Any, options: dict[str, Any]) -> None:
            hidden = inputs[0] if inputs else options.get("hidden_states")
            if isinstance(hidden, torch.Tensor):
                begins(hidden)

        if self._follows:
            return
        self._follows = True
        for layer in self._layers:
            if layer.norm is not None:
                layer.norm.register_forward_pre_hook(keep)
        if self._first is not None:
            self._first.register_forward_pre_hook(first, with_kwargs=True)

    def choose(self, layer: int, hidden_TH: torch.Tensor) -> Choice | None:
        """What a layer's gate would choose for rows as its experts get them; None where its gate is not known."""
        chooser = self._layers[layer].chooser if 0 <= layer < len(self._layers) else None
        return None if chooser is None else chooser(_sample(hidden_TH))

    def foresee(self, layer: int, residual: torch.Tensor) -> Choice | None:
        """What a layer will probably choose, from a residual stream [..., H] at hand before it."""
        known = self._layers[layer] if 0 <= layer < len(self._layers) else None
        if known is None or known.chooser is None:
            return None
        rows = _sample(residual.reshape(-1, residual.shape[-1]))
        if known.scale_H is not None:
            return known.chooser(rows * known.scale_H)
        return known.chooser(rows if known.normalise is None else known.normalise(rows))

    def take_residual(self) -> torch.Tensor | None:
        """The residual stream before the experts that are being called, once; None where the norm is not known."""
        residual, self._residual = self._residual, None
        return residual


def _layer_of(model: Any, moe_layer: MoeLayer) -> _Layer:
    block, decoder = _parent_of(model, moe_layer.module), None
    if block is not None:
        decoder = _parent_of(model, block)
    return _Layer(moe_layer.module, moe_layer.num_experts, block, decoder)


def _parent_of(model: Any, wanted: Any) -> Any | None:
    return next((module for module in model.modules() if any(child is wanted for child in module.children())), None)


def _first_of_stack(model: Any, layers: list[_Layer]) -> Any | None:
    """The first of the layers among which the first MoE layer is; it may be a dense one."""
    stack = _parent_of(model, layers[0].decoder) if layers and layers[0].decoder is not None else None
    return next(iter(stack.children()), None) if isinstance(stack, torch.nn.ModuleList) else None


def _sample(rows_TH: torch.Tensor) -> torch.Tensor:
    """At most `MAX_ROWS` rows, evenly."""
    step = -(-rows_TH.shape[0] // MAX_ROWS)
    return rows_TH[step - 1 :: step] if step > 1 else rows_TH


def _same(found: torch.Tensor, wanted_TH: torch.Tensor) -> bool:
    return found.numel() == wanted_TH.numel() and torch.equal(found.reshape(wanted_TH.shape), wanted_TH)


def _find(calls: list[Any], hidden_TH: torch.Tensor, index_TK: torch.Tensor, number: int) -> Chooser | None:
    for module, given, output in calls:
        if not _same(given, hidden_TH):
            continue
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        index_at = score_at = None
        for place, part in enumerate(parts):
            if not isinstance(part, torch.Tensor):
                continue
            if index_at is None and part.shape == index_TK.shape and torch.equal(part.long(), index_TK):
                index_at = place
            elif score_at is None and part.is_floating_point() and part.shape[-1:] == (number,):
                score_at = place
        if score_at is not None:
            return _by_score(module, given, parts[score_at], score_at, index_TK.shape[1])
        if index_at is not None:
            return _by_index(module, given.dim(), index_at)
    return None


def _by_score(module: Any, given: torch.Tensor, score: torch.Tensor, place: int, count: int) -> Chooser:
    """Largest scores: by the gate's weight alone, if they are the product with it, else by the gate itself."""
    wanted = min(2 * count, score.shape[-1])
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    rows = given.reshape(-1, given.shape[-1])
    if isinstance(weight, torch.Tensor) and weight.shape == (score.shape[-1], rows.shape[-1]):
        bias = bias if isinstance(bias, torch.Tensor) else None
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        product = F.linear(rows.to(weight.dtype), weight, bias)
        if torch.allclose(product.float(), score.reshape(product.shape).float(), rtol=1e-2, atol=1e-3):
            return _Product(weight, bias, wanted, count)

    def choose(rows_TH: torch.Tensor) -> Choice:
        output = _asked(module, given.dim(), rows_TH)
        score = output[place] if isinstance(output, (tuple, list)) else output
        return Choice(score.reshape(rows_TH.shape[0], -1).topk(wanted, dim=-1).indices, count)

    return choose


@dataclass(frozen=True, slots=True)
class _Product:
    """A gate by its weight alone."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    wanted: int
    count: int

    def __call__(self, rows_TH: torch.Tensor) -> Choice:
        score_TE = F.linear(rows_TH.to(self.weight.dtype), self.weight, self.bias)
        return Choice(score_TE.topk(self.wanted, dim=-1).indices, self.count)


def _by_index(module: Any, dims: int, place: int) -> Chooser:
    def choose(rows_TH: torch.Tensor) -> Choice:
        output = _asked(module, dims, rows_TH)
        index = output[place] if isinstance(output, (tuple, list)) else output
        index_TK = index.reshape(rows_TH.shape[0], -1)
        return Choice(index_TK, index_TK.shape[1])

    return choose


def _asked(module: Any, dims: int, rows_TH: torch.Tensor) -> Any:
    """Calls a gate with rows in the number of dimensions that its block gives it."""
    return module(rows_TH.reshape(*([1] * (dims - 2)), *rows_TH.shape))
