"""Requests that a real server refuses: what it says of them, and to whom it answers at all."""

import json

import httpx
import openai
import pytest
from test_server import HELLO, KEY, TOOLS


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0)


BAD = {
    "temperature": (dict(temperature=-1), "temperature", "temperature"),
    "too many": (dict(n=7), "n is 7 for 1 prompts; at most 6", "n"),
    "bias": (dict(logit_bias={"x": 1}), "logit_bias", "logit_bias"),
    "bias beyond": (dict(logit_bias={"99999": 1}), "token ids lie in", "logit_bias"),
    "stop id beyond": (dict(stop_token_ids=[99999]), "token ids lie in", "stop_token_ids"),
    "many stop ids": (dict(stop_token_ids=[*range(20)]), "at most 8 can end an answer", "stop_token_ids"),
    "top": (dict(top_logprobs=2), "top_logprobs goes with", "top_logprobs"),
    "schema": (dict(response_format={"type": "json_schema", "json_schema": {"schema": {"type": "strange"}}}), "schema",
               "response_format"),
    "no schema": (dict(response_format={"type": "json_schema"}), "json_schema is missing", "response_format"),
    "schema size": (dict(response_format={"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}),
                    "larger than 20000", None),
    "tool": (dict(tools=[{"type": "function", "function": {"name": "a b"}}]), "a b", "tools"),
    "no tool": (dict(tool_choice="required"), "tools has none", "tool_choice"),
    "image": (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
              "images are not supported", "messages[0].content[0]"),
    "a type of part that is no word": (dict(messages=[{"role": "user", "content": [{"type": {}, "text": "x"}]}]),
                                       'not {}', "messages[0].content[0]"),
    "no content": (dict(messages=[{"role": "user"}]), "messages[0]: a message of role user has no content",
                   "messages[0]"),
    "role": (dict(messages=[{"role": "king", "content": "x"}]), "role", "messages[0].role"),
    "nobody": (dict(messages=[]), "messages", "messages"),
    "two constraints": (dict(guided_regex="a", guided_choice=["b"]), "2 constraints", "guided_choice"),
    "a pattern with tools": (dict(tools=TOOLS, guided_regex="a"), "not with a regex", "guided_regex"),
    "nothing to continue": (dict(continue_final_message=True), "only a last message of the assistant",
                            "messages"),
    "an unknown function": (dict(tools=TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": {
        "mode": "auto", "tools": [{"type": "function", "function": {"name": "zap"}}]}}), "allows zap", "tool_choice"),
    "a function that is not there": (dict(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "zap"}}),
                                     "names zap", "tool_choice"),
    "a schema beside tools": (dict(tools=TOOLS, response_format={"type": "json_object", "schema": {"type": "strange"}}),
                              "strange", "response_format"),
    "messages as a variable": (dict(chat_template_kwargs={"messages": []}), "messages cannot be set here",
                               "chat_template_kwargs"),
    "half a pair": (dict(messages=[{"role": "user", "content": "\ud800"}]), "surrogate", "messages"),
    "a grammar that ends nowhere": (dict(guided_grammar='start: "x" A\nA: /y/ & /z/'), "cannot follow its grammar",
                                    None),
    "a grammar that takes too much": (dict(guided_grammar="start: A\nA: " + " & ".join(
        f"/.*a{i}.*/" for i in range(30))), "takes more than 1 s", "guided_grammar"),
    "a beginning that does not fit": (dict(
        messages=[*HELLO, {"role": "assistant", "content": "no", "prefix": True}], guided_regex="yes|maybe"),
        "does not begin as the answer must", "messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_why(server, name):
    changes, message, param = BAD[name]
    content = json.dumps(dict(model="tiny", messages=HELLO, max_tokens=5) | changes)
    answer = httpx.post(f"{server}/v1/chat/completions", content=content, timeout=60, headers={
        "Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
    assert answer.status_code == (413 if name == "schema size" else 400)
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] == param


OF_RESPONSES = {
    "no tool": (dict(tool_choice="required"), "tool_choice asks for a tool", "tool_choice"),
    "arguments": (dict(instructions="be", input=[*HELLO, {"type": "reasoning"}, {
        "type": "function_call", "call_id": "1", "name": "f", "arguments": "{"}]), "input[2]: arguments", "input[2]"),
    "schema": (dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"type": "strange"}}}), "strange",
               "text.format"),
    "not a number": (dict(metadata={"a": float("nan")}), "metadata comes back", "metadata"),
    "half a pair": (dict(metadata={"a": "\ud800"}), "metadata comes back", "metadata"),
    "half a pair in a tool": (dict(tool_choice="none", tools=[{"type": "function", "name": "f", "parameters": {
        "type": "object", "properties": {"\ud800": {}}}}]), "surrogate", "tools"),
    "type": (dict(input=[{"type": "picture"}]), 'type "picture" are not supported', "input[0]"),
    "a message that is not there": (dict(tools=[{"type": "function", "name": "messages[7]"}]), "messages[7]", "tools"),
    "nothing": (dict(input=[{"type": "reasoning"}]), "input has no message", "input"),
    "circle": (dict(text={"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#"}}}), "schema",
               "text.format"),
}


