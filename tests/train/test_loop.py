"""The loop end to end on a tiny corpus: learning, resuming to the bit, refusing, starting from weights."""

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hub_server import Hub
from tiny_runs import STEPS, finish, load, losses, recipe, start, steps_in_order, wait_for_step

import lfm_jax as lfm
from lfm_jax.convert.hf import chat_template
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.corpora.text import TextCorpus
from lfm_jax.files import locked
from lfm_jax.pretrain.run import Pretraining, train
from lfm_jax.recipe import to_plain
from lfm_jax.testing import tiny_tokenizer
from lfm_jax.train import run_dir as run_dirs
from lfm_jax.train import state as states
from lfm_jax.train.console import Console
from lfm_jax.train.launch import STOPPED
from lfm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    return train(load(recipe(corpus, run_dir)))


def test_a_run_learns_and_leaves_everything_in_its_directory(whole_run):
    run_dir = whole_run.run_dir
    by_step = losses(run_dir)
    assert sorted(by_step) == list(range(1, STEPS + 1))
    assert by_step[STEPS] < by_step[1]
    heldout = [r for r in read_metrics(run_dir) if "heldout_loss" in r]
    assert [r["step"] for r in heldout] == [5, 10, 12]
    assert heldout[-1]["heldout_loss"] == whole_run.heldout_loss
    assert heldout[-1]["heldout_bits_per_byte"] == whole_run.heldout_bits_per_byte
    assert {"config.yaml", "tokenizer.json", "metrics.jsonl", "loss.png", "checkpoints"} <= set(os.listdir(run_dir))
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load(run_dir / "config.yaml").model.vocab_size == 300


def test_starting_a_finished_run_again_changes_nothing_and_tells_the_result(whole_run):
    before = (whole_run.run_dir / "metrics.jsonl").read_bytes()
    again = train(load(whole_run.run_dir / "config.yaml"))
    assert again == whole_run
    assert (whole_run.run_dir / "metrics.jsonl").read_bytes() == before


