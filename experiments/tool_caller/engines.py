"""The same held-out dialogues through every engine: are the calls the same, and if not, why?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import serving
from lm_eval.api.instance import Instance

import lfm_jax as lfm
from lfm_jax.cli.inference import load_chat
from lfm_jax.eval.answers import keep_answers
from lfm_jax.eval.benchmarks.tool_calls import MAX_GEN_TOKS
from lfm_jax.eval.run import of_model
from lfm_jax.files import say
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.text.chat import turn_stop_ids
from lfm_jax.text.codec import encoded
from lfm_jax.text.tools import parse_tool_calls
from tool_caller import other_engines
from tool_caller.config import Life
from tool_caller.measure import CONSTRAINED, PLAIN

NEAR_TIE, ROUNDED = 0.01, 1.0
"""Nats between the two tokens at which answers part, by our float32 logits."""
OPTIONS = {"until": [], "do_sample": False, "max_gen_toks": MAX_GEN_TOKS, "skip_special_tokens": False}
"""Those of the task `tool_calls`."""
OTHER_PROMPT = "the prompt has other ids"
TIE = f"a near tie: less than {NEAR_TIE} nats between the two tokens"
ACTIVATIONS = f"llama.cpp rounds activations to 8 bits: less than {ROUNDED:g} nat between the two tokens"
WEIGHTS = f"the weights are rounded: less than {ROUNDED:g} nat between the two tokens"
BOTH = f"the weights are rounded, and activations by llama.cpp: less than {ROUNDED:g} nat between the two tokens"
UNEXPLAINED = "unexplained"


class Asked(NamedTuple):
    """A turn, and what our engine called in it."""

    prompt: str
    """As the chat template writes it."""
    doc: dict[str, Any]
    text: str
    """Our answer, special tokens in it."""

    def calls(self, text: str) -> list[Any]:
        return [[call.name, call.arguments] for call in parse_tool_calls(text, self.doc["tools"])[1]]


class Weights(NamedTuple):
    """One set of weights in all its forms."""

    name: str
    model: Path
    """The run, whose answers are kept in its measurement."""
    measured: Path
    hugging_face: Path
    whole: Path
    """GGUF in float32."""
    blocks: Path
    """GGUF in blocks, with the same numbers to their rounding."""
    exact: bool
    """The blocks hold the numbers of the run."""


def asked(measured: Path, most: int, form: str = PLAIN) -> dict[str, Asked]:
    """The first turns of both kinds, `most` of each, with the answers of our engine, free or held to a grammar."""
    found = {}
    for kind in ("seen", "unseen"):
        lines = (measured / form / f"samples_tool_calls_{kind}.jsonl").read_bytes().splitlines()
        rows = sorted((json.loads(line) for line in lines), key=lambda row: row["doc_id"])
        for row in rows[:most]:
            prompt = row["arguments"]["gen_args_0"]["arg_0"]
            found[f"{kind}-{row['doc_id']}"] = Asked(prompt, row["doc"], row["resps"][0][0])
    return found


def same_calls(life: Life, weights: Weights, out: Path) -> list[dict[str, Any]]:
    """A row for each engine and file beside our engine on the run: turns, equal calls, exceptions by name."""
    out.mkdir(parents=True, exist_ok=True)
    questions = asked(weights.measured, life.equal_documents)
    judge = _Judge(weights.model)
    rows = [_ours(life, weights, questions, judge, out)]
    cases: list[tuple[str, str, Path, str | None]] = [("transformers", sys.executable, weights.hugging_face, None)]
    if life.llama_cpp:
        cases += [("llama.cpp", life.llama_cpp, weights.whole, None),
                  ("llama.cpp", life.llama_cpp, weights.blocks, ACTIVATIONS if weights.exact else BOTH)]
    for engine, python, path, rounding in cases:
        say(f"{engine} answers from {path.name}", who="tool_caller")
        answers = _others(engine, python, path, questions, judge, out)
        if answers is None:
            say(f"{engine} is not installed for {python}: left out", who="tool_caller")
            continue
        rows.append({"weights": weights.name, "engine": engine, "file": path.name,
                     **judge.compare(questions, answers, rounding)})
    return rows


def _ours(
    life: Life, weights: Weights, questions: Mapping[str, Asked], judge: _Judge, out: Path
) -> dict[str, Any]:
    """Our engine from the GGUF file in blocks, whose weights it widens."""
    say(f"our engine answers from {weights.blocks.name}", who="tool_caller")
    subject = of_model(*load_chat(str(weights.blocks), None), name=weights.blocks.name, slots=life.slots)
    with keep_answers(out / f"ours-{weights.blocks.stem}.jsonl", subject.of) as answers:
        subject.lm.answers = answers
        texts = subject.lm.generate_until([Instance("generate_until", each.doc, (each.prompt, OPTIONS), 0)
                                           for each in questions.values()])
    ours = {key: {"prompt": judge.ids(each.prompt), "ids": [*judge.ids(text), judge.stop_ids[0]]}
            for (key, each), text in zip(questions.items(), texts, strict=True)}
    return {"weights": weights.name, "engine": "lfm_jax", "file": weights.blocks.name,
            **judge.compare(questions, ours, None if weights.exact else WEIGHTS)}


class _Judge:
    """Compares answers with ours by calls, and says why they differ."""

    def __init__(self, model: Path):
        self.model, tokenizer = lfm.load(model)
        assert tokenizer is not None  # A run has one.
        self.tokenizer = tokenizer
        self.stop_ids = turn_stop_ids(tokenizer, self.model.config)

    def ids(self, text: str) -> list[int]:
        return encoded(self.tokenizer, text, add_special_tokens=False).ids

    def compare(
        self, questions: Mapping[str, Asked], answers: Mapping[str, dict[str, Any]], rounding: str | None
    ) -> dict[str, Any]:
        """Turns, equal calls and texts, and exceptions by name.

        Args:
          rounding: what the other engine rounds. None: both compute with the same float32 weights, so that nothing but
            a tie is an excuse.
        """
        equal = texts = 0
        named: Counter[str] = Counter()
        for key, each in questions.items():
            prompt, ids = answers[key]["prompt"], answers[key]["ids"]
            text = self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=False)
            texts += text == each.text
            if each.calls(text) == each.calls(each.text):
                equal += 1
            elif prompt != self.ids(each.prompt):
                named[OTHER_PROMPT] += 1
            else:
                named[self._why(prompt, ids, rounding)] += 1
        return {"turns": len(questions), "equal": equal, "equal_texts": texts, "exceptions": dict(named)}

    def _why(self, prompt: Sequence[int], theirs: Sequence[int], rounding: str | None) -> str:
        (ours,) = generate_tokens(self.model, [prompt], max_new_tokens=MAX_GEN_TOKS, stop_ids=self.stop_ids)
        at = next((i for i, pair in enumerate(zip(ours.tokens, theirs, strict=False)) if pair[0] != pair[1]), None)
        if at is None:
            return UNEXPLAINED
        whole = jnp.asarray([[*prompt, *ours.tokens[:at]]])
        logits_V = self.model(whole, logits="last")[0].reshape(-1)
        margin = float(logits_V[ours.tokens[at]] - logits_V[theirs[at]])
        if margin < NEAR_TIE:
            return TIE
        return rounding if rounding and margin < ROUNDED else UNEXPLAINED


def _others(
    engine: str, python: str, model: Path, questions: Mapping[str, Asked], judge: _Judge, out: Path
) -> dict[str, dict[str, Any]] | None:
    """The answers of another engine; what a killed process has answered is not asked again. None: not installed."""
    kept = out / f"{engine}-{model.stem}.jsonl"

    def answers() -> dict[str, dict[str, Any]]:
        lines = kept.read_text(encoding="utf-8").split("\n")[:-1] if kept.exists() else []  # The last may be cut.
        return {row["key"]: row for row in map(json.loads, lines)}

    found = answers()
    if kept.exists():
        kept.write_text("".join(json.dumps(row) + "\n" for row in found.values()), encoding="utf-8")
    left = {key: each.prompt for key, each in questions.items() if key not in found}
    if left:
        longest = max(len(judge.ids(each.prompt)) for each in questions.values()) + MAX_GEN_TOKS
        request = {"prompts": left, "stop": judge.stop_ids, "most": MAX_GEN_TOKS, "length": longest}
        command = [python, other_engines.__file__, engine, str(model), str(kept)]
        # Nothing is fetched: the model is a directory.
        status = subprocess.run(command, input=json.dumps(request), text=True,
                                env=os.environ | {"HF_HUB_OFFLINE": "1"}).returncode
        if status == other_engines.MISSING:
            return None
        if status:
            raise ValueError(f"{engine} ended with status {status} on {model}; what it said stands above")
    return answers()


def served(life: Life, blocks: Path, measured: Path, scratch: Path) -> dict[str, Any]:
    """Our server on a GGUF file: the calls of its answers, which follow a grammar, beside those of `lfm eval`."""
    scratch.mkdir(parents=True, exist_ok=True)
    questions = asked(measured, life.served_documents, CONSTRAINED).values()
    say(f"lfm serve answers from {blocks.name}", who="tool_caller")
    equal = 0
    with serving.serving(blocks, scratch) as server:
        for each in questions:
            body = {"model": blocks.stem, "messages": [_as_sent(message) for message in each.doc["messages"]],
                    "tools": [{"type": "function", "function": tool} for tool in each.doc["tools"]],
                    "temperature": 0, "repetition_penalty": 1, "max_tokens": MAX_GEN_TOKS}
            message = server.post("/v1/chat/completions", body)["choices"][0]["message"]
            calls = [[call["function"]["name"], json.loads(call["function"]["arguments"])]
                     for call in message.get("tool_calls") or ()]
            equal += calls == each.calls(each.text)
    return {"turns": len(questions), "equal": equal}


def _as_sent(message: dict[str, Any]) -> dict[str, Any]:
    """A message in OpenAI's form, in which the arguments of a call are text."""
    calls = [{**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
             for call in message.get("tool_calls") or ()]
    return message | ({"tool_calls": calls} if calls else {})
