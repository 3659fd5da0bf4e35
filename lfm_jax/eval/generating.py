"""Generates the texts that tasks of lm-eval ask for, on the batched engine."""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jax.sharding import Mesh
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Event, Request
from lfm_jax.infer.decoding import bucket
from lfm_jax.model import LFM
from lfm_jax.sampling import Sampling
from lfm_jax.structured.grammar import Grammar, Matcher, grammar_tokenizer
from lfm_jax.structured.schema import GrammarError
from lfm_jax.text.chat import reply_stage, turn_stop_ids
from lfm_jax.text.codec import ReplyText, encoded, token_bytes
from lfm_jax.text.thoughts import BLANKS, Stage, Thinking, ThoughtCounter, split_thought, thinking
from lfm_jax.text.tools import START

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFIX_CACHE_BYTES = 2**28
SHORTEST = 256
"""Tokens of a slot, at least: shorter ones would save little, and each length is compiled anew."""
FILTERS = ("top_k", "top_p", "min_p", "repetition_penalty")
"""Generation kwargs that are fields of `Sampling`."""
GRAMMARS = {"json_schema": Grammar.json_schema, "tools": Grammar.tool_calls}
"""What the generation kwarg `grammar` may hold: JSON of a schema, or free text and calls of tools."""

_logger = logging.getLogger(__name__)


