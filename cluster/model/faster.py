"""Faster ways of what a model's modules compute, put in place of their own forward functions, in this model alone.

A class of transformers is not changed, nor is any other model of the process. Each takes what it can, and leaves the
rest to the module's own function.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch

from cluster.kernels.gate import FastGate
from cluster.kernels.linear import Family, FastLinear, FastNorm, KernelTable
from cluster.kernels.rotary import FastRotary

_ROTARY = "apply_rotary_pos_emb"
"""By this name the files of transformers' models call it."""


def speed_up(model: Any, table: KernelTable) -> None:
    """Gives every linear layer on the CPU the kernels of ``table``, those of one module that may get the same rows a
    `Family`, and norms, gates and rotary embeddings what was found to compute the same in one call."""
    speed_up_norms(model)
    speed_up_gates(model)
    speed_up_rotary(model)
    for parent in model.modules():
        by_inputs: dict[int, list[FastLinear]] = {}
        for module in parent.children():
            if type(module) is torch.nn.Linear and module.weight.is_cpu and "forward" not in module.__dict__:
                linear = FastLinear(module.weight, module.bias, table)
                # Instead of the class's; a submodule or parameter it is not.
                module.__dict__["forward"] = linear
                if linear.tiles:
                    by_inputs.setdefault(linear.weight.shape[1], []).append(linear)
        for members in by_inputs.values():
            if len(members) > 1:
                Family(members)


def speed_up_norms(model: Any) -> None:
    """Gives every RMSNorm one kernel instead of six: see `FastNorm`."""
    for module in model.modules():
        norm = FastNorm.of(module)
        if norm is not None:
            module.__dict__["forward"] = norm


def speed_up_gates(model: Any) -> None:
    """Gives every gate that takes the best of a softmax one call: see `FastGate`."""
    for module in model.modules():
        gate = None if "forward" in module.__dict__ else FastGate.of(module)
        if gate is not None:
            module.__dict__["forward"] = gate


def speed_up_rotary(model: Any) -> None:
    """Gives every attention layer whose forward function calls `apply_rotary_pos_emb` of its file a forward function
    that calls `FastRotary` by that name."""
    found: dict[tuple[Any, int], FastRotary | None] = {}
    for module in model.modules():
        forward, dim = type(module).forward, getattr(module, "head_dim", None)
        if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names or type(dim) is not int:
            continue
        rotary = forward.__globals__.get(_ROTARY)
        if not callable(rotary) or "forward" in module.__dict__:
            continue
        if (rotary, dim) not in found:
            found[rotary, dim] = FastRotary.of(rotary, dim)
        fast = found[rotary, dim]
        if fast is not None:
            names = {**forward.__globals__, _ROTARY: fast}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.__dict__["forward"] = MethodType(own, module)
