"""What the library promises about its surroundings: NNX used as plain JAX, and a core without PyTorch."""

import os
import subprocess
import sys

STEP = """
import jax, jax.numpy as jnp, optax
from flax import nnx
from lfm_jax.testing import tiny_model

model = tiny_model()
tokens = jnp.ones((2, 5), jnp.int32)
graphdef, params = nnx.split(model, nnx.Param)
params = nnx.to_pure_dict(params)

@jax.jit
def forward(params, tokens, state):
    return nnx.merge(graphdef, params)(tokens, state=state)

@jax.jit
def step(params, tokens):
    def loss(params):
        logits, _ = nnx.merge(graphdef, params)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()
    value, grads = jax.value_and_grad(loss)(params)
    return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads)

first, params = step(params, tokens)
second, params = step(params, tokens)
assert second < first, (first, second)
assert jnp.array_equal(nnx.merge(graphdef, params).embed[...], params["embed"])
logits, state = forward(params, tokens, model.init_state(2, 8))
assert logits.shape == (2, 5, 97) and state.position_B.tolist() == [5, 5]
print(type(params) is dict)
"""
LAZY = """
import sys
import lfm_jax
heavy = {"torch", "transformers", "orbax", "grain", "tokenizers", "jinja2"} & set(sys.modules)
assert not heavy, f"import lfm_jax brings in {sorted(heavy)}"
import importlib, pkgutil
for module in pkgutil.walk_packages(lfm_jax.__path__, "lfm_jax."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, f"a module of lfm_jax brings in {sorted(heavy)}"
print(True)
"""


def run(code, **env):
    return subprocess.run([sys.executable, "-c", code], env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
                          capture_output=True, text=True, timeout=300)


def test_works_without_nnx_graph_mode():
    done = run(STEP, NNX_GRAPH_MODE="false")
    assert done.stdout.strip() == "True", done.stderr


def test_nothing_imports_torch_and_the_package_itself_nothing_heavy():
    done = run(LAZY)
    assert done.stdout.strip() == "True", done.stderr
