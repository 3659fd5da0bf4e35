"""Encoders of the LFM2 family: `Lfm2BidirectionalModel` of LFM2.5-Embedding-350M and LFM2.5-ColBERT-350M.

The network is LFM2 with `causal=False`, without a head. Its config.json has LFM2's `model_type`, and `transformers`
5.24 has no class for it: the published directories bring code of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.families.lfm2 import DENSE, LAST, LFM2, MIXERS
from lfm_jax.convert.weights import Weight


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Whatever the file says of a head, there is none.
    return LFM2.read(hf) | dict(causal=False, tie_embedding=True)


def _write(config: ModelConfig) -> dict[str, Any]:
    return LFM2.write(config) | {"use_cache": False}


def _without_prefix(row: Weight) -> Weight:
    assert isinstance(row.names, str)
    return dataclasses.replace(row, names=row.names.removeprefix("model."))


LFM2_ENCODER = Family(
    name="LFM2 encoder",
    model_types=LFM2.model_types,
    architectures=("Lfm2BidirectionalModel",),
    features={**LFM2.features, "causal": (False,), "tie_embedding": (True,)},
    read=_read,
    write=_write,
    weights=tuple(_without_prefix(row) for row in MIXERS + DENSE + LAST if row.paths != "head"),
)
