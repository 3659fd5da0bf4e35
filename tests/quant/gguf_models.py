"""Names and shapes of the tensors of models as GGUF files, and such files with random numbers."""

import gguf
import numpy as np

CONV, ATTENTION = "c", "a"
LFM2_350M = "ccaccaccacacacac"


def shapes(pattern, *, width=256, ffn=512, vocab=96, kv=128, experts=0, dense_layers=0, tied=True, convs=True):
    """Tensors of a model whose layers are `pattern`; without `convs` those of the `llama` architecture."""
    found = {"token_embd.weight": (vocab, width)}
    if not tied:
        found["output.weight"] = (vocab, width)
    found["token_embd_norm.weight" if convs else "output_norm.weight"] = (width,)
    for i, kind in enumerate(pattern):
        layer = {"attn_norm": (width,), "ffn_norm": (width,)}
        if kind == CONV:
            layer |= {"shortconv.in_proj": (3 * width, width), "shortconv.conv": (width, 3),
                      "shortconv.out_proj": (width, width)}
        else:
            layer |= {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width),
                      "attn_output": (width, width)}
            if convs:
                layer |= {"attn_q_norm": (64,), "attn_k_norm": (64,)}
        if experts and i >= dense_layers:
            layer |= {"ffn_gate_inp": (experts, width), "ffn_gate_exps": (experts, ffn, width),
                      "ffn_up_exps": (experts, ffn, width), "ffn_down_exps": (experts, width, ffn)}
            found[f"blk.{i}.exp_probs_b.bias"] = (experts,)
        else:
            layer |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


MODELS = {
    "350M": ("lfm2", LFM2_350M, {}),
    "untied": ("lfm2", LFM2_350M, {"tied": False}),
    "30 layers": ("lfm2", "ccaccacccacccacccacccacacacacc", {}),
    "narrow": ("llama", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", {"width": 192, "ffn": 320, "kv": 64, "convs": False}),
    "odd": ("llama", "aaa", {"width": 144, "ffn": 100, "kv": 48, "convs": False}),
    "80 layers": ("llama", "a" * 80, {"convs": False, "ffn": 256}),
    "4 experts": ("lfm2moe", "ccaccacccaccacca", {"experts": 4, "dense_layers": 2, "ffn": 256}),
    "8 experts": ("lfm2moe", "ccaccacccaccacca", {"experts": 8, "dense_layers": 2, "ffn": 256}),
}
"""Architecture, pattern and sizes; every rule of a mix is met by one of them."""


def numbers(name, shape):
    """Seeded weights of a tensor: normal, with columns of different sizes."""
    rng = np.random.default_rng(list(name.encode()))
    return 0.02 * rng.standard_normal(shape, np.float32) * np.exp(0.5 * rng.standard_normal(shape[-1], np.float32))


def write(path, model):
    """Writes a float32 file of one of MODELS that llama.cpp can quantise; it has no tokenizer."""
    arch, pattern, sizes = MODELS[model]
    tensors = shapes(pattern, **sizes)
    width, kv = tensors["token_embd.weight"][1], sizes.get("kv", 128)
    head = 64 if width % 64 == 0 else 48
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(len(pattern))
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(sizes.get("ffn", 512))
    writer.add_head_count(width // head)
    writer.add_head_count_kv([kv // head if kind == ATTENTION else 0 for kind in pattern])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(tensors["token_embd.weight"][0])
    if arch != "llama":
        writer.add_shortconv_l_cache(3)
    if sizes.get("experts"):
        writer.add_expert_count(sizes["experts"])
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(sizes.get("ffn", 512))
        writer.add_leading_dense_block_count(sizes["dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    for name, shape in tensors.items():
        writer.add_tensor(name, numbers(name, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
