"""Adapters of a server: requests name them as models, an administrator adds and removes them, a batch has them too."""

import asyncio
import dataclasses
import functools
import json

import httpx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lfm_jax as lfm
from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import Adapter
from lfm_jax.adapters.trees import init_adapter
from lfm_jax.cli import main
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.request import UnknownAdapterError
from lfm_jax.engine.service import Service
from lfm_jax.serve import launch
from lfm_jax.serve.adapters import read_adapters, split_adapters
from lfm_jax.serve.app import make_app
from lfm_jax.serve.batch import batch
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer

ENGINE = EngineConfig(slots=((4, 256),), chunk=64, prefix_cache_bytes=1 << 20)
LORAS = {"pirate": LoRAConfig(rank=3, alpha=9), "poet": LoRAConfig(rank=2, targets=("q_proj", "w2"))}
LAYERS = ("conv", "full_attention")
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


def save(path, config, lora, seed):
    rng = np.random.default_rng(seed)
    made = init_adapter(config, lora, jax.random.key(seed))
    noisy = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), made)
    lfm.save_adapter(Adapter(config, lora, noisy), path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model called tiny, its adapters, one of rank 9, and one of another model."""
    path = tmp_path_factory.mktemp("adapters")
    tokenizer = tiny_tokenizer()
    sizes = dict(vocab_size=tokenizer.get_vocab_size(), layer_types=LAYERS)
    model = tiny_model(**sizes)
    lfm.save_hf(model, path / "tiny", tokenizer=tokenizer)
    for i, (name, lora) in enumerate(LORAS.items()):
        save(path / name, model.config, lora, i)
    save(path / "wide", model.config, LoRAConfig(rank=9, targets=("w1",)), 2)
    save(path / "other", tiny_config(**sizes | dict(layer_types=(*LAYERS, "conv"))), LORAS["pirate"], 3)
    return path


@pytest.fixture(scope="module")
def service(files):
    """One with both adapters, opened as `lfm serve` opens it."""
    return launch.open_service(files / "tiny", None, ENGINE, (1, 1), adapters={name: files / name for name in LORAS})


@functools.cache
def parts():
    tokenizer = tiny_tokenizer()
    return tiny_model(vocab_size=tokenizer.get_vocab_size(), layer_types=LAYERS), tokenizer


def talk(app, *asked, key=None):
    """(status, JSON or text) of requests, one after another: GET a path, or POST (path, body)."""
    async def run():
        transport = httpx.ASGITransport(app)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with app.router.lifespan_context(app), httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1", timeout=120, headers=headers) as client:
            found = []
            for one in asked:
                answer = await (client.get(one) if isinstance(one, str) else client.post(one[0], json=one[1]))
                kind = answer.headers["content-type"]
                found.append((answer.status_code, answer.json() if "json" in kind else answer.text))
            return found

    return asyncio.run(run())


def completion(name, **changes):
    return "/v1/completions", dict(model=name, prompt="the quick", max_tokens=12, temperature=0) | changes


@pytest.fixture(scope="module")
def expected(files):
    """What each answers to `completion`, by `lfm.generate` with the adapter merged."""
    found = {}
    for name in ("tiny", *LORAS):
        model, tokenizer = lfm.load(files / "tiny", adapter=None if name == "tiny" else files / name)
        [found[name]] = lfm.generate(model, tokenizer, ["the quick"], max_new_tokens=12)
    assert len(set(found.values())) == 3
    return found


def test_a_request_names_its_adapter_as_its_model(files, service, expected):
    """Each is answered as the model with that adapter merged."""
    assert (service.engine.config.adapters, service.engine.config.adapter_rank) == (2, 3)
    names = ["tiny", *LORAS]
    chat = dict(messages=[{"role": "user", "content": "hi"}], max_tokens=4)
    asked = [*map(completion, names), ("/v1/chat/completions", chat | {"model": "poet"}),
             ("/v1/responses", {"model": "poet", "input": "hi", "max_output_tokens": 4}), completion("gpt"),
             "/v1/models", "/v1/models/poet", "/v1/models/gpt", (LOAD, {}), completion("poet")]
    found = talk(make_app(service, "tiny"), *asked)
    assert [status for status, _ in found] == [200] * 5 + [404, 200, 200, 404, 404, 200]
    assert [body["choices"][0]["text"] for _, body in (*found[:3], found[-1])] == [
        *expected.values(), expected["poet"]]
    assert [body["model"] for _, body in found[:5]] == [*names, "poet", "poet"]
    unknown = {"message": "there is no model 'gpt'; this server has 'tiny', 'pirate', 'poet'",
               "type": "not_found_error", "param": "model", "code": "model_not_found"}
    assert found[5][1]["error"] == found[8][1]["error"] == unknown
    assert [(one["id"], one["root"], one["parent"]) for one in found[6][1]["data"]] == [
        ("tiny", "tiny", None), *((name, str(files / name), "tiny") for name in LORAS)]
    assert found[7][1] == found[6][1]["data"][2]
    assert "start it with --engine.adapters N and a key in LFM_ADMIN_KEY" in found[9][1]["error"]["message"]


def test_an_adapter_that_goes_while_it_is_asked_for_is_unknown(service, monkeypatch):
    def gone(*_, **__):
        raise UnknownAdapterError("there is no adapter 'poet'")

    monkeypatch.setattr(service, "submit", gone)  # And another of that name has come: the list has it.
    ((status, body),) = talk(make_app(service, "tiny"), completion("poet"))
    assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")


def test_a_line_of_a_batch_names_an_adapter(files, expected, tmp_path, capsys):
    def opened():
        made = Service(*parts(), None, dataclasses.replace(ENGINE, adapters=2, adapter_rank=3))
        for name in LORAS:
            made.engine.load_adapter(name, lfm.load_adapter(files / name, made.config))
        return made

    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [dict(zip(("url", "body"), completion(name), strict=True), custom_id=name) for name in [*expected, "gpt"]]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert batch(opened, "tiny", source, target) == 0
    answers = {one["custom_id"]: one["response"]["body"] for one in map(json.loads, target.read_text().splitlines())}
    assert {name: body["choices"][0]["text"] for name, body in answers.items()} == expected | {"gpt": expected["tiny"]}
    assert [line for line in capsys.readouterr().err.splitlines() if "asks for" in line] == [
        "lfm: line-3 asks for the model 'gpt'; 'tiny' answers every line, whatever it asks for"]


def test_an_administrator_adds_and_removes_adapters(files):
    config = EngineConfig(slots=((2, 64),), chunk=32, adapters=1, adapter_rank=4)
    made = Service(*parts(), None, config)

    def put(name, path=None, **more):
        return LOAD, dict(lora_name=name, lora_path=str(files / (path or name))) | more

    asked = [
        put("tiny", "poet"), put("x", "nowhere"), put("x", "wide"), put("x", "other"),
        put("x", "poet", load_inplace=True), (LOAD, {"lora_name": "x"}),
        put("pirate"), completion("pirate"), put("poet"), put("pirate"),
        (UNLOAD, {"lora_name": "pirate", "lora_int_id": 7}), (UNLOAD, {"lora_name": "pirate"}), completion("pirate"),
        put("poet"), "/v1/models"]
    for key in ("clients", None):
        for each in (put("pirate"), (UNLOAD, {"lora_name": "pirate"})):
            app = make_app(Service(*parts(), None, config), "tiny", api_key="clients", admin_key="boss")
            assert [status for status, _ in talk(app, each, key=key)] == [401]
    found = talk(make_app(made, "tiny", admin_key="boss"), *asked, key="boss")
    assert [status for status, _ in found] == [*[400] * 6, 200, 200, 400, 400, 200, 404, 404, 200, 200]
    assert found[6][1] == "Success: LoRA adapter 'pirate' added successfully."
    said = [body["error"]["message"] for _, body in (*found[:6], *found[8:10])]
    for message, expected in zip(said, [
        "'tiny' is the name of the model", "cannot load the adapter", "its rank is 9; places are of rank 4",
        "unexpected: base_model.model.model.layers.2", "load_inplace: not supported: unload the old one first",
        "lora_path: is missing", "all 1 places for adapters are taken", "there is an adapter 'pirate' already",
    ], strict=True):
        assert expected in message
    assert [one["id"] for one in found[-1][1]["data"]] == ["tiny", "poet"]


def test_what_cannot_be_served_is_said_at_once(files):
    model = tiny_config(vocab_size=parts()[0].config.vocab_size, layer_types=LAYERS)
    named = {"a": files / "nowhere", "b": files / "other", "c": files / "wide", "d": files / "poet"}
    with pytest.raises(ValueError, match="adapters cannot be served") as error:
        read_adapters(named, model, EngineConfig(adapters=3, adapter_rank=4))
    said = str(error.value)
    for part in ("a: cannot load the adapter", "adapter_config.json", "b: cannot load", "unexpected:", "4 adapters are "
                 "named, and there are 3 places", "c: the adapter does not fit", "its rank is 9"):
        assert part in said
    assert "- d:" not in said


def test_a_rank_that_is_given_stays(files):
    """For adapters that come later; else places are as large as those that are named need."""
    model = tiny_config(vocab_size=parts()[0].config.vocab_size, layer_types=LAYERS)
    named = {"pirate": files / "pirate"}
    found = [read_adapters(named, model, engine)[0] for engine in (EngineConfig(), EngineConfig(adapter_rank=8))]
    assert [(one.adapters, one.adapter_rank) for one in found] == [(1, 3), (1, 8)]
    with pytest.raises(ValueError, match=r"its rank is 3; places are of rank 2"):
        read_adapters(named, model, EngineConfig(adapter_rank=2))


def test_names_and_directories_of_the_command_line(monkeypatch, tmp_path, files):
    assert split_adapters(["a=x", "b=y/z=1"], "tiny") == (None, {"a": launch.Path("x"), "b": launch.Path("y/z=1")})
    assert split_adapters(["./lr=3"], "tiny") == (launch.Path("lr=3"), {})
    assert split_adapters([], "tiny") == (None, {})
    for given, message in ((["x", "a=y"], "x has no name, so it is merged"), (["x", "y"], "x has no name"),
                           (["a=x", "a=y"], "'a' is given twice"), (["=x"], "=x has no name"), (["a="], "no directory"),
                           (["tiny=x"], "'tiny' is the name of the model")):
        with pytest.raises(ValueError, match=message):
            split_adapters(given, "tiny")
    opened = []
    monkeypatch.setattr(launch, "open_service", lambda *_, **given: opened.append(given))
    monkeypatch.setattr(launch, "serve", lambda *_: None)
    for flags in (["--adapter", "a=x", "--adapter", "b=y"], ["--adapter", "x"]):
        with pytest.raises(SystemExit, match="0"):
            main(["serve", str(files / "tiny"), "--port", "0", *flags])
    assert [(one["adapter"], one["adapters"]) for one in opened] == [
        (None, {"a": launch.Path("x"), "b": launch.Path("y")}), (launch.Path("x"), {})]
