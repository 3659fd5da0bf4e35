"""The functions behind `lfm data build` and `lfm data show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from lfm_jax import recipe
from lfm_jax.data.build import BuildConfig
from lfm_jax.data.build import build as run
from lfm_jax.data.manifest import load_manifest
from lfm_jax.data.show import overview, sample


def build_help() -> int:
    """Build a dataset of packed rows, or go on with one: `lfm data build [RECIPE.yaml] [--sources ... --out ...]`."""
    return build(["--help"])


def build(args: Sequence[str]) -> int:
    """`lfm data build [RECIPE.yaml] [--sources ... --out ...]`: every key of the recipe is a flag."""
    path = args[0] if args and not args[0].startswith("-") else None
    config = recipe.load_recipe(
        BuildConfig, path, args[1:] if path else args, prog="lfm data build [RECIPE]"
    )
    manifest = run(config)
    console = Console(highlight=False)
    console.print(overview(manifest))
    return 0


def show(
    path: tyro.conf.Positional[Path],
    /,
    samples: int = 3,
    split: Literal["train", "heldout"] = "train",
    row: int | None = None,
    verify: bool = False,
) -> int:
    """Look into a built dataset: counts, packing, lengths, and rows as text with the borders of their pieces.

    Args:
      path: directory of the dataset.
      samples: how many rows, spread over the split.
      split: of the rows shown.
      row: show this row whole instead.
      verify: read every byte of every shard and compare checksums.
    """
    manifest = load_manifest(path)
    manifest.check_files(content=verify)
    console = Console(highlight=False)
    console.print(overview(manifest, verified=verify))
    for part in sample(manifest, split, samples=samples, row=row):
        console.print(part)
    return 0
