"""A step of decoding: every implementation against float64 numpy, and what goes to a GPU."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from lfm_jax.config import ModelConfig
from lfm_jax.kernels import attention
from lfm_jax.kernels.attention import DECODE_IMPLS, decode_attention
from lfm_jax.kernels.pallas_gpu_attention import attend_slots
from lfm_jax.model import LFM

Shape = jax.ShapeDtypeStruct
TRITON = "__gpu$xla.gpu.triton"
BOUNDS = [(0, 1), (0, 100), (99, 100), (63, 65), (7, 64), (64, 99), (30, 30)]
"""[first, stop) of each row, the last one empty; blocks have 64 slots, S is 100."""


def make(dtype=np.float32, N=4, K=2, S=100, H=16):
    rng = np.random.default_rng(0)
    B = len(BOUNDS)
    q, k, v = (rng.standard_normal(shape).astype(dtype) for shape in ((B, 1, N, H), (B, S, K, H), (B, S, K, H)))
    first, stop = np.array(BOUNDS, np.int32).T
    return q, k, v, first, stop


def expected(q, k, v, first, stop):
    """Zeros where nothing is seen."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        seen, head = slice(first[b], stop[b]), n // (q.shape[2] // k.shape[2])
        scores = k[b, seen, head] @ q[b, 0, n] / q.shape[3] ** 0.5
        weight = np.exp(scores - scores.max(initial=-np.inf))
        out[b, 0, n] = weight @ v[b, seen, head] / max(weight.sum(), 1e-30)
    return out


def step(impl):
    return jax.jit(functools.partial(decode_attention, impl=impl, interpret=impl == "pallas_gpu"))


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (2, 2)])
@pytest.mark.parametrize("impl", DECODE_IMPLS)
def test_equals_float64(impl, heads):
    args = make(N=heads[0], K=heads[1])
    out = np.asarray(step(impl)(*args))
    assert np.abs(out - expected(*args))[:-1].max() < 2e-6
    assert np.isfinite(out).all()  # Of a row that sees nothing too.


def test_scores_beyond_memory_go_by_blocks(monkeypatch):
    args = make()
    monkeypatch.setattr(attention, "_choose", lambda shape, S: "blockwise")
    out = np.asarray(decode_attention(*args))
    assert np.abs(out - expected(*args))[:-1].max() < 2e-6
    assert np.isfinite(out).all()


def test_the_kernel_has_the_derivative_of_the_sums():
    q, k, v, first, stop = (x[:-1] for x in make())
    def gradients(impl):
        _, pull = jax.vjp(lambda q, k, v: step(impl)(q, k, v, first, stop), q, k, v)
        return pull(jnp.ones_like(q))

    for a, b in zip(gradients("pallas_gpu"), gradients("xla"), strict=True):
        assert np.abs(a - b).max() < 2e-6


@pytest.mark.parametrize("programs", [1, 40, 10**6])
@pytest.mark.parametrize("S", [100, 128])
def test_parts_of_a_row_add_up(programs, S):
    """One program a head, or several that share its slots: some of them see none."""
    q, k, v, first, stop = make(S=S)
    out = attend_slots(q[:, 0], k, v, first, stop, block=16, programs=programs, interpret=True)
    assert np.abs(out - expected(q, k, v, first, stop)[:, 0]).max() < 2e-6


def test_a_row_that_has_outgrown_its_slots_reads_no_others():
    """80 slots are 5 blocks of 16 in 3 parts of 2; beyond them an interpreter has NaN, and a GPU the next row."""
    q, k, v, _, _ = make(S=80)
    zero = np.zeros(len(BOUNDS), np.int32)
    attend = functools.partial(attend_slots, q[:, 0], k, v, zero, block=16, programs=14 * 3, interpret=True)
    assert np.array_equal(attend(zero + 100), attend(zero + 80))


@pytest.mark.parametrize("impl", DECODE_IMPLS)
def test_bfloat16_is_close(impl):
    args = make(jnp.bfloat16)
    out = step(impl)(*args)
    assert out.dtype == jnp.bfloat16
    assert np.abs(np.asarray(out, np.float64) - expected(*args))[:-1].max() < 0.03


