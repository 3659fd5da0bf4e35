"""What every model of lm-eval here does: texts to tokens, templates, and answers that are kept as they come."""

from __future__ import annotations

import abc
import collections
import functools
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lfm_jax.eval.answers import Answers
from lfm_jax.eval.progress import Progress
from lfm_jax.text.chat import render_chat, render_open, with_calls
from lfm_jax.text.codec import encoded

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_logger = logging.getLogger(__name__)

Tokens = Sequence[int]


class KeptLM(TemplateLM, abc.ABC):
    """A model for `lm_eval.simple_evaluate(model=...)` whose answers are kept.

    Args:
      max_length: the most tokens of context and continuation; more are cut off at the left.
      seed: of sampled texts; a request that comes again has the next one.
      answers: those of earlier calls with this model and these settings, and the place for new ones.

    Attributes:
      silent: says nothing of its progress.
    """

    def __init__(self, *, max_length: int, seed: int = 0, answers: Answers | None = None):
        super().__init__()
        self._max_length, self._seed, self.answers = max_length, seed, answers
        self.silent = False

    @abc.abstractmethod
    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yields number, log-probability and greedy flag of (context, continuation) pairs as they are done."""

    @abc.abstractmethod
    def _wanted(self, context: str, options: Mapping[str, Any], seed: int) -> Any:
        """A text to generate: `request` is what it depends on, plain data, and `most` the most tokens."""

    @abc.abstractmethod
    def _generate(self, tasks: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """Yields number and text of what `_wanted` gave as they are done."""

    @property
    def max_length(self) -> int:
        """The most tokens of context and continuation."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a generated text, where a task does not say."""
        return 256

    # ---------------------------------------------------------------- scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._scores("loglikelihood", pairs, [text for text, _, _ in requests], silent=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text, in windows as long as the model reads."""
        texts = [request.args[0] for request in requests]
        windows = [
            [make_disjoint_window(window) for window in get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length,
                context_len=1)]
            for text in texts
        ]
        scores = iter(self._scores("loglikelihood_rolling", [pair for of_text in windows for pair in of_text], None,
                                   silent=disable_tqdm))
        totals = [sum((next(scores)[0] for _ in of_text), 0.0) for of_text in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _scores(
        self, what: str, pairs: Sequence[tuple[Tokens, Tokens]], texts: Sequence[tuple[str, str]] | None, *,
        silent: bool,
    ) -> list[tuple[float, bool]]:
        """Returns the score of each pair: those that were answered before, and new ones as they come."""
        found: list[tuple[float, bool] | None] = [None] * len(pairs)
        requests = [["score", list(context), list(continuation)] for context, continuation in pairs]
        for i, request in enumerate(requests):
            if self.answers is not None and (answer := self.answers.get(request)) is not None:
                found[i] = (answer[0], answer[1])
        left = [i for i, score in enumerate(found) if score is None]
        sizes = [len(pairs[i][0]) + len(pairs[i][1]) for i in left]
        progress = None if silent or self.silent else Progress(what, len(pairs), sum(sizes), len(pairs) - len(left))
        for number, (logprob, greedy) in self._score([pairs[i] for i in left]):
            i = left[number]
            found[i] = answer = (logprob, greedy)
            if self.answers is not None:
                self.answers.add(requests[i], list(answer))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts[i], answer)
            if progress is not None:
                progress.add(sizes[number])
        return [score for score in found if score is not None]

    # ---------------------------------------------------------------- texts

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generates a text for each (context, generation kwargs), up to a stop string."""
        times: collections.Counter[str] = collections.Counter()
        tasks: list[Any] = []
        for request in requests:
            context, options = request.args
            again = f"{context}\0{sorted(options.items(), key=str)}"
            tasks.append(self._wanted(context, options, self._seed + times[again]))
            times[again] += 1
        texts: list[str | None] = [
            None if self.answers is None else self.answers.get(task.request) for task in tasks
        ]
        left = [i for i, text in enumerate(texts) if text is None]
        progress = None if disable_tqdm or self.silent else Progress(
            "generate_until", len(tasks), sum(tasks[i].most for i in left), len(tasks) - len(left))
        for number, text in self._generate([tasks[i] for i in left]):
            i = left[number]
            texts[i] = text
            if self.answers is not None:
                self.answers.add(tasks[i].request, text)
            self.cache_hook.add_partial("generate_until", requests[i].args, text)
            if progress is not None:
                progress.add(tasks[i].most)
        return [text for text in texts if text is not None]


class EncodedLM(KeptLM):
    """One that is asked with tokens.

    Args:
      tokenizer, template: of the model.
      specials: the variables of the template for special tokens.
      eos_id: ends a text.
      bos_id: begins one; None where there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: str, specials: Mapping[str, Any], eos_id: int, bos_id: int | None,
        **settings: Any,
    ):
        super().__init__(**settings)
        self._codec, self._template, self._specials = tokenizer, template, specials
        self._eos_id, self._bos_id = eos_id, bos_id

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._eos_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text without one: bos, or eos where there is none."""
        return self._eos_id if self._bos_id is None else self._bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **kwargs: Any
    ) -> list[int]:
        """Encodes a text with the tokenizer's own special tokens, unless it begins with bos already.

        Args:
          add_special_tokens: whether to add them, whatever the text begins with.
          left_truncate_len: keeps so many tokens at the right.
        """
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        ids = encoded(self._codec, string, add_special_tokens=add_special_tokens).ids
        return ids[-left_truncate_len:] if left_truncate_len else ids

    @functools.cached_property
    def _prefix_text(self) -> str:
        return self._codec.decode([self.prefix_token_id], skip_special_tokens=False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Renders a conversation; without the opening of the assistant's turn its last message is to be continued.

        Calls and thoughts in it are written as `text.chat.with_calls` has them. A template that refuses it is tried
        without the system message, as in the `hf` backend, with a warning.
        """
        options: dict[str, Any] = {"tools": tools, **self._specials}
        render = render_chat if add_generation_prompt else render_open
        chat_history = [{**message} for message in with_calls(self._template, chat_history)]
        try:
            return render(self._template, chat_history, **options)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            _logger.warning("the chat template is tried without the system message: %s", error)
            return render(self._template, rest, **options)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template; None if lm-eval does not want one.

        Raises:
          ValueError: it wants one by another name than `default`.
        """
        if not chat_template:
            return None
        if chat_template not in (True, "default"):
            raise ValueError(f"there is no chat template {chat_template!r}; the model has one, the default")
        return self._template

    @functools.cached_property
    def tokenizer_name(self) -> str:
        """A name of tokenizer and template, by which lm-eval tells requests apart that it keeps."""
        text = self._codec.to_str() + self._template
        return f"lfm_jax-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
