"""The application of an encoder, in this process: what OpenAI's client gets is what the library computes."""

import asyncio
import functools

import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import lfm_jax as lfm
from lfm_jax.cli import serving
from lfm_jax.infer.embed import Encoder
from lfm_jax.sampling import GREEDY
from lfm_jax.serve import launch
from lfm_jax.serve.encoders import make_encoder_app
from lfm_jax.serve.limits import Limits
from lfm_jax.testing import tiny_model, tiny_tokenizer

TEXTS = ["the quick brown fox", "lazy dog", "jumps over the lazy dog", "lazy dog"]


@functools.cache
def encoder():
    tokenizer = tiny_tokenizer()
    return Encoder(tiny_model(vocab_size=tokenizer.get_vocab_size(), causal=False), tokenizer)


def talk(conversation, **options):
    """Runs `conversation(client)`, a coroutine, with an httpx client of the application."""

    async def run():
        transport = httpx.ASGITransport(make_encoder_app(encoder(), "tiny", **options))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=120) as client:
            return await conversation(client)

    return asyncio.run(run())


def post(path, **body):
    return talk(lambda client: client.post(f"/v1/{path}", json={"model": "tiny"} | body))


@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}])
def test_openai_gets_the_vectors_of_embed(form):
    async def conversation(client):
        api = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=client, max_retries=0)
        return await api.embeddings.create(model="tiny", input=TEXTS, **form)

    answer = talk(conversation)
    assert [one.index for one in answer.data] == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.float32([one.embedding for one in answer.data]), encoder().embed(TEXTS))
    assert answer.model == "tiny"
    tokens = sum(len(encoder().tokenizer.encode(f"document: {text}").ids) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


@pytest.mark.parametrize(("path", "body"), [
    ("embeddings", dict(input="a")), ("rerank", dict(query="a", documents=["b"])),
])
def test_weights_that_are_damaged_are_no_fault_of_the_client(path, body):
    model = tiny_model(vocab_size=encoder().tokenizer.get_vocab_size(), causal=False)
    model.norm.weight[...] = jnp.nan * model.norm.weight[...]
    app = make_encoder_app(Encoder(model, encoder().tokenizer), "tiny")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(f"/v1/{path}", json={"model": "tiny"} | body, timeout=120)

    answer = asyncio.run(ask())
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert "the vectors are not finite" in answer.json()["error"]["message"]


def test_one_text_and_queries():
    answer = post("embeddings", input="lazy dog", input_type="query", colour="red")
    [one] = answer.json()["data"]
    np.testing.assert_allclose(one["embedding"], encoder().embed("lazy dog", "query")[0], atol=1e-6)
    assert answer.headers["x-lfm-unknown-fields"] == "colour"
    assert answer.headers["x-request-id"].startswith("req_")


def test_documents_are_ranked():
    expected = encoder().rerank("dog", TEXTS)
    answer = post("rerank", query="dog", documents=TEXTS).json()
    assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [tuple(one) for one in expected]
    assert answer["usage"]["total_tokens"] > 0
    best = post("rerank", query="dog", documents=TEXTS, top_n=2, return_documents=True).json()["results"]
    assert best == [{"index": i, "relevance_score": score, "document": {"text": TEXTS[i]}} for i, score in expected[:2]]


def test_requests_side_by_side_get_their_own_answers():
    async def conversation(client):
        asked = [client.post("/v1/embeddings", json={"model": "tiny", "input": text}) for text in TEXTS]
        return await asyncio.gather(*asked)

    for text, answer in zip(TEXTS, talk(conversation), strict=True):
        np.testing.assert_allclose(answer.json()["data"][0]["embedding"], encoder().embed(text)[0], atol=1e-6)


def test_more_than_may_wait_are_turned_away():
    async def conversation(client):
        asked = [client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS}) for _ in range(6)]
        return await asyncio.gather(*asked)

    statuses = sorted(answer.status_code for answer in talk(conversation, limits=Limits(prepared=2)))
    assert statuses == [200, 200, 429, 429, 429, 429]


@pytest.mark.parametrize(("path", "body", "status", "param", "match"), [
    ("embeddings", dict(input="x", model="other"), 404, "model", "there is no model 'other'"),
    ("embeddings", dict(), 400, "input", "input: is missing"),
    ("embeddings", dict(input=[1, 2]), 400, "input[0]", "valid string"),
    ("embeddings", dict(input=[]), 400, "input", "at least 1"),
    ("embeddings", dict(input=["x"] * 2049), 400, "input", "at most 2048"),
    ("embeddings", dict(input="x", dimensions=8), 400, "dimensions", "vectors have one width; leave it out"),
    ("embeddings", dict(input="x", encoding_format="int8"), 400, "encoding_format", "'float' or 'base64'"),
    ("rerank", dict(query="x"), 400, "documents", "is missing"),
    ("rerank", dict(query="x", documents=["y"], top_n=0), 400, "top_n", "greater than or equal to 1"),
    ("chat/completions", dict(messages=[]), 404, None, "this server has .*POST /v1/embeddings, POST /v1/rerank"),
])
def test_what_cannot_be_answered(path, body, status, param, match):
    answer = post(path, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    with pytest.raises(ValueError, match=match):
        raise ValueError(error["message"])


def test_health_models_metrics_and_the_key():
    async def conversation(client):
        bearer = {"authorization": "Bearer secret"}
        refused = await client.get("/v1/models")
        return refused, *[await client.get(path, headers=bearer) for path in ("/health", "/v1/models", "/metrics")]

    refused, health, models, metrics = talk(conversation, api_key="secret")
    assert refused.status_code == 401
    assert health.json() == {"status": "ok"}
    assert [(one["id"], one["max_model_len"]) for one in models.json()["data"]] == [("tiny", 512)]
    assert 'lfm_requests_total{path="/v1/models",status="401"} 1.0' in metrics.text


def test_lfm_serve_knows_an_encoder(tmp_path, monkeypatch):
    lfm.save_hf(encoder().model, tmp_path / "encoder", tokenizer=encoder().tokenizer)
    lfm.save_hf(tiny_model(), tmp_path / "causal")
    assert launch.is_encoder(tmp_path / "encoder")
    assert not launch.is_encoder(tmp_path / "causal")
    assert not launch.is_encoder(tmp_path)
    served = []
    monkeypatch.setattr(launch, "serve_encoder", lambda encoder, name, *rest: served.append((encoder, name)))
    assert serving.serve(tmp_path / "encoder", port=0) == 0
    [(found, name)] = served
    assert name == "encoder"
    np.testing.assert_array_equal(found.embed(TEXTS), encoder().embed(TEXTS))
    with pytest.raises(ValueError, match=r"is an encoder, which has no slots, .*: leave out --sampling, --engine"):
        serving.serve(tmp_path / "encoder", port=0, sampling=GREEDY)
