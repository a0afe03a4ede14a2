"""Decoder layers whose part before the experts is one function of ours when every sequence has one token.

A layer is taken for one if all this holds: its forward function, asked with stand-ins for attention and experts, adds
what they give to what it was given, and gives each what its norm makes of that; its attention names nothing that others
do not (no sinks, no clipping, no scale of its own); and in the first steps that could be computed so, what the modules
themselves made of the model's own values was the same.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch

from cluster.errors import ExpertMeshError
from cluster.kernels.attention import Histories
from cluster.kernels.decode import MOST_ROWS, Buffers, DecodeLayer, LayerParts
from cluster.kernels.linear import FastLinear, FastNorm
from cluster.kernels.rotary import FastRotary
from cluster.model.attention import HARMLESS
from cluster.model.packed import Step, current_step

_ROTARY = "apply_rotary_pos_emb"
_SEES = 8
"""Tokens that some history must have in a step that proves a layer: one token's attention does not depend on queries,
and the first one's angles are 0."""
_PROOFS = 2
TOLERANCE = 1e-5
"""Of the largest value: what fp32 sums in another order differ by, in the products before and behind attention too."""
_SUBMODULES = frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
_NUMBERS = frozenset(("head_dim", "layer_idx", "scaling", "attention_dropout", "training", "sliding_window", "config"))
_CALLS = frozenset(("view", "transpose", "reshape", "contiguous", "shape", "getattr", "update", "get_interface"))
_ATTENTION = frozenset(("ALL_ATTENTION_FUNCTIONS", "eager_attention_forward", "_attn_implementation"))
_NAMES = _SUBMODULES | _NUMBERS | _CALLS | _ATTENTION | {_ROTARY}
"""What an attention's forward function may name."""
_ARGUMENTS = frozenset({"attention_mask", "past_key_values", *HARMLESS})
_BUILT_OTHERWISE = (
    AssertionError,
    AttributeError,
    ExpertMeshError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a layer that wants more than it is asked with may raise."""
_CHILDREN = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


def speed_up_layers(model: Any) -> Steps:
    """Gives every decoder layer whose modules have been given fast ones, and that is built as most are, a forward
    function for decode steps. What it gives is to `forget` after each step."""
    buffers, steps = Buffers(), Steps()
    for module in model.modules():
        if all(hasattr(module, name) for name in _CHILDREN) and "forward" not in module.__dict__:
            layer = FastLayer.of(module, buffers, steps)
            if layer is not None:
                module.__dict__["forward"] = layer
    return steps


class FastLayer:
    """Stands in for one decoder layer's forward function."""

    def __init__(self, module: Any, decode: DecodeLayer, steps: Steps) -> None:
        self._own, self._decode = module.forward, decode
        self._norm, self._attention, self._after, self._mlp = (getattr(module, name) for name in _CHILDREN)
        self._index: int = self._attention.layer_idx
        self._watched, self._steps = (module.input_layernorm, module.self_attn), steps
        self.proofs, self.refuted = 0, False

    @classmethod
    def of(cls, module: Any, buffers: Buffers, steps: Steps) -> FastLayer | None:
        """For a decoder layer that is built as described; None for any other."""
        parts = _parts_of(module)
        decode = None if parts is None else DecodeLayer.of(parts, buffers)
        return cls(module, decode, steps) if decode is not None and _adds_up(module, decode.hidden) else None

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, or the same for sequences that have one token each."""
        step = None if args or self.refuted else current_step()
        histories = None if step is None else self._histories(step, hidden_states, kwargs)
        if step is None or histories is None:
            return self._own(hidden_states, *args, **kwargs)
        batch, proven = step.batch, self.proofs >= _PROOFS
        if not proven and max(span.total for span in batch.spans) < _SEES:
            return self._own(hidden_states, **kwargs)
        cos, sin = kwargs["position_embeddings"]
        stored = batch.store.layer(self._index)
        if not proven:
            attended: torch.Tensor = self._attention(hidden_states=self._norm(hidden_states), **kwargs)[0]
            residual, own = hidden_states + attended, [kept[batch.at_T] for kept in stored]
            try:
                got, _ = self._decode(hidden_states, cos, sin, batch.at_T, stored, histories)
                self._learn(hidden_states, (attended, *own), (got, *(kept[batch.at_T] for kept in stored)))
            except ValueError:
                self.refuted = True
            for kept, before in zip(stored, own, strict=True):
                kept[batch.at_T] = before
        else:
            residual, normed = self._decode(hidden_states, cos, sin, batch.at_T, stored, histories)
        if not proven or not self._told(residual):
            normed = self._after(residual)
        computed = self._mlp(normed)
        residual += computed[0] if isinstance(computed, tuple) else computed
        return residual

    def _told(self, residual: torch.Tensor) -> bool:
        """Whoever waits for the call of the norm behind attention; False where there are several, or one that wants
        more than to see what it gets."""
        after = self._after
        if not after._forward_pre_hooks:
            return True
        if after._forward_pre_hooks_with_kwargs or len(after._forward_pre_hooks) > 1:
            return False
        (hook,) = after._forward_pre_hooks.values()
        return hook(after, (residual,)) is None

    def _learn(self, hidden: torch.Tensor, expected: tuple[torch.Tensor, ...], got: tuple[torch.Tensor, ...]) -> None:
        """Compares what attention adds to ``hidden``, and keys and values that were stored."""
        residual, *stored = got
        rounded = 4 * torch.finfo(torch.float32).eps * float(hidden.abs().max())  # where attention adds little
        same = all(
            a.shape == b.shape and float((a - b).abs().max()) <= TOLERANCE * float(a.abs().max()) + slack
            for a, b, slack in zip(expected, (residual - hidden, *stored), (rounded, 0.0, 0.0), strict=True)
        )
        self.proofs, self.refuted = self.proofs + 1, not same

    def _histories(self, step: Step, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Histories | None:
        """Of all sequences of a step that can be computed so; None for any other step."""
        batch, dim = step.batch, self._decode.dim
        histories = self._steps.histories(step, dim, kwargs)
        if histories is None or len(histories.rows) > self._decode.most or not batch.store.has(self._index):
            return None
        if hidden.dtype is not torch.float32 or not hidden.is_contiguous() or hidden.dim() != 3:
            return None
        for module in self._watched:
            if module._forward_hooks or module._forward_pre_hooks:
                return None
        return None if self._after._forward_hooks else histories


class Steps:
    """What layers are called with is the same for all layers of a step, nearly always: it is looked at once."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The step is over; its memory is not to be kept."""
        self._seen: tuple[Any, ...] = ()
        self._found: Histories | None = None

    def histories(self, step: Step, dim: int, kwargs: dict[str, Any]) -> Histories | None:
        """Of all sequences, where they have one token each, see all of their histories, and the layer is called with
        nothing but what is known; ``dim`` is a head's size."""
        seen = (step, dim, *kwargs, *kwargs.values())
        if len(seen) != len(self._seen) or any(a is not b for a, b in zip(seen, self._seen, strict=True)):
            self._seen, self._found = seen, _histories(step, dim, kwargs)
        return self._found


def _histories(step: Step, dim: int, kwargs: dict[str, Any]) -> Histories | None:
    batch, angles = step.batch, kwargs.get("position_embeddings")
    rows = batch.num_tokens
    if rows != len(batch.spans) or rows > MOST_ROWS or kwargs.get("past_key_values") is not step.cache:
        return None
    if not (isinstance(angles, tuple) and len(angles) == 2):
        return None
    if any(t.shape != (1, rows, dim) or t.dtype is not torch.float32 or not t.is_contiguous() for t in angles):
        return None
    if any(name not in _ARGUMENTS and value is not None for name, value in kwargs.items()):
        return None
    histories = batch.mask_of(kwargs.get("attention_mask")).histories()
    return histories if histories is not None and len(histories.rows) == rows else None


def _parts_of(module: Any) -> LayerParts | None:
    attention = module.self_attn
    written = type(attention).forward
    names = set(written.__code__.co_names) if isinstance(written, FunctionType) else {"?"}
    norms = [FastNorm.of(norm) for norm in (module.input_layernorm, module.post_attention_layernorm)]
    if getattr(getattr(attention, "config", None), "clip_qkv", None) is None:
        names -= {"clip_qkv", "clamp_"}
    if not names <= _NAMES or None in norms:
        return None
    linears = [_forward_of(getattr(attention, name, None)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    dim, scale, index = (getattr(attention, name, None) for name in ("head_dim", "scaling", "layer_idx"))
    if not all(isinstance(each, FastLinear) for each in linears) or type(dim) is not int or type(index) is not int:
        return None
    rotary = getattr(_forward_of(attention), "__globals__", {}).get(_ROTARY)
    if not isinstance(scale, float) or not isinstance(rotary, FastRotary):
        return None
    own = [FastNorm.of(getattr(attention, name)) if name in names else None for name in ("q_norm", "k_norm")]
    if any(name in names and norm is None for name, norm in zip(("q_norm", "k_norm"), own, strict=True)):
        return None
    query, key, value, output = linears
    before, after = norms
    assert before is not None
    assert after is not None
    return LayerParts(before, query, key, value, output, own[0], own[1], dim, scale, after)


def _forward_of(module: Any) -> Any:
    """What was given to a module instead of its class's function."""
    forward = getattr(module, "__dict__", {}).get("forward")
    return getattr(forward, "__func__", forward)


def _adds_up(module: Any, hidden: int) -> bool:
    """Asks the layer with stand-ins for attention and experts."""
    given: dict[str, torch.Tensor] = {}
    passed: dict[str, object] = {}
    asked = {name: object() for name in ("attention_mask", "position_ids", "past_key_values", "position_embeddings")}
    attended, computed, x = (torch.randn(1, 3, hidden) for _ in range(3))

    def attention(hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        given["attention"] = hidden_states
        passed.update(kwargs)
        return attended, None

    def mlp(hidden_states: torch.Tensor) -> torch.Tensor:
        given["mlp"] = hidden_states
        return computed

    stand_ins = ((module.self_attn, attention), (module.mlp, mlp))
    before = [(part.__dict__.get("forward"), part) for part, _ in stand_ins]
    try:
        for part, stand_in in stand_ins:
            part.__dict__["forward"] = stand_in
        with torch.inference_mode():
            found = module(x, **asked)
            wanted = (module.input_layernorm(x), module.post_attention_layernorm(x + attended), x + attended + computed)
    except _BUILT_OTHERWISE:
        return False
    finally:
        for forward, part in before:
            if forward is None:
                del part.__dict__["forward"]
            else:
                part.__dict__["forward"] = forward
    if any(passed.get(name) is not value for name, value in asked.items() if name != "position_ids"):
        return False
    got = (given.get("attention"), given.get("mlp"), found)
    return all(
        isinstance(a, torch.Tensor) and torch.allclose(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(got, wanted, strict=True)
    )
