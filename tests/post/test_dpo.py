"""Preference optimisation end to end on a tiny model: the loss, learning, resuming to the bit, both references."""

import functools
import json
import os

import jax
import numpy as np
import pytest
from chats import TURNS, write
from flax import nnx
from tiny_runs import Breaking, Broken, losses
from tuning import base, load, pairs, recipe

import lfm_jax as lfm
from lfm_jax.data.batch import batches_of
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.pairs import PairCorpus
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.dpo import DPO, DPOConfig, Preference
from lfm_jax.post.run import tune
from lfm_jax.text.chat import encode_chat
from lfm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("dpo")
    base(root / "base")
    write(root / "pairs.jsonl", pairs())
    write(root / "held.jsonl", pairs()[:2])
    return root


def dpo(root, run_dir, **changes):
    fields = dict(method="dpo", data__sources=[str(root / "pairs.jsonl")], data__seq_len=128, epochs=8,
                  optimizer={"peak_lr": 5.0e-3, "warmup_fraction": 0.2}, dpo={})
    return recipe(root, run_dir, **(fields | changes))


@pytest.fixture(scope="module")
def whole_run(root):
    return tune(load(dpo(root, root / "whole")))


def measured(run_dir, name):
    return [r[f"heldout_{name}"] for r in read_metrics(run_dir) if f"heldout_{name}" in r]


@functools.cache
def forward(graphdef):
    return jax.jit(lambda params, tokens, segments: nnx.merge(graphdef, params)(tokens, None, segments)[0])


def answer_logprobs(model, tokenizer, pair):
    """[(log-probabilities of chosen), (of rejected)] by a forward of each conversation alone."""
    graphdef, params = nnx.split(model, nnx.Param)
    found = []
    for side in ("chosen", "rejected"):
        prompt = encode_chat(tokenizer, model.config, TURNS, [{"role": "user", "content": pair["prompt"]}])
        answer = tokenizer.encode(pair[side] + "<|im_end|>\n", add_special_tokens=False).ids
        ids = np.array([[*prompt, *answer] + [0] * (64 - len(prompt) - len(answer))])
        logits_TV = np.asarray(forward(graphdef)(params, ids, (ids > 0).astype(np.int32))[0], np.float64)
        log_p = logits_TV - np.logaddexp.reduce(logits_TV, axis=1, keepdims=True)
        found.append([log_p[at, token] for at, token in enumerate(answer, len(prompt) - 1)])
    return found


def by_hand(policy, reference, loss, beta):
    """Sums over pairs, from log-probabilities of tokens."""
    reduced = sum if loss == "sigmoid" else np.mean
    rewards = [[beta * reduced(np.subtract(*side)) for side in zip(*both, strict=True)]
               for both in zip(policy, reference, strict=True)]
    total = 0.0
    for chosen, rejected in rewards:
        m = chosen - rejected
        total += (m / beta - 1 / (2 * beta)) ** 2 if loss == "ipo" else np.log1p(np.exp(-m))
    return {"loss": total, "chosen_reward": sum(r[0] for r in rewards), "rejected_reward": sum(r[1] for r in rewards),
            "accuracy": sum(r[0] > r[1] for r in rewards)}


@pytest.fixture(scope="module")
def alone(root, whole_run):
    """Of the run's model and of the reference: the models, and the log-probabilities of all pairs."""
    models = [lfm.load(path)[0] for path in (whole_run.run_dir, root / "base")]
    tokenizer = lfm.load(root / "base")[1]
    return *models, tokenizer, [[answer_logprobs(model, tokenizer, pair) for pair in pairs()] for model in models]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "sigmoid_norm"])
def test_the_loss_of_packed_pairs_is_that_of_each_alone_by_hand(root, alone, loss):
    policy, reference, tokenizer, logprobs = alone
    data = ChatData(sources=(str(root / "pairs.jsonl"),), seq_len=512, batch_size=2, heldout_fraction=0.0)
    corpus = PairCorpus(data, tokenizer, reference.config, TURNS)
    assert corpus.rows == 1, "all pairs share a row; the other one is padding"
    (batch,) = batches_of(corpus.train_rows, 2)
    objective = Preference(dpo=DPOConfig(loss=loss, beta=0.3, reference="model"))
    (graphdef, params), others = nnx.split(policy, nnx.Param), nnx.split(reference, nnx.Param)[1]
    sums = jax.jit(lambda params, others, batch: objective(
        nnx.merge(graphdef, params), batch, {"reference": nnx.merge(graphdef, others)}).sums)(params, others, batch)
    assert float(objective.weight(batch)) == 8
    for name, expected in by_hand(*logprobs, loss, 0.3).items():
        assert float(sums[name]) == pytest.approx(expected, rel=1e-4), name


