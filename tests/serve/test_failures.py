"""What clients hear when an answer takes too long and when the engine fails: the application in this process."""

import asyncio
import contextlib
import dataclasses
import json
import time

import httpx
import pytest

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.service import Service
from lfm_jax.serve import app as apps
from lfm_jax.serve.app import make_app
from lfm_jax.serve.limits import LIMITS
from lfm_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture
def service():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    return Service(model, tokenizer, config=EngineConfig(slots=((2, 256),), chunk=16, steps=1))


@contextlib.asynccontextmanager
async def client_of(app):
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            yield client


def ask(client, tokens, **changes):
    body = {"model": "tiny", "prompt": "hello", "max_tokens": tokens, "temperature": 0}
    return client.post("/v1/completions", json=body | changes)


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token_is_no_failure(service, capsys, path, stream):
    """Nothing is written of it, and its request is cancelled."""
    fields = {"completions": {"prompt": "hello"}, "responses": {"input": "hello"},
              "chat/completions": {"messages": [{"role": "user", "content": "hello"}]}}
    content = json.dumps(dict(model="tiny", stream=stream) | fields[path]).encode()
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": f"/v1/{path}", "raw_path": b"", "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
             "server": ("127.0.0.1", 1), "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"),
                                                     (b"content-length", str(len(content)).encode())]}
    sent = []

    async def talk():
        app = make_app(service, "tiny")
        news = asyncio.Queue()
        news.put_nowait({"type": "http.request", "body": content, "more_body": False})
        news.put_nowait({"type": "http.disconnect"})

        async def send(message):
            sent.append(message)

        await app(scope, news.get, send)  # The engine does not run: there is no first token.

    asyncio.run(talk())
    service.engine.step()
    assert service.engine.waiting() == service.engine.running() == 0
    assert service.engine.counts["cancelled"] == 1
    assert "has failed" not in capsys.readouterr().err
    assert sent[0]["status"] == (200 if stream else 499)
    assert b"data" not in b"".join(message.get("body", b"") for message in sent)


def test_free_memory_goes_back_while_the_server_is_up(service, monkeypatch):
    calls = []
    monkeypatch.setattr(apps, "TIDY_SECONDS", 0.001)
    monkeypatch.setattr(apps, "give_back_memory", lambda: calls.append(len(calls)))

    async def talk():
        async with client_of(make_app(service, "tiny")):
            while len(calls) < 3:
                await asyncio.sleep(0.001)
        there = len(calls)
        await asyncio.sleep(0.05)
        return there

    assert asyncio.run(talk()) >= len(calls) - 1  # One may have been under way.


def test_several_answers_are_as_long_as_slots_of_which_there_are_several():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    service = Service(model, tokenizer, config=EngineConfig(slots=((2, 64), (1, 256)), chunk=16))

    async def talk():
        async with client_of(make_app(service, "tiny")) as client:
            return [await ask(client, 200, n=n, prompt=[7] * length, ignore_eos=True)
                    for n, length in ((1, 10), (2, 10), (2, 64), (3, 10))]

    one, two, long, three = asyncio.run(talk())
    assert one.json()["usage"]["completion_tokens"] == 200
    assert two.json()["usage"]["completion_tokens"] == 2 * 54
    assert [choice["finish_reason"] for choice in two.json()["choices"]] == ["length"] * 2
    assert long.json()["error"]["code"] == "context_length_exceeded"
    assert "64 tokens" in long.json()["error"]["message"]
    assert three.json()["error"]["param"] == "n"


def test_an_answer_that_takes_too_long_is_504_and_leaves_its_slot(service, monkeypatch):
    step = service.engine.step

    def slowly():
        time.sleep(0.1)
        return step()

    async def talk():
        async with client_of(make_app(service, "tiny", limits=dataclasses.replace(LIMITS, seconds=3.0))) as client:
            monkeypatch.setattr(service.engine, "step", slowly)
            late = await ask(client, 200)
            streamed = await ask(client, 200, stream=True)
            monkeypatch.setattr(service.engine, "step", step)
            return late, streamed, await ask(client, 2)

    late, streamed, after = asyncio.run(talk())
    assert late.status_code == 504
    assert late.json()["error"]["message"] == "the answer took too long"
    assert late.json()["error"]["type"] == "timeout_error"
    assert '"type":"timeout_error"' in streamed.text.replace('": "', '":"')
    assert after.status_code == 200
    assert service.engine.running() == 0
    assert service.engine.counts["deadline"] == 2


def test_an_engine_that_has_failed_says_so(service, monkeypatch, capsys):
    async def talk():
        async with client_of(make_app(service, "tiny")) as client:
            healthy = await client.get("/health")
            monkeypatch.setattr(service.engine._pools[0], "generate", lambda **_: 1 / 0)
            return healthy, await ask(client, 9), await client.get("/health"), await ask(client, 2)

    healthy, broken, health, refused = asyncio.run(talk())
    assert [healthy.status_code, broken.status_code, health.status_code, refused.status_code] == [200, 500, 503, 503]
    assert health.json()["error"]["message"] == "the engine has failed"
    assert "ZeroDivisionError" not in broken.text + health.text + refused.text
    assert "ZeroDivisionError" in capsys.readouterr().err
