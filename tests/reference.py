"""The whole network once more, in float64 numpy, for one document of any length: slow, plain, independent.

It shares no code with `lfm_jax` but the parameter names, has no batch, no padding and no state, and covers what
`transformers` cannot express: one tap, fewer gates, recurrences, no q/k norm.

Dimensions: T time, D width, N query heads, K key/value heads, H head width, W taps.
"""

import numpy as np


def rms_norm(x, w, eps):
    return w * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def silu(x):
    return x / (1 + np.exp(-x))


def rotate(x_TNH, positions_T, theta, fraction=1.0):
    half = x_TNH.shape[-1] // 2
    frequency_H = theta ** (-np.arange(half) / half)
    frequency_H[int(fraction * 2 * half // 2) :] = 0
    angle_T1H = np.outer(positions_T, frequency_H)[:, None]
    first, second = x_TNH[..., :half], x_TNH[..., half:]
    turned = (first + 1j * second) * np.exp(1j * angle_T1H)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def causal_conv(y_TD, w_WD):
    """`z_t = sum_j w[W-1-j] y_{t-j}`, nothing before the first token."""
    T, W = len(y_TD), len(w_WD)
    z_TD = np.zeros_like(y_TD)
    for t in range(T):
        for j in range(min(W, t + 1)):
            z_TD[t] += w_WD[W - 1 - j] * y_TD[t - j]
    return z_TD


def centred_conv(y_TD, w_WD):
    """`torch.nn.Conv1d` with W // 2 zeros on both sides, cropped to T."""
    T, W = len(y_TD), len(w_WD)
    padded_SD = np.pad(y_TD, ((W // 2, W // 2), (0, 0)))
    return np.stack([sum(w_WD[k] * padded_SD[t + k] for k in range(W)) for t in range(T)])


def linear_scan(a_TD, b_TD):
    """`h_t = a_t h_{t-1} + b_t`, nothing before the first token."""
    h_TD = np.zeros_like(b_TD)
    for t in range(len(b_TD)):
        h_TD[t] = b_TD[t] + (a_TD[t] * h_TD[t - 1] if t else 0)
    return h_TD


def attention(q_TNH, k_TKH, v_TKH, window=None, causal=True):
    """Attention of one document, head by head; `window` counts the token itself."""
    T, N, H = q_TNH.shape
    group = N // k_TKH.shape[1]
    out_TNH = np.zeros_like(q_TNH)
    for t in range(T):
        seen = slice(0 if window is None else max(0, t + 1 - window), t + 1 if causal else T)
        for n in range(N):
            scores_S = k_TKH[seen, n // group] @ q_TNH[t, n] / np.sqrt(H)
            weights_S = np.exp(scores_S - scores_S.max())
            out_TNH[t, n] = weights_S / weights_S.sum() @ v_TKH[seen, n // group]
    return out_TNH


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def short_conv_operator(p, x_TD, positions_T, config):
    gates = config.conv_gates
    bias_CE = p.get("in_bias", np.zeros(p["in_proj"].shape[:2]))
    streams = list(np.einsum("TD,CED->CTE", x_TD, p["in_proj"]) + bias_CE[:, None])
    h_TD = streams.pop()
    c_TD = streams.pop() if gates in ("output", "both") else 1
    b_TD = streams.pop() if gates in ("input", "both") else 1
    assert not streams
    conv = causal_conv if config.causal else centred_conv
    z_TD = conv(b_TD * h_TD, p["conv"]) + p.get("conv_bias", 0)
    return (c_TD * z_TD) @ p["out_proj"].T + p.get("out_bias", 0)


def recurrence_operator(p, x_TD, positions_T, config):
    form = config.recurrence
    gate_TD, c_TD, x_TD = np.einsum("TD,CED->CTE", x_TD, p["in_proj"])
    cell = p["cell"]
    if form == "rglru":
        a_TD = sigmoid(-cell["rate"]) ** (8 * sigmoid(cell["gate_scale"] * x_TD + cell["gate_bias"]))
        b_TD = np.sqrt(1 - a_TD**2) * sigmoid(gate_TD) * x_TD
    elif form == "liquid":
        leak_D, f_TD = np.exp(cell["rate"]), softplus(gate_TD + cell["gate_bias"])
        a_TD = np.exp(-(leak_D + f_TD))
        b_TD = cell["gain"] * (1 - a_TD) * f_TD / (leak_D + f_TD) * x_TD
    else:
        a_TD = np.exp(-np.exp(cell["rate"])) * np.ones_like(x_TD)
        b_TD = np.sqrt(1 - a_TD**2) * gate_TD * x_TD
    return (c_TD * linear_scan(a_TD, b_TD)) @ p["out_proj"].T


def attention_operator(p, x_TD, positions_T, config):
    return gqa(p, x_TD, positions_T, config, config.rope_theta, config.rope_fraction, None)


def sliding_attention_operator(p, x_TD, positions_T, config):
    theta = config.rope_theta if config.sliding_rope_theta is None else config.sliding_rope_theta
    return gqa(p, x_TD, positions_T, config, theta, 1.0, config.sliding_window)


def gqa(p, x_TD, positions_T, config, theta, fraction, window):
    q_TNH, k_TKH, v_TKH = (np.einsum("TD,NHD->TNH", x_TD, p[name]) for name in ("q_proj", "k_proj", "v_proj"))
    if config.qk_norm:
        q_TNH = rms_norm(q_TNH, p["q_norm"]["weight"], config.norm_eps)
        k_TKH = rms_norm(k_TKH, p["k_norm"]["weight"], config.norm_eps)
    q_TNH, k_TKH = (rotate(x, positions_T, theta, fraction) for x in (q_TNH, k_TKH))
    out_TNH = attention(q_TNH, k_TKH, v_TKH, window, config.causal)
    if config.attention_gate:
        out_TNH = out_TNH * sigmoid(x_TD @ p["gate"].T)[:, :, None]
    return np.einsum("TNH,DNH->TD", out_TNH, p["out_proj"])


def swiglu(p, x_TD, config):
    return (silu(x_TD @ p["w1"].T) * (x_TD @ p["w3"].T)) @ p["w2"].T


def moe(p, x_TD, config):
    sigmoid_TE = 1 / (1 + np.exp(-x_TD @ p["router"].T))
    y_TD = np.zeros_like(x_TD)
    for t, (x_D, sigmoid_E) in enumerate(zip(x_TD, sigmoid_TE, strict=True)):
        chosen = np.argsort(-(sigmoid_E + p.get("expert_bias", 0)), kind="stable")[: config.active_experts]
        weights = sigmoid_E[chosen] / (sigmoid_E[chosen].sum() + 1e-6 if config.normed_weights else 1)
        for e, weight in zip(chosen, weights * config.expert_scale, strict=True):
            y_TD[t] += weight * (silu(x_D @ p["w1"][e]) * (x_D @ p["w3"][e])) @ p["w2"][e]
    return y_TD


OPERATORS = {
    "conv": short_conv_operator, "recurrence": recurrence_operator, "full_attention": attention_operator,
    "sliding_attention": sliding_attention_operator,
}
FEED_FORWARDS = {"swiglu": swiglu, "moe": moe}
"""By kind, on one document."""


def hidden(config, params, tokens_T, positions_T=None):
    """Normed hidden states [T, D] of one document; `params` is a nested dict of float64 arrays."""
    positions_T = np.arange(len(tokens_T)) if positions_T is None else positions_T
    eps = config.norm_eps
    x_TD = params["embed"][tokens_T]
    for i, layer in enumerate(config.layers):
        p = params["blocks"][i]
        h_TD = rms_norm(x_TD, p["operator_norm"]["weight"], eps)
        y_TD = OPERATORS[layer.operator](p["operator"], h_TD, positions_T, config)
        x_TD = x_TD + (rms_norm(y_TD, p["post_operator_norm"]["weight"], eps) if config.post_norm else y_TD)
        h_TD = rms_norm(x_TD, p["ffn_norm"]["weight"], eps)
        y_TD = FEED_FORWARDS[layer.feed_forward](p["feed_forward"], h_TD, config)
        x_TD = x_TD + (rms_norm(y_TD, p["post_ffn_norm"]["weight"], eps) if config.post_norm else y_TD)
    return rms_norm(x_TD, params["norm"]["weight"], eps)
