"""What runs in a peer's own virtual environment: one engine, asked over standard input and output.

Run as ``python program.py ENGINE MODEL DTYPE THREADS``; imports nothing of ExpertMesh, since its virtual environment
has none of it. Prints one JSON object with the versions that it runs, then answers each line of input, ``{"prompts":
[[ids], ...], "new": N}``, with ``{"seconds": S, "tokens": [[ids], ...]}``: all prompts at once, greedy, N tokens each.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Prompts = list[list[int]]
Generate = Callable[[Prompts, int], list[list[int]]]


def transformers_engine(model: str, dtype: str, threads: int) -> tuple[Generate, dict[str, str]]:
    """`generate` of plain transformers, with the fastest of its own experts implementations on CPUs."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        experts_implementation="grouped_mm",
        local_files_only=True,
    ).eval()

    @torch.inference_mode()
    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        cache = None
        rows: list[torch.Tensor] = []
        # Its own loop is a little slower than a bare one; the peer gets the faster.
        for _ in range(new):
            output = loaded(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            rows.append(ids)
        tokens: list[list[int]] = torch.cat(rows, dim=1).tolist()
        return tokens

    return generate, {"transformers": transformers.__version__, "torch": torch.__version__}


def vllm_engine(model: str, dtype: str, threads: int) -> tuple[Generate, dict[str, str]]:
    """vLLM's CPU build, prefix caching off since prompts are fresh anyway."""
    import torch
    import vllm

    engine = vllm.LLM(
        model,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=False,
    )

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        asked: Sequence[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(answer.outputs[0].token_ids) for answer in engine.generate(asked, params, use_tqdm=False)]

    return generate, {"vllm": vllm.__version__, "torch": torch.__version__}


def llama_cpp_engine(model: str, _dtype: str, threads: int) -> tuple[Generate, dict[str, str]]:
    """llama.cpp through its batch interface; ``model`` is a GGUF file, which has its own precision."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_backend_init()
    weights = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 1024, 4096, 512, 16
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(weights, params)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(weights))
    batch = llama_cpp.llama_batch_init(4096, 0, 1)

    def step(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """(token, position, sequence, whether its logits are wanted) -> greedy tokens."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [
            int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)).argmax())
            for i, row in enumerate(rows)
            if row[3]
        ]

    def generate(prompts: Prompts, new: int) -> list[list[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = step([(t, at, s, at == len(p) - 1) for s, p in enumerate(prompts) for at, t in enumerate(p)])
        rows = [last]
        for i in range(new - 1):
            last = step([(token, len(prompts[s]) + i, s, True) for s, token in enumerate(last)])
            rows.append(last)
        return [list(sequence) for sequence in zip(*rows, strict=True)]

    return generate, {"llama-cpp-python": llama_cpp.__version__}


ENGINES = {"transformers": transformers_engine, "vllm": vllm_engine, "llama.cpp": llama_cpp_engine}


def main() -> None:
    """Serves the engine that the command line names until standard input ends."""
    name, model, dtype, threads = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    # Libraries print to standard output, which belongs to the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with contextlib.redirect_stdout(sys.stderr):
        generate, versions = ENGINES[name](model, dtype, threads)
        answers.write(json.dumps({"versions": versions}) + "\n")
        answers.flush()
        for line in sys.stdin:
            asked = json.loads(line)
            started_s = time.perf_counter()
            tokens = generate(asked["prompts"], asked["new"])
            answers.write(json.dumps({"seconds": time.perf_counter() - started_s, "tokens": tokens}) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
