"""What is measured of each arm, document by document: text, needle and recall, tasks of lm-eval, and costs.

Dimensions: B rows, T time.
"""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from lfm_jax.ablate.cost import measure_cost
from lfm_jax.ablate.hybrid import passages
from lfm_jax.ablate.hybrid.study import HybridStudy
from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.kernels.logprobs import token_scores
from lfm_jax.model import LFM
from lfm_jax.train.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from lfm_jax.eval.long_context import Text

KINDS = {"needle": "needle", "recall": "needle_keys"}
"""What is asked at each length, and what `eval.long_context` calls it: one number told in a text, or one of eight."""
BATCH_TOKENS = 2048
"""Of one call of the model."""
LINE = 60
"""Characters of a line of what needles are hidden in: a dozen tokens, so that they stand at the depths they should."""


class Scorer:
    """Log-probabilities of given texts by a model; whole rows of few lengths, so that few programs are compiled."""

    def __init__(self, model: LFM, lengths: Sequence[int]):
        self._graphdef, self._params = nnx.split(model, nnx.Param)
        self._lengths = sorted(lengths)

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each row, for its second token and all after: (log-probability, whether it is the likeliest)."""
        found: list[Any] = [None] * len(rows)
        of_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            of_length.setdefault(next(n for n in self._lengths if n >= len(row) - 1), []).append(i)
        for T, some in of_length.items():
            B = max(1, BATCH_TOKENS // T)
            for first in range(0, len(some), B):
                part = some[first : first + B]
                tokens, targets = np.zeros((B, T), np.int32), np.full((B, T), LOSS_IGNORE, np.int32)
                segments = np.zeros((B, T), np.int32)
                for b, i in enumerate(part):
                    n = len(rows[i]) - 1
                    tokens[b, :n], targets[b, :n], segments[b, :n] = rows[i][:-1], rows[i][1:], 1
                logprobs, likeliest = jax.device_get(_scores(self._graphdef, self._params, tokens, targets, segments))
                for b, i in enumerate(part):
                    n = len(rows[i]) - 1
                    found[i] = (logprobs[b, :n], likeliest[b, :n] == targets[b, :n])
        return found


@partial(jax.jit, static_argnames="graphdef")
def _scores(graphdef: Any, params: Any, tokens_BT: Any, targets_BT: Any, segment_ids_BT: Any) -> Any:
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(tokens_BT, None, segment_ids_BT, logits=None, padding="right")
    return tuple(token_scores(hidden_BTD, model.head_VD, targets_BT))


def text_documents(study: HybridStudy, tokenizer: Tokenizer) -> dict[str, list[list[int]]]:
    """Documents by kind of text: passages of held-out books, and the beginnings of others, of at most T + 1 tokens."""
    held = passages.Books(Path(study.books), study.heldout_books).heldout
    found = passages.drawn(held, tokenizer, study.seq_len, f"{study.seed} measured")
    rows = {"books": [next(found)[1] for _ in range(study.text_documents)]}
    for path in map(Path, study.texts):
        beginnings = (tokenizer.encode(text, add_special_tokens=False).ids[: study.seq_len + 1]
                      for text in passages.documents(path))
        rows[path.stem] = [*itertools.islice((ids for ids in beginnings if len(ids) > 1), study.text_documents)]
    return rows


def measure_text(study: HybridStudy, model: LFM, documents: Mapping[str, list[list[int]]]) -> dict[str, Any]:
    """Nats and predicted tokens of each document, by kind of text."""
    score = Scorer(model, [study.seq_len // 2, study.seq_len])  # Most documents of other kinds are short.
    found = {kind: score(rows) for kind, rows in documents.items()}
    return {kind: {"nats": [float(-logprobs.sum()) for logprobs, _ in of], "tokens": [len(x) for x, _ in of]}
            for kind, of in found.items()}


def haystack(path: Path) -> str:
    """What needles are hidden in: documents in short lines. Of whole paragraphs few would fit into a short context, or
    none.

    Raises:
      ValueError: the file cannot be read, or has too little text.
    """
    from lfm_jax.eval.long_context import Text

    lines = "\n".join(line for text in passages.documents(path) for line in textwrap.wrap(text, LINE))
    Text(lines, str(path))  # Refuses what is too little, before anything is trained.
    return lines


def measure_recall(study: HybridStudy, model: LFM, tokenizer: Tokenizer, text: Text) -> dict[str, Any]:
    """Of each kind and length, document by document: whether the number that is asked for is what greedy decoding would
    write, and its nats.

    One pass over prompt and answer tells: an answer is decoded greedily if each of its tokens is the likeliest after
    those before it.
    """
    from lfm_jax.eval.long_context import documents

    score, found = Scorer(model, study.lengths), {}

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for name, kind in KINDS.items():
        found[name] = {}
        for length in study.lengths:
            docs = documents(kind, length, study.recall_documents, text, lambda prompt: len(ids(prompt)), study.seed)
            answers = [ids(f" {doc.wanted[0]}") for doc in docs]
            scored = score([ids(doc.prompt) + answer for doc, answer in zip(docs, answers, strict=True)])
            ends = [(x[-len(answer) :], hit[-len(answer) :]) for (x, hit), answer in zip(scored, answers, strict=True)]
            found[name][str(length)] = {"right": [bool(hit.all()) for _, hit in ends],
                                        "nats": [float(-logprobs.sum()) for logprobs, _ in ends]}
    return found


def measure_tasks(study: HybridStudy, model: LFM, tokenizer: Tokenizer, out: Path) -> dict[str, list[float]]:
    """Whether each document of each task is right, by `lfm eval`'s own machinery; of several scores acc_norm."""
    if not study.tasks:
        return {}
    from lfm_jax.eval.run import evaluate, of_model

    data = None if study.tasks_data is None else Path(study.tasks_data)
    evaluate(of_model(model, tokenizer, None, name=out.parent.name), study.tasks, out, data=data,
             limit=study.tasks_documents)
    found = {}
    for task in study.tasks:
        lines = [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_bytes().splitlines()]
        lines.sort(key=lambda row: row["doc_id"])
        found[task] = [float(row["acc_norm"] if "acc_norm" in row else row["acc"]) for row in lines]
    return found


def measured_cost(study: HybridStudy, config: ModelConfig, base: ModelConfig) -> dict[str, Any]:
    """`ablate.cost.measure_cost` of a model beside the original."""
    return measure_cost(
        config, base, train_shape=(1, study.seq_len), optimizer=OptimizerConfig(), contexts=study.cost_contexts,
        prefill_length=min(1024, config.max_position), repeats=3,
    )
