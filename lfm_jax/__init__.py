"""lfm_jax: the LFM2 family of hybrid language models in JAX."""

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM
from lfm_jax.state import State

__all__ = ["LFM", "ModelConfig", "State"]
