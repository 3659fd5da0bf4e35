"""Distillation end to end on a tiny model: learning, a stored teacher, quantised students, bad teachers."""

import shutil

import jax
import numpy as np
import pytest
import tuning
from flax import nnx
from tiny_runs import losses
from tuning import base, load, recipe

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.data.config import ChatData
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.distill import Distillation, DistillConfig, teacher_config
from lfm_jax.post.run import distill as store
from lfm_jax.post.run import tune
from lfm_jax.testing import tiny_tokenizer
from lfm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tuning.desk(tmp_path_factory.mktemp("distill"))
    base(root / "teacher", hidden_size=24, ffn_size=32, num_heads=3, seed=5, init_std=0.5)
    return root


def distill(root, run_dir, **changes):
    settings = {"teacher": str(root / "teacher"), "top_k": 8, "temperature": 1.5, "cross_entropy": 0.1}
    fields = dict(method="distill", epochs=4, distill=settings | changes.pop("distill", {}))
    return recipe(root, run_dir, **(fields | changes))


@pytest.fixture(scope="module")
def whole_run(root):
    return tune(load(distill(root, root / "whole")))


def test_a_run_comes_near_its_teacher(whole_run):
    steps, ends = losses(whole_run.run_dir), [r for r in read_metrics(whole_run.run_dir) if "heldout_loss" in r]
    assert steps[max(steps)] < 0.8 * steps[1]
    assert ends[-1]["heldout_kl_mass"] < 0.6 * ends[0]["heldout_kl_mass"]
    parts = ends[-1]["heldout_kl_mass"] + ends[-1]["heldout_kl_top"] + 0.1 * ends[-1]["heldout_cross_entropy"]
    assert ends[-1]["heldout_loss"] == pytest.approx(parts, rel=1e-5)
    assert not (whole_run.run_dir / "teacher").exists()
    assert lfm.load(whole_run.run_dir)[0].config.hidden_size == 16


def test_a_teacher_in_the_step_cannot_become_a_stored_one(root, whole_run):
    path = distill(root, whole_run.run_dir, distill={"stored": str(root / "new")})
    with pytest.raises(ValueError, match=r"teacher there, none here(.|\n)*distill.stored: None there, '.*new' here"):
        tune(load(path))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(root):
    model, tokenizer = lfm.load(root / "base")
    ids = np.array([tokenizer.encode("<|im_start|>user\nthe fox?<|im_end|>\n").ids[:12]], np.int32)
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segment_ids": np.ones_like(ids[:, 1:]),
             "positions": np.arange(ids.shape[1] - 1)[None]}
    objective = Distillation(distill=DistillConfig(teacher="x", top_k=5, temperature=2.0))
    graphdef, params = nnx.split(model, nnx.Param)

    def total(params):
        student, teacher = nnx.merge(graphdef, params), nnx.merge(graphdef, jax.lax.stop_gradient(params))
        return objective(student, batch, {"teacher": teacher}).total

    loss, grads = jax.jit(jax.value_and_grad(total))(params)
    assert abs(float(loss)) < 1e-4
    assert all(np.abs(grad).max() < 1e-4 for grad in jax.tree.leaves(grads))


def test_a_stored_teacher_is_the_one_in_the_step_and_is_not_needed_any_more(root, whole_run, capsys):
    """By `lfm data distill`, and then without the teacher's weights."""
    teacher = root / "leaving"
    shutil.copytree(root / "teacher", teacher)
    settings = {"teacher": str(teacher), "stored": str(root / "kept")}
    path = distill(root, root / "stored", distill=settings)
    with pytest.raises(SystemExit) as stop:
        main(["data", "distill", str(path)])
    assert stop.value.code == 0
    assert not (root / "stored").exists()
    (teacher / "model.safetensors").unlink()
    teacher_config.cache_clear()
    tune(load(path))
    ours, theirs = losses(root / "stored"), losses(whole_run.run_dir)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)
    with pytest.raises(ValueError, match=r"kept/train was made of something else(.|\n)*fields"):
        store(load(distill(root, root / "other", distill=settings | {"top_k": 4})))
    with pytest.raises(ValueError, match="nothing is to be stored"):
        store(load(distill(root, root / "other")))


def test_a_stored_teacher_that_changed_is_refused_and_one_that_left_is_not_missed(root, tmp_path):
    teacher = shutil.copytree(root / "teacher", tmp_path / "leaving")
    settings = {"teacher": str(teacher), "stored": str(tmp_path / "kept")}
    path = distill(root, tmp_path / "run", distill=settings, data__heldout=[], data__heldout_fraction=0.0)
    store(load(path))
    shutil.rmtree(teacher)
    base(teacher, hidden_size=24, ffn_size=32, num_heads=3, seed=6, init_std=0.5)
    with pytest.raises(ValueError, match="kept/train was begun with other weights"):
        store(load(path))
    shutil.rmtree(teacher)
    teacher_config.cache_clear()
    assert store(load(path)).run_dir == tmp_path / "kept"


def test_a_model_is_its_own_teacher_for_its_narrow_form(root):
    """And all tokens may be learnt."""
    settings = {"teacher": str(root / "base"), "cross_entropy": 0.0, "temperature": 1.0, "learn": "all"}
    result = tune(load(distill(root, root / "narrow", distill=settings, model={"quantize": "int4"}, epochs=2)))
    steps = losses(result.run_dir)
    assert 1e-5 < steps[1] < 1.0, "only what rounding took"
    weights = [r["weight"] for r in read_metrics(result.run_dir) if "weight" in r]
    tokens = [r["tokens"] for r in read_metrics(result.run_dir) if "tokens" in r]
    assert weights == tokens


def test_teachers_that_do_not_fit_are_refused(root, tmp_path):
    data = ChatData(sources=(str(root / "chats.jsonl"),), seq_len=96, batch_size=2, heldout_fraction=0.0)

    def refused(match, **settings):
        given = {"teacher": str(root / "teacher")} | settings
        with pytest.raises(ValueError, match=match):
            tune(TuneConfig.of(str(root / "base"), run_dir=str(tmp_path / "run"), data=data, method="distill",
                               distill=DistillConfig(**given)))
        assert not (tmp_path / "run").exists()

    base(tmp_path / "wide", vocab_size=320)
    refused("has 320 tokens and the student 300; its distributions are", teacher=str(tmp_path / "wide"))
    shutil.copytree(root / "teacher", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(
        tiny_tokenizer(vocab_size=300).to_str().replace("<|im_end|>", "<|im_off|>"))
    refused(r"has another tokenizer than the student: token \d+ is '<.im_end.>' here and '<.im_off.>' there",
            teacher=str(tmp_path / "other"))
    refused("distill.teacher is empty", teacher="")
    refused("nowhere", teacher=str(tmp_path / "nowhere"))
    refused("top_k 999 exceeds the 300 tokens", top_k=999)
    with pytest.raises(ValueError, match=r"learn is 'x'(.|\n)*top_k is 0(.|\n)*temperature is 0(.|\n)*entropy is -1"):
        DistillConfig(learn="x", top_k=0, temperature=0, cross_entropy=-1)
    with pytest.raises(ValueError, match="distill is for method distill, and method is sft"):
        TuneConfig.of(str(root / "base"), run_dir="x", data=data, distill=DistillConfig(teacher="x"))

