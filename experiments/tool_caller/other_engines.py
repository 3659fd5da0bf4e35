"""Greedy answers of `transformers` or llama.cpp, in any Python that has them; nothing of lfm_jax is used.

    PYTHON other_engines.py ENGINE MODEL ANSWERS < REQUESTS

REQUESTS is JSON: prompts, a text by key; stop, ids that end an answer; most, its most tokens; length, the tokens of the
longest prompt and answer. Every answer is a line of ANSWERS as soon as it is there: its key, the ids of the prompt and
its own. Ends with status 3 where the engine is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Answer = Callable[[str], tuple[list[int], list[int]]]
MISSING = 3
KEPT: list[Any] = []
"""What llama.cpp has the address of."""


def of_transformers(path: str, stop: list[int], most: int, length: int) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def answer(text: str) -> tuple[list[int], list[int]]:
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=most, eos_token_id=stop,
                                   pad_token_id=0, attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        return prompt, whole[0, len(prompt) :].tolist()

    return answer


def of_llama_cpp(path: str, stop: list[int], most: int, length: int) -> Answer:
    llama_cpp = importlib.import_module("llama_cpp")
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    KEPT.append(silent)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch = length, 512
    settings.n_threads = settings.n_threads_batch = os.cpu_count()
    settings.type_k = settings.type_v = 0  # Float32, as here.
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def decode(ids: list[int], start: int) -> int:
        """The likeliest next token."""
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(ids) - 1
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama.cpp cannot decode {len(ids)} tokens at {start}")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return max(range(size), key=logits.__getitem__)

    def answer(text: str) -> tuple[list[int], list[int]]:
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), False, True)
        prompt = list(room[:count])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        likeliest = [decode(prompt[start : start + 512], start) for start in range(0, len(prompt), 512)]
        made = likeliest[-1:]
        while made[-1] not in stop and len(made) < most:
            made.append(decode(made[-1:], len(prompt) + len(made) - 1))
        return prompt, made

    return answer


def main(engine: str, model: str, answers: str) -> int:
    request: dict[str, Any] = json.load(sys.stdin)
    how = {"transformers": of_transformers, "llama.cpp": of_llama_cpp}[engine]
    try:
        answer = how(model, request["stop"], request["most"], request["length"])
    except ImportError as error:
        print(error, file=sys.stderr)
        return MISSING
    with open(answers, "a", encoding="utf-8") as file:
        for key, text in request["prompts"].items():
            prompt, made = answer(text)
            file.write(json.dumps({"key": key, "prompt": prompt, "ids": made}) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