@pytest.mark.parametrize("name", OF_RESPONSES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_for_responses_say_why_in_their_own_words(server, name, stream):
    changes, message, param = OF_RESPONSES[name]
    body = json.dumps(dict(model="tiny", input="hello", max_output_tokens=5, stream=stream) | changes)
    answer = httpx.post(f"{server}/v1/responses", content=body, headers={
        "Authorization": f"Bearer {KEY}", "Content-Type": "application/json"})
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize("name", [
    "template", "tools", "documents", "add_generation_prompt", "bos_token", "specials", "self", "strftime_now", "a b"])
def test_variables_of_the_template_of_any_name(server, name):
    answer = httpx.post(f"{server}/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"},
                        json=dict(model="tiny", messages=HELLO, max_tokens=1, chat_template_kwargs={name: "x"}))
    taken = name in ("tools", "documents", "add_generation_prompt")
    assert answer.status_code == (400 if taken else 200), answer.text


def test_every_answer_names_its_request(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    seen = set()
    for method, path, given, status in (
        ("GET", "/v1/models", {"headers": headers}, 200), ("GET", "/v1/models", {}, 401),
        ("GET", "/nowhere", {"headers": headers}, 404), ("POST", "/v1/chat/completions", {"headers": headers}, 400),
        ("POST", "/v1/completions", {"headers": headers, "content": b"x" * 30_000}, 413),
        ("POST", "/v1/completions", {"headers": headers, "json": dict(model="tiny", prompt="a", stream=True)}, 200),
    ):
        answer = httpx.request(method, f"{server}{path}", **given)
        assert answer.status_code == status
        seen.add(answer.headers["x-request-id"])
    assert len(seen) == 6
    assert all(name.startswith("req_") for name in seen)


def test_a_prompt_beyond_the_context_is_called_what_clients_look_for(client):
    messages = [{"role": "user", "content": "hello " * 2000}]
    for ask in (lambda: client.chat.completions.create(model="tiny", messages=messages),
                lambda: client.responses.create(model="tiny", input=messages),
                lambda: client.completions.create(model="tiny", prompt=[7] * 1024, max_tokens=1)):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1024 tokens") as caught:
            ask()
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param in ("messages", "input", "prompt")


def test_bodies_that_are_none_say_where(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    for content, kind, message in (
        (b'{"model": "tiny",\n  "messages": [}', "application/json", "not JSON: Expecting value at line 2, column 16"),
        (b"[1]", "application/json", "not a JSON object"), (b"", "application/json", "body is missing"),
        (b'{"model": "tiny"}', "text/plain", "content-type: application/json"),
        (b'{"messages": []}', "application/json", "model: is missing"),
    ):
        answer = httpx.post(f"{server}/v1/chat/completions", headers=headers | {"Content-Type": kind}, content=content)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
    for method, path, status in (("GET", "/v1/embeddings", 404), ("PUT", "/v1/models", 405)):
        answer = httpx.request(method, f"{server}{path}", headers=headers)
        assert answer.status_code == status
        message = answer.json()["error"]["message"]
        why = ": 'tiny' is a causal model, whose tokens see no later ones; serve an encoder, LFM2.5-Embedding"
        assert message.startswith(
            f"there is no {method} {path}{why if path == '/v1/embeddings' else ''}; this server has ")
        assert "POST /v1/chat/completions" in message


def test_the_key(server):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"},
                    [("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {KEY}")]):
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            answer = httpx.get(f"{server}{path}", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    for scheme in ("bearer", "BEARER"):
        assert httpx.get(f"{server}/v1/models", headers={"Authorization": f"{scheme} {KEY}"}).status_code == 200
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}
    assert "<title>lfm_jax</title>" in httpx.get(f"{server}/").text


@pytest.mark.parametrize("schema", [
    {"$ref": "#"}, {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
], ids=str)
def test_references_in_a_circle_are_the_clients_mistake(server, schema):
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    answer = httpx.post(f"{server}/v1/chat/completions", headers={"Authorization": f"Bearer {KEY}"},
                        json=dict(model="tiny", messages=HELLO, max_tokens=5, response_format=form), timeout=60)
    assert answer.status_code == 400
    assert "leads back to itself" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("schema", "message"), [
    ({"type": 5}, "type is 5; expected a type"), ({"type": [[1]]}, "type is"), ({"required": [[]]}, "required is"),
    ({"type": "number", "multipleOf": True}, "multipleOf is True; expected a number"),
    ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum is True"),
    ({"type": "integer", "minimum": 10**400}, "expected what a float can hold"),
    ({"type": "object", "$id": 5}, "$id is 5; expected a text"),
    ({"pattern": "^((a{1,1000}){1,1000}){1,1000}$"}, "make more than 10000 characters"),
    ({"allOf": [{"pattern": f".*{c}0.{{3}}.*"} for c in "abcdefghijklmnopqrst"]}, "20 patterns and formats for one"),
], ids=str)
def test_malformed_schemas_say_why(server, schema, message):
    headers = {"Authorization": f"Bearer {KEY}"}
    asked = dict(model="tiny", messages=HELLO, max_tokens=5)
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {
        "type": "object", "properties": {"x": {"type": "string"} | schema}}}}
    for extra in (dict(response_format=form), dict(tools=[tool])):
        answer = httpx.post(f"{server}/v1/chat/completions", headers=headers, json=asked | extra, timeout=60)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_halves_of_surrogate_pairs_and_tools_that_are_not_called(server):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    for path, body in (("completions", r'{"model": "tiny", "prompt": "a\ud800"}'),
                       ("chat/completions", r'{"model": "tiny", "messages": [{"role": "user", "content": "\ud83d"}]}')):
        answer = httpx.post(f"{server}/v1/{path}", headers=headers, content=body)
        assert answer.status_code == 400
        assert "half of a surrogate pair" in answer.json()["error"]["message"]
    call = r'{"id": "x", "function": {"name": "\ud800", "arguments": "5"}}'
    body = f'{{"model": "tiny", "messages": [{{"role": "assistant", "tool_calls": [{call}]}}]}}'
    answer = httpx.post(f"{server}/v1/chat/completions", headers=headers, content=body)
    assert answer.status_code == 400
    assert "are not a JSON object" in answer.json()["error"]["message"]
    body = dict(model="tiny", messages=HELLO, max_tokens=2, tools=[{"type": "function", "function": {"name": "a b"}}])
    for choice, status in (("none", 200), ("auto", 400)):
        answer = httpx.post(f"{server}/v1/chat/completions", headers=headers, json=body | {"tool_choice": choice})
        assert answer.status_code == status


def test_long_lists_of_nonsense_are_refused_at_once(server):
    headers = {"Authorization": f"Bearer {KEY}"}
    for body in (dict(messages=[5] * 4000), dict(messages=[{"role": "user", "content": [5] * 4000}])):
        answer = httpx.post(f"{server}/v1/chat/completions", headers=headers, json=body | {"model": "tiny"})
        assert answer.status_code == 400
        assert len(answer.json()["error"]["message"]) < 500


def test_bodies_have_a_limit_told_or_not(server):
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    large = json.dumps(dict(model="tiny", prompt="x" * 30_000)).encode()
    assert httpx.post(f"{server}/v1/completions", headers=headers, content=large).status_code == 413

    def chunks():
        for i in range(0, len(large), 1000):
            yield large[i : i + 1000]

    assert httpx.post(f"{server}/v1/completions", headers=headers, content=chunks()).status_code == 413
