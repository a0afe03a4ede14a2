"""The oracle: plain single-process transformers on the same checkpoint. Uses nothing of the serving path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

_ROUNDING = 1e-6
"""Standard deviation of what `Reference.others` adds to each input, as a share of it: what a layer's sums in fp32 lose,
and a hundredth of what `verify` lets logits differ by."""
_OTHERS = 24


class Reference:
    """A model loaded the way its users load it, in ``dtype``."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in config:
            self._model = _dequantized(path, dtype)
        else:
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        self._model.eval()
        self.arch = str(config["model_type"])

    @torch.inference_mode()
    def greedy(self, prompt: list[int], new: int) -> list[int]:
        """The next ``new`` tokens, each the likeliest; end tokens end nothing."""
        ids = torch.tensor([prompt])
        # Without a mask, generate() takes a padding token in the prompt for padding and hides it.
        made = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
        )
        tokens: list[int] = made[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def logits(self, prompt: list[int], continuation: list[int]) -> torch.Tensor:
        """fp32 [len(continuation), V]: the logits that each token of the continuation was chosen from."""
        ids = torch.tensor([prompt + continuation[:-1]])
        output: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
        return output

    def others(self, prompt: list[int], continuation: list[int]) -> Iterator[torch.Tensor]:
        """`logits` again and again, each time with embeddings that are off by about what rounding makes later.

        All are the same but where two experts are as good for some token: which of them is chosen is decided by the
        order of a sum, and moves all logits behind it far more than rounding does.
        """
        for seed in range(_OTHERS):
            with self._rounded(seed):
                logits = self.logits(prompt, continuation)
            yield logits

    @contextmanager
    def _rounded(self, seed: int) -> Iterator[None]:
        draw = torch.Generator().manual_seed(seed)

        def off(_module: Any, _inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            return embedded * (1.0 + _ROUNDING * torch.randn(embedded.shape, generator=draw).to(embedded))

        handle = self._model.get_input_embeddings().register_forward_hook(off)
        try:
            yield
        finally:
            handle.remove()


def _dequantized(path: Path, dtype: torch.dtype) -> Any:
    """A block-scaled fp8 checkpoint multiplied out here, on purpose not by the reader that it is the oracle of."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    rows, columns = config.quantization_config["weight_block_size"]
    del config.quantization_config
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        stored.update(load_file(file))
    state: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            tensor = tensor.float()
            for row in range(0, tensor.shape[-2], rows):
                for column in range(0, tensor.shape[-1], columns):
                    factor = scale[..., row // rows, column // columns]
                    tensor[..., row : row + rows, column : column + columns] *= factor[..., None, None]
        state[name] = tensor
    kind: Any = type(AutoModelForCausalLM.from_config(config))
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
