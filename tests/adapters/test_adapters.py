"""Adapters on a model: unmerged = merged, over narrow weights too, stacked, several in one batch; what targets name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import KINDS, Net, rel_err, tokens_like

from lfm_jax import ModelConfig, quantize
from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.targets import named_targets
from lfm_jax.adapters.trees import (
    adapt,
    adapt_rows,
    adapter_traits,
    digest,
    for_rows,
    init_adapter,
    merge,
    num_adapter_params,
    taken,
)
from lfm_jax.adapters.weights import Adapted
from lfm_jax.model import abstract_model
from lfm_jax.stacking import stack_layers
from lfm_jax.testing import tiny_config, tiny_model

LORA = LoRAConfig(rank=3, alpha=6)


def noisy(adapter, seed=1):
    """With B that is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), adapter)


@functools.cache
def net(kind="hybrid"):
    return Net(**KINDS[kind])


@functools.partial(jax.jit, static_argnums=0)
def logits(graphdef, weights, tokens):
    return nnx.merge(graphdef, weights)(tokens)[0]


@pytest.mark.parametrize("kind", ["every-operator", "lfm3", "moe"])
def test_merged_is_unmerged(kind):
    """Targets of all shapes: in_proj's three streams, heads in and out."""
    ours, tokens = net(kind), tokens_like((2, 7), 0)
    adapter = init_adapter(ours.config, LORA, jax.random.key(0))
    plain = logits(ours.graphdef, ours.params, tokens)
    begun = logits(ours.graphdef, adapt(ours.config, LORA, ours.params, adapter), tokens)
    assert rel_err(begun, plain) < 1e-6  # B is zero; the two programs round differently.
    adapter = noisy(adapter)
    apart = adapt(ours.config, LORA, ours.params, adapter)
    together = merge(ours.config, LORA, ours.params, adapter)
    expected = logits(ours.graphdef, together, tokens)
    assert rel_err(expected, plain) > 1e-2
    assert rel_err(logits(ours.graphdef, apart, tokens), expected) < 1e-5
    jax.tree.map(np.testing.assert_array_equal, taken(apart), adapter)
    assert jax.tree.structure(together) == jax.tree.structure(ours.params)


@pytest.mark.parametrize("form", ["int8", "int4:32"])
def test_over_narrow_weights(form):
    kind, _, group = form.partition(":")
    config = tiny_config(hidden_size=32, ffn_size=64)
    narrow = quantize(tiny_model(hidden_size=32, ffn_size=64), kind, int(group) if group else None)
    graphdef, params = nnx.split(narrow, nnx.Param)
    params, tokens = nnx.to_pure_dict(params), tokens_like((2, 7), 0)
    adapter = noisy(init_adapter(config, LORA, jax.random.key(0)))
    apart = adapt(config, LORA, params, adapter)
    assert apart["blocks"][0]["operator"]["in_proj"].base is params["blocks"][0]["operator"]["in_proj"]
    expected = logits(graphdef, merge(config, LORA, params, adapter), tokens)
    assert rel_err(logits(graphdef, apart, tokens), expected) < 1e-5


def test_the_product_is_pefts():
    """W x + scale B A x, with A drawn as PEFT draws it."""
    config = tiny_config()
    _, weights = abstract_model(config)
    lora = LoRAConfig(rank=4, alpha=10, rslora=True)
    adapter = init_adapter(config, lora, jax.random.key(3))
    a = np.asarray(adapter["blocks"][1]["operator"]["out_proj"]["a"])
    assert a.shape == (4, 4, 8)
    assert 0.9 < np.abs(a).max() * np.sqrt(32) <= 1
    rng = np.random.default_rng(0)
    x, b, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 4, 8), (32, 4), (32, 4, 8)))
    adapter["blocks"][1]["operator"]["out_proj"]["b"] = jnp.asarray(b)
    weights["blocks"][1]["operator"]["out_proj"] = jnp.asarray(w)
    made = adapt(config, lora, weights, adapter)["blocks"][1]["operator"]["out_proj"]
    expected = np.einsum("btnh,dnh->btd", x, w) + 10 / 2 * np.einsum("btnh,rnh,dr->btd", x, a, b)
    y = made.linear(jnp.asarray(x), inputs=2, dtype=jnp.dtype("float32"), impl="auto")
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_stacked_layers_have_the_same_numbers():
    config = tiny_config(layer_types=("conv", "full_attention") * 2)
    lora = LoRAConfig(rank=2, dropout=0.5)
    plain, stacked = (init_adapter(config, lora, jax.random.key(0), stacked=stacked) for stacked in (False, True))
    jax.tree.map(np.testing.assert_array_equal, stack_layers(plain, config), stacked)
    traits = adapter_traits(config, lora, stacked=True)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, known: len(known.axes) == x.ndim, stacked, traits)))
    params = Net(layer_types=config.layer_types).params
    tokens, key = tokens_like((2, 6), 0), jax.random.key(7)

    @jax.jit
    def both(params, plain):
        found = []
        for scan in (False, True):
            graphdef, _ = abstract_model(config, stacked=scan)
            trees = (stack_layers(params, config), stack_layers(plain, config)) if scan else (params, plain)
            model = nnx.merge(graphdef, adapt(config, lora, *trees, key=key, stacked=scan))
            found.append(model(tokens, logits=None)[0])
        without = nnx.merge(abstract_model(config)[0], adapt(config, lora, params, plain))(tokens, logits=None)[0]
        return *found, without

    one, other, without = both(params, noisy(plain))
    assert rel_err(one, other) < 1e-5
    assert rel_err(without, other) > 1e-2  # Dropout dropped something.


