"""Models by their Hub id, against a server of the Hub's protocol on loopback."""

import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from hub_server import Hub
from huggingface_hub import constants, file_download
from running import run

import lfm_jax as lfm
from lfm_jax.convert.hub import is_id
from lfm_jax.loading import local
from lfm_jax.testing import tiny_model, tiny_tokenizer

NOT_READ = {"README.md": b"#", "pytorch_model.bin": b"x", "onnx/model.onnx": b"x", "onnx/config.json": b"{}",
            "onnx/model.safetensors": b"x", "tokenizer.json.bak": b"x", ".gitattributes": b"x"}
NEEDED = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "LICENSE", "additional_chat_templates/tools.jinja"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), path, tokenizer=tokenizer)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (path / "LICENSE").write_text("LFM Open License v1.0")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def hub(checkpoint, cache):
    """A Hub, and in it the checkpoint as Org/tiny."""
    hub = Hub()
    hub.add("Org/tiny", checkpoint, more=NOT_READ)
    with hub.reached(cache):
        yield hub


def same(loaded, checkpoint):
    """Whether (model, tokenizer) is what a directory holds, to the bit."""
    model, tokenizer = lfm.load(checkpoint)
    ours, theirs = lfm.to_state_dict(loaded[0]), lfm.to_state_dict(model)
    return (loaded[0].config == model.config and loaded[1].to_str() == tokenizer.to_str()
            and ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours))


def refusal(name):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the callers look at it)
        lfm.load(name)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_name_is_an_id_by_its_form():
    for name in ("LiquidAI/LFM2.5-350M", "a/b", "a/b@main", "a/b@refs/pr/3", "a_b/c.d-e@v1.0"):
        assert is_id(name), name
    for name in ("LFM2.5-350M", "/a/b", "a/b/c", "~/b", "../b", "a/..", "a/b@", "a b/c", "a/b@x y", "", "é/b"):
        assert not is_id(name), name


def test_it_loads_as_its_directory_and_what_is_not_read_is_not_fetched(hub, checkpoint):
    assert same(lfm.load("Org/tiny"), checkpoint)
    assert hub.fetched() == NEEDED
    assert {what for *_, what, _ in hub.asked} == NEEDED | {"info", "tree"}


