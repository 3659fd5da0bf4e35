"""`lfm convert`."""

from __future__ import annotations

from pathlib import Path

import tyro

from lfm_jax.cli.arguments import ModelName
from lfm_jax.config import DType


def convert(
    src: ModelName,
    dst: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> int:
    """Write a checkpoint as a Hugging Face directory that `transformers` loads.

    Args:
      src: Hugging Face directory, run directory, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      dst: a new directory.
      dtype: dtype of the written weights; the stored one if left out.
      max_shard_bytes: size of the largest safetensors file; larger weights become several files with an index.
    """
    from lfm_jax.convert.hf import convert as run
    from lfm_jax.convert.hf import save_hf
    from lfm_jax.loading import HUGGING_FACE, local, recognise

    path = local(src)
    if (source := recognise(path)) is HUGGING_FACE:
        run(path, dst, dtype=dtype, max_shard_bytes=max_shard_bytes)
    else:
        model, tokenizer = source.load(path, dtype, None)
        save_hf(model, dst, tokenizer=tokenizer, source=path, max_shard_bytes=max_shard_bytes)
    print(f"wrote {dst}")
    return 0
