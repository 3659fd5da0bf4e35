"""Measures a LoRA step of supervised fine-tuning beside `peft` and `transformers`: real tokens a second, peak memory.

    python experiments/beside_peft.py MODEL CHATS [--dtypes float32 bfloat16] [--rows 4] [--seq-len 1024] [--rank 8]
        [--steps 7] [--sizes 1 2 4 8] [--threads 2] [--records runs/beside_peft.jsonl]

MODEL is a GGUF file or a directory that both take; CHATS are those of `lfm tune`. Both sides have the same weights, the
same new adapter, AdamW, and in each step the same chats: here packed into `--rows` rows of `--seq-len`,
there sorted by length and padded. Padding does not count as tokens. In bfloat16 weights are kept and used in it, and
adapters are in float32. Each side is a process of its own, and they take their steps in turn. Of `--sizes`, rows in
memory at a time, each side has the one whose step is the fastest, unless `--ours` or `--theirs` name it. The first step
is for compiling and not timed. Needs peft, torch and Linux. Started again with the same settings and files it
repeats nothing that is in the records.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from records import Records, Row, stamp

Step = Callable[[int], float]
"""Takes a step on the batch of a number and returns its loss."""
SIDES = {"lfm_jax": ("lfm_jax", "jax"), "peft": ("peft", "transformers", "torch")}
"""Packages of each side whose versions are told."""
BATCHES, ADAPTER = "batches.npz", "adapter.npz"
LLAMA = {"blocks.": "model.layers.", "operator.": "self_attn.", "out_proj": "o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj"}
"""Parts of names of matrices here, where a model is of no family of LFM2's, and in Llama of `transformers`."""
IGNORE = -100
"""No target, in labels of `transformers`."""
ALPHA = 16
LEARNING = {"peak_lr": 1e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "clip_norm": 1.0}


