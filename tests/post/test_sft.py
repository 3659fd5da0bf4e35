"""Supervised fine-tuning end to end on a tiny model: learning, packing, resuming to the bit, refusing early."""

import dataclasses
import gc
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tuning
from chats import TURNS, turns, write
from flax import nnx
from running import run
from tiny_runs import environment, losses, steps_in_order
from tuning import base, desk, facts, load, recipe

import lfm_jax as lfm
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.chats import ChatCorpus
from lfm_jax.loading import chat_template, model_config
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.methods import METHODS, MethodName
from lfm_jax.post.run import tune
from lfm_jax.post.sft import SFT, sft_objective
from lfm_jax.recipe import dump_recipe
from lfm_jax.text.chat import encode_chat
from lfm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("tune"))


@pytest.fixture(scope="module")
def whole_run(root):
    """An uninterrupted run."""
    return tune(load(recipe(root, root / "whole")))


def test_a_run_learns_and_its_directory_is_a_model_that_chats(whole_run, root, capsys):
    by_step = losses(whole_run.run_dir)
    assert sorted(by_step) == list(range(1, whole_run.steps + 1))
    assert whole_run.step == whole_run.steps == SFT(load(recipe(root, root / "x"))).steps()
    assert by_step[whole_run.steps] < 0.7 * by_step[1]
    measured = [r["heldout_loss"] for r in read_metrics(whole_run.run_dir) if "heldout_loss" in r]
    assert measured[-1] == whole_run.measured["heldout_loss"] < measured[0]
    model, tokenizer = lfm.load(whole_run.run_dir)
    assert tokenizer is not None
    assert chat_template(whole_run.run_dir) == TURNS
    assert (whole_run.run_dir / "tokenizer_config.json").exists()
    reply = lfm.chat(model, tokenizer, facts()[0]["messages"][:1], template=TURNS, max_new_tokens=4)
    assert isinstance(reply.text, str)
    lfm.save_hf(model, root / "exported", tokenizer, source=whole_run.run_dir)
    assert chat_template(root / "exported") == TURNS


def test_the_loss_of_packed_chats_is_that_of_each_alone(root):
    """By a forward of the whole chat, the probability of each learnt token given all before it."""
    model, tokenizer = lfm.load(root / "base")
    config = load(recipe(root, root / "x"))
    corpus = ChatCorpus(ChatData(sources=config.data.sources, seq_len=512, batch_size=1, heldout_fraction=0.0),
                        tokenizer, model.config, TURNS)
    assert corpus.rows == 1
    batch = next(corpus.train_batches())
    objective, (graphdef, params) = sft_objective(config), nnx.split(model, nnx.Param)
    packed = float(jax.jit(lambda params, batch: objective(nnx.merge(graphdef, params), batch).total)(params, batch))
    forward = jax.jit(lambda params, tokens, segments: nnx.merge(graphdef, params)(tokens, None, segments)[0])
    nats, count = 0.0, 0
    for chat in facts():
        messages = chat["messages"]
        for i in (1, 3):
            prompt = encode_chat(tokenizer, model.config, TURNS, messages[:i])
            answer = tokenizer.encode(messages[i]["content"] + "<|im_end|>\n", add_special_tokens=False).ids
            ids = np.array([[*prompt, *answer] + [0] * (96 - len(prompt) - len(answer))])
            logits_TV = np.asarray(forward(params, ids, (ids > 0).astype(np.int32))[0], np.float64)
            for at, token in enumerate(answer, len(prompt) - 1):
                nats += np.log(np.sum(np.exp(logits_TV[at]))) - logits_TV[at, token]
                count += 1
    assert count == float(objective.weight(batch))
    assert packed == pytest.approx(nats, rel=1e-5)


