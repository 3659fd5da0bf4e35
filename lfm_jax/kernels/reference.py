"""The kernels once more in float64 numpy, with their gradients: what `lfm selfcheck` and the tests compare with.

Slow and plain. Each function takes the arguments of its kernel and returns `(values, gradients)`; `gradients` takes the
cotangents of the values and returns the gradient of every array by the name of its argument.

Dimensions: B batch, T query time, S key slots, D channels, W taps, V = W - 1 columns of history, N query heads, K
key/value heads, G = N / K, H head width; M tokens, A active experts of a token, E experts, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def _starts(segment_ids_BT: Array | None, B: int, T: int) -> Array:
    """Index of the first token of each token's document; -1 in a row's first one, which may have a past."""
    start_BT = np.full((B, T), -1)
    if segment_ids_BT is not None:
        for b in range(B):
            for t in range(1, T):
                same = segment_ids_BT[b, t] == segment_ids_BT[b, t - 1]
                start_BT[b, t] = start_BT[b, t - 1] if same else t
    return start_BT


def causal_conv(
    y_BTD: Array,
    w_WD: Array,
    tail_BVD: Array | None = None,
    segment_ids_BT: Array | None = None,
    *,
    gate_in_BTD: Array | None = None,
    gate_out_BTD: Array | None = None,
    bias_D: Array | None = None,
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """`gate_out * (conv(gate_in * y) + bias)`, each tap of a token taken from where it stands, or from nowhere."""
    (B, T, D), W = y_BTD.shape, len(w_WD)
    V = W - 1
    y, w = y_BTD.astype(np.float64), w_WD.astype(np.float64)
    tail = np.zeros((B, V, D)) if tail_BVD is None else tail_BVD.astype(np.float64)
    gate_in = np.ones_like(y) if gate_in_BTD is None else gate_in_BTD.astype(np.float64)
    gate_out = np.ones_like(y) if gate_out_BTD is None else gate_out_BTD.astype(np.float64)
    bias = np.zeros(D) if bias_D is None else bias_D.astype(np.float64)

    u_BSD = np.concatenate([tail, gate_in * y], axis=1)
    rows_B1, start_BT, time_T = np.arange(B)[:, None], _starts(segment_ids_BT, B, T), np.arange(T)
    source_BT = [np.broadcast_to(V + time_T - j, (B, T)) for j in range(W)]  # Indices into u.
    in_document_BT1 = [((start_BT < 0) | (time_T - j >= start_BT))[:, :, None] for j in range(W)]
    taken_BTD = [np.where(in_document_BT1[j], u_BSD[rows_B1, source_BT[j]], 0) for j in range(W)]
    c_BTD = sum(taken_BTD[j] * w[V - j] for j in range(W)) + bias

    def gradients(dz_BTD: Array) -> dict[str, Array]:
        dz_BTD = dz_BTD.astype(np.float64)
        dc_BTD, du_BSD = dz_BTD * gate_out, np.zeros_like(u_BSD)
        for j in range(W):
            np.add.at(du_BSD, (rows_B1, source_BT[j]), np.where(in_document_BT1[j], dc_BTD, 0) * w[V - j])
        return dict(
            y_BTD=du_BSD[:, V:] * gate_in,
            w_WD=np.stack([np.sum(dc_BTD * taken_BTD[V - i], axis=(0, 1)) for i in range(W)]),
            tail_BVD=du_BSD[:, :V],
            gate_in_BTD=du_BSD[:, V:] * y,
            gate_out_BTD=dz_BTD * c_BTD,
            bias_D=np.sum(dc_BTD, axis=(0, 1)),
        )

    return gate_out * c_BTD, gradients


def linear_scan(
    a_BTD: Array, b_BTD: Array, h0_BD: Array | None = None, segment_ids_BT: Array | None = None
) -> tuple[tuple[Array, Array], Callable[[Array, Array], dict[str, Array]]]:
    """`h_t = a_t * h_{t-1} + b_t` token by token; the values are (h_BTD, last_BD)."""
    B, T, D = b_BTD.shape
    a, b = a_BTD.astype(np.float64), b_BTD.astype(np.float64)
    h0 = np.zeros((B, D)) if h0_BD is None else h0_BD.astype(np.float64)
    start_BT = _starts(segment_ids_BT, B, T)
    padding_BT1 = np.zeros((B, T, 1), bool) if segment_ids_BT is None else (segment_ids_BT == 0)[:, :, None]
    forget_BT1 = (start_BT == np.arange(T))[:, :, None] & ~padding_BT1

    h_BTD, before_BTD = np.zeros((B, T, D)), np.zeros((B, T, D))
    state_BD = h0
    for t in range(T):
        before_BTD[:, t] = state_BD
        stepped_BD = np.where(forget_BT1[:, t], 0, a[:, t] * state_BD) + b[:, t]
        state_BD = h_BTD[:, t] = np.where(padding_BT1[:, t], state_BD, stepped_BD)

    def gradients(dh_BTD: Array, dlast_BD: Array) -> dict[str, Array]:
        by_a, by_b, later_BD = np.zeros_like(a), np.zeros_like(b), dlast_BD.astype(np.float64)
        for t in reversed(range(T)):
            total_BD = dh_BTD[:, t] + later_BD
            by_b[:, t] = np.where(padding_BT1[:, t], 0, total_BD)
            by_a[:, t] = np.where(padding_BT1[:, t] | forget_BT1[:, t], 0, total_BD * before_BTD[:, t])
            later_BD = np.where(padding_BT1[:, t], total_BD, np.where(forget_BT1[:, t], 0, a[:, t] * total_BD))
        return dict(a_BTD=by_a, b_BTD=by_b, h0_BD=later_BD)

    return (h_BTD, state_BD), gradients


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    order_BT: Array | None = None,
    key_order_BS: Array | None = None,
    segment_ids_BT: Array | None = None,
    key_segment_ids_BS: Array | None = None,
    window: int | None = None,
    causal: bool = True,
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """Softmax attention over the visible keys; zero for a query that sees none."""
    (_, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    q, k, v = (x.astype(np.float64) for x in (q_BTNH, k_BSKH, v_BSKH))
    k_BSNH, v_BSNH = (np.repeat(x, N // K, axis=2) for x in (k, v))
    order = np.arange(T)[None] if order_BT is None else order_BT
    key_order = np.arange(S)[None] if key_order_BS is None else key_order_BS
    distance_BTS = order[:, :, None] - key_order[:, None, :]
    visible_BTS = distance_BTS >= 0 if causal else np.ones_like(distance_BTS, bool)
    if window is not None:
        visible_BTS = visible_BTS & (distance_BTS < window)
    if segment_ids_BT is not None and key_segment_ids_BS is not None:
        visible_BTS = visible_BTS & (segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :])
    visible_BNTS = visible_BTS[:, None]

    scores_BNTS = np.where(visible_BNTS, np.einsum("BTNH,BSNH->BNTS", q, k_BSNH) / np.sqrt(H), -np.inf)
    highest = np.max(scores_BNTS, axis=-1, keepdims=True)
    weights_BNTS = np.exp(scores_BNTS - np.where(np.isfinite(highest), highest, 0))
    weights_BNTS /= np.maximum(np.sum(weights_BNTS, axis=-1, keepdims=True), 1e-300)

    def gradients(dout_BTNH: Array) -> dict[str, Array]:
        dout_BTNH = dout_BTNH.astype(np.float64)
        dweights_BNTS = np.einsum("BTNH,BSNH->BNTS", dout_BTNH, v_BSNH)
        mean_BNT1 = np.sum(dweights_BNTS * weights_BNTS, axis=-1, keepdims=True)
        dscores_BNTS = weights_BNTS * (dweights_BNTS - mean_BNT1) / np.sqrt(H)
        by_k = np.einsum("BNTS,BTNH->BSNH", dscores_BNTS, q)
        by_v = np.einsum("BNTS,BTNH->BSNH", weights_BNTS, dout_BTNH)
        return dict(
            q_BTNH=np.einsum("BNTS,BSNH->BTNH", dscores_BNTS, k_BSNH),
            k_BSKH=by_k.reshape(*k.shape[:3], N // K, H).sum(axis=3),
            v_BSKH=by_v.reshape(*v.shape[:3], N // K, H).sum(axis=3),
        )

    return np.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH), gradients


def experts(
    x_MD: Array, weight_MA: Array, w1_EDF: Array, w3_EDF: Array, w2_EFD: Array, *, chosen_MA: Array
) -> tuple[Array, Callable[[Array], dict[str, Array]]]:
    """The weighted sum of a token's experts, each `w2(silu(w1 x) * w3 x)`, token by token and choice by choice."""
    x, weight, w1, w3, w2 = (a.astype(np.float64) for a in (x_MD, weight_MA, w1_EDF, w3_EDF, w2_EFD))
    rows = [(m, a, e) for (m, a), e in np.ndenumerate(chosen_MA) if 0 <= e < len(w1)]

    def hidden(m: int, e: int) -> tuple[Array, Array, Array]:
        gate, up = x[m] @ w1[e], x[m] @ w3[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        return gate * sigmoid * up, sigmoid * (1 + gate * (1 - sigmoid)) * up, gate * sigmoid  # And its derivatives.

    y_MD = np.zeros_like(x)
    for m, a, e in rows:
        y_MD[m] += weight[m, a] * hidden(m, e)[0] @ w2[e]

    def gradients(dy_MD: Array) -> dict[str, Array]:
        dx, dweight, dw1, dw3, dw2 = map(np.zeros_like, (x, weight, w1, w3, w2))
        for m, a, e in rows:
            dy = dy_MD[m].astype(np.float64)
            h_F, by_gate_F, by_up_F = hidden(m, e)
            dh_F = w2[e] @ dy
            dweight[m, a] = h_F @ dh_F
            dgate_F, dup_F = weight[m, a] * dh_F * by_gate_F, weight[m, a] * dh_F * by_up_F
            dx[m] += w1[e] @ dgate_F + w3[e] @ dup_F
            dw1[e] += np.outer(x[m], dgate_F)
            dw3[e] += np.outer(x[m], dup_F)
            dw2[e] += weight[m, a] * np.outer(h_F, dy)
        return dict(x_MD=dx, weight_MA=dweight, w1_EDF=dw1, w3_EDF=dw3, w2_EFD=dw2)

    return y_MD, gradients
