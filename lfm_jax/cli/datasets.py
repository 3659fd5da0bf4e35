"""`lfm data build`, `lfm data show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro
from rich.console import Console

from lfm_jax.data.chats import OPENERS
from lfm_jax.data.manifest import load_manifest
from lfm_jax.data.show import overview, sample

if TYPE_CHECKING:
    from lfm_jax.data.build import BuildConfig


def build(config: BuildConfig, args: Sequence[str]) -> int:
    """Build a dataset of packed rows, or resume its build: `lfm data build [RECIPE.yaml] [--sources ... --out ...]`.

    Every key of the recipe is a flag.
    """
    del args
    from lfm_jax.data.build import build as run

    Console(highlight=False).print(overview(run(config)))
    return 0


def show(
    path: tyro.conf.Positional[Path],
    /,
    of: str | None = None,
    samples: int = 3,
    split: Literal["train", "heldout"] = "train",
    row: int | None = None,
    verify: bool = False,
) -> int:
    """Look into a built dataset: counts, packing, lengths, and rows as text with marked pieces. Or, with --of, into
    chats as a model's own template writes them, what is learnt in colour.

    Args:
      path: directory of the dataset; file or directory of chats.
      of: the model whose tokenizer and chat template write the chats.
      samples: number of rows or chats to show, spread over all.
      split: split of the rows.
      row: number of one row or chat to show whole instead.
      verify: reads every byte of every shard and compares checksums.
    """
    console = Console(highlight=False)
    if of is not None:
        from lfm_jax.post.show import chats_as_text

        for part in chats_as_text(path, of, samples=samples, row=row):
            console.print(part)
        return 0
    if path.name.lower().endswith(tuple(OPENERS)):
        raise ValueError(f"{path} is a file of chats; name the model whose chat template writes them: --of MODEL")
    manifest = load_manifest(path)
    manifest.check_files(content=verify)
    console.print(overview(manifest, verified=verify))
    for part in sample(manifest, split, samples=samples, row=row):
        console.print(part)
    return 0
