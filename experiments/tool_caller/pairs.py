"""Preferences from the model's own answers: sampled on training dialogues, judged by the verifier, paired."""

from __future__ import annotations

import itertools
import json
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
from tool_caller.config import Life
from tool_caller.prepare import SPECIAL

MOST = 128
"""Tokens of an answer."""
AT_ONCE = 32
"""Turns whose answers are sampled at a time; between them is a look at the clock."""
OWN = ("chosen is sampled", "chosen is the reference")


def make_pairs(life: Life, model: Path, out: Path) -> dict[str, Any]:
    """Writes `out/pairs.jsonl`, and returns what was found. Answers are kept in `out/answers.jsonl` as they come.

    A turn with a wrong answer gives a pair: a right answer, or else the call of the dialogue, above the wrong one.
    """
    out.mkdir(parents=True, exist_ok=True)
    subject = of_model(*load_chat(str(model), None), name=str(model), slots=life.slots, seed=life.seed)
    task = ToolCalls(life.data / "asked.jsonl")
    documents = task.test_docs()
    options = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": MOST, "skip_special_tokens": False}
    pairs, right, asked = [], 0, 0
    ends = time.monotonic() + 60 * life.minutes.pairs
    with keep_answers(out / "answers.jsonl", {**subject.of, "sampling": options}) as answers:
        subject.lm.answers = answers
        subject.lm.silent = True
        for some in itertools.batched(documents, AT_ONCE):
            contexts = [task.fewshot_context(doc, 0, chat_template=subject.lm.apply_chat_template) for doc in some]
            texts = iter(subject.lm.generate_until([
                Instance("generate_until", doc, (context, options), 0)
                for doc, context in zip(some, contexts, strict=True) for _ in range(life.samples)]))
            for doc in some:
                judged = [(text, tool_call(text, {"tool_calls": doc["calls"], "tools": doc["tools"]}))
                          for text in itertools.islice(texts, life.samples)]
                right += sum(worth == 1 for _, worth in judged)
                pairs += _pair(doc, judged)
            asked += len(some)
            say(f"pairs: {asked:,} of {len(documents):,} turns asked, {right / asked / life.samples:.1%} of answers "
                f"right, {len(pairs):,} pairs", who="tool_caller")
            if time.monotonic() > ends or (life.steps and pairs):
                break
    if not pairs:
        raise ValueError(f"answers to {asked} turns gave no pair of a right and a wrong one; raise minutes.pairs or "
                         "samples")
    write_whole(out / "pairs.jsonl", "".join(json.dumps(pair["line"], ensure_ascii=False) + "\n" for pair in pairs))
    return {"turns": asked, "answers": asked * life.samples, "right": right, "pairs": len(pairs),
            **{name: sum(pair["of"] == name for pair in pairs) for name in OWN}}


def _pair(doc: dict[str, Any], judged: list[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """The pair of a turn, if it gives one."""
    good, bad = ([_message(doc, text) for text, worth in judged if worth == wanted] for wanted in (1, 0))
    reference = [{"role": "assistant", "tool_calls": _calls(doc["calls"])}] if doc["calls"] else []
    chosen = next(iter([*filter(None, good), *reference]), None)
    rejected = next((message for message in bad if message is not None and message != chosen), None)
    if chosen is not None and rejected is not None:
        line = {"prompt": doc["messages"], "tools": doc["tools"], "chosen": [chosen], "rejected": [rejected]}
        yield {"line": line, "of": OWN[chosen in reference]}


def _message(doc: dict[str, Any], text: str) -> dict[str, Any] | None:
    """An answer as a message, without marks that no chat may hold; None where nothing is in it."""
    content, calls = parse_tool_calls(text, doc["tools"])
    content = SPECIAL.sub("", content)
    # What is left may be a mark anew, and a call of what was none.
    if not (calls or content.strip()) or SPECIAL.search(f"{content}{calls}"):
        return None
    made = _calls([{"name": call.name, "arguments": call.arguments} for call in calls])
    return {"role": "assistant", **({"content": content} if content.strip() else {}),
            **({"tool_calls": made} if made else {})}


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"call_{i}", "type": "function",
             "function": {"name": call["name"], "arguments": call["arguments"]}} for i, call in enumerate(calls)]
