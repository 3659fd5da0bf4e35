"""Measures what quantised weights cost: perplexity, KL divergence and agreement with full precision, text by text.

    python experiments/quantised_quality.py MODEL TEXT [--types Q8_0 Q4_K_M int8 int4:32 ...] [--documents 40]
        [--tokens 512] [--records runs/quantised.jsonl] [--llama-cpp PYTHON]

MODEL is anything `lfm.load` takes, and so may a type be: a run that was trained through rounded weights, beside the
model that it began with. `w8a8` rounds activations too; `kv` keeps keys and values in int8, and weights whole. TEXT is
a file of plain text whose documents begin with a title, ` = Title = `, as in WikiText, or else are cut every `--tokens`
tokens. Of each document the first `--tokens` tokens are scored. With `--llama-cpp`, a Python that has llama-cpp-python,
its own quantiser makes a file of each type too, which is loaded here and scored by the same code.

Every document of every type is a line of the records; killed and started again with the same files it repeats none. The
table that it prints has 95 % t intervals over documents; differences to full precision are paired by document.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from records import Records, stamp

import lfm_jax as lfm
from lfm_jax.ablate.stats import paired_difference, summarize
from lfm_jax.model import LFM
from lfm_jax.quant.model import FORMS
from lfm_jax.state import init_state
from lfm_jax.weight_kinds import WeightKind

FULL, KV = "full", "kv"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_K_S", "Q4_0", "int8", "int4", "int4:32")
QUANTISE = """
import sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.nthread = int(sys.argv[3]), 2
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""
FILE_TYPES = {"Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2}
"""Numbers of llama.cpp for whole files (`llama_ftype`)."""

Score = dict[str, float]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--records", type=Path, default=Path("runs/quantised.jsonl"))
    parser.add_argument("--llama-cpp", default=None)
    args = parser.parse_args(argv)
    model, tokenizer = lfm.load(args.model, dtype=jnp.float32)
    if tokenizer is None:
        parser.error(f"{args.model} has no tokenizer")
    documents = list(ids_of(args.text.read_text(encoding="utf-8"), tokenizer, args.tokens))[: args.documents]
    names = [FULL, *args.types]
    if args.llama_cpp:
        names += [f"{name} by llama.cpp" for name in args.types if name in FILE_TYPES]
    settings = {"model": args.model, "tokens": args.tokens, "files": stamp(args.model) + stamp(args.text)}
    of = {name: settings | {"type": name, "of_type": stamp(name) if Path(name).is_dir() else args.llama_cpp
                            if name.endswith(" by llama.cpp") else None} for name in names}
    records = Records(args.records, lambda row: of.get(row["type"], {"type": None}).items() <= row.items())
    done = {(row["type"], row["document"]): row for row in records.rows}
    score = scorer(model, documents)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            missing = [i for i in range(len(documents)) if (name, i) not in done]
            if not missing:
                continue
            began = time.monotonic()
            params, size = variant(name, model, tokenizer, Path(scratch), args.llama_cpp)
            print(f"{name}: {size / 1e6:.1f} MB, made in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
            for i in missing:
                done[name, i] = of[name] | {"document": i, "bytes": size, **score(name, params, i)}
                records.add(done[name, i])
            print(f"{name}: {len(missing)} texts in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(done, names, len(documents)))
    return 0


def ids_of(text: str, tokenizer: Any, tokens: int) -> Iterator[np.ndarray]:
    """Token ids of each document, at most `tokens`; documents of fewer are left out, so that one program does."""
    parts = re.split(r"(?m)^(?= = [^=].* = $)", text)
    if len(parts) < 3:
        ids = tokenizer.encode(text).ids
        parts_ids = [ids[i : i + tokens] for i in range(0, len(ids), tokens)]
    else:
        parts_ids = [tokenizer.encode(part.strip()).ids for part in parts if part.strip()]
    yield from (np.array(ids[:tokens], np.int32) for ids in parts_ids if len(ids) >= tokens)


def scorer(model: LFM, documents: list[np.ndarray]) -> Callable[[str, Any, int], Score]:
    """Scores a document with other weights of the model beside its own, whose answers are kept in memory."""
    graphdef, full = nnx.split(model, nnx.Param)
    full = nnx.to_pure_dict(full)

    @functools.partial(jax.jit, static_argnames="int8_kv")
    def logprobs(params: Any, ids_T: jax.Array, int8_kv: bool = False) -> jax.Array:
        state = init_state(model.config, 1, len(ids_T), int8_kv=True) if int8_kv else None
        logits_1TV, _ = nnx.merge(graphdef, params)(ids_T[None], state=state)
        return jax.nn.log_softmax(logits_1TV[0, :-1].astype(jnp.float32))

    @jax.jit
    def compared(log_p_TV: jax.Array, log_q_TV: jax.Array, ids_T: jax.Array) -> dict[str, jax.Array]:
        nll_T = -jnp.take_along_axis(log_q_TV, ids_T[1:, None], axis=1)
        return {
            "nll": jnp.mean(nll_T), "kl": jnp.mean(jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - log_q_TV), axis=1)),
            "agree": jnp.mean(jnp.argmax(log_p_TV, axis=1) == jnp.argmax(log_q_TV, axis=1)),
        }

    @functools.cache
    def of_full(i: int) -> jax.Array:
        return logprobs(full, documents[i])

    def score(name: str, params: Any, i: int) -> Score:
        found = compared(of_full(i), logprobs(params, documents[i], int8_kv=name == KV), documents[i])
        return {name: float(x) for name, x in found.items()}

    return score


def variant(name: str, model: LFM, tokenizer: Any, scratch: Path, llama_cpp: str | None) -> tuple[Any, int]:
    """(weights of the type, widened to float32; bytes of the file, or of the weights in memory)."""
    if name in (FULL, KV):
        return nnx.to_pure_dict(nnx.state(model, nnx.Param)), 4 * model.config.num_params()
    if Path(name).is_dir():
        trained, _ = lfm.load(name, dtype=jnp.float32)
        return nnx.to_pure_dict(nnx.state(trained, nnx.Param)), 4 * model.config.num_params()
    if name in FORMS:
        kind, group = FORMS[name]
        narrow = nnx.to_pure_dict(nnx.state(lfm.quantize(model, kind, group), nnx.Param))
        size = sum(_bits(x) * x.size for x in jax.tree.leaves(narrow)) // 8
        if kind == "w8a8":  # Its products are not those of the widened weights.
            return narrow, size
        kinds = jax.tree.map(lambda w: w.astype(jnp.float32), narrow, is_leaf=lambda w: isinstance(w, WeightKind))
        return kinds, size
    path = scratch / "model.gguf"
    if name.endswith(" by llama.cpp"):
        assert llama_cpp is not None
        whole = scratch / "whole.gguf"
        if not whole.exists():
            lfm.save_gguf(model, whole, tokenizer, type="F32")
        kind = name.removesuffix(" by llama.cpp")
        command = [llama_cpp, "-c", QUANTISE, str(whole), str(path), str(FILE_TYPES[kind])]
        subprocess.run(command, check=True, capture_output=True)
    else:
        lfm.save_gguf(model, path, tokenizer, type=name)
    loaded, _ = lfm.load(path, dtype=jnp.float32)
    size = path.stat().st_size
    path.unlink()
    return nnx.to_pure_dict(nnx.state(loaded, nnx.Param)), size


def _bits(x: jax.Array) -> int:
    return 4 if x.dtype == jnp.int4 else 8 * x.dtype.itemsize


def table(done: dict[tuple[str, int], Score], names: list[str], documents: int) -> str:
    lines = ["| type | MB | perplexity | loss over full precision, nats | KL, nats | same likeliest token |",
             "|---|---|---|---|---|---|"]
    full = {i: done[FULL, i]["nll"] for i in range(documents)}
    for name in names:
        of = [done[name, i] for i in range(documents)]
        nll = {i: score["nll"] for i, score in enumerate(of)}
        worse, kl, agree = paired_difference(nll, full), *(summarize(s[key] for s in of) for key in ("kl", "agree"))
        assert worse is not None
        cells = ["", "", ""] if name == FULL else [
            _interval(worse.mean, worse.low, worse.high, "+.4f"), _interval(kl.mean, kl.low, kl.high, ".4f"),
            _interval(100 * agree.mean, 100 * (agree.low or 0), 100 * (agree.high or 0), ".1f") + " %",
        ]
        perplexity = math.exp(summarize(nll.values()).mean)
        lines.append(f"| {name} | {of[0]['bytes'] / 1e6:.1f} | {perplexity:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(mean: float, low: float | None, high: float | None, form: str) -> str:
    return f"{mean:{form}}" if low is None or high is None else f"{mean:{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
