"""Shared experts ahead of time: computed while the routed experts are on their way, where the model's block asks for
them afterwards.

Some blocks run their shared experts after the routed ones (DeepSeek, GLM), some before (Qwen), some have none. Which it
is, and with what input, is seen in the model's own calls and not believed: a block's shared experts are run ahead only
after one step in which they were called behind the experts, with the experts' own input, and gave the same bits.
"""

from __future__ import annotations

from typing import Any

import torch

_NAMES = ("shared_experts", "shared_expert", "shared_mlp")


class AheadOfTime:
    """Stands in front of one block's shared experts. Used by one thread.

    `run` is called between sending to the groups and waiting for them; the block's own call then gets what it computed.
    """

    def __init__(self, module: Any) -> None:
        self._forward = module.forward
        self._input: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._leading: torch.Size = torch.Size()
        self._result: torch.Tensor | None = None
        self.proven = self._refuted = False
        module.__dict__["forward"] = self._call  # instead of the class's; a submodule or parameter it is not

    def run(self, hidden_TH: torch.Tensor) -> None:
        """The experts were asked for with ``hidden_TH``."""
        self._input, self._result = hidden_TH, None
        if self.proven:
            self._result = self._forward(self._as_asked(hidden_TH))
        elif not self._refuted:
            self._copy = hidden_TH.clone()

    def _as_asked(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """The experts' input in the shape that the block gives its shared experts."""
        return hidden_TH.view(*self._leading, *hidden_TH.shape)

    def _call(self, hidden: torch.Tensor) -> torch.Tensor:
        asked, result, self._input, self._result = self._input, self._result, None, None
        same = asked is not None and asked.data_ptr() == hidden.data_ptr() and asked.numel() == hidden.numel()
        if result is not None and same and result.shape == hidden.shape:
            return result
        output: torch.Tensor = self._forward(hidden)
        if not self.proven and not self._refuted:
            self._learn(hidden, output, asked if same else None)
        return output

    def _learn(self, hidden: torch.Tensor, output: torch.Tensor, asked: torch.Tensor | None) -> None:
        self._leading, before, self._copy = hidden.shape[:-2], self._copy, None
        self.proven = (
            asked is not None
            and before is not None
            and all(size == 1 for size in self._leading)
            and torch.equal(asked, before)  # the block has not written to it meanwhile
            and torch.equal(self._forward(self._as_asked(before)), output)
        )
        self._refuted = not self.proven  # once is enough: blocks are straight code, and the order is always the same


def shared_experts_of(model: Any, experts_module: Any) -> Any | None:
    """The shared experts beside an experts module, in the same block; None where there are none."""
    for block in model.modules():
        if any(child is experts_module for child in block.children()):
            found = [getattr(block, name) for name in _NAMES if isinstance(getattr(block, name, None), torch.nn.Module)]
            return found[0] if len(found) == 1 else None
    return None
