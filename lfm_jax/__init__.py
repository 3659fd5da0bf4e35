"""lfm_jax: the LFM2 family of hybrid language models in JAX.

Names are imported when first used: kernels, their benchmark and `lfm_jax.selfcheck` need jax and numpy only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm_jax.adapters.peft import load_adapter, save_adapter
    from lfm_jax.config import ModelConfig
    from lfm_jax.convert.gguf.calibration import importance
    from lfm_jax.convert.gguf.models import save_gguf
    from lfm_jax.convert.hf import from_state_dict, save_hf, to_state_dict
    from lfm_jax.export.stablehlo import export_stablehlo
    from lfm_jax.infer.chat import chat
    from lfm_jax.infer.embed import embed, load_encoder, rerank
    from lfm_jax.infer.extract import classify, extract
    from lfm_jax.infer.generate import generate, stream
    from lfm_jax.loading import load
    from lfm_jax.model import LFM
    from lfm_jax.post.merge import merge
    from lfm_jax.quant.model import quantize
    from lfm_jax.sampling import Sampling
    from lfm_jax.state import State
    from lfm_jax.text.reply import Reply, read_reply

__all__ = [
    "LFM",
    "ModelConfig",
    "Reply",
    "Sampling",
    "State",
    "chat",
    "classify",
    "embed",
    "export_stablehlo",
    "extract",
    "from_state_dict",
    "generate",
    "importance",
    "load",
    "load_adapter",
    "load_encoder",
    "merge",
    "quantize",
    "read_reply",
    "rerank",
    "save_adapter",
    "save_gguf",
    "save_hf",
    "stream",
    "to_state_dict",
]

_MODULES = {
    "LFM": "model", "ModelConfig": "config", "Reply": "text.reply", "Sampling": "sampling", "State": "state",
    "chat": "infer.chat", "classify": "infer.extract", "embed": "infer.embed", "export_stablehlo": "export.stablehlo",
    "extract": "infer.extract", "from_state_dict": "convert.hf", "generate": "infer.generate",
    "importance": "convert.gguf.calibration", "load": "loading", "load_adapter": "adapters.peft",
    "load_encoder": "infer.embed", "merge": "post.merge", "quantize": "quant.model", "read_reply": "text.reply",
    "rerank": "infer.embed", "save_adapter": "adapters.peft", "save_gguf": "convert.gguf.models",
    "save_hf": "convert.hf", "stream": "infer.generate", "to_state_dict": "convert.hf",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
