"""Attention made into convolutions: what is kept of it, which layers matter, and learning layer by layer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tuning
from chats import TURNS, write
from flax import nnx
from tiny_runs import losses

import lfm_jax as lfm
from lfm_jax.data.config import ChatData
from lfm_jax.init_from import write_model
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.distill import DistillConfig
from lfm_jax.post.hybridise import convolutions, hybrid_config, hybridised, importance, started
from lfm_jax.post.layer_outputs import LayerOutputs
from lfm_jax.post.run import tune
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.train.optimizer import OptimizerConfig

FIELDS = dict(layer_types=("full_attention",) * 3, qk_norm=False)
TAPS = 3


@pytest.fixture(scope="module")
def original():
    return tiny_model(**FIELDS)


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(3, 97, (24, 32), dtype=np.int32)


@pytest.fixture(scope="module")
def operators(original, text):
    return started(original, text, TAPS)


def logits(model, tokens):
    return run(*nnx.split(model, nnx.Param), tokens)


@partial(jax.jit, static_argnames="graphdef")
def run(graphdef, params, tokens):
    return nnx.merge(graphdef, params)(tokens)[0]


def test_on_tokens_by_themselves_nothing_is_lost(original):
    """There attention gives each token its own value, and so does the convolution that is fitted to them."""
    tokens = np.arange(3, 97, dtype=np.int32)[:, None]
    made = hybridised(original, started(original, tokens, TAPS), TAPS)
    np.testing.assert_allclose(logits(made, tokens), logits(original, tokens), atol=2e-4, rtol=1e-4)
    assert made.config.layer_types == ("conv",) * 3


def test_taps_are_the_nearest_that_there_are(original, text, operators):
    """No other taps or bias of a channel bring the convolution nearer to what the first layer's attention makes."""
    block = original.blocks[0]
    x_BTD, positions, segments = original.inputs(jnp.asarray(text), None, jnp.ones_like(text))
    normed = block.operator_norm(x_BTD)
    wanted = block.operator(normed, positions_BT=positions, segment_ids_BT=segments, state=None)[0]
    conv = hybridised(original, {0: operators[0]}, TAPS).blocks[0].operator
    graphdef, params = nnx.split(conv, nnx.Param)
    inverse = np.linalg.inv(operators[0]["out_proj"])  # Back to the heads, which are what is fitted.

    def error(taps, bias):
        held = nnx.to_pure_dict(params) | {"conv": taps, "conv_bias": bias}
        made = nnx.merge(graphdef, held)(normed, positions_BT=positions, segment_ids_BT=segments, state=None)[0]
        return jnp.mean(jnp.square((made - wanted) @ inverse.T))

    slopes_of = jax.jit(jax.value_and_grad(error, argnums=(0, 1)))
    best, slopes = slopes_of(operators[0]["conv"], operators[0]["conv_bias"])
    nothing, _ = slopes_of(np.zeros((TAPS, 32), np.float32), np.zeros(32, np.float32))
    assert best < 0.95 * nothing
    assert all(np.abs(slope).max() < 1e-4 * float(nothing) for slope in slopes)


def test_what_keeps_all_its_attention_is_what_it_was(original, text):
    assert hybrid_config(original.config, range(3), TAPS) == original.config
    np.testing.assert_array_equal(logits(hybridised(original, {}, TAPS), text), logits(original, text))


def test_layers_that_stay_are_the_original_s_and_the_others_those_that_are_given(original, text, operators):
    made = hybridised(original, {i: operators[i] for i in (0, 2)}, TAPS)
    assert made.config.layer_types == ("conv", "full_attention", "conv")
    weights = nnx.to_pure_dict(nnx.split(made, nnx.Param)[1])["blocks"]
    ours = nnx.to_pure_dict(nnx.split(original, nnx.Param)[1])["blocks"]
    jax.tree.map(np.testing.assert_array_equal, weights[1], ours[1])
    jax.tree.map(np.testing.assert_array_equal, weights[0]["feed_forward"], ours[0]["feed_forward"])
    jax.tree.map(np.testing.assert_array_equal, convolutions(made), {i: operators[i] for i in (0, 2)})


def test_importance_is_the_divergence_of_the_changed_model(original, text, operators):
    found = importance(original, operators, text[:2], TAPS)
    p = jax.nn.log_softmax(logits(original, text[:2]))
    for i in range(3):
        q = jax.nn.log_softmax(logits(hybridised(original, {i: operators[i]}, TAPS), text[:2]))
        assert found[i] == pytest.approx(float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))), rel=1e-3)


