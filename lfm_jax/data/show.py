"""What `lfm data show` prints: a built dataset in figures, and rows of it as text.

Dimensions: T time (tokens of a row).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from lfm_jax.data.encoding import tokenizer_digest
from lfm_jax.data.manifest import Manifest, Split
from lfm_jax.data.records import StoredRow
from lfm_jax.text.tokenizer import load_tokenizer

BAR = 20
"""Widest bar of a histogram, in columns."""
SHOWN = 160
"""Characters at either end of a piece that are shown of it."""
PIECES = 4
"""Pieces of a row that are shown, unless it is shown whole."""
STYLES = ("cyan", "green", "yellow", "magenta")


def overview(manifest: Manifest, *, verified: bool = False) -> RenderableType:
    """Counts, packing and lengths."""
    sources = manifest.sources
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("rows of", f"{manifest.seq_len:,} tokens ({manifest.dtype}, vocabulary {manifest.vocab_size:,}, "
                             f"bos {manifest.bos_id}, eos {manifest.eos_id})")
    facts.add_row("sources", f"{', '.join(sources['patterns'])} ({sources['files']:,} files, "
                             f"{_size(sources['bytes'])})")
    if manifest.unreadable:
        facts.add_row("left out", f"[red]{manifest.unreadable:,} unreadable documents[/red]")
    facts.add_row("held out", f"{manifest.heldout_fraction:g} of the documents, by a hash of their text")
    facts.add_row("seed", f"{manifest.seed}, blocks of {_size(manifest.block_bytes)}")
    stored, state = sum(shard.bytes for shard in manifest.shards), "every checksum" if verified else "sizes"
    facts.add_row("on disk", f"{_size(stored)} in {len(manifest.shards):,} shards, {state} right")
    facts.add_row("tokenizer", manifest.tokenizer)
    counts = Table.grid(padding=(0, 4, 0, 0))
    for name, justify in (("", "left"), ("training", "right"), ("held out", "right")):
        counts.add_column(name, justify=justify)
    splits = (manifest.train, manifest.heldout)
    counts.add_row("", "[bold]training", "[bold]held out")
    for name in ("documents", "tokens", "pieces", "rows"):
        counts.add_row(f"[bold]{name}", *(f"{getattr(split, name):,}" for split in splits))
    counts.add_row("[bold]text", *(_size(split.text_bytes) for split in splits))
    counts.add_row("[bold]bytes a token", *(_ratio(split.text_bytes, split.tokens, ".2f") for split in splits))
    counts.add_row("[bold]packing efficiency", *(_ratio(s.tokens, s.rows * manifest.seq_len, ".2%") for s in splits))
    both = manifest.train + manifest.heldout
    histograms = Table.grid(padding=(0, 6, 0, 0))
    histograms.add_row("[bold]tokens of a document", "[bold]tokens of a piece")
    histograms.add_row(_histogram(both.document_lengths), _histogram(both.piece_lengths, manifest.seq_len))
    return Group(Text(str(manifest.directory), style="bold cyan"), facts, "", counts, "", histograms)


def _ratio(part: int, whole: int, form: str) -> str:
    return format(part / whole, form) if whole else ""


def _histogram(bins: Sequence[int], longest: int | None = None) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column(width=BAR)
    table.add_column(justify="right")
    filled = [i for i, n in enumerate(bins) if n]
    for i in range(filled[0], filled[-1] + 1) if filled else ():
        bar = Text("█" * max(1, round(BAR * bins[i] / max(bins))) if bins[i] else "", style="cyan")
        low, high = 1 << max(i - 1, 0), min((1 << i) - 1, longest or 1 << i)
        table.add_row(f"{low:,}" if low == high else f"{low:,}-{high:,}", bar, f"{bins[i]:,}")
    return table


def sample(manifest: Manifest, split: Split, *, samples: int, row: int | None = None) -> Iterator[RenderableType]:
    """Rows as text, spread over a split, or one row whole.

    Raises:
      ValueError: the split has no such row, or a shard or the tokenizer beside it is damaged.
    """
    count = manifest.counts(split).rows
    if row is not None and not 0 <= row < count:
        raise ValueError(f"row is {row}; the {split} split of {manifest.directory} has rows 0 to {count - 1}")
    if row is None and not (count and samples > 0):
        return
    from lfm_jax.data.shards import Records

    tokenizer = load_tokenizer(manifest.directory)
    if tokenizer_digest(tokenizer) != manifest.tokenizer:
        raise ValueError(f"the tokenizer in {manifest.directory} is not the one it was built with; restore it")
    records = Records(manifest, split)
    chosen = [row] if row is not None else sorted({int(i) for i in np.linspace(0, count - 1, samples + 2)[1:-1]})
    for i in chosen:
        yield _row(manifest, tokenizer, split, i, manifest.codec.split(records[i]), whole=row is not None)


def _row(
    manifest: Manifest, tokenizer: Tokenizer, split: Split, number: int, row: StoredRow, *, whole: bool
) -> Panel:
    T, (lengths, ids, learnt) = manifest.seq_len, row
    total = int(lengths.sum())
    parts: list[RenderableType] = [_strip(lengths, T)]
    stops = np.cumsum(lengths + 1)
    shown = len(lengths) if whole else PIECES
    for i, (stop, n) in enumerate(zip(stops[:shown].tolist(), lengths[:shown].tolist(), strict=True)):
        piece = ids[stop - n - 1 : stop]
        style = STYLES[i % len(STYLES)]
        if learnt is None:
            begins, ends = piece[0] == manifest.bos_id, piece[-1] == manifest.eos_id
            about = (f"{'document begins' if begins else 'goes on from another row'}, "
                     f"{'document ends' if ends else 'goes on in another row'}")
            piece = piece[int(begins) : len(piece) - int(ends)]
            marked = np.ones(len(piece), bool)
        else:
            pairs = slice(stop - i - 1 - n, stop - i - 1)
            marked = np.append(False, learnt[pairs])  # The first id is no target.
            about = f"{int(marked.sum()):,} of them learnt (in colour)"
        parts.append(Text(f"▌piece {i + 1}: {n:,} tokens, {about}", style=f"bold {style}"))
        parts.append(_text(tokenizer, piece, marked, style, whole=whole))
    if len(lengths) > shown:
        parts.append(Text(f"... and {len(lengths) - shown} more pieces (--row {number} shows all)", style="dim"))
    title = f"{split} row {number:,}: {len(lengths)} piece{'s' * (len(lengths) > 1)}, {total:,} of {T:,} tokens"
    if learnt is not None:
        title += f", {int(learnt.sum()):,} learnt"
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim")


def _text(tokenizer: Tokenizer, ids: np.ndarray, learnt: np.ndarray, style: str, *, whole: bool) -> Text:
    """Ids as text, what is learnt in its style; not whole: on one line, and its two ends if it is long."""
    text = Text()
    borders = np.flatnonzero(np.diff(learnt)) + 1
    for run, marks in zip(np.split(ids, borders), np.split(learnt, borders), strict=True):
        part = tokenizer.decode(run.tolist(), skip_special_tokens=False)
        text.append(part if whole else re.sub(r"\s+", " ", part), style if marks.all() else "dim")
    if whole or len(text) <= 2 * SHOWN:
        return text
    return Text.assemble(text[:SHOWN], " [...] ", text[-SHOWN:])


def _strip(lengths: np.ndarray, T: int, width: int = 72) -> Text:
    """The row in one line: its pieces in turn in their colours, padding as dots."""
    stops = np.cumsum(lengths)
    places = (np.arange(width) + 0.5) * T / width
    pieces = np.searchsorted(stops, places, side="right")
    strip = Text()
    for piece in pieces.tolist():
        if piece < len(lengths):
            strip.append("█", STYLES[piece % len(STYLES)])
        else:
            strip.append("·", "dim")
    return strip


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
