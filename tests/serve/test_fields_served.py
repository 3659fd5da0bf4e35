"""What the fields of a request do, against a real server."""

import json
import re

import httpx
import jsonschema
import openai
import pydantic
import pytest

import lfm_jax as lfm
from lfm_jax.text.chat import encode_chat

HELLO = [{"role": "user", "content": "hello"}]
GREEDY = dict(temperature=0, extra_body=dict(repetition_penalty=1.0, top_k=0))
LETTERS = {str(i): 60 for i in range(40, 48)}
SCHEMA = {"type": "object", "properties": {"year": {"type": "integer", "minimum": 0, "maximum": 99}},
          "required": ["year"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]}}}
    for name in ("add", "take")]


@pytest.fixture(scope="module")
def client(server, key):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def model(checkpoint):
    return lfm.load(checkpoint)


def test_penalties(client):
    """Tokens that were generated become less likely: with a large one more of them are different."""
    asked = dict(model="tiny", prompt="the", max_tokens=8, logprobs=0, **GREEDY, logit_bias=LETTERS)
    plain = client.completions.create(**asked).choices[0].logprobs.tokens
    assert len({*plain}) < 8
    for penalty in ("presence_penalty", "frequency_penalty"):
        changed = client.completions.create(**asked, **{penalty: 2.0}).choices[0].logprobs.tokens
        assert changed[0] == plain[0]  # The prompt does not count.
        assert len({*changed}) > len({*plain})


def test_a_bias_of_any_size(client, model):
    size = model[0].config.vocab_size
    bias = {str(i): -100 for i in range(size)} | {"50": 0}
    answer = client.completions.create(model="tiny", prompt="the", max_tokens=5, logit_bias=bias, logprobs=0)
    assert len({*answer.choices[0].logprobs.tokens}) == 1


def test_stop_token_ids(client):
    asked = dict(model="tiny", prompt="the", max_tokens=30, temperature=0, logprobs=0)
    plain = client.completions.create(**asked, extra_body=dict(repetition_penalty=1.0))
    stop = client.completions.create(**asked, logit_bias={"50": 100},
                                     extra_body=dict(repetition_penalty=1.0, stop_token_ids=[50]))
    assert plain.usage.completion_tokens > 1
    assert (stop.usage.completion_tokens, stop.choices[0].finish_reason) == (1, "stop")


def test_scoring_a_prompt(client, model):
    """max_tokens 0 with echo: log-probabilities of the prompt's tokens and no other, of any length that fits."""
    for prompt, logprobs in (("the quick brown", 1), ([7] * 1024, 0)):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=logprobs)
        [choice] = answer.choices
        tokens = answer.usage.prompt_tokens
        assert (answer.usage.completion_tokens, choice.finish_reason) == (0, "length")
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == tokens
        assert choice.logprobs.token_logprobs[0] is None
        assert all(p <= 0 for p in choice.logprobs.token_logprobs[1:])
    assert client.completions.create(model="tiny", prompt="a", max_tokens=0).choices[0].text == ""


def test_the_chosen_token_is_among_the_likeliest(client):
    for logprobs in (0, 2):
        told = client.completions.create(model="tiny", prompt="the", max_tokens=20, temperature=5, logprobs=logprobs,
                                         extra_body=dict(top_k=0)).choices[0].logprobs
        for token, value, best in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
            assert best[token] == value
            assert len(best) <= logprobs + 1


def test_usage_as_it_grows_and_what_the_cache_had(client):
    prompt = "the quick brown fox " * 40
    asked = dict(model="tiny", prompt=prompt, max_tokens=5)
    client.completions.create(**asked)
    again = client.completions.create(**asked)
    assert 0 < again.usage.prompt_tokens_details.cached_tokens < again.usage.prompt_tokens
    options = {"include_usage": True, "continuous_usage_stats": True}
    made = [chunk.usage.completion_tokens for chunk in
            client.completions.create(**asked, stream=True, stream_options=options)]
    assert made == sorted(made)
    assert made[-1] == again.usage.completion_tokens


def test_an_answer_ends_where_the_context_does(client):
    answer = client.completions.create(model="tiny", prompt=[7] * 1020, max_tokens=10**6,
                                       logit_bias={str(i): -100 for i in (2, 7)})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 4


def test_unknown_fields_are_named_in_the_answer(client):
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=[HELLO[0] | {"mood": "good"}], max_tokens=2, extra_body={"colour": 1, "size": None},
        reasoning_effort="low", verbosity="low", store=True, prompt_cache_key="x", service_tier="flex")
    assert raw.headers["x-lfm-unknown-fields"] == "colour, messages[].mood"
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().choices


