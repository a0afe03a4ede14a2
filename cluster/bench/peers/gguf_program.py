"""Writes a qwen3_moe checkpoint as a GGUF file in fp32. Runs in llama.cpp's virtual environment, which has ``gguf``.

Run as ``python gguf_program.py DIRECTORY FILE``. Layout and names are llama.cpp's for its architecture "qwen3moe".
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors import safe_open

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
}
_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def main() -> None:
    """Writes the file that the command line names."""
    directory, file = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "qwen3_moe":
        sys.exit(f"llama.cpp is compared on qwen3_moe only; this is {config['model_type']}")
    num_experts = config["num_local_experts"] if "num_local_experts" in config else config["num_experts"]  # by its age
    theta = config.get("rope_theta") or config.get("rope_parameters", {}).get("rope_theta", 10000.0)
    writer = gguf.GGUFWriter(str(file), "qwen3moe")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta)
    writer.add_expert_count(num_experts)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    where: dict[str, Path] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "np") as tensors:
            where |= dict.fromkeys(tensors.keys(), path)

    def read(name: str) -> Any:
        with safe_open(where[name], "np") as tensors:
            return tensors.get_tensor(name).astype(np.float32)

    for source, target in _MODEL.items():
        if source in where:
            writer.add_tensor(target, read(source))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for source, target in _LAYER.items():
            writer.add_tensor(f"blk.{layer}.{target}", read(prefix + source))
        experts = range(num_experts)
        if any(re.fullmatch(rf"{re.escape(prefix)}mlp\.experts\.0\..*", name) for name in where):
            for source, target in _EXPERT.items():
                stacked = np.stack([read(f"{prefix}mlp.experts.{e}.{source}.weight") for e in experts])
                writer.add_tensor(f"blk.{layer}.{target}.weight", stacked)
        else:
            gate, up = np.split(read(f"{prefix}mlp.experts.gate_up_proj"), 2, axis=1)
            down = read(f"{prefix}mlp.experts.down_proj")
            for target, tensor in (("ffn_gate_exps", gate), ("ffn_up_exps", up), ("ffn_down_exps", down)):
                writer.add_tensor(f"blk.{layer}.{target}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
