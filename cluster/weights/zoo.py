"""The zoo: random-weight checkpoints of every architecture that is tested, in the Hugging Face layout.

Weights are scaled so that every routed expert, gate and attention window visibly changes the logits: with the usual
initialisation (standard deviation 0.02) a tiny model's experts hardly do, and a wrong one would go unnoticed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from cluster.errors import InvalidArgument
from cluster.weights.layouts import LAYOUTS, write_layout

PRESETS = ("tiny", "bench-700m")
WINDOW = 16

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GQA = {"num_key_value_heads": 2, "head_dim": 16}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 128,
    "first_k_dense_replace": 1,
}

TINY: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_COMMON, **_MLA, "topk_method": "group_limited_greedy", "routed_scaling_factor": 1.0},
    "deepseek_v3": {**_COMMON, **_MLA, "routed_scaling_factor": 2.5, "norm_topk_prob": True},
    "qwen2_moe": {
        **_COMMON,
        "num_key_value_heads": 2,
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "intermediate_size": 128,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "qwen3_moe": {
        **_COMMON,
        **_GQA,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
    },
    "mixtral": {**_COMMON, **_GQA, "num_local_experts": 8, "intermediate_size": 48, "sliding_window": WINDOW},
    "olmoe": {
        **_COMMON,
        "num_key_value_heads": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "intermediate_size": 32,
    },
    "gpt_oss": {
        **_COMMON,
        **_GQA,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "intermediate_size": 32,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm4_moe": {
        **_COMMON,
        **_GQA,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
        "use_qk_norm": True,
    },
    "granitemoe": {
        **_COMMON,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.25,
        "logits_scaling": 1.5,
    },
    "phimoe": {
        **_COMMON,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 48,
        "sliding_window": WINDOW,
        "attention_bias": True,
        "lm_head_bias": True,
    },
}

BENCH_700M: dict[str, Any] = {
    **_COMMON,
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "intermediate_size": 2048,
    "norm_topk_prob": True,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}


def architectures() -> list[str]:
    """Names that ``make_model`` takes for preset ``tiny``."""
    return sorted(TINY)


def make_model(
    arch: str, preset: str, seed: int, out: Path, layout: str = "per-expert", progress: Callable[[str], None] = print
) -> None:
    """Writes a random-weight checkpoint to the directory ``out``; the same arguments give the same weights.

    Raises:
        InvalidArgument: unknown architecture, preset or layout, or ``out`` already holds files.
    """
    if arch not in TINY:
        raise InvalidArgument("--arch", arch, f"must be one of {', '.join(architectures())}")
    if preset not in PRESETS:
        raise InvalidArgument("--preset", preset, f"must be one of {', '.join(PRESETS)}")
    if layout not in LAYOUTS:
        raise InvalidArgument("--layout", layout, f"must be one of {', '.join(LAYOUTS)}")
    if preset == "bench-700m" and arch != "qwen3_moe":
        raise InvalidArgument("--arch", arch, "preset bench-700m is qwen3_moe")
    if seed < 0:
        raise InvalidArgument("--seed", seed, "must be 0 or more")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgument("--out", str(out), "must be a new or empty directory")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise InvalidArgument("--out", str(out), f"cannot be made: {exc.strerror}") from exc
    settings = dict(TINY[arch] if preset == "tiny" else BENCH_700M)
    config = AutoConfig.for_model(arch, **settings)
    progress(f"building {arch} ({preset})")
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill(model, seed)
    progress(f"writing {layout} layout to {out}")
    write_layout(model, out, layout)


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Random weights of standard deviation 1 / sqrt(fan in), twice that for gates; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    transposed = {name for name, module in model.named_modules() if getattr(module, "is_transposed", False)}
    norms = {
        name
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower() or "norm" in name.rpartition(".")[2]
    }
    for name, tensor in sorted(model.state_dict().items()):
        owner, _, key = name.rpartition(".")
        noise = torch.randn(tensor.shape, generator=generator)
        if owner in norms and key == "weight":
            tensor.copy_(1.0 + 0.2 * noise)
        elif tensor.dim() < 2 or key.endswith("bias"):
            tensor.copy_((0.05 if key == "e_score_correction_bias" else 0.3) * noise)
        elif "embed_tokens" in owner:
            tensor.copy_(noise)
        else:
            fan_in = tensor.shape[-2] if owner in transposed else tensor.shape[-1]
            gate = re.search(r"(gate|router)(\.layer)?$", owner) is not None
            gain = 2.0 if gate else 1.0  # more for experts would amplify rounding over many layers
            tensor.copy_(gain / math.sqrt(fan_in) * noise)
    model.tie_weights()
