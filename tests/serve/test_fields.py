"""The rule of fields, for every field of OpenAI's API, and its table in the docs."""

import typing
from pathlib import Path

import pytest
from openai.types import chat as openai_chat
from openai.types import completion_create_params, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import ValidationError

from lfm_jax.serve import fields, messages, protocol, tools
from lfm_jax.serve.fields import Ignored, Refused, place, unknown_fields
from lfm_jax.serve.protocol import ChatBody, CompletionBody
from lfm_jax.serve.responses import ResponsesBody

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": HELLO}
TEXT = {"model": "tiny", "prompt": "hello"}
RESPONSE = {"model": "tiny", "input": "hello"}
FUNCTION = {"name": "f", "description": "Does it.", "parameters": {"type": "object", "properties": {}}, "strict": False}
TOOL = {"type": "function", "function": FUNCTION}
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "fields.md"


def problems(model, body):
    """(field, message) of each error."""
    try:
        model.model_validate(body)
    except ValidationError as error:
        return [(place(e["loc"]), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
    return []


OFFICIAL = [
    (CompletionBody, completion_create_params.CompletionCreateParamsNonStreaming),
    (ChatBody, chat_create_params.CompletionCreateParamsNonStreaming),
    (ResponsesBody, response_create_params.ResponseCreateParamsNonStreaming),
    (protocol.StreamOptions, openai_chat.ChatCompletionStreamOptionsParam),
    (messages.ChatMessage, openai_chat.ChatCompletionUserMessageParam),
    (messages.ChatMessage, openai_chat.ChatCompletionAssistantMessageParam),
    (messages.ChatMessage, openai_chat.ChatCompletionToolMessageParam),
    (messages.TextPart, openai_chat.ChatCompletionContentPartTextParam),
    (messages.RefusalPart, openai_chat.ChatCompletionContentPartRefusalParam),
    (messages.CalledTool, openai_chat.ChatCompletionMessageFunctionToolCallParam),
    (tools.ToolEntry, openai_chat.ChatCompletionFunctionToolParam),
    (tools.FunctionTool, shared_params.FunctionDefinition),
    (tools.AllowedTools, openai_chat.ChatCompletionAllowedToolsParam),
    (protocol.ResponseFormat, shared_params.ResponseFormatJSONSchema),
]


@pytest.mark.parametrize(("ours", "theirs"), OFFICIAL, ids=lambda c: c.__name__)
def test_every_official_field_is_known(ours, theirs):
    names = {field.alias or name for name, field in ours.model_fields.items()}
    assert {*typing.get_type_hints(theirs)} - names - {"stream"} == set()


BODIES = {CompletionBody: TEXT, ChatBody: CHAT, ResponsesBody: RESPONSE}
EACH = [(model, name) for model in BODIES for name in model.model_fields]


@pytest.mark.parametrize(("model", "name"), EACH, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_each_field_does_what_the_table_says(model, name):
    field, body = model.model_fields[name], BODIES[model]
    if not field.is_required():
        assert problems(model, body | {name: None}) == []
    [mark] = [m for m in field.metadata if isinstance(m, (Ignored, Refused))] or [None]
    if isinstance(mark, Ignored):
        for value in ("x", 1, True, [], {"a": 1}):
            assert problems(model, body | {name: value}) == []
    elif isinstance(mark, Refused):
        for value in (False, [], {}, "", *mark.neutral):
            assert problems(model, body | {name: value}) == []
        for value in ({"a": 1}, ["b"], True, "no such value"):
            assert problems(model, body | {name: value}) == [(name, f"not supported: {mark.instead}")]


def test_unknown_fields_are_accepted_and_named_at_every_level():
    body = ChatBody.model_validate(CHAT | {
        "colour": 1, "size": None, "tools": [{"type": "function", "function": {"name": "f", "kind": 2}, "extra": 3}],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a", "shade": 4}], "mood": 5}] * 2,
        "stream_options": {"pace": 6}, "b\nd": 7,
    })
    assert {*unknown_fields(body)} == {"colour", "b?d", "tools[].extra", "tools[].function.kind",
                                       "messages[].mood", "messages[].content[].shade", "stream_options.pace"}


def test_the_log_names_an_unknown_field_once(capsys):
    log, body = fields.UnknownFieldLog(), ChatBody.model_validate(CHAT | {"colour": 1})
    for _ in range(2):
        assert log.headers(body, "req_1") == {"x-lfm-unknown-fields": "colour"}
    assert capsys.readouterr().err.count("request req_1 has the unknown field colour") == 1
    assert log.headers(ChatBody.model_validate(CHAT), "req_2") == {}


NEUTRAL = [
    dict(stop=""), dict(stop=[]), dict(stop=["", "x"]), dict(logit_bias={}), dict(frequency_penalty=0), dict(n=1),
    dict(functions=[]), dict(function_call="auto"), dict(tools=[]), dict(tool_choice="auto"), dict(top_logprobs=0),
    dict(modalities=["text"]), dict(response_format={"type": "text"}), dict(stream_options={"include_usage": True}),
    dict(tools=[{"type": "function", "function": {"name": "f"}}]),
    dict(tools=[{"function": {"name": "f", "parameters": {}}}]), dict(top_k=-1), dict(max_tokens=10**9),
]


@pytest.mark.parametrize("given", NEUTRAL, ids=str)
def test_neutral_values_are_accepted(given):
    assert problems(ChatBody, CHAT | given) == []


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SENT_BACK = {
    "a stream's delta": {"role": "assistant", "content": "", "tool_calls": [CALL | {"index": 0}]},
    "what parse() gives": {"role": "assistant", "content": None, "parsed": None, "refusal": None, "audio": None,
                           "annotations": [], "function_call": None, "tool_calls": [
                               CALL | {"function": CALL["function"] | {"parsed_arguments": {"a": 1}}}]},
    "litellm": {"role": "assistant", "content": "x", "provider_specific_fields": {"refusal": None}, "tool_calls": None},
    "reasoning": {"role": "assistant", "content": "x", "reasoning_content": "y", "id": "msg_1"},
    "a refusal": {"role": "assistant", "content": None, "refusal": "no"},
    "an old call": {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
    "an answer without a word": {"role": "assistant", "content": None},
    "an output of a function": {"role": "function", "name": "f", "content": "7"},
    "arguments as data": {"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f", "arguments": {}}}]},
}


@pytest.mark.parametrize("case", SENT_BACK)
def test_what_was_received_can_be_sent_back(case):
    body = ChatBody.model_validate(CHAT | {"messages": [*HELLO, SENT_BACK[case]]})
    assert unknown_fields(body) == []
    message = messages.plain_messages(body.messages)[1]
    assert message["role"] in ("assistant", "tool")
    assert isinstance(message["content"], str)
    if "call" in case or "delta" in case or "parse" in case or "arguments" in case:
        assert [(call["name"], call["arguments"]) for call in message["tool_calls"]] == [("f", {})]


WRONG = [
    (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
     "messages[0].content[0]", "images are not supported; the model reads text only"),
    (dict(messages=[{"role": "user", "content": 5}]), "messages[0].content", "expected a text or a list of parts"),
    (dict(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "Field required"),
    (dict(tools=[{"type": "web_search"}]), "tools[0]",
     'tools of type "web_search" are not supported; describe a function instead'),
    (dict(tool_choice={"type": "custom"}), "tool_choice",
     'expected none, auto, required, {"type": "function", ...} or {"type": "allowed_tools", ...}'),
    (dict(stop=5), "stop", "expected a text, or a list of texts"),
    (dict(logit_bias={"x": 1}), "logit_bias",
     "expected an object of token ids (as texts) and numbers from -100 to 100"),
    (dict(functions=[FUNCTION]), "functions", "not supported: describe them in tools"),
    (dict(n=0), "n", "Input should be greater than or equal to 1"),
]


@pytest.mark.parametrize(("given", "field", "message"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_an_error_is_about_the_one_thing_that_is_wrong(given, field, message):
    assert problems(ChatBody, CHAT | given) == [(field, message)]


def test_several_constraints_are_refused():
    body = ChatBody.model_validate(CHAT | {"guided_regex": "a+", "response_format": {"type": "json_object"}})
    with pytest.raises(ValueError, match=r"2 constraints \(json, regex\)"):
        _ = body.grammar


def test_a_response_asks_for_the_same_as_a_chat():
    body = ResponsesBody.model_validate({
        "model": "tiny", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5, "store": True,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                  {"type": "reasoning", "id": "rs_1", "summary": []},
                  {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
                   "content": [{"type": "output_text", "text": "I call.", "annotations": []}]},
                  {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{\"a\": 1}", "id": "fc_1"},
                  {"type": "function_call_output", "call_id": "c1", "output": "7"}],
        "tools": [{"type": "function", "name": "f", "parameters": None, "strict": True, "description": None}],
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}},
        "tool_choice": {"type": "function", "name": "f"},
    })
    assert unknown_fields(body) == []
    chat = body.as_chat()
    assert messages.plain_messages(chat.messages) == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "I call.", "tool_calls": [{"id": "c1", "name": "f", "arguments": {"a": 1}}]},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    assert chat.functions_offered == [{"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}]
    assert chat.schemas == [{"name": "f", "parameters": {"type": "object", "properties": {}}}]
    assert chat.tool_choice == tools.NamedTool(type="function", function=tools.NamedFunction(name="f"))
    assert (chat.max_completion_tokens, chat.temperature) == (9, 0.5)
    assert chat.response_format.schema_asked() == {"type": "object"}


@pytest.mark.parametrize(("given", "field"), [
    (dict(input=[{"type": "item_reference", "id": "x"}]), "input[0]"), (dict(previous_response_id="resp_1"),
                                                                        "previous_response_id"),
    (dict(tools=[{"type": "web_search"}]), "tools[0]"), (dict(input=5), "input"), (dict(background=True), "background"),
])
def test_what_a_response_cannot_be_asked_for(given, field):
    assert [f for f, _ in problems(ResponsesBody, RESPONSE | given)] == [field]


def test_the_docs_say_of_each_field_what_happens():
    rows = dict(fields.described(ChatBody))
    assert rows["logit_bias"] == "honoured: of any size"
    assert rows["user"] == f"accepted, changes nothing: {fields.ACCOUNT}"
    assert rows["function_call"] == '`null` or `"none"` or `"auto"`, else refused: use tool_choice'
    assert [*rows] == [*ChatBody.model_fields]
    page = PAGE.read_text(encoding="utf-8")
    assert [model for model in BODIES if f"{{request-fields}} {model.__module__}.{model.__name__}" not in page] == []
