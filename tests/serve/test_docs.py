"""The code of docs/serving.md runs; its client is tried on a real server in test_server.py."""

import json
import re
import shlex
from pathlib import Path

import jsonschema
import pytest

import lfm_jax as lfm
from lfm_jax import cli
from lfm_jax.cli import serving
from lfm_jax.testing import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), tmp_path / "LFM2.5-350M", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_python_blocks_run(desk):
    namespace = {}
    found = [block for block in blocks("python") if "OpenAI" not in block]
    assert len(found) == 2
    for block in found:
        exec(compile(block, "docs/serving.md", "exec"), namespace)
    for person in (namespace["person"], *namespace["people"]):
        jsonschema.validate(person, namespace["schema"])
    assert all(sum(mood.values()) == pytest.approx(1) for mood in namespace["moods"])
    assert all(1 <= len(tokens) <= 8 for tokens in namespace["tokens"])


@pytest.mark.slow
def test_commands_run(desk, monkeypatch):
    serve, batch = (shlex.split(block)[1:] for block in blocks("bash"))
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    (desk / "requests.jsonl").write_text(json.dumps({"custom_id": "1", "url": "/v1/chat/completions", "body": body}))
    with pytest.raises(SystemExit) as status:
        cli.main([*batch, "--engine.slots", "2", "128", "--engine.max-logprobs", "0"])
    assert status.value.code == 0
    [answer] = map(json.loads, (desk / "answers.jsonl").read_text().splitlines())
    assert answer["response"]["body"]["usage"]["completion_tokens"] >= 1

    asked = {}

    class Run:
        KEY_VARIABLE = "LFM_API_KEY"
        check_address = staticmethod(lambda host, key: asked.update(host=host))
        open_service = staticmethod(lambda path, dtype, engine, mesh: asked.update(path=path, engine=engine))
        serve = staticmethod(lambda *args: asked.update(args=args))

    monkeypatch.setattr(serving, "_serving", lambda module: Run)
    with pytest.raises(SystemExit) as status:
        cli.main(serve)
    assert status.value.code == 0
    assert asked["engine"].slots == ((16, 2048), (1, 32768))
    assert asked["args"][1:4] == ("LFM2.5-350M", asked["host"], 8000)
