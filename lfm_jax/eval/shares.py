"""Scores that are shares: of parts of documents, or of those documents that they are about.

A document has `[value, weight]`, or `[value, weight, cluster]` where some documents belong together, as those of one
chat do: they are right and wrong together, so that they say less than as many of different chats.

Dimensions: M clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NONE = "N/A"
"""What lm-eval writes where there is no number."""


def cluster_sums(parts: Sequence[Sequence[Any]]) -> np.ndarray:
    """(value, weight) of each cluster, [2, M]; parts without a cluster are one each."""
    keys = [tuple(part[2:]) or i for i, part in enumerate(parts)]
    place = {key: m for m, key in enumerate(dict.fromkeys(keys))}
    index = [place[key] for key in keys]
    return np.stack([np.bincount(index, [part[k] for part in parts], len(place)) for k in (0, 1)])


def share(parts: Sequence[Sequence[Any]]) -> float | str:
    """The sum of values over that of weights; NONE where nothing has weight."""
    value, weight = cluster_sums(parts).sum(axis=1).tolist()
    return value / weight if weight else NONE


def share_error(parts: Sequence[Sequence[Any]]) -> float | str:
    """Standard error of `share`, over the clusters that have weight; NONE where they are fewer than two.

    The linearised variance of a ratio (Cochran, Sampling Techniques, 1977, section 9A.3, with the factor
    M / (M - 1)); where every document has weight 1 and no cluster, lm-eval's `mean_stderr`.
    """
    value_M, weight_M = cluster_sums(parts)
    value_M, weight_M = value_M[weight_M > 0], weight_M[weight_M > 0]
    M = len(weight_M)
    if M < 2:
        return NONE
    residual_M = value_M - weight_M * (value_M.sum() / weight_M.sum())
    return float(np.sqrt(M / (M - 1) * (residual_M**2).sum()) / weight_M.sum())