def test_a_second_load_fetches_nothing_and_needs_no_hub(hub, checkpoint, monkeypatch):
    first = local("Org/tiny")
    hub.asked.clear()
    assert local(Path("Org/tiny")) == first
    assert hub.fetched() == set()
    hub.fall_silent()
    assert same(lfm.load("Org/tiny"), checkpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(lfm.load("Org/tiny"), checkpoint)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_hub_that_does_not_answer_as_it_should_does_not_keep_from_the_cache(hub, status):
    first = local("Org/tiny")
    hub.status = status
    assert local("Org/tiny") == first


def test_revisions_are_branches_tags_and_commits(hub, checkpoint, tmp_path):
    lfm.save_hf(tiny_model(seed=1), tmp_path / "other")
    other = hub.add("Org/tiny", tmp_path / "other", revision="v1.0")
    hub.add("Org/tiny", tmp_path / "other", revision="refs/pr/3", more={"LICENSE": b"x"})
    for name in ("Org/tiny@v1.0", f"Org/tiny@{other}"):
        assert local(name).name == other
    assert (local("Org/tiny@refs/pr/3") / "LICENSE").read_text() == "x"
    assert local("Org/tiny@main") == local("Org/tiny") != local("Org/tiny@v1.0")
    # The branch moves: a new call has what it names now, and the old commit stays.
    old = local("Org/tiny")
    hub.repositories["Org/tiny"]["main"] = hub.repositories["Org/tiny"]["v1.0"]
    assert local("Org/tiny").name == other
    hub.fall_silent()
    assert local("Org/tiny").name == other
    assert local(f"Org/tiny@{old.name}") == old


def test_shards_come_with_their_index(hub, checkpoint, tmp_path):
    model, tokenizer = lfm.load(checkpoint)
    lfm.save_hf(model, tmp_path / "shards", tokenizer=tokenizer, max_shard_bytes=30_000)
    hub.add("Org/shards", tmp_path / "shards")
    assert same(lfm.load("Org/shards"), checkpoint)
    assert {name for name in hub.fetched() if "safetensors" in name} > {"model.safetensors.index.json"}


def test_a_connection_that_breaks_is_resumed(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cuts = [("model.safetensors", 10_000)]
    assert same(lfm.load("Org/tiny"), checkpoint)
    ranges = [asked for method, _, what, asked in hub.asked if (method, what) == ("GET", "model.safetensors")]
    assert ranges == [None, "bytes=8192-"]


def test_a_download_that_broke_off_is_completed_by_the_next_call(hub, checkpoint, monkeypatch):
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.cuts = [("model.safetensors", 10_000)] * 10
    assert "cannot be reached (RemoteProtocolError: " in refusal("Org/tiny")
    hub.fall_silent()
    assert "not all of it is in the cache" in refusal("Org/tiny")
    with hub.reached(constants.HF_HUB_CACHE):
        hub.cuts.clear()
        hub.asked.clear()
        assert same(lfm.load("Org/tiny"), checkpoint)
        assert hub.fetched() == {"model.safetensors"}


@pytest.mark.parametrize("listed", [True, False])
def test_a_part_in_the_cache_is_no_model_offline_and_is_completed_online(hub, checkpoint, listed):
    """Whether the library knows what belongs to it, having fetched it all once, or not."""
    if listed:
        (local("Org/tiny") / "model.safetensors").unlink()
    else:
        huggingface_hub.hf_hub_download("Org/tiny", "config.json")
        huggingface_hub.hf_hub_download("Org/tiny", "tokenizer.json")
    hub.fall_silent()
    message = refusal("Org/tiny")
    assert message.startswith("there is no Org/tiny here, not all of it is in the cache of the Hugging Face Hub, and ")
    assert "cannot be reached (ConnectError: " in message
    assert listed or "the cache has a part of it: neither model.safetensors nor" in message
    with hub.reached(constants.HF_HUB_CACHE):
        assert same(lfm.load("Org/tiny"), checkpoint)


@pytest.mark.parametrize("name", ["./tiny/model", "../tiny/model", "tiny/model/"])
def test_what_is_written_as_a_path_is_no_id(name):
    assert local(name) == Path(name)


def test_on_a_command_line_too(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").write_text("{}")
    for verb, *more in (
        ("generate", "x"), ("chat",), ("extract", "x", "--schema", "s"), ("classify", "x", "--labels", "a", "b"),
        ("convert", "new"), ("serve", "--port", "0"), ("batch", "requests", "answers"),
    ):
        assert run(verb, "./Org/tiny", *more) == 2
        assert "Org/tiny is not a directory; a model is" in capsys.readouterr().err, verb
    with pytest.raises(ValueError, match=r"cannot load Org/tiny:\s+- there is no such directory"):
        lfm.load_encoder("./Org/tiny")


def test_a_directory_of_the_name_of_an_id_wins(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lfm.save_hf(tiny_model(seed=1), "Org/tiny")
    assert lfm.load("Org/tiny")[1] is None
    os.rename("Org/tiny", "Org/other")
    os.symlink("nowhere", "Org/tiny")
    assert refusal("Org/tiny").startswith("Org/tiny is not a directory; a model is ")
    assert hub.asked == []


def test_each_refusal_is_one_line_that_says_what_to_do(hub, checkpoint):
    url = constants.ENDPOINT
    hub.add("Org/gated", checkpoint)
    hub.gated.add("Org/gated")
    assert refusal("Org/gated") == (
        f"Org/gated is gated: accept its licence at {url}/Org/gated, then run `hf auth login`, or set HF_TOKEN")
    assert refusal("runs/mime") == (
        f"there is neither a directory runs/mime here nor a repository {url}/runs/mime; if it is private, run "
        "`hf auth login`, or set HF_TOKEN")
    assert refusal("Org/tiny@v9") == f"{url}/Org/tiny has no revision 'v9'; name a branch, a tag or a commit"
    hub.status = 500
    assert refusal("Org/tiny") == ("there is no Org/tiny here, not all of it is in the cache of the Hugging Face Hub, "
                                   f"and {url}/Org/tiny answers with HTTP status 500")
    assert hub.fetched() == set()


def test_offline_and_not_cached(hub, monkeypatch):
    nowhere = "there is no Org/tiny here, not all of it is in the cache of the Hugging Face Hub, and "
    hub.fall_silent()
    assert refusal("Org/tiny").startswith(f"{nowhere}{constants.ENDPOINT} cannot be reached (ConnectError: ")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refusal("Org/tiny") == f"{nowhere}HF_HUB_OFFLINE forbids to fetch it; unset it once"


@pytest.mark.parametrize(("config", "problem"), [
    (b'{"model_type": "llama"}', "config.json: model_type is 'llama'; expected 'lfm2'"),
    (b'{"model_type": "lfm2"}', "config.json: lacks hidden_size"), (b"{", "config.json is not valid JSON"),
])
def test_another_family_is_refused_before_its_weights_are_fetched(hub, checkpoint, config, problem):
    hub.add("Org/other", checkpoint, more={"config.json": config})
    assert refusal("Org/other").startswith(f"cannot load Org/other: {problem}")
    assert hub.fetched() == {"config.json"}


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(hub, checkpoint):
    files = {"config.json": (checkpoint / "config.json").read_bytes()}
    hub.repositories["Org/old"] = {"main": files | {"pytorch_model.bin": b"x"}}
    assert refusal("Org/old") == (
        "Org/old has neither model.safetensors nor model.safetensors.index.json, but pytorch_model.bin: pickle files "
        "are not read, because opening one runs the code in it")
    hub.repositories["Org/none"] = {"main": files}
    assert refusal("Org/none") == "Org/none has neither model.safetensors nor model.safetensors.index.json"
    hub.repositories["Org/tiny-GGUF"] = {"main": {"tiny.gguf": b"x"}}
    assert refusal("Org/tiny-GGUF") == (
        "Org/tiny-GGUF has no config.json; name the repository of the original weights, in safetensors")
    assert hub.fetched() == set()


def test_convert_takes_an_id_with_all_its_files(hub, checkpoint, tmp_path, capsys):
    assert run("convert", "Org/tiny@main", tmp_path / "out") == 0
    written = {file.relative_to(tmp_path / "out").as_posix(): file
               for file in (tmp_path / "out").rglob("*") if file.is_file() and not file.is_symlink()}
    assert written.keys() == NEEDED
    for name, file in written.items():
        assert file.read_bytes() == (checkpoint / name).read_bytes(), name
    capsys.readouterr()
    assert run("convert", "Org/none", tmp_path / "none") == 2
    assert capsys.readouterr().err.startswith("lfm: there is neither a directory Org/none here nor a repository ")


def test_serve_and_batch_name_a_model_after_its_id(hub, tmp_path, monkeypatch, capsys):
    from lfm_jax.serve import batch, launch

    opened = []
    monkeypatch.setattr(launch, "open_service", lambda path, *_, **__: opened.append(path))
    monkeypatch.setattr(launch, "serve", lambda service, name, *_: opened.append(name))

    def answer(open_service, name, *_, **__):
        open_service()
        opened.append(name)

    monkeypatch.setattr(batch, "batch", answer)
    assert run("serve", "Org/tiny", "--port", "0") == run("batch", "Org/tiny@main", "requests", "answers") == 0
    assert opened == [local("Org/tiny"), "tiny"] * 2
    assert run("batch", "Org/none", "requests", "answers") == 2
    assert "nor a repository" in capsys.readouterr().err


def test_generate_in_a_process_of_its_own(checkpoint, tmp_path):
    """With the environment that a user has, in a directory without that name."""
    hub = Hub()
    hub.add("Org/tiny", checkpoint, more=NOT_READ)
    texts = []
    with hub.serving() as url:
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                            "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        for name in ("Org/tiny", str(checkpoint)):
            command = [sys.executable, "-m", "lfm_jax.cli", "generate", name, "the quick", "--max-new-tokens", "4"]
            ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr
            texts.append(ended.stdout)
            assert ("Fetching" in ended.stderr) == (name == "Org/tiny")  # The library's progress bar.
    assert texts[0] == texts[1] != ""
    assert hub.fetched() == NEEDED


def test_the_library_is_imported_only_when_an_id_is_named(checkpoint):
    code = ("import sys, lfm_jax as lfm; lfm.load(sys.argv[1]); "
            "sys.exit('huggingface_hub' in sys.modules)")
    subprocess.run([sys.executable, "-c", code, checkpoint], check=True)
