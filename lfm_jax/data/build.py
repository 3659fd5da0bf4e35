"""`lfm data build`: text files to packed rows on disk, once, for any number of training runs.

The sources are cut into stretches, these are shuffled and put together to blocks of about equal size, and each block
becomes shards of its own (`block.py`). At no time is more in memory than the tokens of one block a worker, and the list
of source files. A build that was stopped, however rudely, goes on with the same command, and its files are the same to
the byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.data.block import Block, Settings, load_block
from lfm_jax.data.config import field_problems
from lfm_jax.data.encoding import DocumentEncoder, tokenizer_digest
from lfm_jax.data.heldout import HELDOUT_RULE
from lfm_jax.data.manifest import BUILD_DIR, MANIFEST_FILE, Counts, Manifest, load_manifest
from lfm_jax.data.records import TEXT_FORMAT
from lfm_jax.data.sources import SourceFile, Stretch, find_files, stretches
from lfm_jax.files import locked, write_whole
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer

STRETCHES = 16
"""A block is put together from about this many stretches of the sources, or more where files are small."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """A dataset to build.

    Raises:
      ValueError: on construction, one message that lists every bad field and how to mend it.
    """

    sources: tuple[str, ...]
    """Files (.txt, .md, .py, .jsonl), directories (read recursively) and globs."""
    out: str
    """Directory of the dataset; a build begun in it goes on."""
    tokenizer: str
    """A tokenizer.json or a directory with one; it is copied beside the shards."""
    seq_len: int
    """T, tokens of a row; a longer document is cut into pieces."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and directories to leave out, for example `tests` or `lib/old`."""
    text_field: str = "text"
    """Key of the text in the JSON object on each line of a .jsonl file."""
    skip_unreadable: bool = False
    """Leave out and count documents that cannot be read, instead of stopping at them."""
    heldout_fraction: float = 0.01
    """Share of the documents held out, chosen by a hash of their text (`data/heldout.py`). 0: none."""
    bos_id: int = 1
    """What a document begins with; the model's bos_id."""
    eos_id: int = 7
    """What a document ends with; the first of the model's eos_ids."""
    seed: int = 0
    """Of what shares a block and a row."""
    block_bytes: int = 64 * 2**20
    """Source bytes that become one shard, and are in memory at a time, as tokens, in each worker."""
    workers: int = 0
    """Processes that build blocks. 0: one a core."""

    def __post_init__(self) -> None:
        raise_problems("BuildConfig is not valid", _problems(self))


