"""Extracts data that fits a schema from texts, and classifies texts by labels.

Dimensions: B texts of a batch, L labels, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import LOGITS_NOT_FINITE, Request
from lfm_jax.infer.decoding import bucket, chunks
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.model import LFM
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.state import State
from lfm_jax.text.chat import encode_chat, reply_stage, turn_stop_ids
from lfm_jax.text.codec import check_tokenizer, encoded
from lfm_jax.text.thoughts import Stage, ThoughtLimit, split_thought, thinking

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXTRACTION = "Extract what the JSON schema asks for from the user's text. Answer with JSON only. Schema: {schema}"
CLASSIFICATION = "Which of these labels fits the user's text? {labels}. Answer with the label only."
SLOTS = 8
"""Texts that `extract` runs at a time."""
CHUNK = 256
"""Tokens of a prompt that go through the model at a time."""
ROWS = 32
"""Pairs of text and label in one batch of `classify`."""


class DataModel(Protocol):
    """A class of pydantic, as far as `extract` knows it."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...

    @classmethod
    def model_validate(cls, obj: Any) -> Self: ...


@overload
def extract[M: DataModel](
    model: LFM, tokenizer: Tokenizer, text: str, schema: type[M], *, template: str | None = None,
    instruction: str = EXTRACTION, sampling: Sampling = GREEDY, max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None, plain_contents: bool = True,
) -> M: ...


@overload
def extract[M: DataModel](
    model: LFM, tokenizer: Tokenizer, text: Sequence[str], schema: type[M], *, template: str | None = None,
    instruction: str = EXTRACTION, sampling: Sampling = GREEDY, max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None, plain_contents: bool = True,
) -> list[M]: ...


@overload
def extract(
    model: LFM, tokenizer: Tokenizer, text: str, schema: Mapping[str, Any], *, template: str | None = None,
    instruction: str = EXTRACTION, sampling: Sampling = GREEDY, max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None, plain_contents: bool = True,
) -> Any: ...


@overload
def extract(
    model: LFM, tokenizer: Tokenizer, text: Sequence[str], schema: Mapping[str, Any], *, template: str | None = None,
    instruction: str = EXTRACTION, sampling: Sampling = GREEDY, max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None, plain_contents: bool = True,
) -> list[Any]: ...


def extract(
    model: LFM, tokenizer: Tokenizer, text: str | Sequence[str], schema: Mapping[str, Any] | type[DataModel], *,
    template: str | None = None, instruction: str = EXTRACTION, sampling: Sampling = GREEDY, max_new_tokens: int = 512,
    max_thinking_tokens: int | None = None, plain_contents: bool = True,
) -> Any:
    """Extracts data that fits a JSON schema from a text. Needs the extra `lfm_jax[grammar]`.

    Every token is chosen among those that the schema allows, so that even a bad model returns valid data.

    Args:
      model, tokenizer: as `lfm.load` gives them.
      text: one, or several.
      schema: what is wanted, as a JSON schema or a class of pydantic. Texts and lists without a limit of their own get
        one (`json_schema.Bounds`).
      template: chat template (`lfm.convert.hf.chat_template`); None means DEFAULT_TEMPLATE.
      instruction: the system's message; `{schema}` in it stands for the schema.
      sampling: how tokens are chosen.
      max_new_tokens: of the JSON, and of the thought before it where the model has one.
      max_thinking_tokens: after so many tokens a thought is closed; 0: none is begun. None: no limit of its own.
      plain_contents: the names of special tokens in a text are text like any other (see `chat.encode_chat`).

    Returns:
      The data of a text, an instance where the schema is a class; or a list of them.

    Raises:
      ValueError: arguments of another type; a schema that is not supported (`GrammarError`); an answer that
        max_new_tokens does not hold, data that the class refuses, a text too long for the model, or logits that are not
        finite, with the number of the text.
    """
    from lfm_jax.structured.grammar import Grammar, grammar_tokenizer

    texts, (wanted, read) = _texts("text", text), _wanted(schema)
    check_tokenizer(tokenizer, model.config)
    stop_ids = _stop_ids(model, tokenizer)
    constraint, how = Grammar.json_schema(wanted), thinking(tokenizer, template)
    follow = grammar_tokenizer(tokenizer, model.config.vocab_size, stop_ids)
    if not texts:
        return []
    system = instruction.replace("{schema}", json.dumps(wanted, ensure_ascii=False))
    prompts = [_prompt(model, tokenizer, template, system, each, plain_contents) for each in texts]
    _check_lengths(model, prompts, max_new_tokens)
    length = min(bucket(max(map(len, prompts)) + max_new_tokens), model.config.max_position)
    config = EngineConfig(slots=((min(SLOTS, max(2, len(texts))), length),), chunk=CHUNK,
                          prefix_cache_bytes=2 * model.config.state_bytes(length))
    # The template opens each reply in the same way.
    begin: Stage = reply_stage(tokenizer, how, prompts[0])
    may_think = how is not None and not (begin == "start" and max_thinking_tokens == 0)
    grammar = follow.matcher(constraint.after_thought(how, begin) if may_think else constraint)
    if may_think and max_thinking_tokens is not None:
        grammar.limit = ThoughtLimit(tokenizer, how, begin, max_thinking_tokens)
    requests = [
        Request(prompt=prompt, max_new_tokens=max_new_tokens, sampling=sampling, stop_ids=stop_ids, grammar=grammar)
        for prompt in prompts
    ]
    results = []
    for number, [answer] in enumerate(Engine(model, config).complete(requests)):
        if answer.reason is not None:
            raise ValueError(f"the answer for text {number} cannot be finished: {answer.reason}")
        if answer.finish != "stop":
            raise ValueError(f"the answer for text {number} needs more than max_new_tokens {max_new_tokens}; raise it, "
                             "bound the schema (maxLength, maxItems), or set max_thinking_tokens if the model thinks")
        reply = tokenizer.decode([i for i in answer.tokens if i not in stop_ids], skip_special_tokens=False)
        data = json.loads(split_thought(reply, begin).answer)
        try:
            results.append(read(data))
        except ValueError as error:
            raise ValueError(f"the data for text {number} is refused by its class: {error}") from error
    return results[0] if isinstance(text, str) else results


