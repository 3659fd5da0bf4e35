"""Measures memory and speed of the 350M shape on a small machine: a prompt of 1,024 tokens and 100 new ones, in
llama.cpp from a GGUF file, mapped and not, and here from the same file.

    python experiments/edge.py --llama-cpp PYTHON [--tokenizer DIRECTORY] [--types Q8_0 Q4_K_M Q4_0] [--repeats 3]
        [--directory runs/edge]

Weights are random: neither memory nor speed depends on them. PYTHON has llama-cpp-python. With `--tokenizer` the files
carry that vocabulary, as published ones do. Each measurement is a process of its own, in turns; the table has medians.
Every one is a line of DIRECTORY/records.jsonl; killed and started again with the same files it repeats none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from records import Records, stamp

PROMPT, NEW = 1024, 100
MAPPED = ("mapped", "read", "mapped, as in the file")
"""How llama.cpp takes a file: mapped into memory or read; with weights in a faster order beside it, or only as they are
in the file."""
OURS = ("bfloat16", "int8", "w8a8", "int4:32")
"""How the weights of a Q8_0 file are kept here."""
LLAMA = r"""
import ctypes, json, random, sys, time
import llama_cpp
path, how, prompt, new, threads = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
silent = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(silent, None)
settings = llama_cpp.llama_model_default_params()
settings.load_mode = llama_cpp.LLAMA_LOAD_MODE_NONE if how == "read" else llama_cpp.LLAMA_LOAD_MODE_MMAP
settings.use_extra_bufts = how != "mapped, as in the file"  # Buffers for weights in the order in which they are used.
model = llama_cpp.llama_model_load_from_file(path.encode(), settings)
settings = llama_cpp.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_ubatch = prompt + new, 512, 512
settings.n_threads = settings.n_threads_batch = threads
context = llama_cpp.llama_init_from_model(model, settings)
tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
batch = llama_cpp.llama_batch_init(512, 0, 1)

def decode(ids, start, last):
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, last and i == len(ids) - 1
    assert llama_cpp.llama_decode(context, batch) == 0

def pick():
    logits = llama_cpp.llama_get_logits_ith(context, -1)
    return max(range(0, tokens, 64), key=logits.__getitem__)

ids = [random.Random(0).randrange(tokens // 4, tokens // 2) for _ in range(prompt)]
for _ in range(2):  # The first pass warms up.
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    began = time.perf_counter()
    for start in range(0, prompt, 512):
        decode(ids[start : start + 512], start, start + 512 >= prompt)
    token, read = pick(), time.perf_counter()
    for i in range(new):
        decode([token], prompt + i, True)
        token = pick()
    done = time.perf_counter()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
memory = {name: int(status[name].split()[0]) / 1e3 * 1.024 for name in ("VmHWM", "RssAnon", "RssFile")}
print(json.dumps({"prefill": prompt / (read - began), "decode": new / (done - read), **memory}))
"""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", required=True)
    parser.add_argument("--tokenizer", type=Path, default=None)
    parser.add_argument("--types", nargs="+", default=["Q8_0", "Q4_K_M", "Q4_0"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, default=Path("runs/edge"))
    args = parser.parse_args(argv)
    args.directory.mkdir(parents=True, exist_ok=True)
    vocabulary = "" if args.tokenizer is None else f"-{args.tokenizer.resolve().name}"
    files = {type: args.directory / f"350M{vocabulary}-{type}.gguf" for type in args.types}
    make([type for type, path in files.items() if not path.exists()], files, args.tokenizer)
    cases: list[tuple[str, ...]] = [("llama.cpp", type, how) for type in args.types for how in MAPPED]
    if "Q8_0" in files:
        cases += [("lfm_jax", "Q8_0", how) for how in OURS]
    of = {case: {"file": stamp(files[case[1]]), "threads": os.cpu_count(),
                 "python": args.llama_cpp if case[0] == "llama.cpp" else sys.executable} for case in cases}
    records = Records(args.directory / "records.jsonl", lambda row: row.get("of") == of.get(tuple(row["case"]), {}))
    for repeat in range(args.repeats):
        for case in cases:
            if any((row["repeat"], tuple(row["case"])) == (repeat, case) for row in records.rows):
                continue
            engine, type, how = case
            command = [args.llama_cpp, "-c", LLAMA, str(files[type]), how, *map(str, (PROMPT, NEW, os.cpu_count()))]
            if engine == "lfm_jax":
                command = [sys.executable, __file__, "ours", str(files[type]), how]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
            records.add({"of": of[case], "repeat": repeat, "case": case, **json.loads(found)})
            print(f"{repeat} {' '.join(case)}: {found}", file=sys.stderr, flush=True)
    print(table(records.rows, cases, files))
    return 0


def make(types: list[str], files: dict[str, Path], source: Path | None) -> None:
    """Writes files of random weights."""
    if not types:
        return
    from flax import nnx

    import lfm_jax as lfm
    from lfm_jax.text.tokenizer import load_tokenizer

    config = lfm.ModelConfig.preset("lfm2.5-350m").replace(param_dtype="bfloat16", dtype="bfloat16")
    model = lfm.LFM(config, rngs=nnx.Rngs(0))
    tokenizer = None if source is None else load_tokenizer(source)
    for type in types:
        lfm.save_gguf(model, files[type], tokenizer, type=type)


def ours(path: str, how: str) -> dict[str, float]:
    """Loads a file with weights in a form, and generates."""
    import random

    import lfm_jax as lfm
    from lfm_jax.infer.generate import generate_tokens

    dtype = how if how in ("bfloat16", "float32") else "float32"
    model, _ = lfm.load(path, dtype=dtype, quantize=None if how == dtype else how)
    tokens = model.config.vocab_size
    prompt = [random.Random(0).randrange(tokens // 4, tokens // 2) for _ in range(PROMPT)]
    seconds = {}
    for new in (1, NEW + 1):
        passes = []
        for _ in range(4):  # The first pass compiles.
            began = time.perf_counter()
            generate_tokens(model, [prompt], max_new_tokens=new, stop_ids=())
            passes.append(time.perf_counter() - began)
        seconds[new] = statistics.median(passes[1:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {name: int(status[name].split()[0]) / 1e3 * 1.024 for name in ("VmHWM", "RssAnon", "RssFile")}
    return {"prefill": PROMPT / seconds[1], "decode": NEW / (seconds[NEW + 1] - seconds[1]), **memory}


def table(done: list[dict[str, Any]], cases: list[tuple[str, ...]], files: dict[str, Path]) -> str:
    rows = ["| engine | file | MB | weights | peak | own | prefill, tokens/s | decode, tokens/s |",
            "|---|---|---|---|---|---|---|---|"]
    for case in cases:
        of_case = [row for row in done if tuple(row["case"]) == case]
        peak, own, prefill, decode = (statistics.median(row[key] for row in of_case)
                                      for key in ("VmHWM", "RssAnon", "prefill", "decode"))
        engine, type, how = case
        rows.append(f"| {engine} | {type} | {files[type].stat().st_size / 1e6:.1f} | {how} | {peak:.0f} | {own:.0f} | "
                    f"{prefill:.0f} | {decode:.1f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        print(json.dumps(ours(*sys.argv[2:4])))
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
