"""The application of an encoder, in this process: what OpenAI's client gets is what the library computes."""

import asyncio
import base64
import functools
import json
from types import SimpleNamespace

import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lfm_jax as lfm
from lfm_jax.cli import serving
from lfm_jax.engine.adapters import Adapters
from lfm_jax.engine.config import EngineConfig
from lfm_jax.infer.embed import Encoder, LateInteraction
from lfm_jax.sampling import GREEDY
from lfm_jax.serve import launch
from lfm_jax.serve.app import make_app
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


def as_vectors(answer):
    assert answer.status_code == 200, answer.text
    return np.float32([one["embedding"] for one in answer.json()["data"]])


def test_token_ids_are_taken_as_they_are():
    ids = [encoder().tokenizer.encode(f"document: {text}").ids for text in TEXTS]
    answer = post("embeddings", input=ids)
    np.testing.assert_array_equal(as_vectors(answer), encoder().embed(TEXTS))
    assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
    np.testing.assert_array_equal(as_vectors(post("embeddings", input=ids[1])), encoder().embed(TEXTS[1:2]))
    bare = encoder().tokenizer.encode(TEXTS[0], add_special_tokens=False).ids
    plain = Encoder(encoder().model, encoder().tokenizer, {"query": "", "document": ""})
    assert as_vectors(post("embeddings", input=bare))[0] @ plain.embed(TEXTS[0])[0] < 0.999  # No bos is added.


def test_long_ones_are_cut():
    for long in ("fox " * 600, [1, *[40] * 600]):
        assert post("embeddings", input=long, truncate="END").json()["usage"]["prompt_tokens"] == 512


@pytest.mark.parametrize("form", ["float", "base64"])
def test_vectors_can_be_shortened(form):
    async def conversation(client):
        api = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=client, max_retries=0)
        return await api.embeddings.create(model="tiny", input=TEXTS, dimensions=5, encoding_format=form, user="me")

    found = [one.embedding for one in talk(conversation).data]
    if form == "base64":  # Asked for by name, the client leaves it as it is.
        found = [np.frombuffer(base64.b64decode(one), "<f4") for one in found]
    np.testing.assert_array_equal(np.float32(found), lfm.embed(encoder().model, encoder().tokenizer, TEXTS,
                                                               dimensions=5))
    np.testing.assert_allclose(np.linalg.norm(np.float32(found), axis=1), 1, atol=1e-6)


def test_an_answer_of_many_vectors_is_whole():
    np.testing.assert_array_equal(as_vectors(post("embeddings", input=TEXTS * 20)), encoder().embed(TEXTS * 20))


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


@pytest.mark.parametrize(("path", "body"), [
    ("embeddings", dict(input=TEXTS)), ("embeddings", dict(input=TEXTS, dimensions=4)),
    ("rerank", dict(query="dog", documents=TEXTS)),
])
def test_nothing_keeps_the_vectors_of_a_whole_batch(monkeypatch, path, body):
    app, kept = make_encoder_app(encoder(), "tiny"), []
    compute = app.state.queue.compute

    async def noted(rows, reduce):
        found = await compute(rows, reduce)
        kept.extend(found)
        return found

    monkeypatch.setattr(app.state.queue, "compute", noted)

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post(f"/v1/{path}", json={"model": "tiny"} | body)

    assert asyncio.run(ask()).status_code == 200
    assert kept
    assert all(np.asarray(one).base is None for one in kept)


def test_documents_as_jina_and_cohere_send_them():
    documents = [{"text": TEXTS[0]}, *TEXTS[1:]]
    expected = encoder().rerank("dog", TEXTS, max_tokens=6)
    for path in ("/v1/rerank", "/v2/rerank"):
        body = dict(model="tiny", query={"text": "dog"}, documents=documents, top_n=2, return_documents=True,
                    max_tokens_per_doc=6, priority=3, truncate=False)
        answer = talk(lambda client, path=path, body=body: client.post(path, json=body))
        assert answer.json()["results"] == [
            {"index": i, "relevance_score": pytest.approx(score), "document": {"text": TEXTS[i]}}
            for i, score in expected[:2]]
        assert "x-lfm-unknown-fields" not in answer.headers


