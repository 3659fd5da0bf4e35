"""A second stage at longer rows: from another run's weights, with its own data mix, schedule and a context axis."""

import numpy as np
from tiny_runs import finish, load, losses, recipe, start, steps_in_order

import lfm_jax as lfm
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.pretrain.run import train


def test_a_second_stage_of_longer_rows_over_the_context_axis(corpus, tmp_path, cache):
    first = train(load(recipe(corpus, tmp_path / "first")))
    mixture = []
    for name, weight in (("1", 0.7), ("2", 0.3)):  # Two datasets of longer rows, by the names of the files.
        build(BuildConfig(
            sources=(str(corpus / f"*{name}.txt"), str(corpus / "*0.txt")), out=str(tmp_path / name),
            tokenizer=str(first.run_dir), seq_len=128, heldout_fraction=0.0, workers=1,
        ), show_progress=False)
        mixture.append(dict(path=str(tmp_path / name), weight=weight))
    long = dict(
        data__sources=[], data__mixture=mixture, data__heldout_fraction=0.0,
        init_from=str(tmp_path / "first"), steps=8, eval_every=0, checkpoint_every=4, data__seq_len=128,
        data__batch_size=2, data__seed=1, model__max_position=256, optimizer__peak_lr=2e-3,
        optimizer__schedule="cosine", mesh__context=2,
    )
    run_dir = tmp_path / "second"
    path = recipe(corpus, run_dir, **long)
    status, _, err = finish(start(path, cache, "--devices-per-process", 2))
    assert status == 0, err[-3000:]
    assert "context 2" in err
    assert steps_in_order(run_dir) == list(range(1, 9))
    # It goes on where the first stage ended, and gets better.
    assert losses(run_dir)[1] < losses(first.run_dir)[1] - 0.5
    assert losses(run_dir)[8] < losses(run_dir)[1]
    # The same rows on one device.
    alone = tmp_path / "alone"
    train(load(recipe(corpus, alone, **(long | {"mesh__context": 1, "keep_checkpoints": 1}))))
    np.testing.assert_allclose(list(losses(run_dir).values()), list(losses(alone).values()), rtol=1e-4)
    model, tokenizer = lfm.load(run_dir)
    assert model.config.max_position == 256
    assert tokenizer.to_str() == lfm.load(first.run_dir)[1].to_str()