CONSTRAINTS = [
    (dict(guided_regex="[ab]{3}"), "[ab]{3}"), (dict(guided_choice=["yes", "no"]), "yes|no"),
    (dict(guided_grammar='start: "x" /[0-9]{2}/'), "x[0-9]{2}"), (dict(structured_outputs={"regex": "c+d"}), "c+d"),
    (dict(structured_outputs={"choice": ["maybe"]}), "maybe"), (dict(guided_json={"enum": [1, 2]}), "[12]"),
    (dict(structured_outputs={"json": {"const": "k"}}), '"k"'),
]


BOTH = [(kind, *case) for case in CONSTRAINTS for kind in ("chat", "text")]
CHATS = [("chat", dict(response_format={"type": "json_object", "schema": {"enum": [3]}}), "3")]


@pytest.mark.parametrize(("kind", "given", "pattern"), BOTH + CHATS, ids=str)
def test_constraints_by_the_names_of_other_servers(client, kind, given, pattern):
    for seed in range(3):
        asked = dict(model="tiny", max_tokens=40, seed=seed, temperature=1.0, extra_body=given)
        if kind == "chat":
            choice = client.chat.completions.create(messages=HELLO, **asked).choices[0]
            text = choice.message.content
        else:
            choice = client.completions.create(prompt="the", **asked).choices[0]
            text = choice.text
        if choice.finish_reason == "stop":
            assert re.fullmatch(pattern, text)
        else:
            assert "+" in pattern


def test_calls_or_an_answer_in_the_format(client, model):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    seen = set()
    start = model[1].token_to_id("<|tool_call_start|>")
    for bias in (-100, 100):
        choice = client.chat.completions.create(
            model="tiny", messages=HELLO, tools=TOOLS, response_format=form, max_tokens=150, seed=1,
            temperature=1.0, logit_bias={str(start): bias}, extra_body=dict(top_k=0)).choices[0]
        if choice.message.tool_calls:
            seen.add("calls")
            assert choice.finish_reason == "tool_calls"
            assert not choice.message.content
        elif choice.finish_reason == "stop":
            seen.add("answer")
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert seen == {"calls", "answer"}


def test_a_continued_answer_keeps_to_its_format(client):
    begun = '{"year": 7'
    message = client.chat.completions.create(
        model="tiny", messages=[*HELLO, {"role": "assistant", "content": begun}], max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        extra_body=dict(continue_final_message=True)).choices[0].message
    value = json.loads(begun + message.content)
    jsonschema.validate(value, SCHEMA)
    assert str(value["year"]).startswith("7")


BREAKS = "a\u2028b\u2029c\u0085d"


@pytest.mark.parametrize(("path", "asked", "text_of"), [
    ("chat/completions", dict(messages=HELLO), lambda e: e["choices"][0]["delta"].get("content")),
    ("completions", dict(prompt="a"), lambda e: e["choices"][0]["text"]),
    ("responses", dict(input="a", text={"format": {"type": "json_schema", "name": "x", "schema": {"enum": [BREAKS]}}}),
     lambda e: e["delta"] if e["type"] == "response.output_text.delta" else ""),
])
def test_a_stream_has_no_character_that_clients_break_lines_at(server, key, path, asked, text_of):
    fields = dict(max_tokens=60, guided_choice=[BREAKS]) if path != "responses" else {}
    answer = httpx.post(f"{server}/v1/{path}", headers={"Authorization": f"Bearer {key}"}, timeout=120,
                        json=dict(model="tiny", stream=True) | asked | fields)
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert all(line.startswith(("data: ", "event: ")) for line in answer.text.splitlines() if line)
    text = "".join(text_of(json.loads(line)) or "" for line in data if line != "[DONE]")
    assert text == (json.dumps(BREAKS, ensure_ascii=False) if path == "responses" else BREAKS)


@pytest.mark.parametrize("stream", [False, True])
def test_responses_tell_the_same_logprobs_as_chats(client, stream):
    """Also of tokens that are a part of a character only."""
    asked = dict(model="tiny", temperature=0, top_p=1)
    text = "the € x"
    body = {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"enum": [text]}}}}
    chat = client.chat.completions.create(
        messages=HELLO, logprobs=True, top_logprobs=2, max_tokens=40, **asked,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [text]}}})
    response = client.responses.create(input=HELLO, include=["message.output_text.logprobs"], top_logprobs=2,
                                       max_output_tokens=40, stream=stream, extra_body=body, **asked)
    streamed = []
    if stream:
        events = [*response]
        streamed = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
        response = events[-1].response
    [part] = response.output[0].content
    expected = [(entry.token, entry.logprob) for entry in chat.choices[0].logprobs.content]
    assert part.text == json.dumps(text, ensure_ascii=False)
    assert [(entry.token, entry.logprob) for entry in part.logprobs] == expected
    assert len(expected) > len(text) - 4
    assert [(entry.token, entry.logprob) for entry in streamed] == expected[: len(streamed)]


