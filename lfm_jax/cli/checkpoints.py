"""`lfm convert`, `lfm merge`, `lfm export`, `lfm imatrix`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from lfm_jax.cli.arguments import ModelName
from lfm_jax.config import DType
from lfm_jax.post.merge_methods import METHODS
from lfm_jax.quant.mixes import MIXES

if TYPE_CHECKING:
    from lfm_jax.model import LFM

    Mix = Method = str
else:
    Mix, Method = Literal[*MIXES], Literal[*METHODS]  # So that --help lists them.


@dataclasses.dataclass(frozen=True)
class Programs:
    """Programs of jax.export; see docs/how_to/programs.md."""

    prompts: tuple[int, ...] = (128, 512)
    """Tokens of prompts, a program for each; shorter ones are padded, longer ones go in several calls."""
    max_len: int = 1024
    """Tokens that a row has room for."""
    batch: int = 1
    """Rows."""


def convert(
    src: ModelName,
    dst: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    max_shard_bytes: int = 5_000_000_000,
    adapter: Path | None = None,
) -> int:
    """Write a checkpoint as a Hugging Face directory that `transformers` loads.

    Args:
      src: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      dst: a new directory.
      dtype: dtype of the written weights; the stored one if left out.
      max_shard_bytes: size of the largest safetensors file; larger weights become several files with an index.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.convert.hf import convert as run
    from lfm_jax.convert.hf import save_hf
    from lfm_jax.loading import HUGGING_FACE, load_local, local, recognise

    path = local(src)
    if (source := recognise(path)) is HUGGING_FACE and adapter is None:
        run(path, dst, dtype=dtype, max_shard_bytes=max_shard_bytes)
    else:
        model, tokenizer = load_local(path, dtype, adapter=adapter)
        with source.beside(path) as directory:
            own = None if source is HUGGING_FACE else tokenizer  # Its files are copied as they are.
            save_hf(model, dst, tokenizer=own, source=directory, max_shard_bytes=max_shard_bytes)
    print(f"wrote {dst}")
    return 0


