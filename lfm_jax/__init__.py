"""lfm_jax: the LFM2 family of hybrid language models in JAX."""

from lfm_jax.config import ModelConfig
from lfm_jax.convert.hf import from_state_dict, save_hf, to_state_dict
from lfm_jax.infer.generate import generate, stream
from lfm_jax.infer.sampling import Sampling
from lfm_jax.load import load
from lfm_jax.model import LFM
from lfm_jax.state import State

__all__ = [
    "LFM",
    "ModelConfig",
    "Sampling",
    "State",
    "from_state_dict",
    "generate",
    "load",
    "save_hf",
    "stream",
    "to_state_dict",
]
