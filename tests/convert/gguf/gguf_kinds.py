"""Tiny models that GGUF files can hold, tokenizers, and what is in a file as the gguf library reads it."""

import gguf
import jax
import numpy as np
from flax import nnx

from lfm_jax.testing import tiny_model, tiny_tokenizer

SIZES = dict(vocab_size=384, hidden_size=64, ffn_size=96, num_heads=4, num_kv_heads=2, head_dim=16, init_std=0.2)
LLAMA = dict(layer_types=("full_attention",) * 2, qk_norm=False)
KINDS = {
    "hybrid": {},
    "untied": dict(tie_embedding=False, conv_taps=2, eos_ids=(7, 2), rope_theta=1e4, norm_eps=1e-6),
    "moe": dict(ffn_types=("swiglu", "moe", "moe"), num_experts=6, active_experts=2, expert_size=32),
    "llama": LLAMA,
    "llama with wide heads": LLAMA | dict(head_dim=32, num_kv_heads=4, tie_embedding=False),
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def model(kind="hybrid", seed=0, **changes):
    return tiny_model(seed, **SIZES | KINDS[kind] | changes)


def tokenizer():
    return tiny_tokenizer(vocab_size=300)


def params(model):
    """Every parameter as (dtype, bits), by path."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): (x.dtype.name, np.asarray(x).tobytes()) for path, x in leaves}


def keys_of(path):
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors_of(path):
    """Every tensor of a file as (type, shape, bytes), by name."""
    return {tensor.name: (tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())), tensor.data.tobytes())
            for tensor in gguf.GGUFReader(path).tensors}


def rewrite(source, path, keys=lambda keys: None, tensors=lambda tensors: None):
    """Writes a file again with its dicts of keys and of arrays changed in place; float32 files only."""
    reader = gguf.GGUFReader(source)
    found = {name: (field.contents(), field.types) for name, field in reader.fields.items()
             if not name.startswith("GGUF.")}
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    keys(found)
    tensors(arrays)
    writer = gguf.GGUFWriter(path, found.pop("general.architecture")[0])
    for name, (value, types) in found.items():
        writer.add_key_value(name, value, *types[:2])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