def build(config: BuildConfig, *, show_progress: bool = True) -> Manifest:
    """Builds a dataset, goes on with one, or finds that it is done.

    Raises:
      ValueError: sources or tokenizer cannot be read, the directory holds another dataset or something else, or the
        sources changed since the build began.
    """
    out = Path(config.out)
    files = find_files(config.sources, config.exclude)
    tokenizer = load_tokenizer(config.tokenizer)
    encoder = DocumentEncoder(tokenizer, bos_id=config.bos_id, eos_id=config.eos_id)
    sizes = [file.path.stat().st_size for file in files]
    if not sum(sizes):
        raise ValueError(f"sources {list(config.sources)}: every file is empty; name files with text")
    identity = _identity(config, files, sizes, tokenizer_digest(tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, f"another build is at work in out {out}; wait for it"):
        if (out / MANIFEST_FILE).exists():
            manifest = load_manifest(out)
            _check_same(out, _of_manifest(manifest), identity)
            manifest.check_files()
            shutil.rmtree(out / BUILD_DIR, ignore_errors=True)
            return manifest
        _begin(out, identity, tokenizer.to_str(pretty=True), [file.path for file in files])
        plan = plan_blocks(files, sizes, config.block_bytes, config.seed)
        settings = Settings(
            directory=out, seq_len=config.seq_len, bos_id=config.bos_id, eos_id=config.eos_id, seed=config.seed,
            heldout_fraction=config.heldout_fraction, text_field=config.text_field,
            skip_unreadable=config.skip_unreadable, blocks=len(plan),
        )
        blocks = _build_blocks(settings, plan, config.workers, show_progress)
        return _finish(out, identity, encoder, blocks)


def plan_blocks(files: Sequence[SourceFile], sizes: Sequence[int], block_bytes: int, seed: int) -> list[list[Stretch]]:
    """The stretches of each block: all that there are, shuffled, in as many blocks of about equal size as it takes."""
    longest = max(1, block_bytes // STRETCHES)
    parts = [part for file, size in zip(files, sizes, strict=True) if size
             for part in stretches(file.path, size, longest)]
    order = np.random.default_rng(seed).permutation(len(parts))
    lengths = np.array([parts[i].stop - parts[i].start for i in order])
    blocks = math.ceil(lengths.sum() / block_bytes)
    # Where a stretch begins among all bytes says to which block it belongs; one longer than a block leaves gaps.
    numbers = (np.cumsum(lengths) - lengths) * blocks // lengths.sum()
    _, numbers = np.unique(numbers, return_inverse=True)
    plan: list[list[Stretch]] = [[] for _ in range(int(numbers.max()) + 1)]
    for i, number in zip(order.tolist(), numbers.tolist(), strict=True):
        plan[number].append(parts[i])
    return plan


def _identity(
    config: BuildConfig, files: Sequence[SourceFile], sizes: Sequence[int], tokenizer: str
) -> dict[str, Any]:
    """What decides every byte of the dataset, but for the content of the sources."""
    names = hashlib.blake2b(digest_size=16)
    for file, size in zip(files, sizes, strict=True):
        names.update(f"{file.name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return {
        "seq_len": config.seq_len, "tokenizer": tokenizer, "bos_id": config.bos_id, "eos_id": config.eos_id,
        "seed": config.seed, "block_bytes": config.block_bytes, "heldout_fraction": config.heldout_fraction,
        "sources": {
            "patterns": list(config.sources), "exclude": list(config.exclude), "text_field": config.text_field,
            "skip_unreadable": config.skip_unreadable, "files": len(files), "bytes": sum(sizes),
            "names": names.hexdigest(),
        },
    }


def _of_manifest(manifest: Manifest) -> dict[str, Any]:
    plain = json.loads(manifest.to_json())
    sources = {key: value for key, value in plain["sources"].items() if key != "content"}
    keys = ("seq_len", "tokenizer", "bos_id", "eos_id", "seed", "block_bytes", "heldout_fraction")
    return {key: plain[key] for key in keys} | {"sources": sources}


def _check_same(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    old, new = (x | {f"sources.{k}": v for k, v in x["sources"].items()} for x in (there, here))
    changed = [f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
               for key in new if key != "sources" and old.get(key) != new.get(key)]
    if changed:
        lines = "".join(f"\n  - {line}" for line in changed)
        raise ValueError(f"out {out} holds another dataset; choose another directory, delete it, or restore:{lines}")


def _begin(out: Path, identity: dict[str, Any], tokenizer: str, paths: Sequence[Path]) -> None:
    """Makes the directory ready, or checks that it was made so for the same build."""
    work = out / BUILD_DIR
    plan = work / "build.json"
    times = hashlib.blake2b(digest_size=16)
    for path in paths:
        times.update(b"%d " % path.stat().st_mtime_ns)
    begun = {"identity": identity, "times": times.hexdigest()}
    if plan.exists():
        there = json.loads(plan.read_text())
        _check_same(out, there["identity"], identity)
        if there != begun:
            raise ValueError(f"source files changed since the build in {out} began; delete {out} and build again")
    else:
        strange = sorted(path.name for path in out.iterdir() if path.name != BUILD_DIR)
        if strange:
            raise ValueError(f"out {out} is not empty ({', '.join(strange[:5])}); choose another directory")
        work.mkdir(exist_ok=True)
        write_whole(work / TOKENIZER_FILE, tokenizer)
        write_whole(plan, json.dumps(begun))
    for path in work.glob("*.arrayrecord.*"):  # Of workers that were killed.
        path.unlink()


def _build_blocks(
    settings: Settings, plan: Sequence[Sequence[Stretch]], workers: int, show_progress: bool
) -> list[Block]:
    """Builds the blocks that are not done yet; the records of all."""
    from lfm_jax.data.workers import run_blocks

    blocks = [load_block(settings.directory, number) for number in range(len(plan))]
    todo = {number: plan[number] for number, block in enumerate(blocks) if block is None}
    total = sum(part.stop - part.start for parts in plan for part in parts)
    for number, block in run_blocks(
        settings, todo, workers, total, [b for b in blocks if b is not None], show_progress
    ):
        blocks[number] = block
    return [block for block in blocks if block is not None]


def _finish(out: Path, identity: dict[str, Any], encoder: DocumentEncoder, blocks: Sequence[Block]) -> Manifest:
    """Writes the manifest, which makes the directory a dataset, and clears the work away."""
    if not sum((block.train for block in blocks), Counts()).rows:
        raise ValueError(
            "no training document is left: all are empty, unreadable or held out; add sources or lower heldout_fraction"
        )
    content = hashlib.blake2b("".join(block.source_digest for block in blocks).encode(), digest_size=16)
    sources = identity["sources"] | {"content": content.hexdigest()}
    manifest = Manifest(
        **identity | {"sources": sources},
        format=TEXT_FORMAT,
        dtype="uint16" if encoder.dtype.itemsize == 2 else "uint32",
        vocab_size=encoder.vocab_size,
        heldout_rule=HELDOUT_RULE,
        unreadable=sum(block.unreadable for block in blocks),
        train=sum((block.train for block in blocks), Counts()),
        heldout=sum((block.heldout for block in blocks), Counts()),
        shards=tuple(shard for split in ("train", "heldout") for block in blocks for shard in block.shards
                     if shard.split == split),
        directory=out,
    )
    manifest.check_files()
    write_whole(out / TOKENIZER_FILE, (out / BUILD_DIR / TOKENIZER_FILE).read_text(encoding="utf-8"))
    write_whole(out / MANIFEST_FILE, manifest.to_json())
    shutil.rmtree(out / BUILD_DIR)
    return manifest


def _problems(c: BuildConfig) -> list[str]:
    problems = field_problems(
        c, names=("sources", "exclude"),
        counts=(("seq_len", 1), ("block_bytes", 1), ("seed", 0), ("workers", 0), ("bos_id", 0), ("eos_id", 0)),
    )
    if c.sources == ():
        problems.append("sources is empty; name at least one file, directory or glob")
    for name in ("out", "tokenizer", "text_field"):
        value = getattr(c, name)
        if not (isinstance(value, str) and value != ""):
            problems.append(f"{name} is {value!r}; it must be a non-empty string")
    return problems
