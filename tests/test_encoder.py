"""Encoders (`causal=False`): each token sees its whole document, whatever lies around it. Against float64 numpy and
PyTorch, and what encoders refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from helpers import Net, batches, documents, rel_err, tokens_like
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.lfm2 import modeling_lfm2

import lfm_jax as lfm
from lfm_jax import ModelConfig
from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import from_state_dict
from lfm_jax.data.config import DataConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.infer.chat_loop import chat_loop
from lfm_jax.kernels.attention import attention
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer

B, T = 3, 24
SEEDS = st.integers(0, 2**16)
ENCODERS = {
    "hybrid": Net(causal=False),
    "four-taps-bias": Net(causal=False, layer_types=("conv", "full_attention"), conv_taps=4, conv_bias=True),
    "blockwise": Net(causal=False, layer_types=("full_attention", "conv"), conv_taps=7, attention_impl="blockwise"),
    "one-tap": Net(causal=False, layer_types=("conv", "full_attention"), conv_taps=1, conv_gates="none"),
}
every_encoder = pytest.mark.parametrize("net", ENCODERS.values(), ids=ENCODERS)


@every_encoder
@given(segment_ids=batches(B, T), seed=SEEDS)
def test_every_document_is_computed_as_if_alone(net, segment_ids, seed):
    tokens = tokens_like((B, T), seed)
    hidden, state = net(tokens, segment_ids=segment_ids)
    assert state is None
    for row in range(B):
        for where in documents(segment_ids[row]):
            assert rel_err(hidden[row, where], net.reference(tokens[row, where])) < 1e-5


@every_encoder
@pytest.mark.parametrize("length", [1, 2, 17])
def test_padding_and_neighbours_change_nothing(net, length):
    tokens = tokens_like((2, length), length)
    plain, _ = net(tokens)  # Of one row the products take another way, and round otherwise.
    middle = [i * (T - 1) // max(length - 1, 1) for i in range(length)]
    for where in (list(range(T - length, T)), list(range(length)), middle):
        rows, segment_ids = tokens_like((B, T), 5), np.zeros((B, T), np.int32)
        segment_ids[0] = 1
        rows[1, where], segment_ids[1, where] = tokens[0], 5
        padded, _ = net(rows, segment_ids=segment_ids)
        assert rel_err(padded[1, where], plain[0]) < 2e-6  # Rounding: shapes differ.


@every_encoder
@given(segment_ids=batches(B, T), seed=SEEDS, data=st.data())
def test_a_changed_token_moves_all_of_its_document_and_nothing_else(net, segment_ids, seed, data):
    tokens = tokens_like((B, T), seed)
    row, at = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    changed = tokens.copy()
    changed[row, at] = 1 + tokens[row, at] % 96
    before, _ = net(tokens, segment_ids=segment_ids)
    after, _ = net(changed, segment_ids=segment_ids)
    moves = np.zeros((B, T), bool)
    for where in documents(segment_ids[row]):
        moves[row, where] = at in where
    real = segment_ids != 0
    np.testing.assert_array_equal((before != after).any(-1) & real, moves & real)


@every_encoder
@given(lengths=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=2), seed=SEEDS)
def test_unread_tokens_stay_in_their_document(net, lengths, seed):
    ids = [i for d, (read, unread) in enumerate(lengths, 3) for i in [d] * read + [-d] * unread]
    segment_ids = np.asarray([ids + [0] * (T - len(ids))], np.int32)
    tokens = tokens_like((1, T), seed)
    hidden, _ = net(tokens, segment_ids=segment_ids)
    assert np.isfinite(hidden[segment_ids != 0]).all()
    first = np.abs(segment_ids) == 3
    moved, _ = net(np.where(segment_ids == 3, 1 + tokens % 96, tokens), segment_ids=segment_ids)
    assert (moved[first] != hidden[first]).any(-1).all()
    np.testing.assert_array_equal(moved[~first & (segment_ids != 0)], hidden[~first & (segment_ids != 0)])


def test_attention_does_not_read_unread_tokens():
    net = Net(causal=False, layer_types=("full_attention", "full_attention"))
    tokens, segment_ids = tokens_like((2, 9), 0), np.asarray([[4] * 5 + [-4] * 4, [-1] * 3 + [1] * 6])
    hidden, _ = net(tokens, segment_ids=segment_ids)
    without, _ = net(tokens, segment_ids=np.maximum(segment_ids, 0))
    changed, _ = net(np.where(segment_ids < 0, 1 + tokens % 96, tokens), segment_ids=segment_ids)
    np.testing.assert_array_equal(changed[segment_ids > 0], hidden[segment_ids > 0])
    assert rel_err(without[0, :5], hidden[0, :5]) < 1e-5
    assert (changed[segment_ids < 0] != hidden[segment_ids < 0]).any(-1).all()


# ------------------------------------------------------------------------------------------------------------ PyTorch


def torch_encoder(model, tokens, attended, convolved):
    """Hidden states of the layers of `Lfm2ForCausalLM` without a causal mask, with zeros on both sides of convolutions.

    Args:
      attended: 1 for tokens that attention reads, [B, T].
      convolved: 1 for tokens that convolutions read.
    """

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **_):
        b, c, x = self.in_proj(hidden_states).transpose(1, 2).chunk(3, dim=1)
        read = b * x * torch.tensor(convolved, dtype=torch.float32)[:, None]
        w = self.conv.weight.shape[-1]
        z = functional.conv1d(read, self.conv.weight, self.conv.bias, padding=w // 2, groups=read.shape[1])
        return self.out_proj((c * z[..., : read.shape[-1]]).transpose(1, 2))

    seen = torch.where(torch.tensor(attended)[:, None, None] == 1, 0.0, -torch.inf).expand(-1, 1, tokens.shape[1], -1)
    body = model.model
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_lfm2.Lfm2ShortConv, "forward", forward)
        x = body.embed_tokens(torch.tensor(tokens, dtype=torch.long))
        positions = torch.arange(x.shape[1])[None]
        embeddings = body.rotary_emb(x, positions)
        for layer in body.layers:
            x = layer(x, position_embeddings=embeddings, attention_mask=seen, position_ids=positions)
        return body.embedding_norm(x).numpy()


@pytest.mark.parametrize("case", ["hybrid", "four-taps-bias", "seven-taps", "two-taps"])
def test_layers_of_transformers_without_a_causal_mask(case):
    """Rows: a whole one, one with padding, one whose last tokens attention does not read."""
    theirs = oracle.hf_model(oracle.hf_config(**oracle.CASES[case]))
    theirs.config._attn_implementation = "eager"
    config = config_from_hf(theirs.config.to_dict(), param_dtype="float32", dtype="float32")
    graphdef, _ = nnx.split(lfm.LFM(config.replace(causal=False), rngs=nnx.Rngs(0)), nnx.Param)
    weights = nnx.state(from_state_dict(oracle.in_files(theirs), config), nnx.Param)
    tokens = tokens_like((3, 33), 0)
    ids = np.asarray([[1] * 33, [1] * 20 + [0] * 13, [1] * 20 + [-1] * 13])
    expected = torch_encoder(theirs, tokens, attended=ids > 0, convolved=ids != 0)
    hidden, _ = nnx.merge(graphdef, weights)(jnp.asarray(tokens), segment_ids_BT=jnp.asarray(ids), logits=None)
    assert rel_err(np.asarray(hidden)[ids != 0], expected[ids != 0]) < 1e-5


# ----------------------------------------------------------------------------------------------------------- refusals


def test_what_needs_a_causal_model_says_so(tmp_path):
    tokenizer = tiny_tokenizer()
    model = tiny_model(causal=False, vocab_size=tokenizer.get_vocab_size())
    state = tiny_model().init_state(1, 8)
    batch = {"tokens": jnp.ones((1, 4), jnp.int32), "targets": jnp.ones((1, 4), jnp.int32), "positions": None,
             "segment_ids": None}
    refused = {
        "a decode state": lambda: model.init_state(1, 8),
        "a call with a state": lambda: model(jnp.ones((1, 1), jnp.int32), state=state),
        "generation": lambda: lfm.generate(model, tokenizer, "the"),
        "generation ": lambda: lfm.stream(model, tokenizer, "the"),
        "a chat": lambda: chat_loop(model, tokenizer),
        "an engine": lambda: Engine(model),
        "next-token prediction": lambda: NextToken()(model, batch),
    }
    for what, call in refused.items():
        with pytest.raises(ValueError, match=f"^{what.strip()} needs a causal model, and causal is False: an encoder"):
            call()
    with pytest.raises(ValueError, match=r"model.causal is False; next-token prediction needs a causal model"):
        TrainConfig(run_dir=str(tmp_path / "run"), steps=1, model=model.config,
                    data=DataConfig(sources=("x",), seq_len=8, batch_size=1))


@pytest.mark.parametrize(("changes", "match"), [
    (dict(causal=1), "causal is 1; it must be true or false"),
    (dict(causal=False, layer_types=("recurrence", "conv", "sliding_attention")),
     "layer_types has recurrence, sliding_attention; a model with causal=False has conv, full_attention only"),
    (dict(causal=False, conv_impl="lax"), "conv_impl is 'lax'; with causal=False choose one of auto, shifted"),
    (dict(causal=False, attention_impl="splash"), "attention_impl is 'splash'; with causal=False choose one of auto,"),
])
def test_configs_that_are_no_encoder(changes, match):
    with pytest.raises(ValueError, match=match):
        tiny_config(**changes)


def test_counts_of_an_encoder():
    causal, encoder = tiny_config(), tiny_config(causal=False)
    assert encoder.num_params() == causal.num_params()
    assert encoder.state_bytes(100) == 0
    scores = 4 * causal.num_heads * causal.head_dim  # FLOPs of one query and one key, in one attention layer.
    assert encoder.flops_per_token(9) - causal.flops_per_token(9) == scores * (9 - 5)
    assert ModelConfig().causal


# ------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("impl", ["xla", "direct", "blockwise"])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_without_order_agrees_with_a_full_softmax(impl, packed):
    rng = np.random.default_rng(0)
    q, k, v, weight = (rng.standard_normal((2, 37, n, 8)).astype(np.float32) for n in (4, 2, 2, 4))
    ids = jnp.asarray(np.repeat([[1, 2, 3], [1, 1, 0]], [10, 7, 20], axis=1), jnp.int32) if packed else None

    def ours(q, k, v):
        return attention(q, k, v, segment_ids_BT=ids, key_segment_ids_BS=ids, causal=False, impl=impl)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(8)
        if ids is not None:
            scores = jnp.where((ids[:, :, None] == ids[:, None])[:, None], scores, -jnp.inf)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    def both(f):
        out, pull = jax.vjp(jax.jit(f), q, k, v)
        return out, *pull(jnp.asarray(weight))

    for a, b in zip(both(ours), both(plain), strict=True):
        assert rel_err(a, b) < 1e-5


def test_attention_without_order_refuses_order():
    x = jnp.ones((1, 4, 1, 8))
    order = jnp.zeros((1, 4), jnp.int32)
    for bad in (dict(order_BT=order), dict(key_order_BS=order), dict(window=2)):
        with pytest.raises(ValueError, match="causal=False has no order: leave order_BT, key_order_BS and window out"):
            attention(x, x, x, causal=False, **bad)
    with pytest.raises(ValueError, match="impl='splash' is causal; use impl='blockwise'"):
        attention(x, x, x, causal=False, impl="splash")
