"""Bodies of requests, as OpenAI's clients send them, and what they ask of the engine. See `fields` for the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import AfterValidator, BeforeValidator, Field, Tag, model_validator

from lfm_jax.sampling import Sampling
from lfm_jax.serve.fields import ACCOUNT, CACHE, HINT, STORAGE, Body, FieldError, Ignored, Refused, blamed, one_of
from lfm_jax.serve.messages import ChatMessage
from lfm_jax.serve.tools import AllowedChoice, NamedTool, Tool, ToolChoice, ToolEntry
from lfm_jax.structured.grammar import Grammar
from lfm_jax.text.chat import OWN_VARIABLES
from lfm_jax.text.tool_schemas import tool_schemas

MAX_STOPS = 8
MAX_STOP = 256
"""Characters of a stop text."""
MAX_TOP_LOGPROBS = 20
MAX_ID = 2**31

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=MAX_ID)]
Prompt = str | list[int]


def _stop_texts(value: Any) -> Any:
    """Stop texts as a list; an empty one would stop nothing."""
    texts = [value] if isinstance(value, str) else value
    if texts is None or texts == []:
        return None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected a text, or a list of texts")
    texts = [text for text in texts if text]
    if len(texts) > MAX_STOPS or any(len(text) > MAX_STOP for text in texts):
        raise ValueError(f"expected at most {MAX_STOPS} texts of at most {MAX_STOP} characters")
    return texts


def _biases(value: Any) -> Any:
    """As in OpenAI's API, -100 forbids a token."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10
        and isinstance(bias, (int, float)) and not isinstance(bias, bool) and -100 <= bias <= 100
        for key, bias in value.items()
    ):
        raise ValueError("expected an object of token ids (as texts) and numbers from -100 to 100")
    return {int(key): -float("inf") if bias == -100 else float(bias) for key, bias in value.items()}


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[Any, Ignored("streams are not padded")] = None


class StructuredOutputs(Body):
    """Constraints on the answer, as vLLM's clients send them."""

    json_: dict[str, Any] | str | bool | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Annotated[Any, Refused("use json, regex, choice or grammar")] = None


class Constraint(NamedTuple):
    """What an answer must follow."""

    field: str
    """The field that asks for it."""
    kind: str
    """`json` (a schema), `regex`, `choice` or `grammar`."""
    value: Any


