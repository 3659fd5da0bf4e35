"""Compiled for a TPU, a step of decoding reads narrow weights, and writes no wider copy of one.

Shapes are those of LFM2.5-350M, two layers of them; the logits of eight rows stay below the smallest matrix.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tpu_aot
from flax import nnx
from helpers import long

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear
from lfm_jax.layers import OUT_IN
from lfm_jax.model import abstract_model, param_traits
from lfm_jax.plan.hlo import Module
from lfm_jax.quant.model import narrow_matrix, narrowed
from lfm_jax.state import init_state

CONFIG = ModelConfig.preset("lfm2.5-350m").replace(
    layer_types=("conv", "full_attention"), vocab_size=65_024, dtype="bfloat16", param_dtype="bfloat16"
)
NAMES = {"int8": "s8", "int4": "s4", "w8a8": "s8"}


def narrow_shapes(config, kind, group):
    """(graphdef, shapes of the parameters) of a quantised model."""
    graphdef, shapes = abstract_model(config)
    matrices = jax.tree.map(lambda traits: (narrow_matrix(traits),), param_traits(config))

    def narrow(params):
        return jax.tree.map(lambda w, m: narrowed(w, *m, kind, group)[0] if m[0] else w, params, matrices)

    return graphdef, jax.eval_shape(narrow, shapes)


def step(graphdef, params, tokens_B1, state):
    model = nnx.merge(graphdef, params)
    logits_B1V, state = model(tokens_B1, state=state, logits="last")
    return jnp.argmax(logits_B1V[:, 0], axis=-1), state


@tpu_aot.requires_libtpu
@pytest.mark.parametrize(("kind", "group", "rows"), [
    ("int8", None, 1), ("int8", None, 8), ("int4", 32, 1), ("int4", 32, 8), ("w8a8", None, 8), long("int4", None, 1),
    long("int4", None, 8), long("int8", 32, 8), long("int4", 128, 1), long("int4", 128, 8), long("w8a8", None, 1),
])
def test_a_step_for_a_tpu_reads_narrow_weights_and_writes_none(kind, group, rows):
    """In `make test-long` the other forms. Narrow copies in another layout there are none either, except of the table
    in groups of 128 where several ids are looked up."""
    graphdef, params = narrow_shapes(CONFIG, kind, group)
    state = jax.eval_shape(lambda: init_state(CONFIG, rows, 32))
    fn = functools.partial(step, graphdef), params, jax.ShapeDtypeStruct((rows, 1), jnp.int32), state
    module = Module(tpu_aot.compile_for(tpu_aot.TOPOLOGIES["v5e"], *fn).as_text())
    narrow, wide = [], set()
    for x in jax.tree.leaves(params):
        if jnp.issubdtype(x.dtype, jnp.integer):
            narrow.append(x.size)
        else:
            wide.add(x.size)
    given = [shape for i in module.computations[module.entry].values() if i.opcode == "parameter" for shape in i.shapes]
    assert sorted(math.prod(s.dims) for s in given if s.dtype == NAMES[kind]) == sorted(narrow)
    written = [
        (instruction.opcode, shape.dtype, math.prod(shape.dims)) for _, instruction, _ in module.executed
        if instruction.opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast")
        for shape in instruction.shapes if math.prod(shape.dims) >= min(narrow)
    ]
    assert written, "the weights are brought to the chip's own memory"
    # Scales of a table in groups are as many as the numbers of a small matrix.
    assert {size for _, dtype, size in written if dtype != NAMES[kind]} <= wide
    copied = [size for opcode, dtype, size in written if opcode == "copy" and dtype == NAMES[kind]]
    assert len(copied) == (1 if (group, rows) == (128, 8) else 0)


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int4", None), ("int8", 32), ("int4", 128)])
def test_nothing_in_a_product_for_a_gpu_asks_for_a_wider_copy(kind, group):
    """Of the program that XLA for CUDA is given: one product, whose operand is made of narrow numbers by elementwise
    operations. What XLA fuses there, and how fast it is, was not measured: that needs a GPU."""
    w = jax.eval_shape(lambda w: narrowed(w, OUT_IN, kind, group)[0], jax.ShapeDtypeStruct((256, 512), jnp.bfloat16))
    x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16)
    gpu = jax.sharding.AbstractDevice("NVIDIA H200", 1, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=gpu)):
        text = jax.jit(linear).trace(x, w).lower(lowering_platforms=("cuda",)).as_text()
    operations = set(re.findall(r"stablehlo\.(\w+)", text))
    assert text.count("stablehlo.dot_general") == 1
    assert f"xi{kind[3:]}>" in text
    assert not operations & {"optimization_barrier", "custom_call", "while", "case", "gather"}
    assert "transpose" not in operations or group, "of the few scales"