def test_a_killed_run_goes_on_and_its_losses_are_the_same_to_the_bit(root, whole_run, cache, capsys):
    """The model that it began with is not needed by then: its own directory has all."""
    run_dir = root / "killed"
    base(root / "moved")
    path = recipe(root, run_dir, init_from=str(root / "moved"))
    process = subprocess.run([sys.executable, tuning.__file__, path], env=environment(cache), capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert steps_in_order(run_dir)[-1] < whole_run.steps
    os.rename(root / "moved", root / "gone")
    assert load(path) == load(run_dir / "config.yaml", "--steps", "0")
    tune(load(path))
    err = capsys.readouterr().err
    assert "8 chats" in err
    assert "resumed" in err
    assert steps_in_order(run_dir) == list(range(1, whole_run.steps + 1))
    assert losses(run_dir) == losses(whole_run.run_dir)
    ours, theirs = (lfm.to_state_dict(lfm.load(d)[0]) for d in (run_dir, whole_run.run_dir))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_other_chats_are_refused_when_a_run_goes_on(root, whole_run, tmp_path):
    other = write(tmp_path / "other.jsonl", facts()[:7])
    with pytest.raises(ValueError, match="belongs to other data"):
        tune(load(recipe(root, whole_run.run_dir, data__sources=[str(other)], steps=99)))


def test_another_method_is_refused_when_a_run_goes_on(root, whole_run):
    with pytest.raises(ValueError, match="method: 'sft' there, 'distill' here"):
        tune(load(recipe(root, whole_run.run_dir, method="distill", steps=99, distill={
            "teacher": str(root / "base"), "top_k": 4})))


def test_the_model_is_that_of_init_from_but_for_what_is_named(root, whole_run):
    config = load(recipe(root, root / "x", model__dtype="bfloat16"), "--model.remat", "none")
    own = model_config(root / "base")
    assert config.model == own.replace(dtype="bfloat16", param_dtype="float32", remat="none")
    assert TuneConfig.of(str(root / "base"), run_dir="x", data=config.data).model == own
    assert model_config(whole_run.run_dir) == lfm.load(whole_run.run_dir)[0].config
    gguf = root / "base.gguf"
    lfm.save_gguf(*(lfm.load(root / "base")[0], gguf, lfm.load(root / "base")[1]), type="F32")
    assert load(recipe(root, root / "x", init_from=str(gguf))).model == own.replace(init_std=0.02)
    (root / "own.yaml").write_text(dump_recipe(config))
    assert load(root / "own.yaml") == config
    assert load(root / "own.yaml", f"--init-from={root / 'nowhere'}").model == config.model
    with pytest.raises(ValueError, match="nowhere"):
        load(recipe(root, root / "x", init_from=str(root / "nowhere")))
    with pytest.raises(ValueError, match="preset lfm2-350m stands beside init_from"):
        load(recipe(root, root / "x", model__preset="lfm2-350m"))


@pytest.mark.parametrize(("lora", "copies"), [({}, 3), ({"rank": 2}, 1)], ids=["full", "lora"])
def test_a_run_holds_its_weights_once(lora, copies, tmp_path, monkeypatch):
    """Beside the moments of those that it trains; begun and resumed."""
    base(tmp_path / "base", hidden_size=20, head_dim=10)  # A width of its own: what other tests hold does not count.
    write(tmp_path / "chats.jsonl", facts())
    write(tmp_path / "held.jsonl", facts()[:2])
    embed, found = lfm.load(tmp_path / "base")[0].embed[...].shape, []

    def counting(self, *args, measured=SFT.measured, **fields):
        gc.collect()
        found.append(sum(x.shape == embed for x in jax.live_arrays()))
        return measured(self, *args, **fields)

    monkeypatch.setattr(SFT, "measured", counting)
    for steps in (2, 4):
        tune(load(recipe(tmp_path, tmp_path / "run", lora=lora, steps=steps, eval_every=2)))
    assert found == [copies, copies]


def test_a_run_of_bf16_weights_has_float32_parameters(tmp_path):
    base(tmp_path / "bf16", param_dtype="bfloat16", dtype="bfloat16")
    data = ChatData(sources=("x",), seq_len=8, batch_size=1)
    model = TuneConfig.of(str(tmp_path / "bf16"), run_dir="x", data=data).model
    assert (model.param_dtype, model.dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("changes", [
    {"lora": {"rank": 2}},
    {"method": "dpo"},
    {"method": "dpo", "dpo": {"reference": "model"}},
    {"method": "grpo", "grpo": {"rewards": ["regex"], "generations": 2, "max_new_tokens": 8}, "data__heldout": [],
     "data__heldout_fraction": 0.0},
], ids=str)
def test_a_warm_up_of_steps_waits_for_the_steps_of_epochs(root, changes):
    config = load(recipe(root, root / "x", optimizer={"peak_lr": 0.5, "warmup_steps": 2}, **changes))
    assert config.training()
    with pytest.raises(ValueError, match="warmup_steps 2 and decay_steps 0 exceed the run's 1 steps"):
        dataclasses.replace(config, steps=1)


def test_bad_chats_end_a_run_before_anything_is_written(root, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [turns("q", "a"), turns("q"), turns("q", "a") | {"mesages": 1}])
    path = recipe(root, tmp_path / "run", data__sources=[str(bad)])
    assert run("tune", path) == 2
    err = capsys.readouterr().err
    assert f"{bad}, line 2: it has no message of the assistant" in err
    assert f"{bad}, line 3: the key 'mesages' is not known; the nearest is" in err
    assert not (tmp_path / "run").exists()


def test_a_config_says_all_that_is_wrong_with_it(root):
    data = ChatData(sources=(str(root),), seq_len=8192, batch_size=3)
    says = (r"steps is -1(.|\n)*rows of 8192 tokens(.|\n)*method is 'x'(.|\n)*epochs is 0(.|\n)*loss_chunk is 0(.|\n)*"
            r"lies inside data source")
    with pytest.raises(ValueError, match=says):
        TuneConfig.of(str(root / "base"), run_dir=str(root / "x"), data=data, steps=-1, method="x", epochs=0,
                      loss_chunk=0)


def test_every_method_has_its_row():
    assert set(METHODS) == set(MethodName.__args__)


def test_a_model_without_a_tokenizer_is_refused(root, tmp_path):
    lfm.save_hf(lfm.load(root / "base")[0], tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare has no tokenizer.json"):
        tune(load(recipe(root, tmp_path / "run", init_from=str(tmp_path / "bare"))))
    assert not (tmp_path / "run").exists()


def test_chats_are_shown_as_the_model_writes_them(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("data", "show", root / "chats.jsonl", "--of", root / "base", "--row", "1") == 0
    out = capsys.readouterr().out
    assert "8 chats in" in out
    assert "chat 1 (line 2)" in out
    assert "the dog?" in out
    assert "\x1b[32mgreen<|im_end|>" in out, "what is learnt is in colour, to the end of the turn"
    assert "\x1b[2mthe dog?" in out or "\x1b[2m<|startoftext|>" in out
    assert run("data", "show", root / "chats.jsonl", "--of", root / "base", "--row", "8") == 2
    assert "has 8 chats, numbered from 0, and no 8" in capsys.readouterr().err
    assert run("data", "show", root / "chats.jsonl") == 2
    assert "name the model whose chat template writes them: --of MODEL" in capsys.readouterr().err
