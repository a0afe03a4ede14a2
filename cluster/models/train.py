"""Trains the embedded model: ``python -m cluster.models.train --out DIR`` (about an hour on two cores).

Writes a checkpoint in the Hugging Face layout (config.json, generation_config.json, model.safetensors in bf16,
tokenizer.json), the held-out text, and ``training.json`` with the figures that the model card quotes. The gate's
correction bias is moved against load after every step, without an auxiliary loss (DeepSeek-V3 technical report,
arXiv 2412.19437, section 2.1.2), and gently: experts stay free to specialise on one kind of text.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from cluster.models.texts import KINDS, split

VOCABULARY = 4096
SEED = 20261123


def model_config() -> DeepseekV3Config:
    """5 layers, the first dense, 16 routed experts in 4 gate groups, 4 a token, one shared expert."""
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        n_shared_experts=1,
        n_routed_experts=16,
        routed_scaling_factor=1.0,
        kv_lora_rank=64,
        q_lora_rank=96,
        qk_rope_head_dim=16,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )


def train_tokenizer(texts: dict[str, str]) -> Tokenizer:
    """Byte-level BPE over both kinds; ids 0, 1, 2 are <|begin|>, <|end|>, <|pad|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|begin|>", "<|end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text[i : i + 10000] for text in texts.values() for i in range(0, len(text), 10000)), trainer
    )
    return tokenizer


class GateMeter:
    """Counts, per MoE layer, how often each expert is chosen, and moves correction biases against load."""

    def __init__(self, model: Any) -> None:
        self.gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
        self.counts_LE = torch.zeros(len(self.gates), self.gates[0].num_experts)
        for index, gate in enumerate(self.gates):
            gate.register_forward_hook(self._count(index))

    def _count(self, index: int) -> Any:
        def hook(_module: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
            self.counts_LE[index] += torch.bincount(output[2].flatten(), minlength=self.counts_LE.shape[1])

        return hook

    def take(self) -> torch.Tensor:
        counts_LE, self.counts_LE = self.counts_LE, torch.zeros_like(self.counts_LE)
        return counts_LE

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        counts_LE = self.take()
        share_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True)
        for gate, share_E in zip(self.gates, share_LE, strict=True):
            # Only experts outside half to twice the mean load are pushed: uneven use is wanted, dead experts are not.
            push_E = torch.where(share_E > 2.0, -1.0, torch.where(share_E < 0.5, 1.0, 0.0))
            gate.e_score_correction_bias += speed * push_E


@torch.no_grad()
def evaluate(model: Any, meter: GateMeter, ids: np.ndarray[Any, Any], length: int) -> tuple[float, list[list[float]]]:
    """(mean loss in nats a token, share of choices of each expert per MoE layer) over held-out ids."""
    model.eval()
    meter.take()
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, length):
        chunk = torch.from_numpy(ids[start : start + length + 1].astype(np.int64))[None]
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, chunk[0, 1:], reduction="sum"))
        count += logits.shape[0]
    model.train()
    counts_LE = meter.take()
    shares_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True)
    return total / count, [[round(float(share), 4) for share in row] for row in shares_LE]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--minutes", type=float, default=90.0, help="the schedule is shortened to end by then")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step, half of each kind")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)

    with tempfile.TemporaryDirectory() as work:
        train_text, held_text = split(Path(work))
    tokenizer = train_tokenizer(train_text)
    train_ids = {kind: np.array(tokenizer.encode(text).ids, dtype=np.uint16) for kind, text in train_text.items()}
    held_ids = {kind: np.array(tokenizer.encode(text).ids, dtype=np.uint16) for kind, text in held_text.items()}
    print({kind: len(ids) for kind, ids in train_ids.items()}, flush=True)

    config = model_config()
    model = DeepseekV3ForCausalLM._from_config(config, experts_implementation="grouped_mm")
    meter = GateMeter(model)
    print("parameters", sum(p.numel() for p in model.parameters()), flush=True)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    started = time.monotonic()
    log: list[dict[str, float]] = []
    done = 0.0
    step = 0
    while done < 1.0:
        # Progress is by steps or by time, whichever is further, so that the schedule always reaches its end.
        done = max(step / args.steps, (time.monotonic() - started) / (args.minutes * 60))
        lr = args.lr * min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for group in optimizer.param_groups:
            group["lr"] = lr
        rows = []
        for index in range(args.batch):
            ids = train_ids[KINDS[index % 2]]
            at = int(rng.integers(0, len(ids) - args.length - 1))
            rows.append(ids[at : at + args.length + 1].astype(np.int64))
        batch = torch.from_numpy(np.stack(rows))
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        meter.balance(1e-3)
        step += 1
        if step % 50 == 0:
            seconds = time.monotonic() - started
            log.append({"step": step, "loss": round(float(loss.detach()), 4), "seconds": round(seconds)})
            print(log[-1], f"lr {lr:.2e}", flush=True)

    model = model.to(torch.bfloat16)
    for gate in meter.gates:
        gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    args.out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {
        "steps": step,
        "tokens_per_step": args.batch * args.length,
        "training_seconds": round(time.monotonic() - started),
        "training_tokens": {kind: len(ids) for kind, ids in train_ids.items()},
        "parameters": sum(p.numel() for p in model.parameters()),
        "log": log,
        "held_out": {},
    }
    for kind in KINDS:
        loss_value, shares = evaluate(model, meter, held_ids[kind], args.length)
        figures["held_out"][kind] = {
            "loss_nats_per_token": round(loss_value, 4),
            "bits_per_byte": round(loss_value / math.log(2) * len(held_ids[kind]) / len(held_text[kind].encode()), 4),
            "expert_share_by_layer": shares,
        }
        (args.out / "heldout").mkdir(exist_ok=True)
        (args.out / "heldout" / f"{kind}.txt").write_text(held_text[kind], encoding="utf-8")
        print(kind, figures["held_out"][kind]["loss_nats_per_token"], figures["held_out"][kind]["bits_per_byte"])
    model.save_pretrained(args.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    # Roles speak as the persons of a play do: that is the only dialogue this model has seen.
    wrapped.chat_template = (
        "{% for m in messages %}{{ m['role'] | upper + '.\n' + m['content'] + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT.\n' }}{% endif %}"
    )
    wrapped.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("saved to", args.out)


if __name__ == "__main__":
    main()
