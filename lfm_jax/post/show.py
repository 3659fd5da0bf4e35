"""Chats as a model's own template writes them, what is learnt in colour: `lfm data show FILE --of MODEL`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from lfm_jax import init_from
from lfm_jax.convert import sidecars
from lfm_jax.data.chats import OPENERS, read_chats
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.chats import ChatEncoder
from lfm_jax.data.sources import find_files
from lfm_jax.loading import model_config
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import load_tokenizer

LEARNT, GIVEN = "green", "dim"
SHOWN = 1500
"""Characters of a chat that are shown of it, unless it is shown whole."""


def chats_as_text(path: Path, of: str, *, samples: int, row: int | None = None) -> Iterator[RenderableType]:
    """Some chats, spread over all, or one of them whole.

    Raises:
      ValueError: files that cannot be read, chats that cannot be used, all of them listed, or no such chat.
    """
    problems: list[str] = []
    chats = read_chats(find_files([str(path)], suffixes=tuple(OPENERS)), ChatData.ignore, problems)
    raise_problems("chats cannot be used", problems)
    if not chats or (row is not None and not 0 <= row < len(chats)):
        raise ValueError(f"{path} has {len(chats)} chats" + ("" if row is None else f", numbered from 0, and no {row}"))
    with init_from.sidecar_files(of) as directory:
        encoder = ChatEncoder(
            load_tokenizer(directory), model_config(of), sidecars.chat_template(directory), date.today().isoformat())
    chosen = sorted({int(i) for i in np.linspace(0, len(chats) - 1, samples + 2)[1:-1]}) if row is None else [row]
    yield Text.assemble(f"{len(chats):,} chats in {path}; ", ("what is learnt", LEARNT), ", ", ("what is given", GIVEN))
    for i in chosen:
        try:
            text, spans = encoder.render(chats[i])
        except ValueError as error:
            raise ValueError(f"{chats[i]}: {error}") from None
        (tokens,) = encoder.encode([(text, spans)])
        shown = Text(text, GIVEN)
        for start, stop in spans:
            shown.stylize(f"not dim {LEARNT}", start, stop)
        cut = row is None and len(text) > SHOWN
        parts = [shown[:SHOWN], Text(f"... (--row {i} shows all)", GIVEN)] if cut else [shown]
        counts = f"{len(tokens.ids):,} tokens, {int(tokens.learnt().sum()):,} learnt"
        title = f"chat {i:,} (line {chats[i].line:,}): {counts}"
        yield Panel(Group(*parts), title=title, title_align="left", border_style="dim")