class Shared(Body):
    """Fields that both kinds of completion have."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="`include_usage`, `continuous_usage_stats`")
    stop: Annotated[list[str] | None, BeforeValidator(_stop_texts, json_schema_input_type=str | list[str] | None)] = (
        Field(None, description=f"at most {MAX_STOPS} texts; special tokens may be among them"))
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: Annotated[
        dict[int, float] | None, BeforeValidator(_biases, json_schema_input_type=dict[str, float] | None)
    ] = Field(None, description="of any size")
    # Of other servers of open models.
    top_k: Annotated[int, Field(ge=-1, lt=MAX_ID)] | None = Field(None, description="0 or -1 keeps all")
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: list[TokenId] | None = Field(None, description="end the answer beside the model's own")
    ignore_eos: bool | None = Field(
        None, description="the model's own stop ids do not end the answer, unless a grammar says where it ends")
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = Field(
        None, description="one of `json`, `regex`, `choice`, `grammar` (Lark), `json_object`")
    guided_json: dict[str, Any] | str | bool | None = Field(None, description="as `structured_outputs.json`")
    guided_regex: str | None = Field(None, description="as `structured_outputs.regex`")
    guided_choice: list[str] | None = Field(None, description="as `structured_outputs.choice`")
    guided_grammar: str | None = Field(None, description="as `structured_outputs.grammar`")
    use_beam_search: Annotated[Any, Refused("answers are sampled; ask for several with n")] = None
    user: Annotated[Any, Ignored(ACCOUNT)] = None

    def sampling(self, default: Sampling, seed: int) -> Sampling:
        """How to choose tokens: the server's default where a field is left out; `seed` where none is given."""
        given: dict[str, Any] = {name: getattr(self, name) for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")}
        given["top_k"] = None if self.top_k is None else max(self.top_k, 0)
        given["seed"] = seed if self.seed is None else self.seed % 2**32
        fields: dict[str, Any] = {name: getattr(default, name) for name in Sampling.__dataclass_fields__}
        return Sampling(**fields | {name: value for name, value in given.items() if value is not None})

    def constraints(self) -> list[Constraint]:
        """The constraints on the answer."""
        given = self.structured_outputs or StructuredOutputs()
        inner = [("json", given.json_), ("regex", given.regex), ("choice", given.choice), ("grammar", given.grammar),
                 ("json", {"type": "object"} if given.json_object else None)]
        found = [Constraint("structured_outputs", kind, value) for kind, value in inner]
        found += [Constraint(f"guided_{kind}", kind, getattr(self, f"guided_{kind}"))
                  for kind in ("json", "regex", "choice", "grammar")]
        return [one for one in found if one.value is not None]

    def constraint(self) -> Constraint | None:
        """The one constraint on the answer.

        Raises:
          FieldError: there are several.
        """
        found = self.constraints()
        if len(found) > 1:
            raise FieldError(found[1].field, f"the answer has {len(found)} constraints "
                             f"({', '.join(one.kind for one in found)}); send one of response_format, "
                             "structured_outputs and the guided_* fields")
        return found[0] if found else None

    @functools.cached_property
    def grammar(self) -> Grammar | None:
        """What the answer must follow.

        Raises:
          FieldError: several constraints, or one that is not supported.
        """
        if (constraint := self.constraint()) is None:
            return None
        makers: dict[str, Callable[[Any], Grammar]] = {
            "json": Grammar.json_schema, "regex": Grammar.regex, "choice": Grammar.choice, "grammar": Grammar.lark}
        with blamed(constraint.field):
            return makers[constraint.kind](constraint.value)


# -------------------------------------------------------------------- completions


Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
"""Errors of every element of a long list would take seconds to collect."""
MAX_PROMPTS = 256
ONE_OF_FOUR = "a text, a list of texts, a list of token ids, or a list of such lists"


def prompt_kind(value: Any) -> str | None:
    """The tag of one of four: a text, a list of texts, a list of token ids, a list of such lists."""
    if isinstance(value, str):
        return "(text)"
    if not isinstance(value, list):
        return None
    first = value[0] if value else ""
    return "(texts)" if isinstance(first, str) else "(lists)" if isinstance(first, list) else "(ids)"


class CompletionBody(Shared):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("(texts)")]
        | Annotated[Ids, Tag("(ids)")]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("(lists)")],
        one_of(prompt_kind, ONE_OF_FOUR),
    ] = Field(description="texts or token ids, one or several")
    max_tokens: Annotated[int, Field(ge=0, lt=MAX_ID)] | None = Field(
        None, description="16 where it is left out; ends with `length` where the context ends; 0 with `echo` scores")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="the chosen token is always among them")
    best_of: int | None = Field(None, description="must be `n`: every continuation is given back")
    suffix: Annotated[Any, Refused("the model cannot fill in; put everything into the prompt")] = None

    @model_validator(mode="after")
    def _best(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise FieldError("best_of", "best_of must be n: every continuation is given back")
        return self

    def prompts(self) -> list[Prompt]:
        """Texts and lists of ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


# -------------------------------------------------------------------- chats


class JsonSchemaFormat(Body):
    """A schema that the answer fits."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema", description="of `json_object`")

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing; a response_format of that type has it")
        return self

    def schema_asked(self) -> Any:
        """The schema of the answer; None: any text."""
        if self.type == "json_schema" and self.json_schema is not None:
            return self.json_schema.schema_
        if self.type == "json_object":
            return {"type": "object"} if self.schema_ is None else self.schema_
        return None


def _variables(given: dict[str, Any] | None) -> dict[str, Any] | None:
    if taken := OWN_VARIABLES & (given or {}).keys():
        raise ValueError(f"{', '.join(sorted(taken))} cannot be set here: the other fields of the request say it")
    return given


