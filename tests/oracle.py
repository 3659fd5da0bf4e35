"""The oracle: random `transformers` models made offline, their answers, and their weights in our model."""

import jax.numpy as jnp
import torch
from flax import nnx
from helpers import rel_err
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import from_state_dict

torch.set_num_threads(1)  # Two spinning threads of a tiny model take ten times as long on a busy machine.

HYBRID = ("conv", "full_attention", "conv")
SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=4096)
TINY = {
    "lfm2": SIZES | dict(block_auto_adjust_ff_dim=False, layer_types=HYBRID),
    "lfm2_moe": SIZES | dict(
        layer_types=HYBRID, num_dense_layers=1, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24,
        eos_token_id=2,
    ),
    "lfm3": SIZES | dict(layer_types=("conv", "sliding_attention", "full_attention"), head_dim=8, sliding_window=5,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2),
}
"""By model_type."""
CASES = {
    "hybrid": {},
    "odd-widths": dict(vocab_size=101, hidden_size=35, intermediate_size=29, num_attention_heads=5,
                       num_key_value_heads=5, head_dim=14),
    "two-taps": dict(conv_L_cache=2, layer_types=("full_attention", "conv", "conv", "full_attention")),
    "four-taps-bias": dict(conv_L_cache=4, conv_bias=True),
    "seven-taps": dict(conv_L_cache=7, layer_types=("conv", "conv", "full_attention")),
    "all-conv": dict(layer_types=("conv",) * 3, conv_bias=True),
    "all-attention": dict(layer_types=("full_attention",) * 3, rope_parameters={"rope_type": "default",
                                                                               "rope_theta": 50.0}),
    "no-group": dict(num_key_value_heads=4),
    "one-kv-head": dict(num_key_value_heads=1, norm_eps=1e-2),
    "one-conv": dict(layer_types=("conv",)),
    "one-attention": dict(layer_types=("full_attention",)),
    "untied": dict(tie_word_embeddings=False, block_auto_adjust_ff_dim=True, block_multiple_of=5),
    "wide-heads": dict(head_dim=20, conv_L_cache=2),
    "moe": dict(model_type="lfm2_moe"),
    "moe-bare": dict(model_type="lfm2_moe", num_dense_layers=0, use_expert_bias=False, norm_topk_prob=False,
                     routed_scaling_factor=2.5, num_experts=3, num_experts_per_tok=1, tie_word_embeddings=False),
    "moe-all": dict(model_type="lfm2_moe", num_experts=4, num_experts_per_tok=4, conv_bias=True, conv_L_cache=2),
    "lfm3": dict(model_type="lfm3"),
    "lfm3-bare": dict(
        model_type="lfm3", use_sandwich_norm=False, use_attention_gate=False, tie_word_embeddings=False, conv_bias=True,
        conv_L_cache=2, layer_types=("full_attention", "conv", "sliding_attention"), sliding_window=2, head_dim=14,
        rope_parameters={
            "full_attention": {"rope_type": "proportional", "rope_theta": 50.0, "partial_rotary_factor": 0.7},
            "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
        },
    ),
    "lfm3-windows": dict(model_type="lfm3", layer_types=("sliding_attention",) * 2, use_sandwich_norm=False,
                         num_key_value_heads=4, norm_eps=1e-2),
}
"""Changes to TINY: every kind of LFM2, LFM2 MoE and LFM3 that `transformers` can express."""
WEIGHTS = ("init", "loud")
"""HF's own initialisation, under which the blocks nearly vanish beside the embedding, and weights that hide nothing."""


def hf_config(model_type="lfm2", **changes):
    fields = TINY[model_type] | changes
    return AutoConfig.for_model(model_type, **fields | dict(layer_types=list(fields["layer_types"]),
                                                            num_hidden_layers=len(fields["layer_types"])))


def hf_model(config, weights="loud", seed=0):
    """A random model in float32; `loud` keeps activations near 1 in every layer, biases and norms random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    if weights == "loud":
        make_loud(model)
    return model


@torch.no_grad()
def make_loud(model):
    for name, p in model.named_parameters():
        if "norm" in name:
            p.copy_(1 + 0.4 * torch.randn_like(p))
        elif name.endswith("bias"):
            p.copy_(0.5 * torch.randn_like(p))
        else:
            p.normal_(std=p.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(std=0.3)


def in_files(model, tensors=None):
    """Tensors by the names of a model's parameters (its state dict if left out) by the names that files have."""
    return revert_weight_conversion(model, model.state_dict() if tensors is None else tensors)


def ours(model, **overrides):
    """The same model as ours, float32: (graphdef, params)."""
    config = config_from_hf(model.config.to_dict(), param_dtype="float32", **dict(dtype="float32") | overrides)
    graphdef, params = nnx.split(from_state_dict(in_files(model), config), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def forward(model, tokens, mask=None):
    """(hidden states after the embedding and each layer, the last one normed; logits), as float32 numpy."""
    with torch.no_grad():
        out = model(torch.tensor(tokens, dtype=torch.long), attention_mask=None if mask is None else torch.tensor(mask),
                    use_cache=False, output_hidden_states=True)
    return [h.float().numpy() for h in out.hidden_states], out.logits.float().numpy()


def generate(model, tokens, mask, max_new_tokens):
    """Greedy continuation by `transformers`, [B, max_new_tokens]; nothing ends it early."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    out = model.generate(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(mask, dtype=torch.long),
                         do_sample=False, max_new_tokens=max_new_tokens)
    return out[:, tokens.shape[1] :].numpy()


def layers_and_logits(graphdef, params, tokens_BT):
    """What `forward` returns, from our model; to be traced."""
    model = nnx.merge(graphdef, params)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    hidden = [model.embed[...][tokens_BT]]
    for block in model.blocks:
        hidden.append(block(hidden[-1], positions_BT=positions_BT, segment_ids_BT=None, state=None)[0])
    normed, _ = model(tokens_BT, logits=None)
    return [*hidden[:-1], normed], model.project(normed)


def assert_parity(ours, theirs):
    """Layers to 1e-5 and logits to 1e-4 of the largest value."""
    (layers, logits), (hf_layers, hf_logits) = ours, theirs
    for i, (x, y) in enumerate(zip(layers, hf_layers, strict=True)):
        assert rel_err(x, y) < 1e-5, f"hidden state {i}"
    assert rel_err(logits, hf_logits) < 1e-4
