"""Measures the rollouts of GRPO beside `transformers.generate` in the same loop: answers and tokens a second.

    python experiments/beside_generate.py MODEL CHATS [--dtypes float32 bfloat16] [--prompts 8] [--generations 8]
        [--max-new-tokens 128] [--seq-len 1024] [--slots 64] [--rollouts 5] [--threads 2]
        [--records runs/beside_generate.jsonl]

MODEL is a GGUF file or a directory that both take; prompts are what comes before the first answer in CHATS, files of
`lfm tune`. In one process both have the same weights and prompts, and give each prompt as many answers, sampled at
temperature 1: here the engine as `lfm tune` has it, with log-probabilities, and `--slots` answers side by side; there
one batch of all answers of a rollout, padded at the left, with its cache, as TRL makes it. They take their rollouts in
turn; a first one is not timed. Tokens that were sampled count, padding behind an answer does not. In bfloat16 weights
are kept in it there, and in float32 here, as `lfm tune` has them. Each rollout is a line of the records; started again
with the same settings and files it repeats none. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from records import Records, Row, stamp

Prompts = Sequence[list[int]]
SIDES = ("lfm_jax", "transformers")
PACKAGES = ("jax", "transformers", "torch")


class Chat(NamedTuple):
    """What both sides know of a model and its prompts."""

    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    pad_id: int


def main(argv: list[str]) -> int:
    args = parser(__doc__, "runs/beside_generate.jsonl", rollouts=5).parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # XLA has a thread for each.
    of, records = opened(args, ("prompts", "generations", "max_new_tokens", "seq_len", "slots", "threads"))
    done = records.rows
    for dtype in args.dtypes:
        left = [i for i in range(1, args.rollouts + 1) for side in SIDES if not find(done, dtype, side, i)]
        if not left:
            continue
        chat = read(args, args.prompts * (args.rollouts + 1))
        makes = {"lfm_jax": ours(args, chat, dtype), "transformers": theirs(args, chat, dtype)}
        for i in sorted({0, *left}):
            some = chat.prompts[i * args.prompts : (i + 1) * args.prompts]
            for side, make in makes.items():
                if not find(done, dtype, side, i):
                    began = time.perf_counter()
                    lengths, cut = make(some, i)
                    row = {"dtype": dtype, "side": side, "rollout": i, "seconds": time.perf_counter() - began,
                           "answers": len(lengths), "tokens": sum(lengths), "cut": cut}
                    if i:
                        records.add({"of": of, **row})
                    print(json.dumps(row), file=sys.stderr, flush=True)
    print(table([row for row in done if row["dtype"] in args.dtypes and row["rollout"] <= args.rollouts]))
    print(f"\n{settings_of(of)}")
    return 0


# -------------------------------------------------------------------- settings and records, also of mismatch.py


def parser(about: str | None, where: str, *, rollouts: int) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model", type=Path)
    flags.add_argument("chats", type=Path)
    flags.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    for name, number in (("prompts", 8), ("generations", 8), ("max-new-tokens", 128), ("seq-len", 1024), ("slots", 64),
                         ("rollouts", rollouts), ("threads", len(os.sched_getaffinity(0)))):
        flags.add_argument(f"--{name}", type=int, default=number)
    flags.add_argument("--records", type=Path, default=Path(where))
    return flags


def opened(args: argparse.Namespace, names: Sequence[str]) -> tuple[Row, Records]:
    """The settings, and the records that have them."""
    of = {name: getattr(args, name) for name in names}
    of |= {"versions": {name: version(name) for name in PACKAGES}, "model": stamp(args.model),
           "chats": stamp(args.chats)}
    return of, Records(args.records, lambda row: row["of"] == of)


def settings_of(of: dict[str, Any]) -> str:
    return json.dumps({key: x for key, x in of.items() if key not in ("model", "chats")})


def find(done: list[dict[str, Any]], dtype: str, side: str, rollout: int) -> bool:
    return any((row["dtype"], row["side"], row["rollout"]) == (dtype, side, rollout) for row in done)


def read(args: argparse.Namespace, count: int) -> Chat:
    """So many prompts, drawn among those that leave room for an answer.

    Raises:
      ValueError: there are fewer.
    """
    from lfm_jax import init_from
    from lfm_jax.convert import sidecars
    from lfm_jax.data.chats import read_chats
    from lfm_jax.data.config import ChatData
    from lfm_jax.data.sources import SourceFile
    from lfm_jax.loading import model_config
    from lfm_jax.problems import raise_problems
    from lfm_jax.text.chat import encode_chat, turn_stop_ids
    from lfm_jax.text.tokenizer import load_tokenizer

    config = model_config(str(args.model))
    with init_from.sidecar_files(str(args.model)) as directory:
        tokenizer, template = load_tokenizer(directory), sidecars.chat_template(directory)
    problems: list[str] = []
    chats = read_chats([SourceFile(args.chats, args.chats.name)], ChatData.ignore, problems)
    raise_problems("chats cannot be used", problems)
    found = []
    for chat in random.Random(0).sample(chats, len(chats)):
        first = next(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
        ids = encode_chat(tokenizer, config, template, chat.messages[:first], chat.tools)
        if len(ids) <= args.seq_len - args.max_new_tokens:
            found.append(ids)
        if len(found) == count:
            return Chat(found, turn_stop_ids(tokenizer, config), config.pad_id or 0)
    raise ValueError(f"{args.chats} has {len(found)} prompts of at most {args.seq_len - args.max_new_tokens} tokens, "
                     f"and {count} are needed; lower --rollouts or --prompts")


# -------------------------------------------------------------------- the sides


Rollout = Callable[[Prompts, int], tuple[list[int], int]]
"""(prompts, seed) -> tokens of each answer, how many were cut off."""


def engine(args: argparse.Namespace, stop_ids: Sequence[int], dtype: str) -> tuple[Any, Any]:
    """The engine of a run of GRPO, and the weights that it is given before each rollout."""
    import jax
    from flax import nnx

    from lfm_jax import init_from
    from lfm_jax.engine.config import EngineConfig
    from lfm_jax.engine.engine import Engine
    from lfm_jax.model import abstract_model
    from lfm_jax.post.config import tuned_model

    config = tuned_model(str(args.model)).replace(dtype=dtype)
    weights = jax.tree.map(jax.numpy.asarray, init_from.weights(str(args.model), config))
    shape = EngineConfig(slots=((args.slots, args.seq_len),), max_logprobs=1, logprobs_of="sampled",
                         max_stop_ids=len(stop_ids) or 1)
    return Engine(nnx.merge(abstract_model(config)[0], weights), shape), weights


def sampled(args: argparse.Namespace, of: Any, prompts: Prompts, stop_ids: Sequence[int], seed: int) -> list[list[Any]]:
    """The engine's answers to each prompt."""
    from lfm_jax.engine.request import Request
    from lfm_jax.sampling import Sampling

    return of.complete([
        Request(prompt=prompt, max_new_tokens=args.max_new_tokens, n=args.generations, logprobs=0, stop_ids=stop_ids,
                sampling=Sampling(temperature=1.0, seed=10_000 * seed + 100 * place))
        for place, prompt in enumerate(prompts)])


