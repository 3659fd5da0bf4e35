"""A mixture of experts, the sparse feed-forward of LFM2-8B-A1B (`Lfm2MoeSparseMoeBlock`).

Dimensions: B batch, T time, D model width, E experts, A active experts of a token, F width of an expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.scipy.special import entr

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear
from lfm_jax.kernels.sharded import experts, highest
from lfm_jax.layers import IN_OUT, buffer, normal_param


class MoE(nnx.Module):
    """The weighted sum of the A experts with the highest `sigmoid(router x) + bias`, each a SwiGLU.

    A token's weights are the chosen sigmoids, without the bias, divided by their sum if `config.normed_weights`. Scores
    are float32. Every token gets all of its experts; padding gets none.

    Reports: `load`, 1 / A for each expert of a token, so that its mean is the share of each expert in the tokens;
    `entropy` of the sigmoids as shares of their sum, in nats; and with `config.router_z_loss` a `loss` (ST-MoE, arXiv
    2202.08906, equation 5).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, E, F = config.hidden_size, config.num_experts, config.expert_size
        self.router = normal_param(rngs, (E, D), (None, "width"), config, decay=True, matrix=None, fan_in=D)
        if config.expert_bias:
            self.expert_bias = buffer(jnp.zeros((E,)), (None,))
        up = ("experts", "width", "ffn")
        self.w1 = normal_param(rngs, (E, D, F), up, config, decay=True, matrix=IN_OUT, fan_in=D)
        self.w3 = normal_param(rngs, (E, D, F), up, config, decay=True, matrix=IN_OUT, fan_in=D)
        self.w2 = normal_param(
            rngs, (E, F, D), ("experts", "ffn", "width"), config, decay=True, matrix=IN_OUT, fan_in=F, residual=True
        )
        self.config = config

    def __call__(
        self, x_BTD: jax.Array, *, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        chosen_BTA, weight_BTA, reports = self.route(x_BTD)
        if segment_ids_BT is not None:
            chosen_BTA = jnp.where((segment_ids_BT != 0)[:, :, None], chosen_BTA, self.config.num_experts)
        y_BTD = experts(x_BTD, chosen_BTA, weight_BTA, self.w1[...], self.w3[...], self.w2[...],
                        impl=self.config.experts_impl)
        return y_BTD, reports

    def route(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Returns the experts of each token, their weights, and the reports."""
        config, E = self.config, self.config.num_experts
        # Not `left`: a CPU's exponential over [E, rows] rounds the last rows unlike the others.
        score_BTE = linear(x_BTD, self.router[...], dtype="float32", impl="dot")
        gate_BTE = jax.nn.sigmoid(score_BTE)
        biased_BTE = gate_BTE + self.expert_bias[...] if config.expert_bias else gate_BTE
        chosen_BTA = highest(lax.stop_gradient(biased_BTE), config.active_experts)
        # Not take_along_axis, whose derivative would gather the gates of all devices.
        is_chosen_BTAE = chosen_BTA[..., None] == jnp.arange(E)
        weight_BTA = jnp.sum(jnp.where(is_chosen_BTAE, gate_BTE[:, :, None], 0.0), axis=-1)
        if config.normed_weights:
            weight_BTA /= jnp.sum(weight_BTA, axis=-1, keepdims=True) + 1e-6  # As the published models were trained.
        weight_BTA *= config.expert_scale
        share_BTE = gate_BTE / jnp.sum(gate_BTE, axis=-1, keepdims=True)
        reports = {"load": jnp.mean(is_chosen_BTAE, axis=-2, dtype=jnp.float32),
                   "entropy": jnp.sum(entr(share_BTE), axis=-1)}
        if config.router_z_loss:
            reports["loss"] = config.router_z_loss * jax.nn.logsumexp(score_BTE, axis=-1) ** 2
        return chosen_BTA, weight_BTA, reports


def balanced(bias_E: jax.Array, reports: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
    """The rule of `expert_bias`: raises it by `config.expert_bias_rate` where an expert had fewer tokens than the mean,
    lowers it where it had more (loss-free balancing, arXiv 2408.15664, algorithm 1)."""
    load_E = reports["load"]
    return bias_E + config.expert_bias_rate * jnp.sign(jnp.mean(load_E) - load_E)