def test_each_row_of_a_batch_has_its_own_adapter():
    ours, tokens = net(), tokens_like((5, 7), 0)
    loras = [LORA, LoRAConfig(rank=2, alpha=9, targets=("conv.in_proj", "w2"))]
    adapters = [(lora, noisy(init_adapter(ours.config, lora, jax.random.key(i)), i)) for i, lora in enumerate(loras)]
    rows = np.asarray([2, 0, 1, -1, 2], np.int32)
    several = for_rows(adapt_rows(ours.config, ours.params, adapters, jnp.zeros(5, jnp.int32)), jnp.asarray(rows))
    alone = [ours.params, *(adapt(ours.config, lora, ours.params, adapter) for lora, adapter in adapters)]
    expected = np.stack([logits(ours.graphdef, alone[max(i, 0)], tokens)[row] for row, i in enumerate(rows)])
    assert rel_err(logits(ours.graphdef, several, tokens), expected) < 1e-5
    with pytest.raises(ValueError, match="merge one adapter"):
        several["blocks"][0]["operator"]["in_proj"].astype("float32")


def test_inputs_are_dropped_by_their_share():
    w = Adapted(jnp.zeros((1, 1000)), jnp.ones((1, 1000)), jnp.ones((1, 1)), dropout=0.3, key=jax.random.key(0))
    y = np.asarray(w.linear(jnp.ones((50, 1000)), inputs=1, dtype=jnp.dtype("float32"), impl="dot"))
    assert abs(y.mean() - 1000) < 10
    assert y.std() > 10


def test_what_targets_name():
    config = ModelConfig()
    assert len(named_targets(config, LoRAConfig())) == 16 * 3 + 10 * 2 + 6 * 4
    assert len(named_targets(config, LoRAConfig(targets=("out_proj",)))) == 16
    assert len(named_targets(config, LoRAConfig(targets=("conv.out_proj",)))) == 10
    assert len(named_targets(config, LoRAConfig(targets=("self_attn.out_proj", "2.operator.k_proj")))) == 7
    rank, params = 4, 3 * 16 * (1024 + 4608)
    params += 10 * (1024 + 3072 + 2048) + 6 * (2 * 2048 + 2 * (1024 + 512))
    assert num_adapter_params(config, LoRAConfig(rank=rank)) == rank * params
    # Llama's names, of which nothing would be trained, beside a good one.
    with pytest.raises(ValueError, match=r"(?s)there are in_proj, .*w3.*'o_proj' names no.*'gate_proj' names no"):
        named_targets(config, LoRAConfig(targets=("q_proj", "o_proj", "gate_proj")))
    with pytest.raises(ValueError, match="'proj' names no matrix"):
        named_targets(config, LoRAConfig(targets=("proj",)))
    # Of the default what there is; LFM3 calls its out_proj another name.
    no_conv = tiny_config(layer_types=("full_attention",))
    assert len(named_targets(no_conv, LoRAConfig())) == 7
    lfm3 = named_targets(tiny_config(**KINDS["lfm3"]), LoRAConfig())
    assert "model.layers.2.self_attn.o_proj" in lfm3


@pytest.mark.parametrize("target", ["experts", "w1", "experts.3.w2", "experts.gate_up_proj"])
def test_experts_are_refused_by_name(target):
    ffns = ("moe",) if target == "w1" else ("swiglu", "moe", "moe")  # There may be dense ones of that name too.
    config, targets = tiny_config(**KINDS["moe"] | dict(ffn_types=ffns)), (target, "q_proj")
    with pytest.raises(ValueError, match="names matrices of experts, which have no adapters"):
        named_targets(config, LoRAConfig(targets=targets))
    assert not any("expert" in name for name in named_targets(config, LoRAConfig()))


def test_layers_that_are_stacked_must_be_adapted_alike():
    config = tiny_config(layer_types=("conv", "conv"))
    for lora in (LoRAConfig(targets=("0.conv.in_proj",)), LoRAConfig(rank_pattern={"1.conv.in_proj": 2})):
        init_adapter(config, lora, jax.random.key(0))
        with pytest.raises(ValueError, match=r"model\.scan_layers stacks"):
            init_adapter(config, lora, jax.random.key(0), stacked=True)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(rank=-1), "rank is -1"), (dict(alpha=0.0), "alpha is 0.0"), (dict(dropout=1.0), "dropout is 1.0"),
    (dict(targets=()), "targets is empty"), (dict(quantize="int5"), "quantize is 'int5'"),
    (dict(rank_pattern={"w1": 0}), "rank_pattern w1 is 0"), (dict(alpha_pattern={"(": 1.0}), "no regular expression"),
    (dict(rank=0, dropout=0.1), "rank is 0, which is no adapter, but dropout is given"),
])
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**changes)


def test_a_digest_tells_weights_apart():
    a = {"x": np.ones((2, 2), np.float32), "y": np.zeros(3, np.float32)}
    assert digest(a) == digest(jax.tree.map(jnp.asarray, a))
    others = [a | {"x": a["x"].reshape(4)}, a | {"y": np.float32([0, 0, 1e-30])}, {"x": a["x"], "z": a["y"]}]
    assert len({digest(other) for other in (a, *others)}) == 4