def ours(args: argparse.Namespace, chat: Chat, dtype: str) -> Rollout:
    made, weights = engine(args, chat.stop_ids, dtype)

    def rollout(prompts: Prompts, seed: int) -> tuple[list[int], int]:
        made.use(weights)
        answers = [each for group in sampled(args, made, prompts, chat.stop_ids, seed) for each in group]
        return [len(answer.tokens) for answer in answers], sum(answer.finish == "length" for answer in answers)

    return rollout


def torch_model(args: argparse.Namespace, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    where = {"pretrained_model_name_or_path": args.model} if args.model.is_dir() else {
        "pretrained_model_name_or_path": args.model.parent, "gguf_file": args.model.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=getattr(torch, dtype)).eval()


def generated(
    args: argparse.Namespace, model: Any, prompts: Prompts, chat: Chat, seed: int, **options: Any
) -> tuple[Any, Any, list[int]]:
    """Of all answers of `transformers` in one batch: ids with those of the prompts, the mask of these, and how many
    tokens were sampled of each."""
    import torch

    torch.manual_seed(seed)
    longest = max(map(len, prompts))
    ids = torch.tensor([[chat.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        num_return_sequences=args.generations, max_new_tokens=args.max_new_tokens, use_cache=True,
        eos_token_id=list(chat.stop_ids), pad_token_id=chat.pad_id, **options)
    lengths = []
    for row in found[:, longest:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in chat.stop_ids), len(row))
        lengths.append(end)
    return found, mask.repeat_interleave(args.generations, dim=0), lengths


def theirs(args: argparse.Namespace, chat: Chat, dtype: str) -> Rollout:
    model = torch_model(args, dtype)

    def rollout(prompts: Prompts, seed: int) -> tuple[list[int], int]:
        found, mask, lengths = generated(args, model, prompts, chat, seed)
        ends = [row[mask.shape[1] + n - 1].item() for row, n in zip(found, lengths, strict=True)]
        return lengths, sum(end not in chat.stop_ids for end in ends)

    return rollout


# -------------------------------------------------------------------- the table


def table(rows: list[dict[str, Any]]) -> str:
    """Medians over rollouts; ratios are of pairs of the same prompts."""
    lines = ["| dtype | side | rollouts | tokens/s: median (least to most) | answers/s | tokens an answer | cut off | "
             "tokens/s, times as many | answers/s, times as many |", "|---" * 9 + "|"]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        rate = {(side, what): [row[what] / row["seconds"] for row in sorted(rows, key=lambda row: row["rollout"])
                               if (row["side"], row["dtype"]) == (side, dtype)]
                for side in SIDES for what in ("tokens", "answers")}
        for side in SIDES:
            some = [row for row in rows if (row["side"], row["dtype"]) == (side, dtype)]
            answers, tokens = sum(row["answers"] for row in some), rate[side, "tokens"]
            ratios = ["", ""] if side != SIDES[0] else [
                f"{statistics.median(a / b for a, b in zip(*(rate[each, what] for each in SIDES), strict=True)):.2f}"
                for what in ("tokens", "answers")]
            lines.append(" | ".join([
                f"| {dtype}", side, str(len(some)),
                f"{statistics.median(tokens):,.0f} ({min(tokens):,.0f} to {max(tokens):,.0f})",
                f"{statistics.median(rate[side, 'answers']):.2f}",
                f"{sum(row['tokens'] for row in some) / answers:.1f}",
                f"{sum(row['cut'] for row in some) / answers:.0%}", *ratios]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
