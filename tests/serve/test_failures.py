"""What clients hear when an answer takes too long and when the engine fails: the application in this process."""

import asyncio
import contextlib
import dataclasses
import time

import httpx
import pytest

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.service import Service
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