words = st.lists(st.sampled_from(["fox", "lazy dog", "jumps over", "quick", "brown!"]), max_size=12).map(" ".join)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(words, min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_vector_does_not_depend_on_other_requests(requests):
    async def conversation(client):
        asked = [client.post("/v1/embeddings", json={"model": "tiny", "input": texts}) for texts in requests]
        return await asyncio.gather(*asked)

    for texts, answer in zip(requests, talk(conversation), strict=True):
        alone = np.concatenate([encoder().embed(text) for text in texts])
        np.testing.assert_allclose(as_vectors(answer), alone, atol=1e-6)


def test_a_text_without_finite_vectors_is_no_fault_of_its_neighbours():
    model = tiny_model(vocab_size=encoder().tokenizer.get_vocab_size(), causal=False)
    [bad] = encoder().tokenizer.encode("!", add_special_tokens=False).ids
    model.embed[...] = model.embed[...].at[bad].set(jnp.nan)
    app = make_encoder_app(Encoder(model, encoder().tokenizer), "tiny")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await asyncio.gather(*[
                client.post("/v1/embeddings", json={"model": "tiny", "input": text}) for text in ("fox", "!", "dog")])

    fox, other, dog = asyncio.run(ask())
    assert other.status_code == 500
    np.testing.assert_allclose([*as_vectors(fox), *as_vectors(dog)], encoder().embed(["fox", "dog"]), atol=1e-6)


def test_a_client_that_leaves_is_not_waited_for(monkeypatch):
    """As uvicorn tells of it: a message to the application, which still runs."""
    app, told = make_encoder_app(encoder(), "tiny"), []
    body = json.dumps({"model": "tiny", "input": TEXTS}).encode()

    async def run():
        gone, computing = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            told.append(message)

        async def never(rows, reduce):
            computing.set()
            try:
                await asyncio.Event().wait()
            finally:
                told.append("cancelled")

        monkeypatch.setattr(app.state.queue, "compute", never)
        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "query_string": b"", "root_path": "",
                 "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
                 "http_version": "1.1", "scheme": "http"}
        answering = asyncio.create_task(app(scope, receive, send))
        await computing.wait()
        gone.set()
        await answering

    asyncio.run(run())
    assert "cancelled" in told
    assert next(one["status"] for one in told if "status" in one) == 499


def test_an_answer_that_takes_too_long(monkeypatch):
    app = make_encoder_app(encoder(), "tiny", limits=Limits(seconds=0.01))
    monkeypatch.setattr(app.state.queue, "compute", lambda rows, reduce: asyncio.Event().wait())

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return await client.post("/v1/rerank", json={"model": "tiny", "query": "a", "documents": ["b"]})

    assert asyncio.run(ask()).status_code == 504


def test_a_model_with_a_vector_for_each_token_ranks_and_embeds_nothing():
    late = LateInteraction(projection_OD=np.eye(5, 32, dtype=np.float32), prefix_ids={"query": 8, "document": 9},
                           expansion_id=7, query_length=12)
    model = Encoder(encoder().model, encoder().tokenizer, late=late)

    async def ask():
        transport = httpx.ASGITransport(make_encoder_app(model, "tiny"))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            ranked = await client.post("/v1/rerank", json={"model": "tiny", "query": "dog", "documents": TEXTS})
            return ranked, [await client.post("/v1/embeddings", json={"model": "tiny"} | body)
                            for body in (dict(input="x"), dict(input=[[1]], dimensions=4))]

    ranked, refused = asyncio.run(ask())
    assert [(one["index"], one["relevance_score"]) for one in ranked.json()["results"]] == [
        (i, pytest.approx(score, abs=1e-6)) for i, score in model.rerank("dog", TEXTS)]
    for answer in refused:
        assert answer.status_code == 400
        assert "a vector for each token and none for a text; use rerank" in answer.json()["error"]["message"]