def test_the_latest_checkpoint_loads_as_a_model(whole_run):
    model, tokenizer = lfm.load(whole_run.run_dir)
    assert model.config.vocab_size == 300
    texts = lfm.generate(model, tokenizer, ["alpha beta"], max_new_tokens=4)
    assert len(texts) == 1
    bf16, _ = lfm.load(whole_run.run_dir, dtype="bfloat16")
    assert bf16.embed[...].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("steps", "kills"),
    [(30, 5), pytest.param(300, 50, marks=pytest.mark.long)],
)
def test_kill_9_at_random_moments_and_resume_gives_the_same_losses_to_the_bit(corpus, tmp_path, cache, steps, kills):
    undisturbed = train(load(recipe(corpus, tmp_path / "undisturbed", steps=steps)))
    run_dir = tmp_path / "killed"
    path = recipe(corpus, run_dir, steps=steps)
    rng = random.Random(1)
    for kill in range(1, kills + 1):
        # Killed at a random moment after new steps are on record, checkpoints being written or not.
        least = max(losses(run_dir), default=0) + rng.randint(1, max(1, (steps - 6) // kills))
        process = start(path, cache)
        wait_for_step(process, run_dir, least)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL, f"the run ended before kill {kill}"
        print(f"kill {kill} of {kills} at step {max(losses(run_dir))} of {steps}", file=sys.stderr)
    assert finish(start(path, cache))[0] == 0
    assert steps_in_order(run_dir) == list(range(1, steps + 1))
    assert losses(run_dir) == losses(undisturbed.run_dir)
    a, b = (lfm.to_state_dict(lfm.load(d)[0]) for d in (run_dir, undisturbed.run_dir))
    assert all(np.array_equal(a[name], b[name]) for name in b)
    print(f"{kills} kills: {steps} losses and all parameters equal to the bit", file=sys.stderr)


def test_an_interrupt_saves_and_the_rest_equals_the_uninterrupted_run(corpus, tmp_path, whole_run, monkeypatch):
    run_dir = tmp_path / "stopped"
    config = load(recipe(corpus, run_dir))
    console_step = Console.step

    def interrupt(self, step, *args):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return console_step(self, step, *args)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Console, "step", interrupt)
        stopped = train(config)
    assert 6 <= stopped.step < STEPS
    assert stopped.heldout_loss is None
    assert signal.getsignal(signal.SIGINT) is before
    assert train(config).heldout_loss == whole_run.heldout_loss
    assert losses(run_dir) == losses(whole_run.run_dir)


def test_sigterm_saves_and_ends_with_its_code(corpus, tmp_path, whole_run, cache):
    run_dir = tmp_path / "run"
    path = recipe(corpus, run_dir, steps=2000, checkpoint_every=0, eval_every=0)
    process = start(path, cache)
    wait_for_step(process, run_dir, 3)
    process.send_signal(signal.SIGTERM)
    status, _, err = finish(process)
    assert status == STOPPED
    assert "stopped at step" in err
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert int(saved.name) == max(losses(run_dir)) >= 3
    same = {step: loss for step, loss in losses(run_dir).items() if step <= 2}  # The schedules part then.
    assert same == {step: losses(whole_run.run_dir)[step] for step in same}


def test_a_run_of_scanned_layers_saves_resumes_and_exports_as_any(corpus, tmp_path, monkeypatch):
    """Its checkpoints hold layers by themselves, so that it goes on scanned or not, with the same losses."""
    fields = dict(model__layer_types=["conv"] * 2 + ["full_attention"], optimizer__schedule="constant",
                  checkpoint_every=2)
    converters = []
    real = states._compiled
    monkeypatch.setattr(states, "_compiled", lambda *args: converters.append(real(*args)) or converters[-1])
    for steps, scan in ((4, True), (8, False), (STEPS, True)):
        train(load(recipe(corpus, tmp_path / "run", steps=steps, model__scan_layers=scan, **fields)))
    flat = train(load(recipe(corpus, tmp_path / "flat", **fields)))
    a, b = losses(tmp_path / "run"), losses(flat.run_dir)
    assert list(a) == list(b)
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    assert len(converters) > len(set(converters))  # A second save does not compile again.
    assert (tmp_path / "run" / "checkpoints" / f"{STEPS}").is_dir()
    scanned, unscanned = (lfm.to_state_dict(lfm.load(d)[0]) for d in (tmp_path / "run", flat.run_dir))
    assert {k: v.shape for k, v in scanned.items()} == {k: v.shape for k, v in unscanned.items()}


def test_a_run_with_experts_stopped_between_goes_on_to_the_bit(corpus, tmp_path):
    """Their biases, which the rule changes at each step, are in the checkpoint."""
    fields = dict(model__ffn_types=["swiglu", "moe"], model__num_experts=4, model__active_experts=2,
                  model__expert_size=8, model__expert_bias_rate=0.01, model__router_z_loss=0.001,
                  optimizer__schedule="constant", eval_every=0)
    train(load(recipe(corpus, tmp_path / "whole", steps=8, **fields)))
    train(load(recipe(corpus, tmp_path / "parts", steps=4, **fields)))
    train(load(recipe(corpus, tmp_path / "parts", steps=8, **fields)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (lfm.to_state_dict(lfm.load(tmp_path / name)[0]) for name in ("whole", "parts"))
    assert np.any(whole["model.layers.1.feed_forward.expert_bias"])
    for name, x in whole.items():
        np.testing.assert_array_equal(parts[name], x, err_msg=name)


def test_a_second_run_in_the_same_directory_is_refused(corpus, finished):
    with (
        locked(finished, "taken"),
        pytest.raises(ValueError, match=r"another process trains in run_dir .*; wait for it, stop it, or choose"),
    ):
        train(load(recipe(corpus, finished)))


def test_a_run_that_is_over_counts_no_time(corpus, finished):
    before = (finished / "goodput.json").read_bytes()
    train(load(recipe(corpus, finished)))
    assert (finished / "goodput.json").read_bytes() == before


def test_a_profile_is_written_into_the_run(corpus, tmp_path):
    train(load(recipe(corpus, tmp_path / "run", steps=4, eval_every=0, optimizer__warmup_steps=0, profile="steps=3-4")))
    assert list((tmp_path / "run").rglob("*.xplane.pb"))


def test_resuming_with_another_model_or_other_data_is_refused(corpus, whole_run):
    with pytest.raises(ValueError, match=r"model\.ffn_size: 24 there, 48 here") as error:
        train(load(recipe(corpus, whole_run.run_dir, model__ffn_size=48, data__seed=7)))
    assert "data.seed" in str(error.value)


@pytest.fixture
def finished(corpus, tmp_path, whole_run):
    """A copy of the uninterrupted run, to spoil."""
    shutil.copytree(whole_run.run_dir, tmp_path / "copy")
    return tmp_path / "copy"


def contents(run_dir):
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


def test_a_refused_resume_leaves_the_run_as_it_was(corpus, finished, whole_run):
    before = contents(finished)
    other = finished.parent / "other.json"
    tiny_tokenizer(vocab_size=290).save(str(other))
    with pytest.raises(ValueError, match="not the tokenizer that run_dir"):
        train(load(recipe(corpus, finished, data__tokenizer=str(other), steps=20)))
    with pytest.raises(ValueError, match=r"steps is 3, but run_dir .* is at step 12"):
        train(load(recipe(corpus, finished, steps=3)))
    with pytest.raises(ValueError, match="decay_all"):
        train(load(recipe(corpus, finished, optimizer__decay_all=True)))
    more = finished.parent / "more"
    shutil.copytree(corpus, more)
    (more / "new.txt").write_text("something else\n" * 20)
    with pytest.raises(ValueError, match="belongs to other data"):
        train(load(recipe(corpus, finished, data__sources=[str(more)])))
    assert contents(finished) == before


def test_allowed_changes_are_told_and_moved_data_resumes(corpus, finished, capsys):
    moved = finished.parent / "moved"
    shutil.copytree(corpus, moved)
    result = train(load(recipe(corpus, finished, data__sources=[str(moved)], optimizer__peak_lr=2.0e-2, steps=14)))
    assert result.step == 14
    told = capsys.readouterr().err
    assert "optimizer.peak_lr: 0.01 there, 0.02 here" in told
    assert "steps: 12 there, 14 here" in told


def test_a_tokenizer_left_by_a_run_without_a_checkpoint_is_not_used(corpus, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    tiny_tokenizer(vocab_size=290).save(str(run_dir / "tokenizer.json"))
    left = (run_dir / "tokenizer.json").read_text()
    train(load(recipe(corpus, run_dir, steps=1, optimizer__warmup_steps=0)))
    assert (run_dir / "tokenizer.json").read_text() != left


def test_without_held_out_files_no_held_out_loss_is_claimed(corpus, tmp_path):
    result = train(load(recipe(corpus, tmp_path / "run", steps=2, data__heldout_fraction=0.0)))
    assert result.step == 2
    assert result.heldout_loss is None
    assert not [r for r in read_metrics(result.run_dir) if "heldout_loss" in r]


def test_a_run_directory_inside_its_own_data_is_refused(corpus):
    with pytest.raises(ValueError, match="lies inside data source"):
        dataclasses.replace(load(recipe(corpus, corpus.parent / "x")), run_dir=str(corpus / "runs" / "x"))


def test_init_from_a_run_a_hugging_face_directory_and_a_gguf_file(corpus, tmp_path, whole_run):
    export, file = tmp_path / "hf", tmp_path / "w.gguf"
    model, own = lfm.load(whole_run.run_dir)
    lfm.save_hf(model, export)
    lfm.save_gguf(model, file, own, type="F32")
    tokenizer = str(whole_run.run_dir / "tokenizer.json")
    first = []
    for name, source in (("a", whole_run.run_dir), ("b", export), ("d", file)):
        path = recipe(corpus, tmp_path / name, init_from=str(source), data__tokenizer=tokenizer, steps=2,
                      optimizer__warmup_steps=0, optimizer__peak_lr=1e-12)
        first.append(losses(train(load(path)).run_dir)[1])
    assert first[0] == first[1] == first[2]
    # Its own tokenizer and chat template come along when no other is named.
    (export / "tokenizer.json").write_bytes((whole_run.run_dir / "tokenizer.json").read_bytes())
    (export / "chat_template.jinja").write_text("{{ messages }}")
    run_dir = tmp_path / "c"
    first.append(losses(train(load(recipe(
        corpus, run_dir, init_from=str(export), steps=2, optimizer__warmup_steps=0, optimizer__peak_lr=1e-12
    ))).run_dir)[1])
    assert first[3] == first[0]
    assert chat_template(run_dir) == "{{ messages }}"
    fields = dict(init_from=str(file), steps=2, optimizer__warmup_steps=0, optimizer__peak_lr=1e-12)
    first.append(losses(train(load(recipe(corpus, tmp_path / "e", **fields))).run_dir)[1])
    assert first[4] == first[0]
    assert first[0] < losses(whole_run.run_dir)[1] - 0.5


def test_init_from_a_hub_id_takes_its_weights_and_its_tokenizer(corpus, tmp_path, whole_run):
    model, tokenizer = lfm.load(whole_run.run_dir)
    lfm.save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    hub, run_dir = Hub(), tmp_path / "run"
    hub.add("Org/tiny", tmp_path / "hf")
    run_dir.mkdir()
    with hub.reached(tmp_path / "cache"):
        method = Pretraining(load(recipe(corpus, run_dir, init_from="Org/tiny")))
        method.prepare(run_dir, resuming=False)
        weights = jax.tree.leaves(method.weights())
    assert all(map(np.array_equal, weights, jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))))
    assert (run_dir / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()


def test_init_from_weights_without_a_tokenizer_wants_one_named(corpus, tmp_path, whole_run):
    lfm.save_hf(lfm.load(whole_run.run_dir)[0], tmp_path / "bare")
    with pytest.raises(ValueError, match=r"has no tokenizer.json; name its tokenizer in data.tokenizer"):
        train(load(recipe(corpus, tmp_path / "run", init_from=str(tmp_path / "bare"))))


def test_init_from_keeps_the_biases_of_experts_in_float32(corpus, tmp_path, whole_run):
    fields = dict(model__ffn_types=["moe"], model__num_experts=4, model__active_experts=2, model__expert_size=8,
                  model__param_dtype="bfloat16", model__vocab_size=300)
    model = lfm.LFM(load(recipe(corpus, tmp_path / "x", **fields)).model, rngs=nnx.Rngs(0))
    bias_E = jnp.asarray([1, 1.001, 1.002, 1.003], jnp.float32)
    for block in model.blocks:
        block.feed_forward.expert_bias[...] = bias_E
    tokenizer = lfm.load(whole_run.run_dir)[1]
    lfm.save_hf(model, tmp_path / "weights", tokenizer)
    config = load(recipe(corpus, tmp_path / "run", init_from=str(tmp_path / "weights"), **fields))
    weights = Pretraining(config).weights()
    held = weights["blocks"][0]["feed_forward"]
    np.testing.assert_array_equal(held["expert_bias"], bias_E)
    assert (held["expert_bias"].dtype, held["w1"].dtype) == (jnp.float32, jnp.bfloat16)


def test_init_from_another_shape_is_refused(corpus, tmp_path, whole_run):
    path = recipe(corpus, tmp_path / "other", init_from=str(whole_run.run_dir), model__ffn_size=32)
    with pytest.raises(ValueError, match="ffn_size: 24 there, 32 here"):
        train(load(path))


def test_micro_batches_reach_the_same_loss(corpus, tmp_path, whole_run):
    path = recipe(corpus, tmp_path / "micro", micro_batches=2, loss_chunk=7)
    by_step = losses(train(load(path)).run_dir)
    want = losses(whole_run.run_dir)
    np.testing.assert_allclose([by_step[s] for s in sorted(want)], [want[s] for s in sorted(want)], rtol=1e-4)


def test_bad_settings_are_listed_together(corpus, tmp_path):
    good = load(recipe(corpus, tmp_path / "x"))
    with pytest.raises(ValueError, match="not valid") as error:
        dataclasses.replace(good, steps=0, micro_batches=3, model=good.model.replace(max_position=16, eos_ids=()))
    for part in ("steps is 0", "4 rows is not a multiple of micro_batches 3", "32 tokens exceed model.max_position 16",
                 "eos_ids"):
        assert part in str(error.value)


def test_a_metrics_line_cut_by_a_kill_is_dropped(tmp_path):
    whole = json.dumps({"step": 1, "loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text(whole + "\n" + '{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_run_older_than_a_field_has_its_default(corpus, tmp_path):
    """Runs saved before the operators of this version resume, but not as another model."""
    config = load(recipe(corpus, tmp_path / "run"))
    saved = to_plain(config)
    for field in ("ffn_types", "conv_gates", "recurrence", "sliding_window", "scan_impl", "attention_impl"):
        del saved["model"][field]
    assert run_dirs.check_resumable(config, saved, 1) == []
    other = dataclasses.replace(config, model=config.model.replace(conv_gates="input"))
    with pytest.raises(ValueError, match=r"model.conv_gates: 'both' there, 'input' here"):
        run_dirs.check_resumable(other, saved, 1)


def test_feed_forwards_named_for_each_layer_are_those_named_once(corpus, tmp_path):
    config = load(recipe(corpus, tmp_path / "run"))
    each = load(recipe(corpus, tmp_path / "run", model__ffn_types=["swiglu"] * 2))
    assert each == config
    saved = to_plain(config)
    saved["model"]["ffn_types"] = ["swiglu"] * 2  # As runs have it that were made with it so.
    assert run_dirs.check_resumable(config, saved, 1) == []


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(corpus, tmp_path):
    config = load(recipe(corpus, tmp_path / "run"))
    saved = to_plain(config)
    muon = load(recipe(corpus, tmp_path / "run", optimizer__algorithm="muon"))
    with pytest.raises(ValueError, match=r"optimizer\.algorithm changed"):
        run_dirs.check_resumable(muon, saved, 4)
    old = {key: value for key, value in saved.items() if key != "guard"}
    with pytest.raises(ValueError, match=r"made by an older version.*init_from"):
        run_dirs.check_resumable(config, old, 4)
    with pytest.raises(ValueError, match="method: 'sft' there, None here"):
        run_dirs.check_resumable(config, saved | {"method": "sft"}, 4)
    other = load(recipe(corpus, tmp_path / "run", z_loss=1e-3, guard__spike=5.0, micro_batches=2))
    told = "\n".join(run_dirs.check_resumable(other, saved, 4))
    assert all(name in told for name in ("z_loss", "guard.spike", "micro_batches"))


def test_a_held_out_loss_of_some_batches_claims_no_bits_per_byte(corpus, tmp_path, capsys):
    result = train(load(recipe(corpus, tmp_path / "run", eval_batches=1, steps=2, optimizer__warmup_steps=0)))
    assert result.heldout_loss is not None
    assert result.heldout_bits_per_byte is None
    records = [r for r in read_metrics(tmp_path / "run") if "heldout_loss" in r]
    assert "heldout_bits_per_byte" not in records[-1]
    # What it needs was told before anything else.
    told = capsys.readouterr().err.splitlines()
    assert "parameters; mesh: one device" in told[0]
    assert "on each device, by analysis:" in told[1]


def test_minutes_are_timed_with_one_batch_and_the_data_counted_for_what_they_allow(corpus, tmp_path, whole_run):
    """The dataset has three batches, fewer than steps are timed, and far fewer than `steps`, which is at most."""
    made = build(BuildConfig(
        sources=(str(corpus),), tokenizer=str(whole_run.run_dir), seq_len=32, out=str(tmp_path / "set"), workers=1,
        heldout_fraction=0.2,
    ), show_progress=False)
    fields = dict(
        steps=100_000, eval_every=0, optimizer__warmup_steps=0, data__sources=[], data__batch_size=made.train.rows // 3,
        data__mixture=[{"path": str(tmp_path / "set"), "epochs": 1}],
    )
    with pytest.raises(ValueError, match=r"which is 3 steps of batch_size \d+, and the run has 100000"):
        train(load(recipe(corpus, tmp_path / "all", **fields)))
    timed = load(recipe(corpus, tmp_path / "timed", train_minutes=1e-9, **fields))
    assert train(timed).steps == 1
    assert train(timed).steps == 1  # Resumed, it keeps its steps, and the data is counted for these.


def test_data_used_up_saves_before_it_says_so(corpus, tmp_path, monkeypatch):
    """As when rollbacks have passed over data that the epochs of a mixture were counted on."""
    from lfm_jax.data.config import DataUsedUp
    class Short:
        def __init__(self, whole):
            self.whole, self.left = whole, 6

        def __next__(self):
            if not self.left:
                raise DataUsedUp("the epoch limits of data.mixture are met")
            self.left -= 1
            return next(self.whole)

        def __getattr__(self, name):
            return getattr(self.whole, name)

    real = TextCorpus.train_batches
    monkeypatch.setattr(TextCorpus, "train_batches", lambda *args, **kwargs: Short(real(*args, **kwargs)))
    with pytest.raises(DataUsedUp):
        train(load(recipe(corpus, tmp_path / "run", eval_every=0)))
    assert {"4", "6"} <= set(os.listdir(tmp_path / "run" / "checkpoints"))