class Encoder(Protocol):
    """What is needed of `EvalModel` here."""

    @property
    def max_length(self) -> int: ...
    @property
    def max_gen_toks(self) -> int: ...
    @property
    def eot_token_id(self) -> int: ...
    def tok_encode(self, string: str, *, left_truncate_len: int | None = None) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A text to generate."""

    prompt: list[int]
    most: int
    """The most tokens."""
    until: list[str]
    """Strings before the first of which it ends."""
    sampling: Sampling
    how: Thinking | None
    """How the model writes thoughts."""
    begin: Stage
    """Where the reply goes on."""
    skip_special_tokens: bool = True
    """The text leaves them out."""
    grammar: Mapping[str, Any] | None = None
    """What the answer follows: a key of GRAMMARS, and what the grammar is made from."""

    @property
    def request(self) -> Any:
        """What the text depends on beside the model, plain data."""
        more = [] if self.skip_special_tokens and self.grammar is None else [self.skip_special_tokens, self.grammar]
        return ["generate", self.prompt, self.most, self.until, dataclasses.asdict(self.sampling),
                self.begin if self.how else "answer", *more]

    def matcher(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> Matcher | None:
        """Returns what holds the reply to the grammar.

        Raises:
          GrammarError: it is refused.
        """
        if self.grammar is None:
            return None
        ((kind, content),) = self.grammar.items()
        grammar: Grammar = GRAMMARS[kind](content)
        if self.how is not None:
            grammar = grammar.after_thought(self.how, self.begin)
        return grammar_tokenizer(tokenizer, vocab_size, stop_ids).matcher(grammar)


class Options(NamedTuple):
    """Generation kwargs of a task."""

    most: int
    until: list[str]
    sampling: Sampling
    skip_special_tokens: bool
    """See `Wanted`."""
    grammar: Mapping[str, Any] | None
    """See `Wanted`."""


def read_options(options: Mapping[str, Any], most: int, eos: str | None, seed: int) -> Options:
    """Reads generation kwargs as the `hf` backend does.

    Args:
      most: tokens of a text, where the kwargs do not say.
      eos: the text of the token that ends a text, if it is known.

    Raises:
      ValueError: kwargs that are not known.
    """
    given: dict[str, Any] = {**normalize_gen_kwargs(dict(options), most)}
    until = [text for text in handle_stop_sequences(given.pop("until", None), eos=eos) if text]
    most = given.pop("max_gen_toks")
    sampled, temperature = given.pop("do_sample"), given.pop("temperature", 0.0)
    filters = {name: value for name in FILTERS if (value := given.pop(name, None)) is not None}
    skip, grammar = given.pop("skip_special_tokens", True), given.pop("grammar", None)
    unknown = {name: value for name, value in given.items() if (name, value) != ("num_beams", 1)}
    if unknown:
        raise ValueError(f"generation kwargs {unknown} are not supported; known are until, max_gen_toks, do_sample, "
                         f"temperature, skip_special_tokens, grammar, {', '.join(FILTERS)}")
    sampling = Sampling(temperature=temperature if sampled else 0.0, seed=seed % 2**32, **filters)
    return Options(most, until, sampling, skip, grammar)


def cut_prompt(encoder: Encoder, context: str, most: int) -> list[int]:
    """Encodes a context, cut at the left so that `most` tokens can follow it.

    Raises:
      ValueError: there is no room for it, or it is empty.
    """
    room = encoder.max_length - most
    if room < 1:
        raise ValueError(f"max_gen_toks is {most}, which leaves no room for a context: the model reads "
                         f"{encoder.max_length} tokens")
    prompt = encoder.tok_encode(context, left_truncate_len=room)
    if not prompt:
        raise ValueError("a context is empty, and the tokenizer begins no text by itself: there is nothing to continue")
    return prompt


def wanted(
    encoder: Encoder, tokenizer: Tokenizer, template: str, context: str, options: Mapping[str, Any], seed: int
) -> Wanted:
    """Reads generation kwargs and encodes a context.

    Raises:
      ValueError: see `read_options` and `cut_prompt`.
    """
    eos = tokenizer.decode([encoder.eot_token_id], skip_special_tokens=False)
    most, until, sampling, skip, grammar = read_options(options, encoder.max_gen_toks, eos, seed)
    _check_grammar(tokenizer, grammar)
    prompt = cut_prompt(encoder, context, most)
    how = thinking(tokenizer, template)
    return Wanted(prompt, most, until, sampling, how, reply_stage(tokenizer, how, prompt), skip, grammar)


def _check_grammar(tokenizer: Tokenizer, grammar: Any) -> None:
    if grammar is None:
        return
    if not isinstance(grammar, Mapping) or len(grammar) != 1 or not grammar.keys() <= GRAMMARS.keys():
        raise ValueError(f"grammar is {grammar!r:.80}; expected {' or '.join(GRAMMARS)}, with what it is made from")
    if "tools" in grammar and tokenizer.token_to_id(START) is None:
        raise ValueError(f"the tokenizer has no {START}: tool calls of this model cannot be constrained")


def run(
    model: LFM, tokenizer: Tokenizer, tasks: Sequence[Wanted], slots: int, mesh: Mesh | None = None
) -> Iterator[tuple[int, str]]:
    """Yields the number and the text of each task as it is done; the longest prompts go first.

    Args:
      slots: texts at a time, of each copy of the model.

    Raises:
      ValueError: the model's logits are not finite. A grammar that is refused leaves an empty text, and one that leads
        nowhere the text so far; both with a warning.
    """
    if not tasks:
        return
    longest = max(len(task.prompt) + task.most for task in tasks)
    length = min(max(bucket(longest), SHORTEST), model.config.max_position)
    stop_ids = turn_stop_ids(tokenizer, model.config)
    engine = Engine(model, EngineConfig(
        slots=((min(slots, max(2, len(tasks))), length),), prefix_cache_bytes=PREFIX_CACHE_BYTES,
        max_stop_ids=max(8, len(stop_ids)),
    ), mesh)
    todo = collections.deque(sorted(range(len(tasks)), key=lambda i: -len(tasks[i].prompt)))
    done: list[tuple[int, str]] = []
    failures: list[str] = []

    def submit(number: int) -> None:
        task = tasks[number]
        reply = _Reply(tokenizer, task, stop_ids)
        try:
            matcher = task.matcher(tokenizer, model.config.vocab_size, stop_ids)
        except GrammarError as error:
            _logger.warning("a grammar is refused, and its text is empty: %s", error)
            done.append((number, ""))
            return

        def listen(event: Event) -> None:
            if reply.over:  # What the engine had begun when a stop string came.
                return
            reply.push(event.tokens)
            if event.finish == "grammar":
                _logger.warning("a grammar cannot be followed to its end: %s", event.reason)
            elif event.reason is not None:
                failures.append(event.reason)
            if reply.over or event.finish is not None:
                reply.over = True
                done.append((number, reply.text()))
                if event.finish is None:
                    engine.cancel(ticket, 0, "stop")

        ticket = engine.submit(
            Request(prompt=task.prompt, max_new_tokens=task.most, sampling=task.sampling, stop_ids=stop_ids,
                    grammar=matcher), listen)

    left = len(tasks)
    while left:
        while todo and engine.waiting() < engine.slots:
            submit(todo.popleft())
        engine.step()
        if failures:
            raise ValueError(failures[0])
        left -= len(done)
        yield from done
        done.clear()
    engine.close(drain=False)


def read_reply(tokenizer: Tokenizer, task: Wanted, text: str, stop_ids: Sequence[int]) -> str:
    """Returns the answer in a reply that goes on behind its end, with special tokens in its text."""
    reply = _Reply(tokenizer, task, stop_ids)
    reply.push(encoded(tokenizer, text, add_special_tokens=False).ids)
    return reply.text()


class _Reply:
    """The tokens of a reply, up to the one that completes a stop string."""

    def __init__(self, tokenizer: Tokenizer, task: Wanted, stop_ids: Sequence[int]):
        self._tokenizer, self._task, self._stop_ids = tokenizer, task, stop_ids
        self._thought = ThoughtCounter(tokenizer, task.how, task.begin)
        self._strings = ReplyText(tokenizer, task.until, stop_ids,
                                  skip_special_tokens=task.skip_special_tokens)
        self._tokens: list[int] = []
        self._held: list[int] = []
        """What may still become the mark of a thought."""
        self._begun = False
        """Something but blanks has come, outside of a thought."""
        self.over = False
        """Nothing more is wanted."""

    def push(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.over or token in self._stop_ids:
                return
            self._tokens.append(token)
            inside = self._thought.open
            self._thought.push([token])
            self._held.append(token)
            if self._thought.undecided:
                continue
            # What a thought says ends nothing, nor do the blanks between it and the answer.
            blank = not token_bytes(self._tokenizer, token).decode("latin-1").strip(BLANKS)
            if not (inside or self._thought.open or (self._thought.tokens and blank and not self._begun)):
                self._begun = True
                self._strings.push(self._held)
                self.over = self._strings.stopped
            self._held.clear()

    def text(self) -> str:
        """Returns the answer: what follows a thought, up to the first stop string."""
        answer = self._decode(self._tokens)
        if self._thought.tokens:
            how = self._task.how
            if how is not None and how.token_ids:  # Where special tokens are left out, so are its marks.
                rest = self._tokens[self._thought.tokens :]
                answer = "" if self._thought.open else self._decode(rest).lstrip(BLANKS)
            else:
                answer = split_thought(answer, self._task.begin).answer
        return postprocess_generated_text(answer, self._task.until, None)

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=self._task.skip_special_tokens)