def test_what_is_relaxed_of_a_tool_is_named_in_the_answer(client):
    tags = {"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "string"}}
    tool = {"type": "function", "function": {"name": "label", "parameters": {
        "type": "object", "properties": {"tags": tags}}}}
    asked = dict(model="tiny", messages=HELLO, max_tokens=3, tool_choice="required")
    raw = client.chat.completions.with_raw_response.create(tools=[tool], **asked)
    assert raw.headers["x-lfm-relaxed"] == "tool 'label': parameters/properties/tags/propertyNames"
    assert "x-lfm-relaxed" not in client.chat.completions.with_raw_response.create(tools=TOOLS, **asked).headers
    tool["function"]["strict"] = True
    with pytest.raises(openai.BadRequestError, match="propertyNames"):
        client.chat.completions.create(tools=[tool], **asked)


def test_allowed_tools(client):
    choice = {"type": "allowed_tools", "allowed_tools": {
        "mode": "required", "tools": [{"type": "function", "function": {"name": "take"}}]}}
    for seed in range(3):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice=choice,
                                                max_tokens=200, seed=seed, temperature=1.0)
        assert {call.function.name for call in answer.choices[0].message.tool_calls} == {"take"}


def test_a_call_that_is_cut_leaves_no_text(client):
    for stream in (False, True):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required",
                                                max_tokens=5, stream=stream)
        if stream:
            text, finish = "", None
            for chunk in answer:
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        else:
            text, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
        assert (text, finish) == ("", "length")


def test_a_last_message_is_continued(client, model):
    network, tokenizer = model
    messages = [*HELLO, {"role": "assistant", "content": "the quick "}]
    prompt = encode_chat(tokenizer, network.config, None, messages, continue_final=True)
    expected = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, **GREEDY).choices[0].text
    for given in (dict(continue_final_message=True), dict(continue_final_message=True, add_generation_prompt=False)):
        extra = GREEDY["extra_body"] | given
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0,
                                                extra_body=extra)
        assert answer.choices[0].message.content == expected
    prefixed = [*HELLO, messages[1] | {"prefix": True}]
    answer = client.chat.completions.create(model="tiny", messages=prefixed, max_tokens=12, **GREEDY)
    assert answer.choices[0].message.content == expected


# -------------------------------------------------------------------- responses


def test_a_response_is_the_chat_that_it_stands_for(client):
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "system", "content": "Be brief."}, *HELLO],
                                          max_tokens=20, temperature=0)
    answer = client.responses.create(model="tiny", instructions="Be brief.", input="hello", max_output_tokens=20,
                                     temperature=0)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (
        chat.usage.prompt_tokens, chat.usage.completion_tokens)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "take"}], ids=str)
def test_a_streamed_response_is_the_whole_one(client, choice):
    tools = [{"type": "function", **tool["function"], "strict": True} for tool in TOOLS]
    asked = dict(model="tiny", input="hello", tools=tools, tool_choice=choice, max_output_tokens=200)
    with client.responses.stream(**asked) as stream:
        events = [*stream]
        whole = stream.get_final_response()
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    calls = [item for item in whole.output if item.type == "function_call"]
    assert calls
    for call in calls:
        pieces = [e.delta for e in events
                  if e.type == "response.function_call_arguments.delta" and e.item_id == call.id]
        assert "".join(pieces) == call.arguments
        jsonschema.validate(json.loads(call.arguments), TOOLS[0]["function"]["parameters"])
    history = [{"role": "user", "content": "hello"}, *(item.model_dump(exclude_none=True) for item in whole.output)]
    history += [{"type": "function_call_output", "call_id": call.call_id, "output": "7"} for call in calls]
    assert client.responses.create(model="tiny", input=history, tools=tools, max_output_tokens=3).id


def test_a_response_is_parsed(client):
    class Answer(pydantic.BaseModel):
        year: int = pydantic.Field(ge=0, le=99)

    answer = client.responses.parse(model="tiny", input="hello", text_format=Answer, max_output_tokens=60)
    assert isinstance(answer.output_parsed, Answer)
    chat = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Answer, max_tokens=60)
    assert isinstance(chat.choices[0].message.parsed, Answer)
    again = client.chat.completions.create(model="tiny", max_tokens=3,
                                           messages=[*HELLO, chat.choices[0].message, *HELLO])
    assert again.choices
