"""The engine over replicas and tensor-parallel devices gives the tokens of one device."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import long
from meshes import mesh_of

from lfm_jax import quantize
from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import Adapter
from lfm_jax.adapters.trees import init_adapter
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model

V = 96
CONFIG = EngineConfig(slots=((2, 64), (1, 128)), chunk=16, prefix_cache_bytes=1 << 20, max_logprobs=2)


def requests():
    rng = np.random.default_rng(0)
    return [
        Request(prompt=[*range(20), *rng.integers(0, V, rng.integers(1, 20)).tolist()],
                max_new_tokens=int(rng.integers(1, 60 if i % 5 == 0 else 20)), n=1 + (i % 3 == 1 and i % 5 != 0),
                stop_ids=(3,),
                sampling=Sampling(temperature=float(i % 2), seed=i), logit_bias={5: 1.0} if i % 4 == 0 else {})
        for i in range(14)
    ]


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2), long(dict(tensor=2)), long(dict(data=4))], ids=str)
def test_as_on_one_device(sizes):
    """In `make test-long` each of the two axes alone."""
    model = tiny_model(vocab_size=V, layer_types=("conv", "full_attention", "conv", "sliding_attention"),
                       sliding_window=8)
    expected = Engine(model, CONFIG).complete(requests())
    made = Engine(model, CONFIG, mesh_of(**sizes))
    used = {d for pool in made._pools for x in jax.tree.leaves(pool._slots) for d in x.devices()}
    assert len(used) == np.prod(list(sizes.values()))
    kv = next(s for s in made._pools[0]._slots.state.layers if hasattr(s, "k_BSKH"))
    assert kv.k_BSKH.addressable_shards[0].data.shape[2] == 2 // sizes.get("tensor", 1)
    assert made.complete(requests()) == expected
    assert made.counts["cached_tokens"] > 0


@pytest.mark.parametrize(("form", "kv"), [
    (("int8", 32), "int8"), (("w8a8", None), "model"), long(("int4", None), "model"),
])
def test_narrow_weights_and_states_are_split(form, kv):
    """In `make test-long` int4 too."""
    model = quantize(tiny_model(vocab_size=V, hidden_size=64, ffn_size=64, head_dim=16,
                                layer_types=("conv", "full_attention")), *form)
    config = EngineConfig(slots=((2, 64),), chunk=16, kv=kv, fixed_rows=True)
    some = [Request(prompt=[*range(i, 9 * i + 9)], max_new_tokens=12, stop_ids=()) for i in range(3)]
    expected = Engine(model, config).complete(some)
    made = Engine(model, config, mesh_of(tensor=2))
    w = made._pools[0].params["blocks"][0]["feed_forward"]["w2"]
    for x in (w.values, *([w.scales] if form[1] else [])):  # Of one scale an output there is nothing to split in w2.
        assert x.addressable_shards[0].data.size == x.size // 2
    assert made.complete(some) == expected


def test_adapters_are_in_their_places_on_every_replica():
    """Split as the matrices beside which they stand."""
    model = tiny_model(vocab_size=V, layer_types=("conv", "full_attention"))
    lora, rng = LoRAConfig(rank=3), np.random.default_rng(0)
    made = init_adapter(model.config, lora, jax.random.key(0))
    adapter = Adapter(model.config, lora, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype("float32"), made))
    config = dataclasses.replace(CONFIG, slots=((2, 64),), adapters=2, adapter_rank=4)
    some = [dataclasses.replace(request, adapter=[None, "b", "a"][i % 3], n=1)
            for i, request in enumerate(requests()) if request.size <= 64]
    engines = [Engine(model, config), Engine(model, config, mesh_of(data=2, tensor=2))]
    for each in engines:
        for name in ("b", "a"):
            each.load_adapter(name, adapter)
    w2 = engines[1]._pools[1].params["blocks"][0]["feed_forward"]["w2"]
    assert w2.a_RI.addressable_shards[0].data.size == w2.a_RI.size // 2
    expected, found = (each.complete(some) for each in engines)
    assert [one.tokens for group in found for one in group] == [one.tokens for group in expected for one in group]


def test_meshes_that_do_not_fit():
    model = tiny_model(vocab_size=V)
    with pytest.raises(ValueError, match="uses `data` and `tensor` only"):
        Engine(model, CONFIG, mesh_of(fsdp=2))
    with pytest.raises(ValueError, match="does not divide over tensor=4"):
        Engine(model, CONFIG, mesh_of(tensor=4))
