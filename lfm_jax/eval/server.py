"""A server with OpenAI's API as a model of lm-eval: `lfm serve`, vLLM's, llama.cpp's.

With the model's tokenizer a server is asked with token ids at /completions, as `EvalModel` asks a model; without, with
texts there and with conversations at /chat/completions, which give no scores.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
from lm_eval.models.utils import postprocess_generated_text

from lfm_jax.convert import sidecars
from lfm_jax.convert.safetensors_io import read_json
from lfm_jax.eval.generating import Options, Wanted, read_options, read_reply, wanted
from lfm_jax.eval.kept import EncodedLM, KeptLM, Tokens
from lfm_jax.loading import model_config, recognise
from lfm_jax.problems import raise_problems
from lfm_jax.text.chat import DEFAULT_TEMPLATE, END_OF_TURN
from lfm_jax.text.tokenizer import inference_tokenizer

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 5
SECONDS = 600.0
"""How long an answer may take."""
MOST_STOPS = 4
"""Of a request, as OpenAI has it; the others cut the text here."""
PASSING = (429, 500, 502, 503, 504)
"""Statuses with which the same request is sent again."""


class RefusedError(ValueError):
    """A server does not do what a request asks for."""


class Server:
    """One model of a server.

    Args:
      url: where its API is, as http://127.0.0.1:8000/v1.
      model: name of the model there; None: the only one that there is.
      at_once: requests under way at a time.

    Attributes:
      model: the name.
      says: what /models says of it, but for what is new at each start.

    Raises:
      ValueError: it cannot be reached, or has no such model.
    """

    def __init__(self, url: str, model: str | None = None, *, at_once: int = 16):
        key = os.environ.get(KEY_VARIABLE)
        self.url, self._at_once = url.rstrip("/"), at_once
        self._client = httpx.Client(
            timeout=SECONDS, headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=at_once),
        )
        try:
            listed = self._read(self._client.get(f"{self.url}/models"))
            found = {entry["id"]: entry for entry in listed["data"]}
        except (httpx.HTTPError, httpx.InvalidURL, KeyError, TypeError) as error:
            raise ValueError(f"url {self.url} is not that of a server with OpenAI's API, as http://127.0.0.1:8000/v1: "
                             f"{error or type(error).__name__}") from None
        if model is None and len(found) == 1:
            model = next(iter(found))
        if model is None or model not in found:
            raise ValueError(f"model is {model}; the server at {self.url} has {', '.join(found) or 'none'}")
        self.model = model
        self.says = {name: value for name, value in found[model].items() if name not in ("created", "permission")}

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the model, plain data: its weights are not."""
        return {"url": self.url, "model": self.model, "says": self.says}

    @property
    def longest(self) -> int | None:
        """The most tokens of a request, prompt and answer; None: the server does not say."""
        told = self.says.get("max_model_len")
        return told if isinstance(told, int) else None

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the first choice of the answer to a request.

        Raises:
          ValueError: the server refuses it, or does not answer after some tries.
        """
        problem: object = None
        for i in range(TRIES):
            time.sleep(2**i - 1)
            try:
                response = self._client.post(f"{self.url}/{path}", json={"model": self.model, **body})
            except httpx.TransportError as error:
                problem = error
                continue
            if response.status_code not in PASSING:
                answer = self._read(response)
                try:
                    return answer["choices"][0]
                except (KeyError, IndexError, TypeError):
                    raise ValueError(f"{response.url} answers without choices: {response.text[:200]}") from None
            problem = f"status {response.status_code}: {response.text[:200]}"
        raise ValueError(f"{self.url} does not answer ({problem}); what it has answered is kept: the same command goes "
                         "on from there")

    def ask_all[T](self, tasks: Sequence[T], ask: Callable[[T], Any]) -> Iterator[tuple[int, Any]]:
        """Yields number and answer of tasks as they are done, several at a time; begins none after one has failed."""
        failures: list[Exception] = []

        def answer(task: T) -> Any:
            if failures:
                raise failures[0]
            try:
                return ask(task)
            except Exception as error:
                failures.append(error)
                raise

        with concurrent.futures.ThreadPoolExecutor(self._at_once) as pool:
            running = {pool.submit(answer, task): number for number, task in enumerate(tasks)}
            try:
                for future in concurrent.futures.as_completed(running):
                    if future.exception() is None:  # What is under way beside a failure is answered, and kept.
                        yield running[future], future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if failures:
            raise failures[0]

    @staticmethod
    def _read(response: httpx.Response) -> Any:
        if response.is_error:
            raise RefusedError(f"{response.url} refuses a request with status {response.status_code}: "
                               f"{response.text[:500]}")
        try:
            return response.json()
        except ValueError:
            raise ValueError(f"{response.url} does not answer in JSON: {response.text[:200]!r}") from None


@dataclasses.dataclass(frozen=True)
class Asked:
    """A text to generate."""

    path: str
    prompt: dict[str, Any]
    """The field with what it continues."""
    options: Options
    wanted: Wanted | None = None
    """The text where its reply may begin with a thought, in which no stop string ends it; None: it is the answer."""

    @property
    def most(self) -> int:
        return self.options.most

    @property
    def request(self) -> Any:
        """What the text depends on beside the server, plain data."""
        most, until, sampling, skip, _ = self.options
        more = [] if skip else [skip]
        more += [] if self.wanted is None else [self.wanted.begin]
        return ["generate", self.prompt, most, until, dataclasses.asdict(sampling), *more]

    def text(self, server: Server) -> str:
        """The server's answer, up to the first stop string; where a thought may come first, the whole reply."""
        most, until, sampling, skip, _ = self.options
        whole = self.wanted is not None
        # Every setting is named: servers have defaults of their own, with penalties that matter to greedy texts too.
        # The penalty has another name in llama.cpp's.
        body = self.prompt | dataclasses.asdict(sampling) | {
            "repeat_penalty": sampling.repetition_penalty, "max_tokens": most,
            "stop": None if whole else until[:MOST_STOPS] or None}
        body |= {} if skip and not whole else {"skip_special_tokens": False}
        choice = server.ask(self.path, body)
        found = choice["message"]["content"] if "message" in choice else choice["text"]
        return found or "" if whole else postprocess_generated_text(found or "", until, None)