class ChatBody(Shared):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=MAX_ID)] | None = Field(
        None, description="ends with `length` where the context ends")
    max_completion_tokens: Annotated[int, Field(ge=1, lt=MAX_ID)] | None = Field(None, description="as `max_tokens`")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = Field(None, description="functions")
    tool_choice: ToolChoice | None = Field(
        None, description="`none`, `auto`, `required`, one function, or `allowed_tools`")
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = Field(
        None, description="with `tools`: calls, or an answer in the format")
    # Of other servers of open models.
    add_generation_prompt: bool | None = Field(None, description="false only with `continue_final_message`")
    continue_final_message: bool | None = Field(None, description="the answer continues the last message")
    max_thinking_tokens: Annotated[int, Field(ge=0, lt=MAX_ID)] | None = Field(
        None, description="this server's own: the most tokens of a thought, which is then closed")
    chat_template_kwargs: Annotated[dict[str, Any] | None, AfterValidator(_variables)] = Field(
        None, description="variables of the chat template")
    # Of no consequence here.
    modalities: Annotated[Any, Refused("the model answers in text", ["text"])] = None
    audio: Annotated[Any, Refused("the model answers in text")] = None
    functions: Annotated[Any, Refused("describe them in tools")] = None
    function_call: Annotated[Any, Refused("use tool_choice", "none", "auto")] = None
    web_search_options: Annotated[Any, Refused("the server reaches nothing; offer a search in tools")] = None
    moderation: Annotated[Any, Refused("the server moderates nothing")] = None
    reasoning_effort: Annotated[Any, Ignored(HINT)] = None
    verbosity: Annotated[Any, Ignored(HINT)] = None
    prediction: Annotated[Any, Ignored("it can only make an answer faster")] = None
    metadata: Annotated[Any, Ignored(STORAGE)] = None
    store: Annotated[Any, Ignored(STORAGE)] = None
    service_tier: Annotated[Any, Ignored(ACCOUNT)] = None
    safety_identifier: Annotated[Any, Ignored(ACCOUNT)] = None
    prompt_cache_key: Annotated[Any, Ignored(CACHE)] = None
    prompt_cache_options: Annotated[Any, Ignored(CACHE)] = None
    prompt_cache_retention: Annotated[Any, Ignored(CACHE)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs goes with logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise FieldError("tool_choice", "tool_choice asks for a tool and tools has none")
        if self.add_generation_prompt is False and not self.continues:
            raise FieldError("add_generation_prompt", "without a generation prompt the answer continues the last "
                             "message: send continue_final_message: true too")
        if self.continues and self.messages[-1].role != "assistant":
            raise FieldError("messages", "only a last message of the assistant can be continued")
        return self

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return bool(self.continue_final_message or self.messages[-1].prefix)

    @property
    def calls_tools(self) -> bool:
        """Whether a tool may be called."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def function_tools(self) -> list[ToolEntry]:
        """The tools, none of which is foreign once the body is validated."""
        return [tool for tool in self.tools or () if isinstance(tool, ToolEntry)]

    @functools.cached_property
    def functions_offered(self) -> list[dict[str, Any]]:
        """The tools, with `strict` where the client wrote it.

        Raises:
          FieldError: see `tool_schemas`.
        """
        with blamed("tools"):
            return tool_schemas([tool.function.plain() for tool in self.function_tools])

    @property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The tools as the template shows them."""
        return [{key: value for key, value in tool.items() if key != "strict"}
                for tool in self.functions_offered] or None

    def constraints(self) -> list[Constraint]:
        schema = None if self.response_format is None else self.response_format.schema_asked()
        own = [] if schema is None else [Constraint("response_format", "json", schema)]
        return [*own, *super().constraints()]

    @functools.cached_property
    def grammar(self) -> Grammar | None:
        if not self.calls_tools:
            return super().grammar
        field, kind, schema = self.constraint() or ("", "json", None)
        if kind != "json":
            raise FieldError(field, f"tools go together with a JSON schema for the answer, not with a {kind}; send "
                             "tool_choice: none to have the answer alone")
        if schema is not None:
            with blamed(field):
                Grammar.json_schema(schema)
        required, name, tools = self.tool_choice == "required", None, self.functions_offered
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in {tool["name"] for tool in tools}:
                raise FieldError("tool_choice", f"tool_choice names {name}; tools has no such function")
        elif isinstance(self.tool_choice, AllowedChoice):
            allowed = self.tool_choice.allowed_tools
            names = {tool.function.name for tool in allowed.tools}
            if missing := names - {tool["name"] for tool in tools}:
                raise FieldError("tool_choice", f"tool_choice allows {', '.join(sorted(missing))}; tools has no such "
                                 "function")
            required, tools = allowed.mode == "required", [tool for tool in tools if tool["name"] in names]
        with blamed("tools"):
            return Grammar.tool_calls(tools, required=required, name=name, answer=schema,
                                      parallel=self.parallel_tool_calls is not False)
