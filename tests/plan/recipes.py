"""Recipes of tiny runs for the planner's tests."""

from lfm_jax.config import ModelConfig
from lfm_jax.data.config import DataConfig
from lfm_jax.plan import PlanConfig
from lfm_jax.sharding import MeshConfig

TINY = dict(
    layer_types=("conv", "full_attention", "conv"), vocab_size=512, hidden_size=64, ffn_size=128, num_heads=8,
    num_kv_heads=4, head_dim=16, dtype="bfloat16",
)


def recipe(topology="cpu:8", *, model=None, rows=16, seq_len=64, mesh=None, **fields):
    """A PlanConfig of a tiny model; `model` changes fields of it, `mesh` names sizes of mesh axes."""
    return PlanConfig(
        run_dir="runs/x", steps=1000, topology=topology, model=ModelConfig(**(TINY | (model or {}))),
        data=DataConfig(sources=("text",), seq_len=seq_len, batch_size=rows), mesh=MeshConfig(**(mesh or {})), **fields,
    )
