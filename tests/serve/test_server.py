"""A real server process: OpenAI's own client, streams, tools, structure, limits, clients that leave, SIGTERM."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jsonschema
import openai
import pytest

import lfm_jax as lfm
from lfm_jax.sampling import Sampling

PAGE = "docs/tutorials/serve.md"
KEY = "secret-key"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "year": {"type": "integer", "minimum": 0, "maximum": 99},
                   "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
    "required": ["name", "year", "tags"], "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
                                         "exact": {"type": "boolean"}}, "required": ["a", "exact"]}}},
    {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key=KEY, max_retries=0)


def test_models(client):
    [model] = client.models.list()
    assert (model.id, model.max_model_len) == ("tiny", 1024)
    assert client.models.retrieve("tiny").owned_by == "lfm_jax"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.chat.completions.create(model="gpt", messages=HELLO)


def test_a_completion_is_that_of_generate(client, checkpoint):
    model, tokenizer = lfm.load(checkpoint)
    for sampling in (Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5)):
        [text] = lfm.generate(model, tokenizer, ["the quick"], sampling, max_new_tokens=20)
        answer = client.completions.create(
            model="tiny", prompt="the quick", max_tokens=20, temperature=sampling.temperature, top_p=sampling.top_p,
            seed=sampling.seed, extra_body=dict(top_k=0, repetition_penalty=1.0),
        )
        assert answer.choices[0].text == text
        assert answer.usage.prompt_tokens == len(tokenizer.encode("the quick").ids)


def test_streams_are_their_answers_in_pieces(client):
    for n in (1, 3):
        asked = dict(model="tiny", messages=HELLO, max_tokens=30, seed=3, temperature=1.0, n=n)
        whole = client.chat.completions.create(**asked)
        texts, finish, usage = [""] * n, [None] * n, None
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                finish[choice.index] = choice.finish_reason or finish[choice.index]
        assert texts == [choice.message.content for choice in whole.choices]
        assert finish == [choice.finish_reason for choice in whole.choices]
        assert usage.model_dump() == whole.usage.model_dump()
    asked = dict(model="tiny", prompt=["the", "quick brown"], max_tokens=12, seed=3, temperature=1.0, n=2, echo=True)
    whole = client.completions.create(**asked)
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert all(text.startswith(start) for text, start in zip(texts, ["the", "the", "quick", "quick"], strict=True))


def test_stop_texts(client):
    whole = client.completions.create(model="tiny", prompt="the", max_tokens=40, temperature=0).choices[0].text
    stop = whole[5:7]
    cut = client.completions.create(model="tiny", prompt="the", max_tokens=40, temperature=0, stop=[stop, "never"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 40
    pieces = client.completions.create(model="tiny", prompt="the", max_tokens=40, temperature=0, stop=stop, stream=True)
    assert "".join(choice.text for chunk in pieces for choice in chunk.choices) == whole[: whole.index(stop)]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_stop_texts_may_be_special_tokens(client, kind):
    """Alone or after text, whole and in a stream, shown or not; tokens after them do not count."""
    name, likely = "<|im_start|>", {str(i): 60 for i in (6, *range(40, 48))}  # It, and letters.
    asked = dict(model="tiny", max_tokens=30, seed=0, temperature=5.0, top_p=1.0, logit_bias=likely)
    if kind == "text":
        create, asked = client.completions.create, asked | dict(prompt="the", logprobs=0)
    else:
        create, asked = client.chat.completions.create, asked | dict(messages=HELLO, logprobs=True)

    def answer(skip, stream=False, **more):
        extra = dict(top_k=0, min_p=0, repetition_penalty=1.0, skip_special_tokens=skip)
        got = create(**asked, **more, extra_body=extra, stream=stream)
        text, made, finish = "", 0, None
        for choice in (choice for chunk in (got if stream else [got]) for choice in chunk.choices):
            said = choice if kind == "text" else choice.delta if stream else choice.message
            text += (said.text if kind == "text" else said.content) or ""
            finish = choice.finish_reason or finish
            if choice.logprobs is not None:
                made += len(choice.logprobs.tokens if kind == "text" else choice.logprobs.content)
        assert stream or made == got.usage.completion_tokens
        return text, made, finish

    whole, most, _ = answer(skip=False)
    assert answer(skip=True)[0] == whole.replace(name, "")
    before = whole[: whole.index(name, 1)]
    assert before[-1:].strip()
    for stop, expected in ((name, before), ([before[-1] + name, "never"], before[:-1])):
        for skip in (True, False):
            for stream in (False, True):
                text, made, finish = answer(skip, stream, stop=stop)
                assert (text, finish) == (expected, "stop")
                assert made < most


def test_a_stop_text_may_be_what_begins_a_call(client):
    for stop, made in (("<|tool_call_start|>", 1), ("<|tool_call_start|>[", 2)):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, tools=TOOLS, tool_choice="required",
                                                stop=stop)
        choice = answer.choices[0]
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("", None, "stop")
        assert answer.usage.completion_tokens == made


def test_log_probabilities(client):
    chat = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, logprobs=True, top_logprobs=3,
                                          temperature=0, extra_body=dict(repetition_penalty=1.0))
    content = chat.choices[0].logprobs.content
    assert len(content) == 5
    for entry in content:
        assert [t.logprob for t in entry.top_logprobs] == sorted((t.logprob for t in entry.top_logprobs), reverse=True)
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # Greedy.
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    old = client.completions.create(model="tiny", prompt="the quick", max_tokens=3, logprobs=2, echo=True)
    told = old.choices[0].logprobs
    assert told.token_logprobs[0] is None
    assert all(p <= 0 for p in told.token_logprobs[1:])
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == old.usage.total_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits_its_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        asked = dict(model="tiny", messages=HELLO, max_tokens=200, response_format=form, temperature=1.5, seed=seed,
                     extra_body=dict(top_k=0))
        if stream:
            chunks = client.chat.completions.create(**asked, stream=True)
            text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        else:
            text = client.chat.completions.create(**asked).choices[0].message.content
        jsonschema.validate(json.loads(text), SCHEMA)
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=300, seed=1,
                                            response_format={"type": "json_object"})
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}], ids=str)
def test_tools_are_called_as_they_must_be(client, choice):
    for seed in range(3):
        asked = dict(model="tiny", messages=HELLO, max_tokens=250, tools=TOOLS, tool_choice=choice, seed=seed,
                     parallel_tool_calls=choice == "required", temperature=1.0, extra_body=dict(top_k=0))
        answer = client.chat.completions.create(**asked).choices[0]
        assert answer.finish_reason == "tool_calls"
        calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls]
        streamed = {}
        for chunk in client.chat.completions.create(**asked, stream=True):
            for call in chunk.choices[0].delta.tool_calls or []:
                name, arguments = streamed.get(call.index, ("", ""))
                streamed[call.index] = (name + (call.function.name or ""), arguments + call.function.arguments)
        assert [streamed[i] for i in range(len(calls))] == calls
        for name, arguments in calls:
            tool = next(t["function"] for t in TOOLS if t["function"]["name"] == name)
            jsonschema.validate(json.loads(arguments), tool["parameters"])
        if choice != "required":
            assert [name for name, _ in calls] == ["add"]
        history = [*HELLO, answer.message.model_dump(exclude_none=True)]
        history += [{"role": "tool", "tool_call_id": call.id, "content": "7"} for call in answer.message.tool_calls]
        assert client.chat.completions.create(model="tiny", messages=history, max_tokens=3, tools=TOOLS).choices


def test_the_client_of_the_docs(server):
    page = (Path(__file__).parents[2] / PAGE).read_text()
    [block] = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "OpenAI" in block]
    namespace = {}
    for old, new in (("http://127.0.0.1:8000", server), ('"none"', repr(KEY)), ("LFM2.5-350M", "tiny")):
        assert old in block
        block = block.replace(old, new)
    exec(compile(block, PAGE, "exec"), namespace)
    assert namespace["call"].name == "get_weather"
    assert isinstance(json.loads(namespace["call"].arguments)["city"], str)


def test_tools_may_be_left_alone(client):
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=10, tools=TOOLS,
                                                tool_choice=choice, temperature=0)
        assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_echo_of_one_token_and_offsets(client, checkpoint):
    """The first token of a prompt has no probability; what the text leaves out takes no room in it."""
    one = client.completions.create(model="tiny", prompt=[50], max_tokens=2, logprobs=1, echo=True).choices[0]
    assert len(one.logprobs.tokens) == 3
    assert one.logprobs.token_logprobs[0] is None
    told = client.completions.create(model="tiny", prompt="the quick", max_tokens=6, logprobs=1, echo=True,
                                     temperature=0).choices[0]
    at = [*told.logprobs.text_offset, len(told.text)]
    assert at[0] == at[1] == 0  # Bos.
    assert at == sorted(at)
    for token, begin, end in zip(told.logprobs.tokens[1:], at[1:-1], at[2:], strict=True):
        assert token.startswith("bytes:") or told.text[begin:end] in (token, "")


def test_tokens_after_a_stop_text_do_not_count(client):
    asked = dict(model="tiny", prompt="the", max_tokens=40, temperature=0, logprobs=0)
    whole = client.completions.create(**asked).choices[0]
    stop = whole.text[5:7]
    cut = client.completions.create(**asked, stop=stop)
    made = cut.usage.completion_tokens
    assert len(cut.choices[0].logprobs.tokens) == made
    assert whole.logprobs.tokens[:made] == cut.choices[0].logprobs.tokens
    joined = "".join(whole.logprobs.tokens[: made - 1])
    assert "\ufffd" in joined or stop not in joined


def test_the_document_tells_no_status_that_does_not_come(server):
    document = httpx.get(f"{server}/openapi.json", headers={"Authorization": f"Bearer {KEY}"}).json()
    responses = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"}


def metric(server, name):
    text = httpx.get(f"{server}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def wait_for(seen, seconds=60):
    """Until seen() is true."""
    until = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.01)


def wait_until_idle(server):
    wait_for(lambda: not metric(server, "lfm_slots_in_use") and not metric(server, "lfm_waiting"))


def test_a_client_that_leaves_frees_its_slots(server, client):
    asked = dict(model="tiny", messages=HELLO, max_tokens=900, n=6, temperature=1.0,
                 logit_bias={str(i): -100 for i in (2, 7)})
    cancelled = metric(server, 'lfm_continuations_total{finish="cancelled"}')
    stream = client.chat.completions.create(**asked, stream=True)
    next(iter(stream))
    assert metric(server, "lfm_slots_in_use") > 0
    stream.close()
    wait_until_idle(server)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.05).chat.completions.create(**asked)
    wait_until_idle(server)
    assert metric(server, 'lfm_continuations_total{finish="cancelled"}') > cancelled


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_is_noticed(server, client, stream):
    long = dict(model="tiny", messages=HELLO, max_tokens=900, n=6, temperature=1.0, stream=True,
                logit_bias={str(i): -100 for i in (2, 7)})
    body = json.dumps(dict(model="tiny", messages=HELLO, max_tokens=900, n=6, stream=stream)).encode()
    head = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: tiny\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n").encode()
    address = server.removeprefix("http://").split(":")

    def ended():
        return metric(server, 'lfm_continuations_total{finish="length"}')

    for _ in range(10):  # Again if the answer that holds all slots came to its end first: the machine may be busy.
        wait_until_idle(server)
        before = ended()
        busy = client.chat.completions.create(**long)
        next(iter(busy))
        prompts = metric(server, "lfm_prompt_tokens_total")
        with socket.create_connection((address[0], int(address[1]))) as leaver:
            leaver.sendall(head + body)
            wait_for(lambda before=before: metric(server, "lfm_waiting") or ended() > before)
        wait_for(lambda: not metric(server, "lfm_waiting"))
        after = metric(server, "lfm_prompt_tokens_total")
        held = ended() == before
        busy.close()
        wait_until_idle(server)
        if held:
            assert after == prompts  # It never had a slot.
            return
    raise AssertionError("the slots were never held for as long as a client waited and left")


def test_too_many_wait(server, client):
    status = []

    def ask():
        try:
            client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=200, n=6, temperature=1.0)
            status.append(200)
        except openai.RateLimitError as error:
            status.append(error.status_code)

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(status) == {200, 429}
    wait_until_idle(server)


def test_answers_are_alike_under_load(client):
    # No more than may wait at one time, since all may come within one turn.
    asked = [dict(model="tiny", messages=[{"role": "user", "content": f"hello {i}"}], max_tokens=10 + i, seed=i,
                  temperature=float(i % 2)) for i in range(6)]
    alone = [client.chat.completions.create(**one).choices[0].message.content for one in asked]
    together = [None] * len(asked)

    def ask(i):
        together[i] = client.chat.completions.create(**asked[i]).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_metrics(server, client):
    tokens, steps = metric(server, "lfm_tokens_total"), metric(server, "lfm_steps_total")
    client.completions.create(model="tiny", prompt="the", max_tokens=7, temperature=0, extra_body={"min_tokens": 7})
    assert metric(server, "lfm_tokens_total") == tokens + 7
    assert metric(server, "lfm_steps_total") == steps + 7
    assert metric(server, 'lfm_requests_total{path="/v1/completions",status="200"}') >= 1
    assert metric(server, "lfm_first_token_seconds_count") >= 1
    ends = 'lfm_continuations_total{{finish="{}"}}'.format
    before = [metric(server, ends(name)) for name in ("stop", "cancelled")]
    text = client.completions.create(model="tiny", prompt="the", max_tokens=30, temperature=0).choices[0].text
    # So many tokens that the engine cannot have come to their end before the stop text is seen.
    client.completions.create(model="tiny", prompt="the", max_tokens=900, temperature=0, stop=[text[3:6]],
                              extra_body={"min_tokens": 900})
    wait_until_idle(server)
    assert [metric(server, ends(name)) for name in ("stop", "cancelled")] == [before[0] + 1, before[1]]
    httpx.get(f"{server}/somewhere", headers={"Authorization": f"Bearer {KEY}"})
    assert metric(server, 'lfm_requests_total{path="other",status="404"}') >= 1


@pytest.fixture(scope="module")
def without_key(start_server):
    """(process, address) of a server of its own, which the last test that has it ends."""
    return start_server("--limits.body-seconds", "0.5", "--cors-origins", "https://a.example", key=None)


def test_pages_of_some_origins_may_use_the_server(without_key, server, key):
    _, base = without_key
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}
    for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
        before = httpx.options(f"{base}/v1/chat/completions", headers=asked | {"Origin": origin})
        assert before.headers.get("access-control-allow-origin") == allowed
        assert before.headers["x-request-id"].startswith("req_")
        answer = httpx.get(f"{base}/v1/models", headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed
    answer = httpx.get(f"{server}/v1/models", headers={"Origin": "https://a.example", "Authorization": f"Bearer {key}"})
    assert "access-control-allow-origin" not in answer.headers


def test_another_host_needs_a_key(without_key, server):
    _, base = without_key
    assert httpx.get(f"{base}/v1/models", headers={"Host": "localhost:1"}).status_code == 200
    answer = httpx.get(f"{base}/v1/models", headers={"Host": "evil.example:80"})
    assert answer.status_code == 400
    assert "without an API key" in answer.json()["error"]["message"]
    headers = {"Host": "evil.example", "Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{server}/v1/models", headers=headers).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(without_key):
    _, base = without_key
    with socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=30) as link:
        link.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 100\r\n\r\n{")
        assert link.recv(100).startswith(b"HTTP/1.1 408")


def test_a_head_that_does_not_come_is_not_waited_for(without_key):
    _, base = without_key
    for sent in (b"", b"GET /health HTTP/1.1\r\nHost: local"):
        with socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=30) as link:
            link.sendall(sent)
            assert link.recv(100) == b""
    # One that comes in pieces, and another one after it on the same connection, are as good as any.
    with socket.create_connection(("127.0.0.1", int(base.rsplit(":", 1)[1])), timeout=30) as link:
        for _ in range(2):
            link.sendall(b"GET /health HTTP/1.1\r\nHost: local")
            time.sleep(0.05)
            link.sendall(b"host\r\n\r\n")
            told = b""
            while not told.endswith(b'"ok"}'):
                told += link.recv(1000) or pytest.fail(f"closed after {told}")
            assert told.startswith(b"HTTP/1.1 200")


def test_sigterm_lets_what_runs_end(without_key):
    process, base = without_key
    answer = {}

    def ask():
        body = dict(model="tiny", messages=HELLO, max_tokens=900, min_tokens=900, temperature=1.0)
        answer["response"] = httpx.post(f"{base}/v1/chat/completions", json=body, timeout=60)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for(lambda: metric(base, "lfm_tokens_total"))
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert answer["response"].json()["usage"]["completion_tokens"] == 900
    assert process.wait(60) == 0


def test_what_does_not_end_in_time_is_told_so(start_server):
    process, base = start_server("--drain-seconds", "0", key=None)
    body = dict(model="tiny", prompt="the", max_tokens=900, min_tokens=900, n=6, stream=True)
    with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is closing"
    assert process.wait(60) == 0
    assert "Traceback" not in process.log.read_text()


def test_an_open_address_needs_a_key(checkpoint):
    env = {name: value for name, value in os.environ.items() if name != "LFM_API_KEY"}
    done = subprocess.run([sys.executable, "-m", "lfm_jax.cli", "serve", str(checkpoint), "--host", "0.0.0.0"],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "set a key in LFM_API_KEY" in done.stderr