@pytest.mark.parametrize("impl", DECODE_IMPLS)
def test_what_is_not_seen_does_not_matter(impl):
    """Neither other rows nor hidden slots, however large: not by a bit."""
    q, k, v, first, stop = make()
    out = step(impl)(q, k, v, first, stop)
    other_k, other_v = k.copy(), v.copy()
    for b, (lo, hi) in enumerate(BOUNDS):
        for x in (other_k, other_v):
            x[b, :lo], x[b, hi:] = 1e6, -1e6
    changed = step(impl)(q, other_k, other_v, first, stop)
    assert np.array_equal(out[:-1], changed[:-1])
    other_k[1:], other_v[1:] = 3.0, 4.0
    alone = step(impl)(q, other_k, other_v, np.where(np.arange(len(first)) == 0, first, 0), stop)
    assert np.array_equal(alone[0], out[0])


@pytest.mark.parametrize(("changes", "match"), [
    (dict(impl="cudnn"), "impl is 'cudnn'; choose one of auto, xla, direct, pallas_gpu"),
    (dict(impl="direct", interpret=True), "interpret=True is for impl='pallas_gpu'"),
    (dict(impl="pallas_gpu"), "needs a GPU, half precision and heads of 16, 32, 64 or 128; here cpu, float32, 16"),
    (dict(impl="pallas_gpu", interpret=True, H=12), "16, 32, 64 or 128; here cpu, float32, 12"),
    (dict(two=True), "expected one query a row"),
])
def test_what_cannot_be_done_is_refused(changes, match):
    q, k, v, first, stop = make(H=changes.pop("H", 16))
    q = np.concatenate([q, q], axis=1) if changes.pop("two", False) else q
    with pytest.raises(ValueError, match=match):
        decode_attention(q, k, v, first, stop, **changes)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(attention, "nvidia_capability", lambda: 8.0)


def on_a_gpu():
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("rows", "slots"), [(1, 32_768), (8, 1000), (1024, 1024)])
def test_on_a_gpu_nothing_copies_keys_or_values(ampere, rows, slots):
    state, bound = Shape((rows, slots, 8, 64), jnp.bfloat16), Shape((rows,), jnp.int32)
    with on_a_gpu():
        text = lowered(decode_attention, Shape((rows, 1, 16, 64), jnp.bfloat16), state, state, bound, bound)
    assert text.count(TRITON) == 1
    assert f"tensor<{rows}x{slots}x" not in "".join(re.findall(r"->.*", text))


def test_a_model_on_a_gpu_decodes_with_the_kernel(ampere):
    """Half precision only; and a window that rolls over its slots does not see them in one stretch."""
    config = ModelConfig.preset("lfm2.5-350m").replace(
        layer_types=("full_attention", "conv", "sliding_attention", "full_attention"), sliding_window=8, hidden_size=32,
        ffn_size=32, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=64,
    )
    found = {}
    for dtype in ("bfloat16", "float32"):
        model = LFM(config.replace(dtype=dtype), rngs=nnx.Rngs(0))
        state = model.init_state(2, 32)
        with on_a_gpu():
            found[dtype] = lowered(lambda state, token, model=model: model(token, state=state)[0], state,
                                   Shape((2, 1), jnp.int32)).count("call @attend_slots")
    assert found == {"bfloat16": 2, "float32": 0}


@pytest.mark.parametrize(("changes", "chosen"), [
    ({}, "rows"), (dict(window=4), "rows"), (dict(ids=True), "rows"), (dict(dtype=jnp.float32), "xla"),
    (dict(slots=512), "xla"), (dict(T=1024, slots=2048), "masked"), (dict(T=1025, slots=2048), "xla"),
    (dict(T=1024, slots=4098), "xla"),
])
def test_attention_on_a_gpu_goes_to_cudnn_where_it_can(ampere, monkeypatch, changes, chosen):
    """A mask is worth it for many pairs of queries and key slots, within bounds of memory."""
    taken = []
    monkeypatch.setattr(attention, "cudnn_attention", SimpleNamespace(
        attend_rows=lambda *args: taken.append("rows"), attend_masked=lambda *args: taken.append("masked"),
        MASK_BYTES=2**23))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, *args, **options: taken.append("xla") or q)
    monkeypatch.setattr(attention, "platform", lambda: "gpu")
    T, dtype = changes.get("T", 8), changes.get("dtype", jnp.bfloat16)
    q, k = jnp.ones((1, T, 2, 16), dtype), jnp.ones((1, changes.get("slots", T), 2, 16), dtype)
    ids = jnp.ones((1, T), jnp.int32) if changes.get("ids") else None
    attention.attention(q, k, k, segment_ids_BT=ids, key_segment_ids_BS=ids, window=changes.get("window"))
    assert taken == [chosen]