class TokenServer(EncodedLM):
    """A server that is asked with the ids of the model's own tokenizer.

    Args:
      server: the server.
      tokenizer: its model, or a Hugging Face directory with the tokenizer, the chat template and config.json of it.
      max_length, seed, answers: as for `KeptLM`; max_length None: as the server says.

    Raises:
      ValueError: a file of the tokenizer cannot be read, or the server does not say how much its model reads.
    """

    def __init__(self, server: Server, tokenizer: Path, *, max_length: int | None = None, **settings: Any):
        with recognise(tokenizer).beside(tokenizer) as directory:
            codec, template = inference_tokenizer(directory), sidecars.chat_template(directory)
        bos_id, eos_id, pad_id = _special_ids(tokenizer)
        if eos_id is None:
            raise ValueError(f"tokenizer {tokenizer} names no token that ends a text (eos_token_id in config.json)")
        if max_length is None:
            if server.longest is None:
                raise ValueError(f"the server at {server.url} does not say how many tokens its model reads; name them "
                                 "with --max-length")
            max_length = server.longest - 2  # The last token of a pair, and one that some servers generate.
        specials = {f"{name}_token": "" if i is None else codec.id_to_token(i) or ""
                    for name, i in (("bos", bos_id), ("eos", eos_id), ("pad", pad_id))}
        super().__init__(codec, template or DEFAULT_TEMPLATE, specials, eos_id, bos_id,
                         max_length=max_length, **settings)
        self._server = server

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        lengths = [len(continuation) for _, continuation in pairs]
        if (longest := max(lengths, default=0)) > self.max_length:
            raise ValueError(f"cannot score a continuation of {longest} tokens; the model reads {self.max_length}")
        if 0 in lengths:
            raise ValueError(f"cannot score: pair {lengths.index(0)} has no continuation")
        return self._server.ask_all(pairs, self._scored)

    def _scored(self, pair: tuple[Tokens, Tokens]) -> tuple[float, bool]:
        context, continuation = pair
        ids = [*context, *continuation][-(self.max_length + 1) :]
        needed = (f"the server at {self._server.url} does not give the log-probabilities of a prompt (`echo` with "
                  "`logprobs` at /completions, as lfm serve and vLLM do), of which multiple choice and perplexity are "
                  "made: only tasks with generated texts can be measured there")
        try:
            choice = self._server.ask("completions", {
                "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0})
        except RefusedError as error:
            raise ValueError(f"{error}\n{needed}") from None
        told = choice.get("logprobs") or {}
        logprobs, best = told.get("token_logprobs") or [], told.get("top_logprobs") or []
        if not len(ids) <= len(logprobs) == len(best) <= len(ids) + 1:
            raise ValueError(needed)
        scored = slice(len(ids) - len(continuation), len(ids))
        greedy = all(p >= max(others.values()) for p, others in zip(logprobs[scored], best[scored], strict=True))
        return sum(logprobs[scored]), greedy

    def _wanted(self, context: str, options: Mapping[str, Any], seed: int) -> Asked:
        task = wanted(self, self._codec, self._template, context, options, seed)
        read = _without_grammar(
            Options(task.most, task.until, task.sampling, task.skip_special_tokens, task.grammar))
        return Asked("completions", {"prompt": task.prompt}, read, None if task.begin == "answer" else task)

    def _generate(self, tasks: Sequence[Asked]) -> Iterator[tuple[int, str]]:
        end = self._codec.token_to_id(END_OF_TURN)
        stop_ids = (self.eot_token_id, *([] if end is None else [end]))

        def ask(task: Asked) -> str:
            text = task.text(self._server)
            return text if task.wanted is None else read_reply(self._codec, task.wanted, text, stop_ids)

        return self._server.ask_all(tasks, ask)


class TextServer(KeptLM):
    """A server that is asked with texts, and with conversations where there is a chat template: its own.

    It does not cut what is too long.
    """

    def __init__(self, server: Server, **settings: Any):
        super().__init__(max_length=server.longest or 0, **settings)
        self._server = server

    @cached_property
    def tokenizer_name(self) -> str:
        return f"{self._server.url} {self._server.model}"

    @property
    def eot_token_id(self) -> int:
        raise ValueError(NO_SCORES)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        raise ValueError(NO_SCORES)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The server does not say what its template is."""
        return "that of the server" if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Returns the conversation as a text by which it is found again.

        Raises:
          ValueError: its last message is to be continued, or there are tools.
        """
        if tools is not None:
            raise ValueError("calls of tools are measured as the model writes them; name the tokenizer of the server's "
                             "model with --tokenizer")
        if not add_generation_prompt:
            raise ValueError("a task begins the answer itself, which /chat/completions cannot continue; name the "
                             "tokenizer of the server's model with --tokenizer")
        return _Chat(json.dumps(chat_history, ensure_ascii=False))

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, tuple[float, bool]]]:
        raise ValueError(NO_SCORES)

    def _wanted(self, context: str, options: Mapping[str, Any], seed: int) -> Asked:
        read = _without_grammar(read_options(options, self.max_gen_toks, None, seed))
        if isinstance(context, _Chat):
            return Asked("chat/completions", {"messages": json.loads(context)}, read)
        return Asked("completions", {"prompt": context}, read)

    def _generate(self, tasks: Sequence[Asked]) -> Iterator[tuple[int, str]]:
        return self._server.ask_all(tasks, lambda task: task.text(self._server))


def _without_grammar(options: Options) -> Options:
    if options.grammar is not None:
        raise ValueError("--constrained does not go with --url: each server has its own way to constrain answers")
    return options


NO_SCORES = ("multiple choice, perplexity and long contexts need the tokenizer of the server's model, to know where a "
             "continuation begins and how long a text is: name its Hugging Face directory with --tokenizer")


class _Chat(str):
    """A conversation in JSON."""

    __slots__ = ()


def _special_ids(model: Path) -> tuple[int | None, int | None, int | None]:
    """The first tokens of text, of its end and of padding; a server's model may be of a family that is not ours."""
    if not (model / "config.json").exists():
        config = model_config(model)
        return config.bos_id, next(iter(config.eos_ids), None), config.pad_id
    ids, problems = read_json(model, "config.json")
    raise_problems(f"tokenizer {model} cannot be read", problems)
    bos_id, eos_id, pad_id = (_first(ids.get(f"{name}_token_id")) for name in ("bos", "eos", "pad"))
    return bos_id, eos_id, pad_id


def _first(ids: Any) -> int | None:
    return ids[0] if isinstance(ids, list) else ids