def test_more_than_may_wait_are_turned_away():
    async def conversation(client):
        asked = [client.post("/v1/embeddings", json={"model": "tiny", "input": TEXTS}) for _ in range(6)]
        return await asyncio.gather(*asked)

    statuses = sorted(answer.status_code for answer in talk(conversation, limits=Limits(prepared=2)))
    assert statuses == [200, 200, 429, 429, 429, 429]


@pytest.mark.parametrize(("path", "body", "status", "param", "match"), [
    ("embeddings", dict(input="x", model="other"), 404, "model", "there is no model 'other'"),
    ("embeddings", dict(), 400, "input", "input: is missing"),
    ("embeddings", dict(input=[1, "x"]), 400, "input[1]", "valid integer"),
    ("embeddings", dict(input=["x", 1]), 400, "input[1]", "valid string"),
    ("embeddings", dict(input=[[1, 2], []]), 400, "input[1]", "at least 1"),
    ("embeddings", dict(input=[[1], [2, 600]]), 400, "input", r"input\[1\]\[1\] is 600; token ids lie in 0\.\.\d+"),
    ("embeddings", dict(input=[1, -1]), 400, "input[1]", "greater than or equal to 0"),
    ("embeddings", dict(input=[1], input_type="query"), 400, "input_type", "begin them with those of bos"),
    ("embeddings", dict(input={"text": "x"}), 400, "input", "expected a text, a list of texts, a list of token ids"),
    ("embeddings", dict(input=["x", "fox " * 600], truncate=False), 400, "input",
     r"input\[1\] has \d+ tokens, and at most 512 are read"),
    ("embeddings", dict(input=[1] * 513, truncate="NONE"), 400, "input", r"input\[0\] has 513 tokens"),
    ("embeddings", dict(input=[]), 400, "input", "at least 1"),
    ("embeddings", dict(input=["x"] * 2049), 400, "input", "at most 2048"),
    ("embeddings", dict(input="x", dimensions=33), 400, "dimensions", "from 1 to the width of a vector, 32"),
    ("embeddings", dict(input="x", dimensions=0), 400, "dimensions", "greater than or equal to 1"),
    ("embeddings", dict(input="x", encoding_format="int8"), 400, "encoding_format", "'float' or 'base64'"),
    ("rerank", dict(query="x"), 400, "documents", "is missing"),
    ("rerank", dict(query="x", documents=["y"], top_n=0), 400, "top_n", "greater than or equal to 1"),
    ("rerank", dict(query="x", documents=["y", {"image": "z"}]), 400, "documents[1]", "valid string"),
    ("rerank", dict(query="x", documents=["y"], rank_fields=["title"]), 400, "rank_fields", "join its fields"),
    ("rerank", dict(query="fox " * 600, documents=["y"], truncate=False), 400, "query", "query has .* tokens"),
    ("chat/completions", dict(messages=[]), 404, None,
     "'tiny' is an encoder, which predicts no next token; .*this server has .*POST /v1/embeddings, POST /v1/rerank"),
    ("responses", dict(input="x"), 404, None, "'tiny' is an encoder"),
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


def test_texts_are_counted():
    async def conversation(client):
        await client.post("/v1/embeddings", json={"model": "tiny", "input": [[1, 2, 3], [4, 5]]})
        return await client.get("/metrics")

    text = talk(conversation).text
    for line in ("lfm_texts_total 2.0", "lfm_batches_total 1.0", "lfm_prompt_tokens_total 5.0",
                 "lfm_padded_tokens_total 32.0", "lfm_waiting 0.0"):
        assert line in text


def test_a_causal_model_says_where_vectors_come_from():
    service = SimpleNamespace(engine=SimpleNamespace(longest=64, adapters=Adapters(EngineConfig())), stop_ids=())
    app = make_app(service, "tiny")

    async def ask():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            return [await client.post(path, json={}) for path in ("/v1/embeddings", "/v1/rerank", "/v2/rerank")]

    for answer in asyncio.run(ask()):
        assert answer.status_code == 404
        assert "'tiny' is a causal model, .*; serve an encoder" in answer.json()["error"]["message"].replace(
            "whose tokens see no later ones", ".*")


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
