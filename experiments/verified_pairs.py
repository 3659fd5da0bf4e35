"""Makes preferences of a model's own answers: sampled on turns of chats with tools, judged by the verifier, paired.

    python experiments/verified_pairs.py MODEL CHATS.jsonl OUT [--samples 4] [--minutes 20] [--slots 32] [--seed 0]
        [--dtype bfloat16] [--all]

CHATS has chats with tools as `lfm tune` takes them. Their turns are asked as the task `tool_calls` of `lfm eval` asks
them, until the time is up, and OUT gets pairs.jsonl for `method: dpo`: of each turn with a wrong answer a right one, or
else the call of the chat, above the wrong one. As many of them put a call above a text as a text above a call, and the
others are left out unless --all is given: of a model that seldom calls where it should not, most pairs would say that a
call is better, and it would learn to call always (docs/measurements/post_training.md). Answers are kept in
OUT/answers.jsonl as they come; started again it asks for none twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance

from lfm_jax.cli.inference import load_chat
from lfm_jax.eval.answers import keep_answers
from lfm_jax.eval.benchmarks.tool_calls import ToolCalls
from lfm_jax.eval.run import of_model
from lfm_jax.files import say, write_whole
from lfm_jax.post.rewards import tool_call
from lfm_jax.text.tools import parse_tool_calls

MOST = 128
"""Tokens of an answer."""
AT_ONCE = 32
"""Turns whose answers are sampled at a time; between them is a look at the clock."""
OWN = ("chosen is sampled", "chosen is the reference")


def main(argv: list[str]) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model")
    flags.add_argument("chats", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("--samples", type=int, default=4)
    flags.add_argument("--minutes", type=float, default=20)
    flags.add_argument("--slots", type=int, default=32)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--dtype", choices=["float32", "bfloat16"])
    flags.add_argument("--all", action="store_true")
    args = flags.parse_args(argv)
    print(json.dumps(make_pairs(args.model, args.chats, args.out, samples=args.samples, minutes=args.minutes,
                                slots=args.slots, seed=args.seed, dtype=args.dtype, all_ways=args.all)))
    return 0


def make_pairs(
    model: str, chats: Path, out: Path, *, samples: int, minutes: float, slots: int, seed: int,
    dtype: str | None = None, all_ways: bool = False, most: int | None = None,
) -> dict[str, Any]:
    """Writes `out/pairs.jsonl`, and returns what was found.

    Args:
      samples: answers to each turn.
      all_ways: whether pairs that are not balanced stay too.
      most: it ends once there are so many pairs.

    Raises:
      ValueError: there are no pairs, or see `load_chat`, `ToolCalls` and `keep_answers`.
    """
    out.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer, template = load_chat(model, dtype)
    subject = of_model(loaded, tokenizer, template, name=model, slots=slots, seed=seed)
    special = re.compile("|".join(re.escape(token.content) for token in tokenizer.get_added_tokens_decoder().values()
                                  if token.special))
    task = ToolCalls(chats)
    documents = task.test_docs()
    options = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": MOST, "skip_special_tokens": False}
    found, pairs, right, asked = [], [], 0, 0
    ends = time.monotonic() + 60 * minutes
    with keep_answers(out / "answers.jsonl", {**subject.of, "sampling": options}) as answers:
        subject.lm.answers = answers
        subject.lm.silent = True
        for some in itertools.batched(documents, AT_ONCE):
            contexts = [task.fewshot_context(doc, 0, chat_template=subject.lm.apply_chat_template) for doc in some]
            texts = iter(subject.lm.generate_until([
                Instance("generate_until", doc, (context, options), 0)
                for doc, context in zip(some, contexts, strict=True) for _ in range(samples)]))
            for doc in some:
                judged = [(text, tool_call(text, {"tool_calls": doc["calls"], "tools": doc["tools"]}))
                          for text in itertools.islice(texts, samples)]
                right += sum(worth == 1 for _, worth in judged)
                found += _pair(doc, judged, special)
            asked += len(some)
            pairs = found if all_ways else balanced(found)
            say(f"{asked:,} of {len(documents):,} turns asked, {right / asked / samples:.1%} of answers right, "
                f"{len(pairs):,} pairs", who="pairs")
            if time.monotonic() > ends or (most is not None and len(pairs) >= most):
                break
    if not pairs:
        raise ValueError(f"answers to {asked} turns gave {len(found)} pairs of a right and a wrong one, and none that "
                         "are balanced; raise minutes or samples")
    write_whole(out / "pairs.jsonl", "".join(json.dumps(pair["line"], ensure_ascii=False) + "\n" for pair in pairs))
    return {"turns": asked, "answers": asked * samples, "right": right, "pairs": len(pairs),
            "left out": len(found) - len(pairs), **{name: sum(pair["of"] == name for pair in pairs) for name in OWN}}


def balanced(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pairs of two calls, or of two texts, and as many with a call above a text as with a text above a call: the first
    ones."""
    # 1: a call above a text; -1: a text above a call.
    ways = [("tool_calls" in pair["line"]["chosen"][0]) - ("tool_calls" in pair["line"]["rejected"][0])
            for pair in pairs]
    left = dict.fromkeys((1, -1), min(ways.count(1), ways.count(-1)))
    kept = []
    for pair, way in zip(pairs, ways, strict=True):
        if way and not left[way]:
            continue
        kept.append(pair)
        if way:
            left[way] -= 1
    return kept


def _pair(doc: dict[str, Any], judged: list[tuple[str, float]], special: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """The pair of a turn, if it gives one."""
    good, bad = ([_message(doc, text, special) for text, worth in judged if worth == wanted] for wanted in (1, 0))
    reference = [{"role": "assistant", "tool_calls": _calls(doc["calls"])}] if doc["calls"] else []
    chosen = next(iter([*filter(None, good), *reference]), None)
    rejected = next((message for message in bad if message is not None and message != chosen), None)
    if chosen is not None and rejected is not None:
        line = {"prompt": doc["messages"], "tools": doc["tools"], "chosen": [chosen], "rejected": [rejected]}
        yield {"line": line, "of": OWN[chosen in reference]}


def _message(doc: dict[str, Any], text: str, special: re.Pattern[str]) -> dict[str, Any] | None:
    """An answer as a message, without marks that no chat may hold; None where nothing is in it."""
    content, calls = parse_tool_calls(text, doc["tools"])
    content = special.sub("", content)
    # What is left may be a mark anew, and a call of what was none.
    if not (calls or content.strip()) or special.search(f"{content}{calls}"):
        return None
    made = _calls([{"name": call.name, "arguments": call.arguments} for call in calls])
    return {"role": "assistant", **({"content": content} if content.strip() else {}),
            **({"tool_calls": made} if made else {})}


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"call_{i}", "type": "function",
             "function": {"name": call["name"], "arguments": call["arguments"]}} for i, call in enumerate(calls)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
