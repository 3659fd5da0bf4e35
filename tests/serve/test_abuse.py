"""A real server under what it should not get: generated and malformed requests, and a crowd whose clients leave."""

import asyncio
import collections
import copy
import json
import random
import re
import signal
import time
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ANYWHERE = {405, 413}
"""What any path answers to another method, and to too large a body before anything else is looked at."""


def test_what_the_document_allows_gets_what_it_tells(server, key):
    headers = {"Authorization": f"Bearer {key}"}
    document = schemathesis.openapi.from_url(f"{server}/openapi.json", headers=headers)
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:

        @settings(max_examples=60)
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(headers=headers, timeout=60, checks=[
                not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance])

        check()


# -------------------------------------------------------------------- requests

TOOL = {"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]}}}
FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["left", "right", "straight on"]}}}
SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False, "properties": {
        "a": {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 1},
        "b": {"type": ["string", "null"], "maxLength": 4},
        "c": {"type": "array", "items": {"enum": ["x", 1]}, "maxItems": 2},
        "d": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/e"}]}},
    "$defs": {"e": {"type": "string", "pattern": "^[a-z]{2}$"}},
}
GOOD = [
    (CHAT, dict(messages=[{"role": "user", "content": "hello"}], max_tokens=6)),
    (CHAT, dict(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": "x" * 300}], max_tokens=9,
                temperature=1.0, top_p=0.9, n=2, stream=True, stream_options={"include_usage": True})),
    (CHAT, dict(messages=[{"role": "user", "content": [{"type": "text", "text": "ä"}]}], max_tokens=4, logprobs=True,
                top_logprobs=2)),
    (CHAT, dict(messages=[{"role": "user", "content": "go"}], max_tokens=40, response_format=FORM)),
    (CHAT, dict(messages=[{"role": "user", "content": "go"}], max_tokens=60, tools=[TOOL], tool_choice="required")),
    (CHAT, dict(messages=[{"role": "user", "content": "go"}], max_tokens=8,
                response_format={"type": "json_schema", "json_schema": {"schema": SCHEMA}})),
    (CHAT, dict(messages=[{"role": "user", "content": "go"}], max_tokens=8, tool_choice="required",
                tools=[{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}])),
    (CHAT, dict(messages=[{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "2"}], max_tokens=5)),
    (TEXT, dict(prompt="the quick", max_tokens=8, stop=["q"], seed=3, temperature=0.7, logit_bias={"5": -100})),
    (TEXT, dict(prompt=["the", "quick"], max_tokens=5, echo=True, logprobs=1)),
    (TEXT, dict(prompt=[1, 2, 3, 4], max_tokens=5, min_tokens=5, stream=True)),
    (RESPONSES, dict(input="go", instructions="be", max_output_tokens=6, metadata={"a": "b"}, stream=True,
                     temperature=0)),
    (RESPONSES, dict(input=[{"role": "user", "content": "go"}, {"type": "function_call", "call_id": "1", "name": "add",
                                                               "arguments": "{\"a\": 1}"},
                            {"type": "function_call_output", "call_id": "1", "output": "2"}], max_output_tokens=40,
                     tools=[{"type": "function", "name": "f", "parameters": SCHEMA}], tool_choice="required",
                     temperature=0)),
    (RESPONSES, dict(input="go", max_output_tokens=8, temperature=0, include=["message.output_text.logprobs"],
                     text={"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}})),
]
FIELDS = ["functions", "top_k", "n", "stop", "prompt", "tools", "response_format"]
JUNK = [None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, "", "\x00", "\ud800", "a" * 5000, [], {}, [None], [[1], "a"],
        [[]], {"type": "object"}, {"$ref": "#"}, {"$ref": "http://127.0.0.1/"}, "(a+)+$", ["stop"] * 50,
        {"": ""}, "../../etc", float("nan"), float("-inf"), {"pattern": "(x{1000}){1000}"},
        {"type": "string", "maxLength": 10**9}]
TYPES = ["application/json"] * 9 + ["text/plain", "multipart/form-data", "", "a" * 99]
PATHS = ["/v1/models/%00", "/v1/models/..%2f..%2fetc", "/nowhere", "/metrics", "/v1//models", CHAT + "/"]


def malformed(rng):
    """A request with something wrong with it, most of the time: (method, path, headers, bytes)."""
    path, body = rng.choice(GOOD)
    body = json.loads(json.dumps(body | {"model": "tiny"}))
    for _ in range(rng.randint(1, 3)):
        place = body
        while True:  # Somewhere inside.
            keys = list(place) if isinstance(place, dict) else range(len(place))
            name = rng.choice(keys) if len(keys) else None
            if name is None or not isinstance(place[name], (dict, list)) or rng.random() < 0.4:
                break
            place = place[name]
        kind = rng.random()
        if name is None:
            continue
        if kind < 0.15:
            del place[name]
        elif kind < 0.25 and isinstance(place, dict):
            place[rng.choice(FIELDS)] = copy.deepcopy(rng.choice(JUNK))
        else:
            place[name] = copy.deepcopy(rng.choice(JUNK))
    content = json.dumps(body).encode()
    kind = rng.random()
    if kind < 0.05:
        content = content[: rng.randrange(len(content))]
    elif kind < 0.10:
        at = rng.randrange(len(content))
        content = content[:at] + bytes(rng.randrange(256) for _ in range(3)) + content[at + 3:]
    elif kind < 0.12:
        content = b"[" * rng.choice([10, 9000]) + content
    elif kind < 0.13:
        content = b"x" * 30_000
    headers = {"Content-Type": rng.choice(TYPES)}
    method = rng.choice(["POST"] * 30 + ["GET", "PUT", "DELETE", "OPTIONS"])
    path = rng.choice([path] * 30 + PATHS)
    return method, path, headers, content


def documented(document, path, method):
    """Statuses that a path may answer with."""
    for known, methods in document["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", ".+", known), path):
            return {int(s) for s in methods[method.lower()]["responses"]} if method.lower() in methods else {405}
    return {404, 405}


def memory(pid):
    """Resident bytes of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1)) * 1024


def counts(text):
    """Samples of the metrics page, by name and labels."""
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)}


async def idle(client):
    """The metrics, once nothing runs."""
    until = time.monotonic() + 60
    while True:
        now = counts((await client.get("/metrics")).text)
        if not now["lfm_slots_in_use"] and not now["lfm_waiting"]:
            return now
        assert time.monotonic() < until
        await asyncio.sleep(0.05)


def clients(base, key, at_once):
    return httpx.AsyncClient(base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=120,
                             limits=httpx.Limits(max_connections=at_once))


async def gather(number, at_once, work):
    """Runs work(0), work(1), ..., some at one time; what they return."""
    turns = asyncio.Semaphore(at_once)

    async def one(i):
        async with turns:
            return await work(i)

    return await asyncio.gather(*(one(i) for i in range(number)))


# -------------------------------------------------------------------- malformed requests


def throw(base, key, pid, number, at_once=8):
    """Sends malformed requests; statuses by their number, and memory early and at the end."""

    async def run():
        async with clients(base, key, at_once) as client:
            document = (await client.get("/openapi.json")).json()

            async def one(i):
                method, path, headers, content = malformed(random.Random(i))
                answer = await client.request(method, path, headers=headers, content=content)
                allowed = documented(document, path, method) | ANYWHERE
                assert answer.status_code in allowed, (i, answer.status_code, answer.text[:300])
                assert answer.status_code != 500, (i, answer.text[:300])
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (i, answer.text[:300])
                return answer.status_code

            early = await gather(number // 4, at_once, one)
            before = memory(pid)
            late = await gather(number - number // 4, at_once, lambda i: one(i + number // 4))
            await idle(client)
            return collections.Counter(early + late), before, memory(pid)

    return asyncio.run(run())


def test_malformed_requests_are_refused(start_server, key):
    process, base = start_server()
    seen, _, _ = throw(base, key, process.pid, 400)
    assert {200, 400, 404, 405, 413} <= set(seen)
    end(process)


@pytest.mark.long
def test_thirty_thousand_malformed_requests(start_server, key):
    """So many that after a quarter of them all programs are there, some of which are compiled while serving."""
    process, base = start_server()
    seen, before, after = throw(base, key, process.pid, 30_000)
    print(f"\n{dict(seen)}; resident {before / 2**20:.0f} MiB after a quarter, {after / 2**20:.0f} MiB at the end")
    assert after - before < 32 * 2**20
    end(process)


def end(process):
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    said = process.log.read_text()
    assert "Traceback" not in said
    assert "has failed" not in said


# -------------------------------------------------------------------- a crowd

PATIENT = ("--engine.max-queue", "256", "--limits.prepared", "256")
"""Clients that have left are among those that wait, for a moment."""


def crowd(base, key, pid, number, at_once):
    """Sends mixed requests, of which some are left before their answer is done.

    Every request ends in one way, those that are alike get the same answer, and the server counts what clients count.
    """
    answers = collections.defaultdict(set)

    async def run():
        async with clients(base, key, at_once) as client:
            before = await idle(client)

            async def one(i):
                rng = random.Random(i)
                path, body = rng.choice(GOOD)
                body = body | {"model": "tiny", "seed": rng.randrange(3)}
                leaves = rng.random() < 0.25
                try:
                    if leaves:
                        body |= {"max_output_tokens" if path == RESPONSES else "max_tokens": 300}
                        async with asyncio.timeout(rng.random() * 0.5):
                            await client.post(path, json=body)
                        return "done before it left"
                    answer = await client.post(path, json=body)
                except TimeoutError:
                    return "left"
                if answer.status_code == 200:
                    answers[path, json.dumps(body, sort_keys=True)].add(told(answer, body.get("stream")))
                return answer.status_code

            async def half(start, size):
                return await gather(size, at_once, lambda i: one(start + i))

            ends = await half(0, number // 2)
            middle = memory(pid)
            ends += await half(number // 2, number - number // 2)
            return collections.Counter(ends), before, await idle(client), middle, memory(pid)

    seen, before, after, middle, last = asyncio.run(run())
    assert sum(seen.values()) == number
    assert set(seen) <= {200, "left", "done before it left"}
    assert seen[200] > number / 2
    assert seen["left"] > number / 20
    assert all(len(texts) == 1 for texts in answers.values()), [k for k, v in answers.items() if len(v) > 1]

    def gone(name):
        return after.get(name, 0) - before.get(name, 0)

    ok = sum(gone(f'lfm_requests_total{{path="{path}",status="200"}}') for path in (CHAT, TEXT, RESPONSES))
    assert ok >= seen[200]
    assert gone('lfm_continuations_total{finish="cancelled"}') > 0
    assert gone('lfm_continuations_total{finish="failed"}') == 0
    return seen, middle, last


NAMES = ("id", "call_id", "created", "created_at", "prompt_tokens_details", "input_tokens_details", "logprob",
         "top_logprobs", "token_logprobs")


def told(answer, stream):
    """What an answer says, without its names, and however the tokens of a stream fell into pieces."""
    if not stream:
        return json.dumps(nameless(answer.json()), sort_keys=True)
    pieces = collections.defaultdict(str)
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line[6:])
            if event.get("type") in ("response.output_text.delta", "response.function_call_arguments.delta"):
                pieces[event["output_index"], event["type"]] += event["delta"]
            for choice in event.get("choices", ()):
                pieces[choice["index"], "text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
                pieces[choice["index"], "finish"] += choice["finish_reason"] or ""
    return json.dumps(sorted((*where, text) for where, text in pieces.items()))


def nameless(value):
    """Without names that are new each time, and probabilities, which neighbours may round otherwise."""
    if isinstance(value, list):
        return [nameless(v) for v in value]
    if isinstance(value, dict):
        return {k: nameless(v) for k, v in value.items() if k not in NAMES}
    return value


def test_a_crowd(start_server, key):
    process, base = start_server(*PATIENT)
    crowd(base, key, process.pid, 120, 24)
    end(process)


@pytest.mark.long
def test_two_thousand_requests_of_64_clients(start_server, key):
    process, base = start_server(*PATIENT)
    seen, middle, last = crowd(base, key, process.pid, 2000, 64)
    print(f"\n{dict(seen)}; resident {middle / 2**20:.0f} MiB half way, {last / 2**20:.0f} MiB at the end")
    assert last - middle < 32 * 2**20
    end(process)