def _texts(name: str, given: Any) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(f"{name} is {given!r:.60}; expected a text or a list of texts")
    wrong = next((i for i, each in enumerate(given) if not isinstance(each, str)), None)
    if wrong is not None:
        raise ValueError(f"{name}[{wrong}] is {given[wrong]!r:.60}; expected a text")
    return list(given)


def _wanted(schema: Any) -> tuple[Mapping[str, Any], Callable[[Any], Any]]:
    """A JSON schema, and what makes of data that fits it what the caller wants."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema") and hasattr(schema, "model_validate"):
        model: Any = schema
        return model.model_json_schema(), model.model_validate
    if not isinstance(schema, Mapping):
        raise ValueError(f"schema is {schema!r:.60}; expected a JSON schema (a dict) or a class of pydantic")
    return schema, lambda data: data


def _stop_ids(model: LFM, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = turn_stop_ids(tokenizer, model.config)
    if not ids:
        raise ValueError("the model has no eos_ids and the tokenizer no <|im_end|>: nothing can end an answer")
    return ids


def _prompt(
    model: LFM, tokenizer: Tokenizer, template: str | None, system: str, text: str, plain_contents: bool
) -> list[int]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
    return encode_chat(tokenizer, model.config, template, messages, plain_contents=plain_contents)


def _check_lengths(model: LFM, prompts: Sequence[Sequence[int]], more: int) -> None:
    most = model.config.max_position
    long = [i for i, prompt in enumerate(prompts) if len(prompt) + more > most]
    if long:
        raise ValueError(f"texts {long[:5]} take {len(prompts[long[0]])} tokens, with {more} for the answer more than "
                         f"the model's max_position {most}; cut them")


def classify(
    model: LFM, tokenizer: Tokenizer, texts: str | Sequence[str], labels: Sequence[str], *,
    template: str | None = None, instruction: str = CLASSIFICATION, plain_contents: bool = True,
) -> Any:
    """Computes the probability of each label as the whole answer, among these labels.

    It is the model's probability of the label's tokens and the end of the turn, divided by the sum over all labels. The
    common beginning of all prompts goes through the model once, then each text once, then all labels side by side.

    Args:
      model, tokenizer, template, plain_contents: as for `extract`.
      texts: one, or several.
      labels: at least two different ones.
      instruction: the system's message; `{labels}` in it stands for the labels.

    Returns:
      {label: probability} for a text, or a list of them.

    Raises:
      ValueError: arguments of another type, labels that are not at least two different texts, a text too long for the
        model, or logits that are not finite.
    """
    given = _texts("texts", texts)
    if isinstance(labels, str) or len(names := _texts("labels", labels)) < 2 or "" in names or (
        len(set(names)) < len(names)
    ):
        raise ValueError(f"labels is {labels!r:.100}; expected a list of at least two different texts")
    check_tokenizer(tokenizer, model.config)
    if not given:
        return []
    system = instruction.replace("{labels}", ", ".join(names))
    prompts = [_prompt(model, tokenizer, template, system, text, plain_contents) for text in given]
    end = _stop_ids(model, tokenizer)[-1]
    answers = [[*encoded(tokenizer, label, add_special_tokens=False).ids, end] for label in names]
    longest = max(map(len, answers))
    _check_lengths(model, prompts, longest)
    length = min(bucket(max(map(len, prompts)) + longest), model.config.max_position)
    shared = min(_common(prompts), min(map(len, prompts)) - 1)  # Every prompt keeps a token of its own to run.

    graphdef, params = nnx.split(model, nnx.Param)
    run, score = (functools.partial(program, nnx.to_pure_dict(params)) for program in _programs(graphdef))
    nothing_1D = jnp.zeros((1, model.config.hidden_size), model.config.dtype)
    beginning = model.init_state(1, length)
    for chunk in chunks([prompts[0][:shared]], CHUNK):
        _, beginning = run(nothing_1D, beginning, *chunk)
    size = max(1, ROWS // len(names))
    found: list[np.ndarray] = []
    for start in range(0, len(prompts), size):
        group = [prompt[shared:] for prompt in prompts[start : start + size]]
        group += [group[-1]] * (size - len(group) if len(prompts) > size else 0)
        last_BD, state = _repeat((nothing_1D, beginning), len(group))
        for chunk in chunks(group, CHUNK):
            last_BD, state = run(last_BD, state, *chunk)
        found += list(_label_probabilities(score, last_BD, state, answers))
    results = [dict(zip(names, row.tolist(), strict=True)) for row in found[: len(given)]]
    return results[0] if isinstance(texts, str) else results


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Returns the number of tokens that all rows begin with."""
    shortest = min(map(len, rows))
    block = np.array([row[:shortest] for row in rows])
    same = (block == block[0]).all(axis=0)
    return shortest if same.all() else int(np.argmin(same))