def test_a_run_prefers_what_was_chosen(whole_run):
    first, last = ([measured(whole_run.run_dir, name)[at] for name in ("reward_margin", "accuracy", "loss")]
                   for at in (0, -1))
    assert losses(whole_run.run_dir)[1] == pytest.approx(np.log(2), rel=1e-5), "the first step's model is the reference"
    assert last[0] > max(first[0], 0)
    assert last[1] == 1.0
    assert last[2] < first[2] < np.log(2)
    steps = [r for r in read_metrics(whole_run.run_dir) if "reward_margin" in r]
    assert steps[-1]["reward_margin"] == pytest.approx(steps[-1]["chosen_reward"] - steps[-1]["rejected_reward"],
                                                       abs=1e-5)


def test_a_broken_run_goes_on_to_the_bit_without_its_reference(root, whole_run, monkeypatch, capsys):
    run_dir = root / "broken"
    base(root / "moved")
    path = dpo(root, run_dir, init_from=str(root / "moved"))
    with monkeypatch.context() as patch:
        train_data = DPO.train_data
        patch.setattr(DPO, "train_data", lambda self, rows: Breaking(train_data(self, rows), 8))
        with pytest.raises(Broken):
            tune(load(path))
    os.rename(root / "moved", root / "gone")
    capsys.readouterr()
    tune(load(run_dir / "config.yaml"))
    err = capsys.readouterr().err
    assert "resumed" in err
    assert "8 pairs" in err
    assert losses(run_dir) == losses(whole_run.run_dir)
    ours, theirs = (lfm.to_state_dict(lfm.load(d)[0]) for d in (run_dir, whole_run.run_dir))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    # Other pairs than those that the reference was asked about.
    manifest = run_dir / "reference" / "train" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"rows": "x"}))
    with pytest.raises(ValueError, match="reference/train was made of something else"):
        tune(load(run_dir / "config.yaml"))


def test_a_reference_that_a_broken_start_left_is_not_taken_for_that_of_another_model(root, whole_run):
    def begin(**changes):
        DPO(load(dpo(root, whole_run.run_dir, **changes))).prepare(whole_run.run_dir, resuming=False)

    begin()
    base(root / "changed", seed=5)
    with pytest.raises(ValueError, match="reference/train was begun with other weights"):
        begin(init_from=str(root / "changed"))
    with pytest.raises(ValueError, match=r"something else(.|\n)*model.quantize: '' there, 'int8' here"):
        begin(model={"quantize": "int8"})


def test_a_reference_in_every_step_gives_the_same_losses(root, whole_run):
    result = tune(load(dpo(root, root / "model", dpo={"reference": "model"})))
    assert (whole_run.run_dir / "reference").exists()
    assert not (result.run_dir / "reference").exists()
    ours, theirs = losses(result.run_dir), losses(whole_run.run_dir)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-4)


def test_with_an_adapter_the_reference_is_the_model_without_it(root):
    result = tune(load(dpo(root, root / "lora", dpo={"reference": "model"}, lora={"rank": 2}, epochs=4)))
    steps = losses(result.run_dir)
    assert steps[1] == pytest.approx(np.log(2), rel=1e-6), "a new adapter changes nothing"
    assert steps[max(steps)] < steps[1]
    assert measured(result.run_dir, "reward_margin")[-1] > 0


def test_defaults_and_settings(root):
    config = load(recipe(root, root / "x", method="dpo", optimizer={}))
    assert config.optimizer.peak_lr == 1e-6
    assert load(recipe(root, root / "x", optimizer={})).optimizer.peak_lr == 5e-5
    assert TuneConfig.of(str(root / "base"), run_dir="x", data=config.data, method="dpo").optimizer.peak_lr == 1e-6
    with pytest.raises(ValueError, match=r"loss is 'hinge'(.|\n)*reference is 'x'(.|\n)*beta is 0(.|\n)*ing is 1"):
        DPOConfig(loss="hinge", reference="x", beta=0, label_smoothing=1)
    with pytest.raises(ValueError, match="dpo is for method dpo, and method is sft"):
        TuneConfig.of(str(root / "base"), run_dir="x", data=config.data, dpo=DPOConfig(beta=0.2))