def merge(
    dst: tyro.conf.Positional[Path],
    /,
    method: Method,
    models: tuple[str, ...],
    base: str | None = None,
    weights: tuple[float, ...] | None = None,
    density: tuple[float, ...] | None = None,
    t: float | None = None,
    seed: int | None = None,
    dtype: DType | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> int:
    """Merge checkpoints of one architecture and one tokenizer into a Hugging Face directory.

    docs/how_to/merge.md compares the methods. Example: `lfm merge merged --method ties --base LFM2.5-350M --models
    runs/maths runs/code --density 0.2`.

    Args:
      dst: a new directory. Tokenizer and config are those of the base, else of the first model.
      method: how tensors become one.
      models: Hugging Face directories, run directories, GGUF files, or Hub ids (OWNER/NAME or OWNER/NAME@REVISION).
      base: the model that the others were fine-tuned from; all methods but `linear` and `slerp` need it.
      weights: one for each model, or one for all; 1 if left out. Not for `slerp`.
      density: share of each model's difference from the base that is kept, for each model or for all. `ties`,
        `dare_linear` and `dare_ties` need it.
      t: place between the two models of `slerp`, from 0 (the first) to 1; 0.5 if left out.
      seed: of what `dare_linear` and `dare_ties` drop by chance; 0 if left out.
      dtype: dtype of the written weights; that of the base, else of the first model, if left out.
      max_shard_bytes: size of the largest safetensors file; larger weights become several files with an index.
    """
    from lfm_jax.files import say
    from lfm_jax.post.merge import merge as run

    run(dst, models, method, base=base, weights=weights, density=density, t=t, seed=seed, dtype=dtype,
        max_shard_bytes=max_shard_bytes, tell=say)
    print(f"wrote {dst}")
    return 0


def export(
    src: ModelName,
    dst: tyro.conf.Positional[Path],
    /,
    format: Literal["gguf", "stablehlo", "peft"] = "gguf",
    type: Mix | None = None,
    imatrix: Path | None = None,
    programs: Programs = Programs(),
    adapter: Path | None = None,
) -> int:
    """Write a GGUF file that llama.cpp runs, programs that a process with jax alone runs, or the adapter of a run for
    PEFT. Needs `lfm_jax[gguf]`, or `lfm_jax[export]` for programs.

    Tokenizer and chat template are in a GGUF file. Example: `lfm export LFM2.5-350M lfm.gguf --type Q4_K_M`.

    Args:
      src: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      dst: a new file, or a new directory for programs or an adapter.
      format: `gguf`; `stablehlo`, programs of jax.export with the weights beside them; `peft`, what a run with `lora`
        has trained.
      type: the numbers of the weights, from 32 bits to about 4. If left out, those of a GGUF file stay as they are, and
        others become Q4_K_M.
      imatrix: file with the importance of inputs, of `lfm imatrix` or llama.cpp's llama-imatrix.
      programs: what the programs are for.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
    """
    from lfm_jax.files import say
    from lfm_jax.loading import GGUF, RUN, load_local, load_run, local, recognise

    if format != "gguf" and (type is not None or imatrix is not None):
        raise ValueError(f"--type and --imatrix are of GGUF files; leave them out with --format {format}")
    if format != "stablehlo" and programs != Programs():
        raise ValueError("--programs is for --format stablehlo; leave it out")
    path = local(src)
    source = recognise(path)
    if format == "peft":
        return _export_adapter(path, dst, adapter)
    if format == "stablehlo":
        return _export_programs(load_local(path, adapter=adapter)[0], dst, programs)
    try:
        from lfm_jax.convert.gguf import models

        if adapter is not None:
            model, tokenizer = load_local(path, adapter=adapter)
            models.save_gguf(model, dst, None if source is GGUF else tokenizer, type=type, imatrix=imatrix, source=path,
                             tell=say)
        elif source is RUN:
            type = _type_of_run(path, type, imatrix)
            model, tokenizer = load_run(path, None, gguf_type=type)
            models.save_gguf(model, dst, tokenizer, type=type, imatrix=imatrix, source=path, tell=say)
        else:
            models.export(path, dst, type, imatrix, tell=say)
    except ImportError as error:  # gguf is an extra.
        raise ValueError(str(error)) from None
    print(f"wrote {dst}: {dst.stat().st_size / 1e6:,.1f} MB")
    return 0


def _type_of_run(path: Path, type: str | None, imatrix: Path | None) -> str:
    """The type of a run's file: the one that it was trained for, if none is named.

    Raises:
      ValueError: with an imatrix the file would hold other numbers than the steps computed with.
    """
    from lfm_jax.convert.gguf.models import DEFAULT
    from lfm_jax.files import say
    from lfm_jax.loading import run_quantize

    own = run_quantize(path)
    if not own:
        return type or DEFAULT
    chosen = type or (own if own in MIXES else DEFAULT)
    if chosen != own:
        say(f"{path} was trained through weights in {own}; {chosen} rounds them once more")
    elif imatrix is not None:
        raise ValueError(f"{path} was trained through weights in {own}, rounded without importance; leave --imatrix "
                         "out: with it the file would hold other numbers than its steps computed with")
    return chosen


def _export_adapter(path: Path, dst: Path, adapter: Path | None) -> int:
    from lfm_jax.adapters.peft import save_adapter
    from lfm_jax.loading import RUN, recognise, run_adapter

    if adapter is not None or recognise(path) is not RUN:
        raise ValueError("--format peft writes what a run with lora has trained; name its directory, without --adapter")
    trained, base = run_adapter(path)
    save_adapter(trained, dst, base=base)
    print(f"wrote {dst}")
    return 0


def _export_programs(model: LFM, dst: Path, programs: Programs) -> int:
    from lfm_jax.export.stablehlo import export_stablehlo
    from lfm_jax.files import say

    try:
        export_stablehlo(model, dst, **dataclasses.asdict(programs), say=say)
    except ImportError as error:  # flatbuffers is an extra.
        raise ValueError(str(error)) from None
    print(f"wrote {dst}")
    return 0


def imatrix(
    path: ModelName,
    text: tyro.conf.Positional[Path],
    dst: tyro.conf.Positional[Path],
    /,
    context: int = 512,
    pieces: int | None = None,
    dtype: DType | None = None,
) -> int:
    """Measure over a text which inputs of a model's matrices are large, for `lfm export --imatrix`. Needs
    `lfm_jax[gguf]`.

    llama.cpp's llama-quantize reads the file too. Example: `lfm imatrix LFM2.5-350M sample.txt lfm.imatrix.gguf`.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      text: a text of the kind that the model is for; some hundred thousand tokens are enough.
      dst: a new file.
      context: tokens of a piece; each is read by itself.
      pieces: read no more pieces of the text.
      dtype: dtype of parameters and computation; the stored one if left out.
    """
    from lfm_jax.cli.inference import load_with_tokenizer
    from lfm_jax.files import say
    from lfm_jax.loading import local

    if dst.exists():
        raise ValueError(f"{dst} exists, and nothing is overwritten; choose another name")
    if not dst.parent.is_dir():
        raise ValueError(f"there is no directory {dst.parent} for {dst.name}; make it first")
    if pieces is not None and pieces < 1:
        raise ValueError(f"pieces is {pieces}; it must be at least 1")
    sample = text.read_text(encoding="utf-8")
    try:
        from lfm_jax.convert.gguf.calibration import importance
        from lfm_jax.convert.gguf.imatrix import write_imatrix
        from lfm_jax.quant import gguf_library

        gguf_library()  # Before the text is read, which takes long.
        model, tokenizer = load_with_tokenizer(local(path), dtype)
        found = importance(model, tokenizer, sample, dataset=text.name, context=context, max_pieces=pieces, tell=say)
        write_imatrix(dst, found)
    except ImportError as error:
        raise ValueError(str(error)) from None
    print(f"wrote {dst}: {found.chunks} pieces, {len(found.squares)} matrices")
    return 0