def _repeat(tree: Any, times: int) -> Any:
    return jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), tree)


@functools.lru_cache(maxsize=8)
def _programs(graphdef: Any) -> tuple[Any, Any]:
    def hidden(params: Any, state: State, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params)(tokens_BT, None, segment_ids_BT, state, None, padding="right")

    @jax.jit
    def run(
        params: Any, last_BD: jax.Array, state: State, tokens_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> tuple[jax.Array, State]:
        """Takes in a chunk; returns the hidden state of each row's last token (`last_BD` if it has none) and the
        state."""
        hidden_BTD, state = hidden(params, state, tokens_BT, segment_ids_BT)
        index_B11 = jnp.maximum(jnp.sum(segment_ids_BT, axis=1) - 1, 0)[:, None, None]
        newest_BD = jnp.take_along_axis(hidden_BTD, index_B11, axis=1)[:, 0]
        return jnp.where(jnp.any(segment_ids_BT, axis=1)[:, None], newest_BD, last_BD), state

    @jax.jit
    def score(
        params: Any, last_BD: jax.Array, state: State, tokens_BT: jax.Array, segment_ids_BT: jax.Array
    ) -> jax.Array:
        """Returns the log-probability of all real tokens of each row together, [B], after hidden state `last_BD`."""
        hidden_BTD, _ = hidden(params, state, tokens_BT, segment_ids_BT)
        before_BTD = jnp.concatenate([last_BD[:, None], hidden_BTD[:, :-1]], axis=1)
        head_VD = nnx.merge(graphdef, params).head_VD
        return jnp.sum(token_logprobs(before_BTD, head_VD, jnp.where(segment_ids_BT > 0, tokens_BT, -1)), axis=1)

    return run, score


def _label_probabilities(
    score: Any, last_BD: jax.Array, state: State, answers: Sequence[Sequence[int]]
) -> np.ndarray:
    """Returns the probability of each answer among all answers, [B, L].

    Raises:
      ValueError: the logits are not finite.
    """
    B, L = len(last_BD), len(answers)
    ((tokens_LT, segment_ids_LT),) = chunks(answers, bucket(max(map(len, answers))))
    total_X = score(*_repeat((last_BD, state), L), np.tile(tokens_LT, (B, 1)), np.tile(segment_ids_LT, (B, 1)))
    if not np.isfinite(total_X).all():
        raise ValueError(LOGITS_NOT_FINITE)
    return np.asarray(jax.nn.softmax(total_X.reshape(B, L), axis=1))