def main(argv: list[str]) -> int:
    args = parsed(argv)
    if args.side:
        serve(args)
        return 0
    of = {name: getattr(args, name) for name in ("rows", "seq_len", "rank", "steps", "threads")}
    of |= {"model": stamp(args.model), "chats": stamp(args.chats), "malloc": os.environ.get("GLIBC_TUNABLES", ""),
           "versions": {name: version(name) for names in SIDES.values() for name in names if name != "lfm_jax"}}
    records = Records(args.records, lambda row: row["of"] == of)
    done = records.rows

    def add(row: Row) -> None:
        records.add({"of": of, **row})
        print(json.dumps(row), file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        prepare(args, Path(folder))
        for dtype in args.dtypes:
            sizes = {side: chosen or fastest(args, Path(folder), side, dtype, done, add)
                     for side, chosen in zip(SIDES, (args.ours, args.theirs), strict=True)}
            if not find(done, what="steps", dtype=dtype, sizes=sizes):
                sides = beside(args, Path(folder), dtype, sizes)
                add({"what": "steps", "dtype": dtype, "sizes": sizes, "sides": sides})
        print(table([find(done, what="steps", dtype=dtype)[-1] for dtype in args.dtypes]))
    print(f"\n{json.dumps({key: x for key, x in of.items() if key not in ('model', 'chats')})}")
    return 0


def parsed(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("chats", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--ours", type=int)
    parser.add_argument("--theirs", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--records", type=Path, default=Path("runs/beside_peft.jsonl"))
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)  # A process of `child`.
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def find(done: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in done if all(row.get(key) == x for key, x in wanted.items())]


# -------------------------------------------------------------------- what both sides get


def tune_config(args: argparse.Namespace, dtype: str, micro_batches: int = 1) -> Any:
    from lfm_jax.adapters.config import LoRAConfig
    from lfm_jax.data.config import ChatData
    from lfm_jax.post.config import TuneConfig
    from lfm_jax.train.optimizer import OptimizerConfig

    return TuneConfig.of(
        str(args.model), model={"dtype": dtype, "param_dtype": dtype}, run_dir="unused", steps=args.steps + 1,
        data=ChatData(sources=(str(args.chats),), seq_len=args.seq_len, batch_size=args.rows, heldout_fraction=0.0),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0, weight_decay=0.0, **LEARNING),
        lora=LoRAConfig(rank=args.rank, alpha=ALPHA), micro_batches=micro_batches)


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """Writes the batches of all steps, [S, B, T] each, and the A of each matrix in a new adapter; each B is zero."""
    from lfm_jax.adapters.targets import named_targets
    from lfm_jax.post.sft import SFT

    config = tune_config(args, "float32")
    method = SFT(config)
    print(method, file=sys.stderr, flush=True)
    batches = method.train_data(None)
    found = [next(batches) for _ in range(args.steps + 1)]
    arrays: dict[str, Any] = {name: np.stack([batch[name] for batch in found]) for name in found[0]}
    np.savez(folder / BATCHES, **arrays)
    adapter, a = new_adapter(config), dict[str, Any]()
    for name, path in named_targets(config.model, config.lora).items():
        a[name] = np.asarray(functools.reduce(lambda node, key: node[key], path, adapter)["a"]).reshape(args.rank, -1)
    np.savez(folder / ADAPTER, **a)


def new_adapter(config: Any) -> Any:
    import jax

    from lfm_jax.adapters.trees import init_adapter

    return init_adapter(config.model, config.lora, jax.random.key(0))


def documents(batch: Mapping[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
    """The chats of packed rows as (ids, labels), the longest first; the last id of each is a target only."""
    found = []
    for tokens_T, targets_T, segment_ids_T in zip(*(batch[name] for name in ("tokens", "targets", "segment_ids")),
                                                  strict=True):
        for segment in range(1, segment_ids_T.max(initial=0) + 1):
            here_T = segment_ids_T == segment
            ids, targets = tokens_T[here_T].tolist(), targets_T[here_T].tolist()
            labels = [IGNORE, *(target if target >= 0 else IGNORE for target in targets)]
            ids.append(max(targets[-1], 0))
            found.append((ids, labels))
    return sorted(found, key=lambda pair: -len(pair[0]))


# -------------------------------------------------------------------- the sides, each in a process of its own


def ours(args: argparse.Namespace, dtype: str) -> Step:
    import jax

    from lfm_jax import init_from

    config = tune_config(args, dtype, args.rows // args.size)
    training = config.training()
    state = training.placed_state(init_from.weights(str(args.model), config.model))
    state = dataclasses.replace(state, params=new_adapter(config))
    batches, step = dict(np.load(args.folder / BATCHES)), training.compiled_step()

    def take(i: int) -> float:
        nonlocal state
        state, metrics = step(state, {name: x[i] for name, x in batches.items()})
        return float(jax.block_until_ready(metrics)["loss"])

    return take


def theirs(args: argparse.Namespace, dtype: str) -> Step:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    where = {"pretrained_model_name_or_path": args.model} if args.model.is_dir() else {
        "pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    base = AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype))
    base.config.use_cache = False
    adapter = {their_name(name, base): torch.tensor(a) for name, a in np.load(args.folder / ADAPTER).items()}
    model: Any = get_peft_model(base, LoraConfig(
        r=args.rank, lora_alpha=ALPHA, target_modules=list(adapter), task_type="CAUSAL_LM"))
    for name, a in adapter.items():
        model.get_submodule(f"base_model.model.{name}").lora_A["default"].weight.data.copy_(a)
    model.train()
    weights = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING["peak_lr"], betas=(LEARNING["b1"], LEARNING["b2"]),
                                  eps=LEARNING["eps"], weight_decay=0.0)
    batches = np.load(args.folder / BATCHES)
    names, arrays = ("tokens", "targets", "segment_ids"), {name: batches[name] for name in batches}

    def take(i: int) -> float:
        chats = documents({name: arrays[name][i] for name in names})
        learnt = sum(label != IGNORE for _, labels in chats for label in labels)
        total = 0.0
        for start in range(0, len(chats), args.size):
            some = chats[start : start + args.size]
            T = len(some[0][0])
            ids, labels = (torch.tensor([pair[k] + [fill] * (T - len(pair[k])) for pair in some])
                           for k, fill in ((0, 0), (1, IGNORE)))
            mask = torch.tensor([[1] * len(pair[0]) + [0] * (T - len(pair[0])) for pair in some])
            loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=learnt).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, LEARNING["clip_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return take


def their_name(name: str, model: Any) -> str:
    """The name of a matrix in a model of `transformers`."""
    there = {each for each, _ in model.named_modules()}
    if name not in there:
        name = functools.reduce(lambda name, part: name.replace(*part), LLAMA.items(), name)
    assert name in there, name
    return name


def serve(args: argparse.Namespace) -> None:
    """Takes the step of each number on standard input and answers with {"seconds", "loss", "peak"}; peak is that of
    resident memory since the answer before, in MiB."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print is no answer.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    take = (ours if args.side == "lfm_jax" else theirs)(args, args.dtypes[0])
    print("{}", file=out, flush=True)
    for line in sys.stdin:
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew (proc(5)).
        began = time.perf_counter()
        loss = take(int(line))
        taken, status = time.perf_counter() - began, Path("/proc/self/status").read_text()
        peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
        print(json.dumps({"seconds": taken, "loss": loss, "peak": peak}), file=out, flush=True)


@contextlib.contextmanager
def child(
    args: argparse.Namespace, folder: Path, side: str, dtype: str, size: int
) -> Generator[Callable[[int], dict[str, float]]]:
    """A process of one side, as a function that has it take a step."""
    same = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in
            ("rows", "seq_len", "rank", "steps", "threads")]
    command = [sys.executable, __file__, str(args.model), str(args.chats), *same, "--side", side,
               "--folder", str(folder), "--size", str(size), "--dtypes", dtype]
    # Parts of PyTorch have read the number of threads by the time that it is set.
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        asked, answers = process.stdin, process.stdout

        def answer() -> dict[str, float]:
            if not (line := answers.readline()):
                raise RuntimeError(f"the process of {side} ended; what it said is above")
            return json.loads(line)

        def step(i: int) -> dict[str, float]:
            asked.write(f"{i}\n")
            asked.flush()
            return answer()

        answer()  # It has loaded.
        yield step
        asked.close()


def fastest(
    args: argparse.Namespace, folder: Path, side: str, dtype: str, done: list[dict[str, Any]],
    add: Callable[[dict[str, Any]], None],
) -> int:
    """The number of rows at a time whose second step is the fastest."""
    sizes = [size for size in args.sizes if side != "lfm_jax" or (size <= args.rows and not args.rows % size)]
    for size in sizes:
        if not find(done, what="trial", dtype=dtype, side=side, size=size):
            with child(args, folder, side, dtype, size) as step:
                step(0)
                add({"what": "trial", "dtype": dtype, "side": side, "size": size, "seconds": step(1)["seconds"]})
    trials = [row for row in find(done, what="trial", dtype=dtype, side=side) if row["size"] in sizes]
    return min(trials, key=lambda row: row["seconds"])["size"]


def beside(args: argparse.Namespace, folder: Path, dtype: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What each side says of each step, all steps in turn; and the real tokens of each."""
    with child(args, folder, "lfm_jax", dtype, sizes["lfm_jax"]) as here, child(
        args, folder, "peft", dtype, sizes["peft"]
    ) as there:
        pairs = [(here(i), there(i)) for i in range(args.steps + 1)]
    segment_ids = np.load(folder / BATCHES)["segment_ids"]
    tokens = (segment_ids > 0).sum(axis=(1, 2)).tolist()
    return {"tokens": tokens, "chats": segment_ids.max(axis=2).sum(axis=1).tolist(),
            **dict(zip(SIDES, map(list, zip(*pairs, strict=True)), strict=True))}


# -------------------------------------------------------------------- the table


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over the steps behind the first one."""
    lines = ["| dtype | side | rows at a time | loss of the first step | of the last | "
             "s a step: median (least to most) | real tokens/s | times as fast | peak MiB, warm | "
             "peak MiB, first step |", "|---" * 10 + "|"]
    tokens, chats = (rows[0]["sides"][name][1:] for name in ("tokens", "chats"))  # Of all dtypes the same.
    for row in rows:
        for side in SIDES:
            first, *steps = row["sides"][side]
            seconds = [step["seconds"] for step in steps]
            rate = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
            ratio = "" if side != "lfm_jax" else f"{median_ratio(row):.2f}"
            lines.append(" | ".join([
                f"| {row['dtype']}", side, str(row["sizes"][side]), f"{first['loss']:.5f}", f"{steps[-1]['loss']:.5f}",
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})", f"{rate:,.0f}",
                ratio, f"{max(step['peak'] for step in steps):,.0f}", f"{first['peak']:,.0f} |"]))
    lines.append(f"\n{statistics.mean(tokens):,.0f} tokens and {statistics.mean(chats):.1f} chats a step in the mean, "
                 f"{len(tokens)} steps in turn.")
    return "\n".join(lines)


def median_ratio(row: Mapping[str, Any]) -> float:
    """Of the times of the two sides, each pair of one step."""
    pairs = zip(row["sides"]["peft"][1:], row["sides"]["lfm_jax"][1:], strict=True)
    return statistics.median(there["seconds"] / here["seconds"] for there, here in pairs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
