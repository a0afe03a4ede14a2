"""Writing one model in the layouts that checkpoints come in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYOUTS = ("per-expert", "fused", "sharded", "fp8")
FP8_BLOCK = (128, 128)
_FP8_MAX = 448.0  # largest finite float8_e4m3fn


def write_layout(model: Any, out: Path, layout: str) -> None:
    """Writes ``model`` to ``out``.

    ``per-expert``: as models of its family are published (for most, one tensor an expert and matrix). ``fused``: the
    names and stacked experts of transformers' own modules. ``sharded``: as per-expert, over four or more files with
    an index. ``fp8``: as per-expert, matrices in DeepSeek's block-scaled float8 (the values are rounded by it).
    """
    out.mkdir(parents=True, exist_ok=True)
    if layout == "sharded":
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(out, max_shard_size=max(1, size // 4))
        return
    model.save_pretrained(out, max_shard_size="1000GB")
    if layout == "fused":
        tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
        state = {k: v.contiguous() for k, v in model.state_dict().items() if k not in tied}
        save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    elif layout == "fp8":
        _rewrite_fp8(out)


def _rewrite_fp8(out: Path) -> None:
    state = load_file(out / "model.safetensors")
    written: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        linear = re.search(r"(proj|w1|w2|w3|linear)(_with_mqa)?(\.weight)?$", name) is not None
        if linear and tensor.dim() >= 2:
            written[name], written[f"{name}_scale_inv"] = quantize_blocks(tensor, FP8_BLOCK)
        else:
            written[name] = tensor
    save_file(written, out / "model.safetensors", metadata={"format": "pt"})
    file = out / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(FP8_BLOCK),
    }
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def quantize_blocks(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [..., R, C] as float8_e4m3fn and fp32 scales [..., ceil(R / block[0]), ceil(C / block[1])]."""
    rows, columns = weight.shape[-2:]
    pad = (0, -columns % block[1], 0, -rows % block[0])
    padded = torch.nn.functional.pad(weight.float(), pad)
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))  # [..., r, block0, c, block1]
    scale = blocks.abs().amax(dim=(-3, -1)) / _FP8_MAX
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    quantized = blocks / scale[..., :, None, :, None]
    flat = quantized.flatten(-2, -1).flatten(-3, -2)[..., :rows, :columns]
    return flat.to(torch.float8_e4m3fn).contiguous(), scale.contiguous()