def test_models_that_cannot_be_hybrids_are_refused(original):
    config = original.config
    for match, changed, stays in (
        ("layer 7 is to keep its attention, and it has none", {}, (7,)),
        ("num_heads x head_dim is 64 and hidden_size 32", {"head_dim": 16}, ()),
        ("attention_gate is set", {"attention_gate": True}, ()),
        ("conv_bias is False in the model's own", {"layer_types": ("conv", "full_attention", "conv")}, ()),
        ("causal is False", {"causal": False}, ()),
    ):
        with pytest.raises(ValueError, match=match):
            hybrid_config(config.replace(**changed), stays, TAPS)


# ---------------------------------------------------------------------------------------------------- layer by layer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybridise")
    tokenizer = tiny_tokenizer(vocab_size=300)
    model = tiny_model(**FIELDS | {"vocab_size": tokenizer.get_vocab_size()})
    (root / "tokenizer").mkdir()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), root / "hf", tokenizer)
    (root / "hf" / "chat_template.jinja").write_text(TURNS)
    write_model(model, root / "original", str(root / "hf"))
    text = np.random.default_rng(1).integers(3, 300, (8, 24), dtype=np.int32)
    write_model(hybridised(model, started(model, text, TAPS), TAPS), root / "start", str(root / "hf"))
    write(root / "chats.jsonl", tuning.facts())
    return root


def config(root, name, **changes):
    data = ChatData(sources=(str(root / "chats.jsonl"),), seq_len=96, batch_size=2, heldout_fraction=0.2)
    fields = dict(run_dir=str(root / name), data=data, method="distill", steps=12, log_every=100,
                  freeze=("embed", "norm.*", "blocks.*_norm.*", "blocks.*.feed_forward.*"),
                  optimizer=OptimizerConfig(peak_lr=3e-3, schedule="cosine", warmup_steps=0, warmup_fraction=0.1),
                  distill=DistillConfig(teacher=str(root / "original"), match="layers", learn="all"))
    return TuneConfig.of(str(root / "start"), **fields | changes)


def test_a_model_is_written_and_loaded_as_it_is(root):
    model, tokenizer = lfm.load(root / "start")
    assert tokenizer is not None
    assert model.config.layer_types == ("conv",) * 3
    assert (root / "start" / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="start holds a run"):
        write_model(model, root / "start", str(root / "hf"))


def test_layers_learn_what_the_teachers_do_and_nothing_else_moves(root):
    result = tune(config(root, "layers"))
    steps = losses(result.run_dir)
    assert steps[max(steps)] < 0.9 * steps[1]
    assert {"heldout_layer_0", "heldout_layer_2"} <= result.measured.keys()
    began, ended = (nnx.to_pure_dict(nnx.split(lfm.load(root / name)[0], nnx.Param)[1]) for name in ("start", "layers"))
    for at in range(3):
        jax.tree.map(np.testing.assert_array_equal, began["blocks"][at]["feed_forward"],
                     ended["blocks"][at]["feed_forward"])
        assert not np.array_equal(began["blocks"][at]["operator"]["in_proj"],
                                  ended["blocks"][at]["operator"]["in_proj"])


def test_the_loss_is_the_share_of_a_layers_work_that_is_left_undone(original, text, operators):
    """1 where a layer does nothing, 0 where it does the same; layers of one kind are passed over."""
    nothing = {name: np.zeros_like(w) for name, w in operators[1].items()}
    made = hybridised(original, {1: nothing}, TAPS)
    last = made.blocks[1].feed_forward.w2
    last[...] = jnp.zeros_like(last[...])
    batch = {"tokens": text, "targets": np.roll(text, -1, 1), "segment_ids": np.ones_like(text),
             "positions": np.arange(32) * np.ones_like(text)}
    terms = LayerOutputs()(made, batch, {"teacher": original})
    assert float(terms.total) / text.size == pytest.approx(1, rel=1e-5)
    assert terms.sums.keys() == {"loss", "layer_1"}


def test_students_whose_layers_do_not_match_are_refused(root):
    with pytest.raises(ValueError, match="all operators are of the teacher's kinds"):
        config(root, "same", distill=DistillConfig(teacher=str(root / "start"), match="layers"))
    tuning.base(root / "narrow")
    with pytest.raises(ValueError, match="hidden_size is 32 in the student and 16 in the teacher"):
        config(root, "narrower", distill=DistillConfig(teacher=str(root / "narrow"), match="layers"))
    with pytest.raises(ValueError, match=r"match is 'x'; choose one of tokens, layers"):
        DistillConfig(match="x")
    with pytest.raises(ValueError, match=r"top_k is of match: tokens(.|\n)*stored is of match: tokens"):
        DistillConfig(match="layers", top_k=3, stored="x")


def test_the_config_of_a_hybrid_counts_its_parameters_and_state(original, operators):
    made = hybridised(original, operators, TAPS)
    count = sum(x.size for x in jax.tree.leaves(nnx.split(made, nnx.Param)[1]))
    assert made.config.num_params() == count
    assert made.config.state_bytes(100) == 4 + 3 * 2 * 32 * 4 < original.config.state_bytes(100)
